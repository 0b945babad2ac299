"""``inspect``, ``sheet`` and training through the real command, on the three layouts."""

import base64
import csv
import json
import re
import sys

from conftest import need_extra

need_extra("histopathology")

import numpy as np
import pytest
from layouts import write_challenge, write_pcam, write_wilds
from PIL import Image
from typer.testing import CliRunner

from examples.histopathology.__main__ import app
from examples.histopathology.data.dataset import HistoDataset, open_splits
from examples.histopathology.report import inspection

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"train": 240, "val": 80, "test": 80}
TINY = {"train": 24, "val": 8, "test": 8}
QUICK = ["--method", "probe", "--image-size", "32", "--epochs", "1", "--batch-size", "16"]
AUGMENTED = ["fig4-augmented-affine.png", "fig4-augmented-crop.png"]
FIGURES = ["fig1-centres.png", "fig2-labels-train.png", "fig3-labels-val.png", *AUGMENTED, "samples.png"]


def run(*arguments: object, status: int = 0):
    outcome = CliRunner().invoke(app, [str(a) for a in arguments])
    assert outcome.exit_code == status, outcome.output
    return outcome


def predictions(path):
    with path.open() as file:
        return [int(row["ID"]) for row in csv.DictReader(file)]


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["float16", "float32", "uint8"])
def test_400_images_of_any_dtype_with_keys_out_of_order_and_no_test_labels(tmp_path, dtype):
    data = write_challenge(tmp_path / "data", SIZES, dtype, test_labels=False)
    printed = run("inspect", data, "--out", tmp_path / "inspect").stdout
    assert f"240 × {dtype}, shape (3, 96, 96)" in printed
    assert "listed out of order" in printed and "80 without a label" in printed
    assert "0: 120 (50.0%), 1: 120 (50.0%)" in printed and "0: 80 (33.3%), 3: 80 (33.3%), 4: 80 (33.3%)" in printed
    run("train", "--data", data, *QUICK, "--out", tmp_path / "out")
    assert predictions(tmp_path / "out" / "submission.csv") == list(range(80))
    assert "no labels" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("write", "layout", "first_test_id"),
    [(write_wilds, "WILDS Camelyon17 folder", 32), (write_pcam, "PCam HDF5", 0)],
    ids=["wilds", "pcam"],
)
def test_the_same_commands_take_the_other_layouts(tmp_path, write, layout, first_test_id):
    data = write(tmp_path / "data", TINY)
    printed = run("inspect", data, "--out", tmp_path / "inspect").stdout
    assert printed.count(f"({layout})") == 3 and "24 × uint8, shape (96, 96, 3)" in printed
    run("train", "--data", data, *QUICK, "--out", tmp_path / "out")
    rows = predictions(tmp_path / "out" / "submission.csv")
    assert rows == list(range(first_test_id, first_test_id + 8))
    run("predict", tmp_path / "out" / "adapters" / "probe-seed0", data, "--out", tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_text() == (tmp_path / "out" / "submission.csv").read_text()


def test_inspect_writes_figures_facts_and_one_page_with_all_of_them(tmp_path):
    data = write_challenge(tmp_path / "data", TINY)
    printed = run("inspect", data, "--out", tmp_path / "out").stdout
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([*FIGURES, "inspect.html", "inspect.json"])
    for path in (tmp_path / "out").iterdir():
        assert str(path) in printed
    page = (tmp_path / "out" / "inspect.html").read_text()
    embedded = {base64.b64decode(text) for text in re.findall(r'src="data:image/png;base64,([^"]+)"', page)}
    assert embedded == {(tmp_path / "out" / name).read_bytes() for name in FIGURES}
    assert "http" not in page  # nothing is asked of a network
    facts = {each["name"]: each for each in json.loads((tmp_path / "out" / "inspect.json").read_text())}
    assert facts["train"]["centres"] == {"0": 8, "3": 8, "4": 8} and facts["test"]["labels"] == {"0": 4, "1": 4}


def test_inspect_leaves_out_what_the_data_cannot_give(tmp_path):
    data = write_pcam(tmp_path / "data", TINY)
    (data / "camelyonpatch_level_2_split_valid_y.h5").unlink()
    printed = run("inspect", data, "--out", tmp_path / "out").stdout
    assert "24 without a centre" in printed and "PCam names no centre" in printed
    assert "8 images have no label, which is allowed in the test split only" in printed
    assert {p.name for p in (tmp_path / "out").glob("fig*")} == {"fig2-labels-train.png", *AUGMENTED}


def test_inspect_takes_one_file_and_looks_at_no_more_than_asked(tmp_path):
    data = write_challenge(tmp_path, {"val": 12})
    printed = run("inspect", data / "val.h5", "--limit", 5, "--out", tmp_path / "out").stdout
    assert "images    5" in printed and "in 5 images" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "."], "no split found. Expected train.h5, val.h5, test.h5; or camelyonpatch"),
        (["inspect", "absent"], "absent: no such folder"),
        (["inspect", ".", "--limit", "0"], "--limit 0: must be at least 1"),
        (["sheet", "x.png", "--pictures", "."], "no picture here"),
        (["sheet", "x.png", "--pictures", "absent.png"], "absent.png: no such picture"),
        (["sheet", "x.png", "--colours", "999"], "a palette holds at most 256"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    outcome = run(*arguments, status=1)
    assert outcome.stderr.startswith("error: ") and message in outcome.stderr and outcome.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_colours_are_those_of_the_pooled_pixels(tmp_path):
    split = open_splits(write_challenge(tmp_path, TINY))["train"]
    pixels = split.read(range(24)).astype(np.float64)
    found = inspection.colours(split)
    np.testing.assert_allclose(found.mean, pixels.mean((0, 2, 3)), rtol=1e-10)
    np.testing.assert_allclose(found.std, pixels.std((0, 2, 3)), rtol=1e-8)
    assert (found.images, found.lowest, found.highest) == (24, pixels.min(), pixels.max())


def test_colours_of_a_centre_look_at_its_images_alone(tmp_path):
    data = HistoDataset(write_challenge(tmp_path, TINY) / "train.h5")
    facts = inspection.find_facts("train", data)
    where = np.flatnonzero(data.centres.numpy() == 3)
    np.testing.assert_allclose(facts.colours[3].mean, data.read(where.tolist()).mean((0, 2, 3)), rtol=1e-5)


def test_the_sheet_shows_real_pictures_below_the_synthetic_ones(tmp_path):
    (tmp_path / "pictures").mkdir()
    green = np.zeros((200, 220, 3), np.uint8) + np.array([10, 200, 30], np.uint8)
    Image.fromarray(green).save(tmp_path / "pictures" / "mine.png")
    run("sheet", tmp_path / "sheet.png", "--pictures", tmp_path / "pictures", "--columns", 2, "--patch", 192)
    shown = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    is_green = (np.abs(shown - [10, 200, 30]) < 12).all(-1)
    below = is_green[len(shown) * 5 // 6 :]
    assert below.mean() > 0.5 and not is_green[: len(shown) * 3 // 4].any()


def test_the_sheet_needs_pictures_or_scikit_image(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    outcome = run("sheet", tmp_path / "sheet.png", "--columns", 1, status=1)
    assert "give --pictures with a folder of H&E pictures, or `pip install scikit-image`" in outcome.stderr
    run("sheet", tmp_path / "sheet.png", "--columns", 1, "--bare", "--colours", 16)
    assert Image.open(tmp_path / "sheet.png").mode == "P"
