"""Predictions in parts: shared among processes, and gone on with where they were ended."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

from conftest import need_extra

need_extra("histopathology")

import pytest
import torch
from test_resume import killing
from toy_patches import write_toy

import convlora
from examples.histopathology.data.dataset import HistoDataset
from examples.histopathology.methods.catalogue import find_method
from examples.histopathology.methods.method import Predict
from examples.histopathology.runs import experiment, shards
from examples.histopathology.training.prediction import predict_by
from examples.histopathology.training.processes import Job
from examples.histopathology.training.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = Recipe(image_size=32, batch_size=4)
ROOT = Path(__file__).parents[2]
WAYS = {
    "plain": Predict(),
    "ensemble": Predict(views=8),
    "all": Predict(views=8, adabn=True, balanced=True),
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy"), {"test": 23})


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder, method = tmp_path_factory.mktemp("adapter") / "lora", find_method("lora")
    model = method.prepare(experiment.open_backbone(RECIPE)[0])
    with torch.no_grad():
        for parameter in convlora.trainable_parameters(model):
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    experiment.save(model, folder, method, RECIPE)
    return folder


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(shards, "SIZE", 6)  # with batches of 4: parts of 8, 8 and 7


def predicted(adapter, toy, out, how=WAYS["plain"]):
    method = dataclasses.replace(find_method("lora"), predict=how)
    return experiment.predict_split(adapter, HistoDataset(toy / "test.h5"), RECIPE, method, Job(out))


@pytest.mark.parametrize("way", WAYS)
def test_parts_together_are_the_whole_to_the_bit(adapter, toy, tmp_path, small_parts, way):
    split, lora = HistoDataset(toy / "test.h5"), find_method("lora")
    model = experiment.load(adapter, RECIPE, torch.device("cpu"))
    whole, _ = predict_by(WAYS[way], model, experiment._loaders(lora, split, RECIPE), Job(tmp_path))
    assert torch.equal(predicted(adapter, toy, tmp_path, WAYS[way]), whole)
    assert len(list((tmp_path / "parts").glob("0*"))) == 3


def test_what_is_there_is_not_predicted_again(adapter, toy, tmp_path, small_parts, monkeypatch):
    asked, real = [], shards.predict_each

    def counted(models, loader):
        asked.append(loader.batch_sampler.start)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(models, loader)

    monkeypatch.setattr(shards, "predict_each", counted)
    with pytest.raises(KeyboardInterrupt):
        predicted(adapter, toy, tmp_path)
    found = predicted(adapter, toy, tmp_path)
    assert asked == [0, 8, 8, 16]
    assert torch.equal(found, predicted(adapter, toy, tmp_path / "other"))


def test_parts_of_another_prediction_are_not_taken(adapter, toy, tmp_path, small_parts):
    first = predicted(adapter, toy, tmp_path)
    other = predicted(adapter, toy, tmp_path, Predict(views=8))
    assert not torch.equal(first, other)
    data = write_toy(tmp_path / "data", {"test": 23}, source="written again")
    (tmp_path / "parts" / "000000000.safetensors").write_bytes(b"never read, since the file's times differ")
    assert torch.equal(predicted(adapter, data, tmp_path), first)


@pytest.mark.thorough
def test_killed_at_every_write_the_predictions_are_the_same_files(tmp_path):
    outcome = killing("predictions", tmp_path)
    assert outcome["struck"] >= 10
    assert outcome["killed"] == outcome["whole"]
    assert [line.split()[0] for line in outcome["whole"]] == ["x-probabilities.csv", "x.csv"]


@pytest.mark.thorough
def test_killed_ten_times_at_random_moments_the_predictions_are_the_same_files(tmp_path):
    outcome = killing("predictions-random", tmp_path, "10", "0")
    assert outcome["struck"] == 10
    assert outcome["killed"] == outcome["whole"]
    assert [line.split()[0] for line in outcome["whole"]] == ["x-probabilities.csv", "x.csv"]


@pytest.mark.thorough
def test_two_processes_predict_what_one_does_to_the_byte(adapter, toy, tmp_path):
    arguments = ["-m", "examples.histopathology", "predict", str(adapter), str(toy / "test.h5"), "--batch-size", "4"]
    for processes in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        done = subprocess.run(
            [sys.executable, *(launcher if processes > 1 else []), *arguments, "--out", tmp_path / f"{processes}.csv"],
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("wrote") == 1
    files = [(tmp_path / f"{n}-probabilities.csv").read_bytes() for n in (1, 2)]
    assert files[0] == files[1]
