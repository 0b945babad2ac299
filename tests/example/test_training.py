import dataclasses
import math

from conftest import need_extra

need_extra("histopathology")

import pytest
import torch
from torch import nn
from toy_patches import write_toy

import convlora
from examples.histopathology.augment.draws import Draws
from examples.histopathology.augment.transforms import (
    CROP_SCALE,
    EvalTransform,
    Normalisation,
    Normalise,
    TrainTransform,
)
from examples.histopathology.data.dataset import HistoDataset, open_splits
from examples.histopathology.errors import ExampleError
from examples.histopathology.methods.catalogue import find_method
from examples.histopathology.runs import experiment
from examples.histopathology.training import recipe as training
from examples.histopathology.training.processes import Job
from examples.histopathology.training.recipe import EarlyStopping, Recipe, accuracy, class_balance, fit

RECIPE = Recipe(image_size=32, epochs=2, batch_size=16)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy"))


def views(toy, recipe=RECIPE):
    return experiment.make_views(open_splits(toy), recipe, find_method("lora"))


def trained(name, toy, out, recipe=RECIPE, **options):
    return experiment.run_method(find_method(name), open_splits(toy), recipe, Job(out, **options))


class Head(nn.Module):
    """Reads the mean colour; enough for a loop to be tested on."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 1)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


def toy_model():
    return convlora.inject(Head(), target_modules=(), modules_to_save=["fc"])


def test_early_stopping_counts_epochs_since_the_best():
    stopping = EarlyStopping(patience=2)
    seen = [(stopping.improved(loss), stopping.exhausted) for loss in (1.0, 0.5, 0.6, 0.5)]
    assert seen == [(True, False), (True, False), (False, False), (False, True)]


def test_fit_keeps_the_best_epoch_lowers_the_rate_and_stops(toy, tmp_path, monkeypatch):
    losses = iter([1.0, 0.4, *[0.5] * 40])

    def scripted(wrapped, loaders, optimiser, *rest):
        with torch.no_grad():
            wrapped.model.fc.bias += 1  # so that models of different epochs differ
        return training.Epoch(0.0, next(losses), 0.5, optimiser.param_groups[0]["lr"], 0.0)

    monkeypatch.setattr(training, "_epoch", scripted)
    model, saved = toy_model(), []
    start = model.fc.bias.item()
    result = fit(
        model,
        views(toy),
        dataclasses.replace(RECIPE, epochs=50),
        save=lambda: saved.append(model.fc.bias.item()),
        job=Job(tmp_path),
    )
    assert result.best_epoch == 1
    assert len(result.history) == 12  # the best, then ten without improvement
    assert saved == pytest.approx([start + 1, start + 2])
    assert model.fc.bias.item() == pytest.approx(start + 2)
    rates = [epoch.lr for epoch in result.history]
    # patience 5: the sixth epoch without improvement lowers the rate of the one after it
    assert rates == pytest.approx([1e-3] * 8 + [1e-4] * 4)


def test_one_ratio_is_the_recipe_for_all_and_another_is_for_B_alone_without_decay_of_factors():
    model = convlora.inject(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 1, 3)), 2, modules_to_save=["2"]
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    (group,) = training.optimiser_for(model, RECIPE).param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in trained]
    assert (group["lr"], group["weight_decay"]) == (RECIPE.lr, RECIPE.weight_decay)
    groups = training.optimiser_for(model, RECIPE, find_method("lora-plus").adapt.lr_ratio).param_groups
    found = {each["name"]: (each["lr"], each["weight_decay"]) for each in groups}
    slow = RECIPE.lr, 0.0
    assert found == {"A": slow, "B": (16 * RECIPE.lr, 0.0), "head": (RECIPE.lr, RECIPE.weight_decay), "biases": slow}
    assert {id(p) for each in groups for p in each["params"]} == {id(p) for p in trained}


def test_loss_that_is_not_finite_is_one_clear_error(toy, tmp_path):
    model = toy_model()
    nn.init.constant_(model.fc.weight, math.nan)
    with pytest.raises(ExampleError, match=r"toy 1/2: the loss became nan at learning rate 0.001; .*lower --lr"):
        fit(model, views(toy), RECIPE, job=Job(tmp_path), name="toy")


def test_class_balance_gives_both_classes_the_same_weight():
    assert class_balance(torch.tensor([0, 0, 0, 1])) == 3
    with pytest.raises(ExampleError, match="all 2 training patches have the label 1"):
        class_balance(torch.tensor([1, 1]))


def test_accuracy_needs_labels():
    logits = torch.tensor([-1.0, 2.0, 3.0, -4.0])
    assert accuracy(logits, torch.tensor([0.0, 1.0, 0.0, 0.0])) == 0.75
    assert accuracy(logits, torch.full((4,), math.nan)) is None


@pytest.mark.parametrize("name", ["probe", "probe-augmented", "lora", "lora-plus", "lora-track", "full", "norms"])
def test_method_trains_reloads_bit_equal_and_merges(toy, tmp_path, name):
    result = trained(name, toy, tmp_path)
    assert result.proofs.reload_bit_equal
    assert result.proofs.merge_same_labels
    assert result.proofs.merge_difference < 1e-4  # fp32 rounding over fifty layers; logits are near 1
    assert len(result.test_logits) == 24
    assert sorted(p.name for p in (tmp_path / "adapters" / name).iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "run.json",
    ]
    assert experiment.read_card(tmp_path / "adapters" / name) == (RECIPE, find_method(name))
    assert (result.trainable == 1281) == name.startswith("probe")


@pytest.mark.thorough
def test_the_same_seed_gives_the_same_bits(toy, tmp_path):
    runs = [trained("lora", toy, tmp_path / str(i)) for i in range(2)]
    assert torch.equal(runs[0].test_logits, runs[1].test_logits)
    losses = [[(e.train_loss, e.val_loss) for e in run.history] for run in runs]
    assert losses[0] == losses[1]


@pytest.mark.thorough
def test_only_methods_that_track_move_norm_statistics(toy, tmp_path):
    moving = {"probe": False, "lora": False, "lora-track": True, "full": False, "full-track": True, "norms": False}
    for name, moves in moving.items():
        model, _ = experiment.open_backbone(RECIPE)
        before = model.bn2.running_mean.clone()
        find_method(name).prepare(model, rank=2)
        recipe = dataclasses.replace(RECIPE, epochs=1)
        fit(model, views(toy), recipe, job=Job(tmp_path), to_train_mode=find_method(name).to_train_mode)
        assert torch.equal(model.bn2.running_mean, before) != moves, name


def test_an_interrupted_run_leaves_the_best_adapter(toy, tmp_path, monkeypatch):
    folder, real, calls = tmp_path / "adapters" / "lora", training._epoch, iter(range(9))

    def interrupted(*args):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(training, "_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained("lora", toy, tmp_path)
    split = HistoDataset(toy / "test.h5")
    logits = experiment.predict_split(folder, split, *experiment.read_card(folder), Job(tmp_path))
    assert len(logits) == 24
    assert [p.name for p in folder.parent.iterdir()] == ["lora"]


def test_transforms_give_the_size_and_normalise():
    half = Normalisation("toy", "none", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    white, draws = torch.ones(2, 3, 96, 96), Draws(0, 0, [0, 1])
    for size in (32, 128, 224):
        assert TrainTransform(size, Normalise(half))(white, draws).shape == (2, 3, size, size)
        whole = torch.ones(2, 3, size, size)
        assert torch.allclose(EvalTransform(size, Normalise(half))(white, draws), whole)


def test_every_training_crop_holds_the_labelled_centre():
    # The narrowest crop: the least area at a side ratio of 3:4.
    assert 96 * math.sqrt(CROP_SCALE[0] * 3 / 4) >= 64
