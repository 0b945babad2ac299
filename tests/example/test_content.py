"""What lies in the files counts, not their names: features, results and checkpoints of an earlier run; faults and
leaks are told before anything is trained."""

import json
import os

from conftest import need_extra

need_extra("histopathology")

import h5py
import numpy as np
import pytest
import torch
from layouts import write_challenge, write_wilds
from toy_patches import SIZES, write_toy
from typer.testing import CliRunner

from examples.histopathology.__main__ import app
from examples.histopathology.data.dataset import HistoDataset, open_splits
from examples.histopathology.errors import ExampleError
from examples.histopathology.methods.catalogue import find_method
from examples.histopathology.runs import content, experiment
from examples.histopathology.runs.leakage import warnings
from examples.histopathology.training.backbones import lite0_state
from examples.histopathology.training.processes import Job
from examples.histopathology.training.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = Recipe(image_size=32, epochs=1, batch_size=16)
QUICK = ["--method", "probe", "--image-size", "32", "--epochs", "1", "--batch-size", "16"]
TINY = {"train": 24, "val": 8, "test": 8}


def invoked(*arguments, status=0):
    outcome = CliRunner().invoke(app, [str(a) for a in arguments])
    assert outcome.exit_code == status, outcome.output
    return outcome


def write_anew(path, change):
    """Other pixels under the same name, of the same size and times; labels, ids and centres stay."""
    before = path.stat()
    with h5py.File(path, "r+") as file:
        for key in file:
            file[key]["img"][...] = change(file[key]["img"][...])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def mirrored(image):
    return 1 - image


@pytest.mark.parametrize("split", ["train", "val"])
def test_features_of_other_pixels_are_not_taken(tmp_path, split):
    data = write_toy(tmp_path / "data")
    run = lambda out: experiment.run_method(find_method("probe"), open_splits(data), RECIPE, Job(out))  # noqa: E731
    old = run(tmp_path / "out")
    write_anew(data / f"{split}.h5", mirrored)
    new, fresh = run(tmp_path / "out"), run(tmp_path / "fresh")
    assert torch.equal(new.val_logits, fresh.val_logits) and new.history[0].val_loss == fresh.history[0].val_loss
    assert new.history[0].val_loss != old.history[0].val_loss


def test_features_of_images_normalised_otherwise_are_not_taken(tmp_path, monkeypatch):
    splits, backbone = open_splits(write_toy(tmp_path / "data")), experiment.open_backbone
    run = lambda out: experiment.run_method(find_method("probe"), splits, RECIPE, Job(out))  # noqa: E731
    run(tmp_path / "out")

    def otherwise(recipe):
        model, own = backbone(recipe)
        return model, type(own)(own.name, own.source, (0.2, 0.3, 0.4), (1.0, 1.0, 1.0))

    monkeypatch.setattr(experiment, "open_backbone", otherwise)
    assert run(tmp_path / "out").history[0].val_loss == run(tmp_path / "fresh").history[0].val_loss


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_resumed_run_on_other_pixels_is_refused_by_the_splits_name(tmp_path, split):
    data = write_toy(tmp_path / "data")
    run = lambda: experiment.run_method(  # noqa: E731
        find_method("probe"), open_splits(data), RECIPE, Job(tmp_path / "out", resume=True)
    )
    run()
    assert run().method == "probe"
    write_anew(data / f"{split}.h5", mirrored)
    with pytest.raises(
        ExampleError, match=rf"another training: {split} '{SIZES[split]} patches, .* Give the same .*data"
    ):
        run()


def test_a_resumed_run_on_other_weights_under_the_same_name_is_refused(tmp_path):
    torch.save(lite0_state(), tmp_path / "own.pt")
    recipe = Recipe(image_size=32, epochs=1, batch_size=16, weights=tmp_path / "own.pt")
    splits = open_splits(write_toy(tmp_path / "data"))
    run = lambda: experiment.run_method(find_method("probe"), splits, recipe, Job(tmp_path, resume=True))  # noqa: E731
    run()
    torch.save({name: tensor + (name == "conv_stem.weight") for name, tensor in lite0_state().items()}, recipe.weights)
    with pytest.raises(ExampleError, match=r"another training: weights 'own.pt, \w+' there, 'own"):
        run()


