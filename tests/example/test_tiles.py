import csv
from pathlib import Path

from conftest import need_extra

need_extra("histopathology")

import numpy as np
import pytest
import torch
from layouts import pixels, write_challenge
from PIL import Image
from toy_patches import write_toy
from typer.testing import CliRunner

from examples.histopathology.__main__ import app
from examples.histopathology.data.dataset import HistoDataset
from examples.histopathology.errors import ExampleError

pytestmark = pytest.mark.usefixtures("one_thread")


def open_tiles(folder: Path) -> HistoDataset:
    return HistoDataset(folder, require_labels=False)


def save(folder: Path, names: list[str], side: int = 96) -> Path:
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        picture = Image.fromarray(pixels(i, i % 2))
        picture.resize((side, side), Image.Resampling.NEAREST).save(folder / name)
    return folder


@pytest.mark.parametrize("suffix", ["png", "tif", "tiff", "PNG"])
def test_a_tiles_pixels_are_those_of_its_file(tmp_path, suffix):
    split = open_tiles(save(tmp_path, [f"{i}.{suffix}" for i in range(3)]))
    for i in range(3):
        expected = torch.from_numpy(pixels(i, i % 2).transpose(2, 0, 1) / np.float32(255))
        assert torch.equal(split[i][0], expected)
    assert (split.layout, split.labels, split.has_centres) == ("folder of tiles", None, False)


def test_numbers_are_ids_and_order(tmp_path):
    split = open_tiles(save(tmp_path, ["10.png", "9.jpg", "2.tif"]))
    assert split.ids.tolist() == [2, 9, 10]
    assert [split.rows.name(i) for i in range(3)] == ["2.tif", "9.jpg", "10.png"]
    assert split.rows.notes == []


@pytest.mark.parametrize("names", [["a.png", "7.png"], ["7.png", "07.png"], ["7.png", "7.jpg"]])
def test_names_that_are_no_numbers_of_their_own_are_counted(tmp_path, names):
    split = open_tiles(save(tmp_path, names))
    assert split.ids.tolist() == [0, 1]
    assert [split.rows.name(i) for i in range(2)] == sorted(names)
    assert split.rows.notes == ["not every name is a different number, so IDs count the tiles by name, from 0"]


def test_larger_squares_are_averaged_and_said(tmp_path):
    save(tmp_path, ["0.png", "1.png"])
    save(tmp_path, ["2.png"], side=192)
    split = open_tiles(tmp_path)
    assert torch.equal(split[2][0], split[0][0])  # each pixel twice in both directions
    assert split.rows.notes == ["resized to 96×96: 2 of 96×96, 1 of 192×192"]


def test_every_faulty_tile_is_named_in_one_error(tmp_path):
    save(tmp_path, [f"{i}.png" for i in range(4)])
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:2000])
    (tmp_path / "note.jpg").write_text("no picture")
    Image.new("RGB", (96, 64)).save(tmp_path / "wide.tif")
    Image.new("RGB", (2048, 2048)).save(tmp_path / "slide.png")
    with pytest.raises(ExampleError) as caught:
        open_tiles(tmp_path)
    message = str(caught.value)
    assert f"{tmp_path}: 4 of 7 tiles cannot be used: " in message
    for fault in ("1.png: cannot be read", "note.jpg: cannot be read", "wide.tif: 96×64", "slide.png: 2048×2048"):
        assert fault in message
    assert message.endswith("Nothing was written.")
    assert "\n" not in message


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiles")
    arguments = ["train", "--method", "probe", "--data", write_toy(root / "data"), "--image-size", 32, "--epochs", 1]
    outcome = CliRunner().invoke(app, [str(a) for a in (*arguments, "--batch-size", 16, "--out", root / "out")])
    assert outcome.exit_code == 0, outcome.output
    return root / "out" / "adapters" / "probe-seed0"


def predict(adapter, data, out, status=0):
    outcome = CliRunner().invoke(app, ["predict", str(adapter), str(data), "--out", str(out)])
    assert outcome.exit_code == status, outcome.output
    return outcome


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.thorough
def test_tiles_are_predicted_as_the_same_patches_in_hdf5_are(adapter, tmp_path):
    hdf5 = write_challenge(tmp_path / "data", {"test": 12}, "uint8")
    predict(adapter, hdf5, tmp_path / "hdf5.csv")
    predict(adapter, save(tmp_path / "tiles", [f"{i}.png" for i in range(12)]), tmp_path / "tiles.csv")
    assert (tmp_path / "tiles.csv").read_text() == (tmp_path / "hdf5.csv").read_text()
    found = rows(tmp_path / "tiles-probabilities.csv")
    assert [row["Name"] for row in found] == [f"{i}.png" for i in range(12)]
    for one, other in zip(found, rows(tmp_path / "hdf5-probabilities.csv"), strict=True):
        assert (one["ID"], one["Probability"], one["Pred"]) == (other["ID"], other["Probability"], other["Pred"])
        assert one["Pred"] == str(int(float(one["Probability"]) > 0.5))


def test_a_faulty_tile_leaves_nothing_half_written(adapter, tmp_path):
    folder = save(tmp_path / "tiles", ["0.png", "1.png"])
    (folder / "0.png").write_bytes(b"cut")
    outcome = predict(adapter, folder, tmp_path / "out" / "s.csv", status=1)
    assert outcome.stderr.startswith(f"error: {folder}: 1 of 2 tiles cannot be used: 0.png: cannot be read")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_anything_to_predict_is_refused(adapter, tmp_path):
    assert "this folder has no test.h5 and no PNG" in predict(adapter, tmp_path, tmp_path / "s.csv", status=1).stderr
