import csv
import shutil
from pathlib import Path

from conftest import need, need_extra

need_extra("histopathology")
onnx, onnxruntime = need("onnx"), need("onnxruntime")
need("onnxscript")

import pytest
import torch
from toy_patches import write_toy
from typer.testing import CliRunner

from examples.histopathology.__main__ import app
from examples.histopathology.data.dataset import HistoDataset, open_splits
from examples.histopathology.errors import ExampleError
from examples.histopathology.methods.catalogue import find_method
from examples.histopathology.predicting import exporting
from examples.histopathology.runs import experiment
from examples.histopathology.training.processes import Job
from examples.histopathology.training.recipe import Recipe

RECIPE = Recipe(image_size=32, epochs=1, batch_size=16)

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments: object, status: int = 0):
    outcome = CliRunner().invoke(app, [str(a) for a in arguments])
    assert outcome.exit_code == status, outcome.output
    return outcome


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    root = tmp_path_factory.mktemp("onnx")
    splits = open_splits(write_toy(root / "data"))
    return experiment.run_method(find_method("lora"), splits, RECIPE, Job(root / "out")).adapter


@pytest.fixture(scope="module")
def exported(adapter, tmp_path_factory):
    file = tmp_path_factory.mktemp("file") / "model.onnx"
    printed = run("export", adapter, "--out", file, "--data", data(adapter)).stdout
    assert "24 patches: " in printed
    return file


def data(adapter: Path) -> Path:
    return adapter.parents[2] / "data" / "test.h5"


def columns(path: Path) -> dict[str, list[str]]:
    with path.open() as file:
        read = list(csv.DictReader(file))
    return {name: [row[name] for row in read] for name in read[0]}


@pytest.mark.thorough
def test_the_file_is_the_plain_network_and_its_logits_are_torchs(adapter, exported):
    onnx.checker.check_model(onnx.load(exported))
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = experiment.load(adapter, RECIPE, torch.device("cpu")).eval()(images)
    (found,) = session.run(["logits"], {"images": images.numpy()})  # five at a time, though it was written with two
    # fp32 sums in another order, through fifty layers
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
    assert not any("lora" in tensor.name for tensor in onnx.load(exported).graph.initializer)


@pytest.mark.thorough
@pytest.mark.parametrize("how", ["", "ensemble,balanced"])
def test_predictions_from_the_file_are_those_of_the_adapter(adapter, exported, tmp_path, how):
    for name, model in (("torch", adapter), ("onnx", exported)):
        run("predict", model, data(adapter), "--how", how, "--out", tmp_path / f"{name}.csv")
    torchs, onnxs = (columns(tmp_path / f"{name}-probabilities.csv") for name in ("torch", "onnx"))
    assert torchs["ID"] == onnxs["ID"]
    assert [float(p) for p in onnxs["Probability"]] == pytest.approx(
        [float(p) for p in torchs["Probability"]], abs=1e-4
    )
    assert torchs["Pred"] == onnxs["Pred"]


@pytest.mark.thorough
def test_a_file_that_differs_from_torch_never_gets_its_name(adapter, exported, tmp_path, monkeypatch):
    real = exporting._Session.logits
    monkeypatch.setattr(exporting, "_write", lambda model, images, path: shutil.copy(exported, path))  # half a minute
    monkeypatch.setattr(exporting._Session, "logits", lambda self, images: real(self, images) + 1)
    outcome = run("export", adapter, "--out", tmp_path / "model.onnx", status=1)
    assert "was not written: onnxruntime's logits differ from torch's by 1" in outcome.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.thorough
def test_what_a_fixed_network_cannot_do_is_refused(adapter, exported, tmp_path, monkeypatch):
    assert "the name must end in .onnx" in run("export", adapter, "--out", tmp_path / "model.pt", status=1).stderr
    outcome = run("predict", exported, data(adapter), "--how", "adabn", "--out", tmp_path / "s.csv", status=1)
    assert "adabn: an ONNX file has no batch norms" in outcome.stderr
    monkeypatch.setattr(exporting, "read_card", lambda folder: (RECIPE, find_method("lora-centre")))
    with pytest.raises(ExampleError, match="lora-centre uses statistics of all its test images"):
        exporting.export(adapter, tmp_path / "model.onnx", RECIPE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.thorough
def test_files_of_others_are_refused(adapter, exported, tmp_path):
    split = data(adapter)
    assert "no such file" in run("predict", tmp_path / "absent.onnx", split, status=1).stderr
    (tmp_path / "text.onnx").write_text("no network")
    assert "cannot be read as ONNX" in run("predict", tmp_path / "text.onnx", split, status=1).stderr
    stored = onnx.load(exported)
    del stored.metadata_props[:]
    onnx.save(stored, tmp_path / "foreign.onnx")
    assert "does not say how its input is made" in run("predict", tmp_path / "foreign.onnx", split, status=1).stderr


@pytest.mark.thorough
def test_without_the_packages_the_message_names_them(adapter, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ExampleError, match=r"ONNX needs a package that is not installed .*pip install onnx onnxscript"):
        exporting.export(adapter, tmp_path / "model.onnx", RECIPE, HistoDataset(data(adapter)))
    assert list(tmp_path.iterdir()) == []
