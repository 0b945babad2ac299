import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import need_extra

need_extra("histopathology")

import pytest
import torch
from killing import Colours, train_colours
from toy_patches import write_toy

import convlora
from examples.histopathology.augment.transforms import dihedral
from examples.histopathology.data.dataset import HistoDataset, open_splits
from examples.histopathology.errors import ExampleError
from examples.histopathology.methods.catalogue import find_method
from examples.histopathology.methods.method import Predict
from examples.histopathology.runs import content, experiment
from examples.histopathology.training import recipe as training
from examples.histopathology.training.checkpoints import moving, random_state, set_random_state
from examples.histopathology.training.loading import View, make_loader
from examples.histopathology.training.prediction import ensembled, predict_by
from examples.histopathology.training.processes import Job
from examples.histopathology.training.recipe import Recipe, fit, predict

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = Recipe(image_size=32, epochs=2, batch_size=16)
PROBE = find_method("probe-augmented")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy"))


def killing(*arguments: object) -> dict[str, object]:
    paths = os.pathsep.join([str(HERE), str(HERE.parent.parent)])
    done = subprocess.run(
        [sys.executable, HERE / "killing.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths},
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.thorough
def test_killed_at_every_write_the_training_ends_in_the_same_numbers(tmp_path):
    outcome = killing("writes", tmp_path)
    assert outcome["struck"] > 20
    assert outcome["killed"] == outcome["whole"]


@pytest.mark.thorough
def test_killed_at_random_the_training_ends_in_the_same_numbers(tmp_path):
    outcome = killing("random", tmp_path, 3, 0)
    assert outcome["struck"] == 3
    assert outcome["killed"] == outcome["whole"]


@pytest.mark.slow
def test_killed_twenty_times_the_training_ends_in_the_same_numbers(tmp_path):
    outcome = killing("random", tmp_path, 20, 1)
    assert outcome["struck"] == 20
    assert outcome["killed"] == outcome["whole"]


def test_more_epochs_go_on_where_fewer_ended(toy, tmp_path):
    def run(out, epochs, resume=False):
        recipe = dataclasses.replace(RECIPE, epochs=epochs)
        return experiment.run_method(PROBE, open_splits(toy), recipe, Job(out, resume=resume))

    run(tmp_path / "a", 1)
    longer = run(tmp_path / "a", 2, resume=True)
    whole = run(tmp_path / "b", 2)
    assert torch.equal(longer.test_logits, whole.test_logits)
    assert [e.val_loss for e in longer.history] == [e.val_loss for e in whole.history]
    assert len((tmp_path / "a" / "logs" / "probe-augmented.csv").read_text().splitlines()) == 3


def test_a_training_that_is_done_is_read_and_not_run_again(toy, tmp_path, monkeypatch):
    run = lambda: experiment.run_method(  # noqa: E731
        PROBE, open_splits(toy), RECIPE, Job(tmp_path, resume=True)
    )
    first = run()
    monkeypatch.setattr(experiment, "fit", None)
    again = run()
    assert torch.equal(first.test_logits, again.test_logits)
    assert again.history == first.history
    assert again.proofs == first.proofs


def test_what_a_sweep_tries_is_proven_only_where_it_is_kept_and_reads_the_test_set_once(toy, tmp_path, monkeypatch):
    splits, job, lora = open_splits(toy), Job(tmp_path), find_method("lora")
    read, rows = [], splits["test"].rows
    real = rows.read
    monkeypatch.setattr(rows, "read", lambda index, out: (read.append(index), real(index, out)))
    content.digest_of(splits["test"])  # which reads the images, too, once for a whole job
    read.clear()
    rates = {f"{lr}": dataclasses.replace(RECIPE, lr=lr) for lr in (1e-3, 1e-4)}
    losses = [experiment.try_training(lora, splits, recipe, job, name) for name, recipe in rates.items()]
    assert read == [] and not (tmp_path / "results").exists()
    monkeypatch.setattr(training, "_epoch", None)  # nothing is trained twice
    kept = experiment.train(lora, splits, rates["0.001"], job, "0.001")
    assert sorted(read) == list(range(24))
    assert kept.val_loss == losses[0] and kept.proofs.held


def test_the_views_of_an_ensemble_are_predicted_in_one_reading(toy, tmp_path, monkeypatch):
    split, lora = HistoDataset(toy / "test.h5"), find_method("lora")
    model = lora.prepare(experiment.open_backbone(RECIPE)[0])
    loaders = experiment._loaders(lora, split, RECIPE)
    plain = loaders(1).dataset.transform
    views = [View(split, lambda images, draws, view=view: plain(dihedral(images, view))) for view in range(8)]
    each = [predict(model, make_loader(view, 16))[0] for view in views]
    read, real = [], split.rows.read
    monkeypatch.setattr(split.rows, "read", lambda index, out: (read.append(index), real(index, out)))
    together, _ = predict_by(Predict(views=8), model, loaders, Job(tmp_path))
    assert read == list(range(24))
    torch.testing.assert_close(together, ensembled(torch.stack(each)))


def test_a_checkpoint_of_another_training_is_refused_by_name(toy, tmp_path):
    run = lambda **changes: experiment.run_method(  # noqa: E731
        PROBE, open_splits(toy), dataclasses.replace(RECIPE, **changes), Job(tmp_path, resume=True)
    )
    run()
    with pytest.raises(ExampleError, match=r"is of another training: lr 0\.001 there, 0\.01 now\. .*--resume"):
        run(lr=0.01)
    (tmp_path / "checkpoints" / "probe-augmented.pt").write_bytes(b"cut short")
    with pytest.raises(ExampleError, match=r"probe-augmented.pt is damaged .*delete it"):
        run(epochs=5)


def test_without_resume_a_training_begins_anew(toy, tmp_path):
    for _ in range(2):
        result = experiment.run_method(PROBE, open_splits(toy), RECIPE, Job(tmp_path))
        assert len(result.history) == 2


def test_a_checkpoint_holds_nothing_that_could_run(toy, tmp_path):
    train_colours(tmp_path, toy)
    state = torch.load(tmp_path / "checkpoints" / "lora.pt", weights_only=True)["state"]
    assert set(state) == {"model", "optimizer", "scheduler", "stopping", "random", "sampler", "history", "best"}
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["lora.pt"]


def test_random_state_brings_every_generator_back():
    import random

    import numpy as np

    state = random_state()
    draw = lambda: (torch.rand(1).item(), np.random.rand(), random.random())  # noqa: E731
    first = draw()
    set_random_state(state)
    assert draw() == first


def test_moving_is_what_training_moves():
    model = convlora.inject(Colours(), target_modules=(), modules_to_save=["fc"])
    assert set(moving(model)) == {"fc.weight", "fc.bias"}


def test_bf16_trains_near_fp32_and_leaves_the_model_in_fp32(toy, tmp_path):
    from examples.histopathology.training.processes import make_accelerator

    losses = {}
    for precision in ("fp32", "bf16"):
        recipe = dataclasses.replace(RECIPE, epochs=1, precision=precision)
        job = Job(tmp_path / precision, accelerator=make_accelerator(precision))
        model, _ = experiment.open_backbone(recipe)
        method = PROBE
        method.prepare(model)
        views = experiment.make_views(open_splits(toy), recipe, method)
        losses[precision] = fit(model, views, recipe, job=job).history[0]
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    make_accelerator("fp32")
    assert losses["bf16"].train_loss != losses["fp32"].train_loss  # it did compute in another precision
    # bf16 keeps 8 bits; a few steps of one epoch move a loss near 0.7 by less than this
    assert losses["bf16"].val_loss == pytest.approx(losses["fp32"].val_loss, abs=0.05)