def test_a_digest_is_of_pixels_labels_centres_and_ids_and_not_of_how_they_are_stored(tmp_path):
    def digest(folder, dtype="uint8", **changes):
        split = HistoDataset(write_challenge(tmp_path / folder, {"val": 4}, dtype) / "val.h5")
        for name, value in changes.items():
            setattr(split, name, value)
        return content.digest_of(split)

    assert digest("a") == digest("b") == digest("c", "float32")
    others = {digest("d", labels=torch.tensor([1, 1, 1, 0])), digest("e", centres=torch.tensor([1, 1, 1, 2]))}
    others |= {digest("f", labels=None), digest("g", ids=np.array([0, 1, 2, 5]))}
    assert len(others | {digest("a")}) == 5


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 255])
def test_a_pixel_that_cannot_be_is_found_before_anything_is_trained(tmp_path, split, value):
    data = write_toy(tmp_path / "data")
    with h5py.File(data / f"{split}.h5", "r+") as file:
        file["17"]["img"][2, 95, 95] = value
    error = invoked("train", "--data", data, *QUICK, "--out", tmp_path / "out", status=1).stderr
    assert f"{split}.h5: img of key 17 has values from" in error and "finite and in [0, 1]" in error
    assert not (tmp_path / "out").exists()
    assert "img of key 17" in invoked("inspect", data, "--out", tmp_path / "out", status=1).stderr


def test_images_in_two_splits_are_told_with_ids(tmp_path):
    data = write_toy(tmp_path / "data", {"train": 24, "val": 8, "test": 8})
    assert not any(warnings(open_splits(data)).values())
    with h5py.File(data / "test.h5", "r+") as test, h5py.File(data / "train.h5", "r") as train:
        for here, there in ((2, 20), (5, 1)):
            test[str(here)]["img"][...] = train[str(there)]["img"][...]
    found = warnings(open_splits(data))
    (told,) = found["test"]
    assert told.startswith("2 of 8 images of test are in train too, pixel by pixel (ids 2, 5): ")
    assert "since the model has seen them" in told
    assert not found["train"] and not found["val"]


def test_a_centre_of_two_splits_and_a_split_of_one_label_are_told(tmp_path):
    splits = open_splits(write_toy(tmp_path, {"train": 24, "val": 8, "test": 8}))
    splits["val"].centres[3:5] = 0
    splits["val"].rows.labels = [1] * 8
    one, shared = warnings(splits)["val"]
    assert one.startswith("every labelled image of val has the label 1: ")
    assert shared.startswith("train and val share centre 0: ") and "hospitals that the model has not seen" in shared


def test_a_split_without_centres_shares_none(tmp_path):
    splits = open_splits(write_toy(tmp_path, {"train": 24, "val": 8, "test": 8}))
    for split in splits.values():
        split.centres[:] = -1
    assert not any(warnings(splits).values())


def test_a_slide_or_patient_in_several_splits_is_told(tmp_path):
    splits = open_splits(write_wilds(tmp_path, {"train": 6, "val": 2, "test": 2}))
    assert splits["test"].rows.slides == ["patient_044_node_2"] * 2
    assert splits["test"].rows.patients == ["patient_044"] * 2
    assert not any("slide" in each or "patient" in each for own in warnings(splits).values() for each in own)
    splits["val"].rows.slides = splits["train"].rows.slides[:2]
    splits["val"].rows.patients = splits["train"].rows.patients[:2]
    splits["test"].rows.patients = splits["train"].rows.patients[:2]
    found = warnings(splits)
    assert any(
        each.startswith("2 slides have patches in train and in val (patient_004_node_0, ") for each in found["val"]
    )
    assert not any("patients have" in each for each in found["val"])  # the slides say it
    assert any(each.startswith("2 patients have patches in train and in test") for each in found["test"])


def test_warnings_are_printed_and_stand_in_every_output(tmp_path):
    data = write_challenge(tmp_path / "data", TINY)  # whose images are the same in each split
    told = "8 of 8 images of val are in train too, pixel by pixel (ids 0, 1, 2, 3, 4, ...)"
    printed = invoked("train", "--data", data, *QUICK, "--out", tmp_path / "out").stdout
    assert f"warning: {told}" in printed
    assert f"**Warning: {told}" in (tmp_path / "out" / "table.md").read_text()
    assert f"<strong>Warning:</strong> {told}" in (tmp_path / "out" / "report.html").read_text()
    assert json.loads((tmp_path / "out" / "results.json").read_text())["warnings"][0].startswith(told)
    assert f"WARNING   {told}" in invoked("inspect", data, "--out", tmp_path / "inspect").stdout
    facts = {each["name"]: each for each in json.loads((tmp_path / "inspect" / "inspect.json").read_text())}
    assert facts["val"]["warnings"][0].startswith(told) and facts["train"]["warnings"] == []
