"""Whole slides: where tiles lie, which hold tissue, that they are predicted as any patch is, and what is written."""

from conftest import absent, need, need_extra

need_extra("histopathology")
need("openslide")

import csv
import json
import shutil
import threading

import numpy as np
import pytest
import torch
from made_slides import drawn_slide, tissue, write_patches, write_svs
from PIL import Image, ImageDraw
from torch import nn
from typer.testing import CliRunner

from examples.histopathology.__main__ import Options, app
from examples.histopathology.augment.transforms import Normalisation
from examples.histopathology.data import wholeslide
from examples.histopathology.data.dataset import HistoDataset, open_splits
from examples.histopathology.data.wholeslide import (
    AHEAD,
    WholeSlide,
    make_grid,
    overview,
    read_ahead,
    read_tiles,
    tissue_mask,
    tissue_tiles,
)
from examples.histopathology.errors import ExampleError
from examples.histopathology.making.slides import cut_slides
from examples.histopathology.methods.catalogue import find_method
from examples.histopathology.predicting.heatmap import write_map
from examples.histopathology.predicting.outlines import regions, rings
from examples.histopathology.predicting.slidemap import (
    Asked,
    classifier,
    classifier_of,
    predict_slide,
    summary,
    tiles_csv,
)
from examples.histopathology.runs.clinical import operating_point
from examples.histopathology.runs.experiment import predict_split, read_card, read_point, run_method
from examples.histopathology.training.processes import Job
from examples.histopathology.training.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["openslide", "tiffslide"])
def library(request, monkeypatch):
    """Each of the two libraries alone."""
    need(request.param)

    def gone(path):
        raise ImportError

    monkeypatch.setattr(wholeslide, {"openslide": "_by_tiffslide", "tiffslide": "_by_openslide"}[request.param], gone)


# -- where tiles lie ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mpp", [0.23, 0.485, 0.97, 1.5])
@pytest.mark.parametrize("stride", [96, 32, 50])
@pytest.mark.parametrize("size", [(2220, 2967), (10, 5000), (1, 1)])
def test_the_grid_covers_the_slide_with_the_fewest_tiles(size, mpp, stride):
    grid = make_grid(size, mpp, 0.97, stride)
    assert grid.side == pytest.approx(96 * 0.97 / mpp)
    for count, length in zip((grid.columns, grid.rows), size, strict=True):
        assert (count - 1) * grid.step + grid.side >= length - 1e-3
        assert count == 1 or (count - 2) * grid.step + grid.side < length


def test_microns_per_pixel_halved_in_the_metadata_double_a_tiles_side_and_halve_their_number_each_way(tmp_path):
    picture = tissue(960, 1152)
    found = [
        predict_slide(write_svs(tmp_path / f"{mpp}.svs", picture, mpp), by_colour, Asked(tile_mpp=0.97))
        for mpp in (0.97, 0.485)
    ]
    assert [(each.grid.side, each.grid.columns, each.grid.rows) for each in found] == [(96, 12, 10), (192, 6, 5)]
    assert [each.size for each in found] == [(1152, 960)] * 2
    # The slide is half as wide and half as high, by its own word.
    areas = [summary(each)["tissue_area"] for each in found]
    assert areas[0] == pytest.approx(4 * areas[1]) == pytest.approx(1.152 * 0.96 * 0.97**2)


@pytest.mark.parametrize("levels", [1, 3])
def test_a_tiles_pixels_are_the_means_of_what_it_covers_and_white_beyond_the_slide(tmp_path, library, levels):
    picture = tissue(500, 700)
    slide = WholeSlide(write_svs(tmp_path / "a.svs", picture, 0.5, levels))
    grid = make_grid(slide.size, 0.5, 2.0)  # 4 pixels for 1, two tiles by two
    assert (grid.columns, grid.rows) == (2, 2)
    ((places, pixels),) = read_tiles(slide, grid, np.ones((2, 2), bool))
    padded = np.pad(picture, ((0, 268), (0, 68), (0, 0)), constant_values=255)
    for (row, column), found in zip(places, pixels, strict=True):
        own = padded[row * 384 : (row + 1) * 384, column * 384 : (column + 1) * 384]
        expected = own.reshape(96, 4, 96, 4, 3).mean((1, 3))
        # Pillow rounds after each of two directions, and so does each level.
        np.testing.assert_allclose(found, expected, atol=1.01 if levels == 1 else 2.1)


def test_tiles_of_a_fraction_of_a_pixel_do_not_drift(tmp_path, library):
    slide = WholeSlide(write_svs(tmp_path / "a.svs", tissue(900, 2000), 0.499))
    grid = make_grid(slide.size, 0.499, 0.97)
    (places, tiles), *_ = list(read_tiles(slide, grid, np.ones((grid.rows, grid.columns), bool)))
    for (row, column), pixels in zip(places, tiles, strict=True):
        side = (grid.side, grid.side)
        alone = slide.read(column * grid.step, row * grid.step, side, grid.scale, (96, 96))
        # Pillow's weights are of 22 bits, so that a box cut elsewhere may round otherwise.
        assert np.abs(pixels.astype(int) - alone).max() <= 1


def test_overlapping_tiles_are_cut_where_they_lie(tmp_path):
    picture = tissue(300, 300)
    slide = WholeSlide(write_svs(tmp_path / "a.svs", picture, 1.0))
    grid = make_grid(slide.size, 1.0, 1.0, stride=40)
    for places, tiles in read_tiles(slide, grid, np.ones((grid.rows, grid.columns), bool)):
        for (row, column), pixels in zip(places, tiles, strict=True):
            inside = picture[row * 40 : row * 40 + 96, column * 40 : column * 40 + 96]
            assert np.array_equal(pixels[: inside.shape[0], : inside.shape[1]], inside)


def test_tiles_on_glass_are_left_out(tmp_path):
    slide = WholeSlide(write_svs(tmp_path / "a.svs", drawn_slide(6, 4, (slice(0, 1), slice(3, 4)), glass=2), 1.0))
    grid = make_grid(slide.size, 1.0, 1.0)
    picture = overview(slide, grid, 12)
    assert picture.shape == (4 * 12, 6 * 12, 3)
    expected = np.zeros((4, 6), bool)
    expected[:, 2:] = True
    assert np.array_equal(tissue_tiles(tissue_mask(picture), grid, 12, 0.25), expected)
    assert tissue_tiles(tissue_mask(picture), grid, 12, 0.0).all()


def test_no_more_is_read_ahead_than_was_said_and_all_of_it_in_order():
    begun, lock = [], threading.Lock()

    def read(item):
        with lock:
            begun.append(item)
        return item

    for handed, item in enumerate(read_ahead(read, range(50), threads=3)):
        assert item == handed
        with lock:
            assert max(begun) <= handed + AHEAD


def test_what_a_reading_thread_raises_is_raised():
    def read(item):
        if item == 5:
            raise ExampleError("cut off")
        return item

    with pytest.raises(ExampleError, match="cut off"):
        list(read_ahead(read, range(50)))


# -- the map -----------------------------------------------------------------------------------------------


def by_colour(patches):
    """A network that anyone can check: tumour is where blue outweighs red."""
    return 100 * (patches[:, 2] - patches[:, 0]).mean((1, 2))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapter")
    data = write_patches(root / "data", {"train": 48, "val": 24, "test": 24})
    recipe = Recipe(image_size=64, epochs=8, lr=1e-2, batch_size=16)
    return run_method(find_method("probe"), open_splits(data), recipe, Job(root / "out"), suffix="-seed0").adapter


def predict(adapter, slide, out, *options, status=0):
    arguments = ["predict", adapter, slide, "--out", out, *options]
    outcome = CliRunner().invoke(app, [str(a) for a in arguments])
    assert outcome.exit_code == status, outcome.output
    return outcome


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


TUMOUR = (slice(3, 5), slice(4, 7))  # rows and columns of tiles


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Ten columns and eight rows of tiles at two pixels for one, two columns of glass."""
    picture = drawn_slide(10, 8, TUMOUR, glass=2).repeat(2, 0).repeat(2, 1)
    return write_svs(tmp_path_factory.mktemp("slide") / "planted.svs", picture, 0.485, levels=2)


@pytest.fixture(scope="module")
def mapped(adapter, planted, tmp_path_factory):
    out = tmp_path_factory.mktemp("map") / "planted.csv"
    return predict(adapter, planted, out).stdout, out


def test_a_planted_tumour_is_found_where_it_lies_to_the_tile(mapped):
    printed, out = mapped
    found = rows(out)
    assert len(found) == 8 * 8  # no glass
    positive = {(int(row["X"]), int(row["Y"])) for row in found if row["Pred"] == "1"}
    assert positive == {(192 * column, 192 * row) for row in range(3, 5) for column in range(4, 7)}
    facts = json.loads((out.parent / "planted-summary.json").read_text())
    (region,) = facts["regions"]
    assert {key: region[key] for key in ("x", "y", "width", "height", "tiles")} == {
        "x": 768,
        "y": 576,
        "width": 576,
        "height": 384,
        "tiles": 6,
    }
    assert region["area"] == pytest.approx(6 * (0.096 * 0.97) ** 2)
    assert (facts["tissue_tiles"], facts["tumour_tiles"], facts["microns_per_pixel"]) == (64, 6, 0.485)
    assert "64 of 80 tiles hold tissue" in printed and "the largest has 0.05 mm² at x 768, y 576" in printed


def test_qupath_gets_the_outline_and_every_tile_in_the_slides_coordinates(mapped):
    features = json.loads((mapped[1].parent / "planted.geojson").read_text())["features"]
    (outline,) = [each for each in features if each["properties"]["objectType"] == "annotation"]
    (ring,) = outline["geometry"]["coordinates"]
    assert ring[0] == ring[-1] and len(ring) == 5
    assert {tuple(corner) for corner in ring} == {(768, 576), (1344, 576), (1344, 960), (768, 960)}
    assert outline["properties"]["classification"]["name"] == "Tumor"
    tiles = [each for each in features if each["properties"]["objectType"] == "tile"]
    probability = {
        tuple(t["geometry"]["coordinates"][0][0]): t["properties"]["measurements"]["Probability"] for t in tiles
    }
    assert probability == {(float(row["X"]), float(row["Y"])): float(row["Probability"]) for row in rows(mapped[1])}


def test_the_heat_map_opens_as_a_slide_of_the_same_scale_and_is_bright_where_the_tumour_is(mapped):
    import openslide

    opened = openslide.OpenSlide(str(mapped[1].parent / "planted-heatmap.tif"))
    width, height = opened.dimensions
    # 8 × 10 tiles of 96 pixels of 0.97 microns
    assert width * float(opened.properties["openslide.mpp-x"]) == pytest.approx(960 * 0.97)
    assert height * float(opened.properties["openslide.mpp-y"]) == pytest.approx(768 * 0.97)
    assert opened.level_count > 1 and max(opened.level_dimensions[-1]) <= 256
    for level in range(opened.level_count):
        shown = np.asarray(opened.read_region((0, 0), level, opened.level_dimensions[level]).convert("RGB")).astype(int)
        cell = shown.shape[0] // 8
        cells = shown[: 8 * cell, : 10 * cell].reshape(8, cell, 10, cell, 3).mean((1, 3))
        yellow = cells[..., 0] - cells[..., 2]  # of the colours' upper end
        inside = np.zeros((8, 10), bool)
        inside[TUMOUR] = True
        assert yellow[inside].min() > yellow[~inside].max()
    with Image.open(mapped[1].parent / "planted-heatmap.png") as image:
        assert image.format == "PNG" and image.width == 1800


def test_a_slides_tiles_are_predicted_as_the_same_tiles_in_a_folder_are(adapter, planted, mapped, tmp_path):
    with wholeslide.opened_slide(planted) as slide:
        grid = make_grid(slide.size, slide.mpp, 0.97)
        chosen = np.zeros((8, 10), bool)
        chosen[2:5, 3:6] = True
        for places, tiles in read_tiles(slide, grid, chosen):
            for (row, column), pixels in zip(places, tiles, strict=True):
                Image.fromarray(pixels).save(tmp_path / f"{row * 10 + column}.png")
    predict(adapter, tmp_path, tmp_path / "out" / "tiles.csv")
    alone = {int(row["ID"]): float(row["Probability"]) for row in rows(tmp_path / "out" / "tiles-probabilities.csv")}
    found = {int(r["Y"]) // 192 * 10 + int(r["X"]) // 192: float(r["Probability"]) for r in rows(mapped[1])}
    assert len(alone) == 9
    for tile, probability in alone.items():
        assert found[tile] == pytest.approx(probability, abs=1e-5)  # batches of another size may round otherwise


def test_a_slide_predicted_in_overlapping_tiles_maps_their_middles(tmp_path):
    """Tiles of 3 by 3 strides: the tile whose middle lies on the tumour is the one that is called so."""
    picture = np.full((480, 480, 3), (200, 60, 60), np.uint8)
    picture[192:288, 192:288] = (60, 60, 200)
    slide = write_svs(tmp_path / "a.svs", picture, 1.0)
    found = predict_slide(slide, by_colour, Asked(tile_mpp=1.0, stride=32))
    (region,) = summary(found)["regions"]
    # A tile counts from half of its pixels on; those at a corner of the tumour have fewer.
    assert (region["x"], region["y"], region["width"], region["height"]) == (192, 192, 96, 96)
    paths = write_map(found, tmp_path / "a.csv")
    features = json.loads(paths[3].read_text())["features"]
    corners = {tuple(corner) for corner in features[0]["geometry"]["coordinates"][0]}
    assert min(corners)[0] == 192 and max(corners)[0] == 288


def test_an_ensembles_probability_is_the_mean_over_the_eight_views():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 96 * 96, 1))
    plain = Normalisation("none", "", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    patches = torch.rand(5, 3, 96, 96)
    found = classifier_of(model, 96, plain, views=8)(patches).sigmoid()
    one = classifier_of(model, 96, plain)
    turned = [torch.rot90(each, turn, (2, 3)) for each in (patches, patches.flip(3)) for turn in range(4)]
    expected = torch.stack([one(each).sigmoid() for each in turned]).mean(0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_threshold_and_tissue_decide_what_is_called_and_what_is_looked_at(tmp_path):
    slide = write_svs(tmp_path / "a.svs", drawn_slide(4, 3, (slice(0, 1), slice(2, 3)), glass=1), 1.0)
    found = predict_slide(slide, by_colour, Asked(tile_mpp=1.0, threshold=0.0, tissue=0.0))
    assert found.tumour.sum() == 12
    found = predict_slide(slide, by_colour, Asked(tile_mpp=1.0, threshold=1.0))
    assert (found.tumour.sum(), found.tissue.sum()) == (0, 9)
    assert summary(found)["regions"] == [] and tiles_csv(found).count("\n") == 10


# -- as validation decided ---------------------------------------------------------------------------------


def decided(adapter, folder, threshold, temperature):
    """A copy of an adapter that says another threshold and temperature."""
    shutil.copytree(adapter, folder)
    card = json.loads((folder / "run.json").read_text())
    card["operating_point"] = {"threshold": threshold, "temperature": temperature}
    (folder / "run.json").write_text(json.dumps(card))
    return folder


def test_an_adapters_folder_holds_what_validation_decided(adapter):
    done = json.loads((adapter.parent.parent / "results" / "probe-seed0.json").read_text())["result"]
    expected = operating_point(torch.tensor(done["val_logits"]), torch.arange(24) % 2)
    assert read_point(adapter) == expected


def test_calibrated_predictions_are_by_the_adapters_threshold_and_temperature(adapter, tmp_path):
    tiles = tmp_path / "tiles"
    tiles.mkdir()
    for i in range(8):
        Image.fromarray(tissue(96, 96, i, tumour=bool(i % 2))).save(tiles / f"{i}.png")
    split = HistoDataset(tiles, require_labels=False)
    logits = predict_split(adapter, split, *read_card(adapter), Job(tmp_path))
    middle = float(logits.sort().values[2:4].mean())  # three tiles below it, five above
    own = decided(adapter, tmp_path / "own", middle, 4.0)
    predict(own, tiles, tmp_path / "s.csv", "--calibrated")
    found = rows(tmp_path / "s-probabilities.csv")
    assert [int(row["Pred"]) for row in found] == (logits > middle).int().tolist() and sum(logits > middle) == 5
    assert [row["Pred"] for row in rows(tmp_path / "s.csv")] == [row["Pred"] for row in found]
    expected = (logits.double() / 4).sigmoid().tolist()
    # batches of another size may round otherwise; six digits are written
    assert [float(row["Probability"]) for row in found] == pytest.approx(expected, abs=1e-5)


def test_a_calibrated_map_is_of_the_same_temperature_and_threshold(adapter, planted, tmp_path):
    plain = predict_slide(planted, classifier(adapter, *read_card(adapter)), Asked(tile_mpp=0.97)).probabilities
    logits = torch.from_numpy(plain[~np.isnan(plain)]).logit()
    middle = float(logits.sort().values[19:21].mean())
    predict(decided(adapter, tmp_path / "own", middle, 4.0), planted, tmp_path / "a.csv", "--calibrated")
    found = rows(tmp_path / "a.csv")
    assert [float(row["Probability"]) for row in found] == pytest.approx((logits / 4).sigmoid().tolist(), abs=1e-5)
    assert [int(row["Pred"]) for row in found] == (logits > middle).int().tolist()
    assert sum(row["Pred"] == "1" for row in found) == 44


@pytest.mark.parametrize(
    ("options", "point", "message"),
    [
        (("--calibrated", "--how", "ensemble"), (0.5, 2.0), "--calibrated needs an adapter's folder"),
        (("--calibrated",), (None, None), "run.json holds no threshold and temperature; a training writes"),
    ],
)
def test_what_was_not_decided_is_refused(adapter, planted, tmp_path, options, point, message):
    own = decided(adapter, tmp_path / "own", *point)
    assert message in predict(own, planted, tmp_path / "a.csv", *options, status=1).stderr


# -- outlines ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_outlines_are_simple_rings_that_enclose_their_cells_and_no_other(seed):
    mask = np.random.default_rng(seed).random((12, 14)) < 0.62
    covered = np.zeros(mask.shape, int)
    for region in regions(mask):
        found = rings(region)
        for ring in found:
            assert ring[0] == ring[-1] and len(set(ring)) == len(ring) - 1
        # drawn at 4 pixels a cell, where the middle of a cell is no line
        canvas = Image.new("1", (14 * 4 + 1, 12 * 4 + 1))
        for number, ring in enumerate(found):
            part = Image.new("1", canvas.size)
            ImageDraw.Draw(part).polygon([(4 * x, 4 * y) for x, y in ring], fill=1, outline=1)
            inside = np.asarray(part)[2::4, 2::4]
            assert number == 0 or not (inside & region).any()
            covered += inside.astype(int) * (1 if number == 0 else -1)
    assert np.array_equal(covered == 1, mask) and covered.min() >= 0


# -- faults ------------------------------------------------------------------------------------------------


def test_a_slide_that_does_not_say_its_microns_asks_for_them(adapter, tmp_path):
    slide = write_svs(tmp_path / "a.svs", tissue(200, 200), power=20)
    text = predict(adapter, slide, tmp_path / "a.csv", status=1).stderr
    assert text.startswith(f"error: {slide}: its metadata do not say the microns per pixel. Give --mpp")
    assert "Its objective was 20×: about --mpp 0.5." in text
    assert list(tmp_path.iterdir()) == [slide]
    printed = predict(adapter, slide, tmp_path / "a.csv", "--mpp", "0.5").stdout
    assert "200×200 pixels of 0.5 microns" in printed


def test_a_slide_coarser_than_the_training_and_a_scale_of_ones_own_are_said(adapter, tmp_path):
    slide = write_svs(tmp_path / "a.svs", tissue(200, 200), 0.5)
    printed = predict(adapter, slide, tmp_path / "a.csv", "--mpp", "2").stdout
    assert "--mpp 2 overrides the slide's metadata, which say 0.5" in printed
    assert "the slide is coarser (2 microns a pixel) than the training patches (0.97)" in printed


def test_without_a_library_the_extra_is_named(monkeypatch, tmp_path):
    def gone(path):
        raise ImportError

    for name in ("_by_openslide", "_by_tiffslide"):
        monkeypatch.setattr(wholeslide, name, gone)
    slide = write_svs(tmp_path / "a.svs", tissue(200, 200), 0.5)
    with pytest.raises(ExampleError, match=r"needs openslide-python or tiffslide: pip install \"convlora\[slides\]\""):
        WholeSlide(slide)


def test_a_file_that_is_no_slide_is_named_with_what_is_read(tmp_path):
    (tmp_path / "a.svs").write_bytes(b"no slide at all")
    with pytest.raises(ExampleError, match=r"a\.svs: cannot be read as a slide \(.*\)\. Aperio"):
        WholeSlide(tmp_path / "a.svs")


def test_a_truncated_slide_is_named_where_it_ends_and_nothing_is_written(adapter, tmp_path):
    slide = write_svs(tmp_path / "a.svs", tissue(2000, 600), 0.97)
    whole = slide.read_bytes()
    slide.write_bytes(whole[: len(whole) // 3] + bytes(len(whole) - len(whole) // 3))
    text = predict(adapter, slide, tmp_path / "a.csv", status=1).stderr
    assert text.startswith(f"error: {slide}: ") and text.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.svs"]


def test_a_slide_of_glass_is_said_to_hold_no_tissue(adapter, tmp_path):
    slide = write_svs(tmp_path / "a.svs", np.full((300, 300, 3), 243, np.uint8), 0.97)
    text = predict(adapter, slide, tmp_path / "a.csv", status=1).stderr
    assert "none of its 16 tiles holds 25% tissue; --tissue 0 takes all." in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mpp", "0"), "--mpp 0.0: must be a number above 0"),
        (("--tile-mpp", "nan"), "--tile-mpp nan: must be a number above 0"),
        (("--stride", "97"), "--stride 97: must be from 1 to 96"),
        (("--tissue", "25"), "--tissue 25.0: must be a share from 0 to 1"),
        (("--threshold", "-1"), "--threshold -1.0: must be a share"),
        (("--how", "balanced"), "uses all images together"),
    ],
)
def test_what_no_slide_can_be_predicted_by_is_refused(adapter, planted, tmp_path, options, message):
    assert message in predict(adapter, planted, tmp_path / "a.csv", *options, status=1).stderr


def test_options_of_slides_are_refused_elsewhere(adapter, tmp_path):
    Image.fromarray(tissue(96, 96)).save(tmp_path / "0.png")
    text = predict(adapter, tmp_path, tmp_path / "a.csv", "--mpp", "0.5", status=1).stderr
    assert "--mpp is for slides" in text


# -- cutting pictures at a magnification -------------------------------------------------------------------


def cuttable(folder, mpp):
    for i, name in enumerate(("a.svs", "b.svs", "c.svs")):
        write_svs(folder / name, tissue(400, 400, i), mpp)
    (folder / "slides.csv").write_text("file,split,centre\na.svs,train,0\nb.svs,val,1\nc.svs,test,2\n")
    return folder


def test_pictures_are_cut_at_the_magnification_that_was_asked_for(tmp_path):
    folder = cuttable(tmp_path, 0.5)
    # 10× is 1 micron a pixel, two of these slides' own: patches of 192 pixels, 96 apart
    expected = cut_slides(folder, tmp_path / "own", patch=192, stride=96)
    assert cut_slides(folder, tmp_path / "ten", patch=96, stride=48, magnification=10) == expected
    for split in ("train", "val", "test"):
        assert (tmp_path / "own" / f"{split}.h5").read_bytes() == (tmp_path / "ten" / f"{split}.h5").read_bytes()


def test_a_magnification_needs_every_pictures_microns(tmp_path):
    folder = cuttable(tmp_path, None)
    with pytest.raises(ExampleError, match=r"a\.svs: a magnification needs the picture's microns per pixel"):
        cut_slides(folder, tmp_path / "out", magnification=10)
    (folder / "slides.csv").write_text("file,split,centre,mpp\na.svs,train,0,0.5\nb.svs,val,1,.5\nc.svs,test,2,0.5\n")
    assert cut_slides(folder, tmp_path / "out", magnification=10, stride=48) == {"train": 9, "val": 9, "test": 9}
    (folder / "slides.csv").write_text("file,split,centre,mpp\na.svs,train,0,half\nb.svs,val,1,.5\nc.svs,test,2,0.5\n")
    with pytest.raises(ExampleError, match="line 2: mpp 'half' is not a number above 0"):
        cut_slides(folder, tmp_path / "out", magnification=10)


def test_what_was_trained_on_pictures_own_pixels_asks_what_they_are(adapter, planted, tmp_path):
    folder = tmp_path / "pictures"
    assert Options(data=folder).recipe().mpp == 0.97
    assert Options(slides=folder, magnification=20).recipe().mpp == 0.5
    assert Options(slides=folder, magnification=20, patch=192).recipe().mpp == 1.0
    assert Options(slides=folder).recipe().mpp is None
    shutil.copytree(adapter, tmp_path / "own")
    card = json.loads((adapter / "run.json").read_text())
    assert card["recipe"]["mpp"] == 0.97
    card["recipe"]["mpp"] = None
    (tmp_path / "own" / "run.json").write_text(json.dumps(card))
    text = predict(tmp_path / "own", planted, tmp_path / "b.csv", status=1).stderr
    assert "does not say the microns per pixel of its training patches: give --tile-mpp." in text
    assert "16 of 20 tiles" in predict(tmp_path / "own", planted, tmp_path / "b.csv", "--tile-mpp", "1.94").stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--patch", "192"), "--patch needs --slides"),
        (("--slides", "x", "--mpp", "1"), "--mpp is for --data"),
        (("--mpp", "-1"), "--mpp -1.0: must be a number above 0"),
    ],
)
def test_options_of_pictures_are_refused_without_them(tmp_path, options, message):
    outcome = CliRunner().invoke(app, ["train", *options, "--out", str(tmp_path / "out")])
    assert outcome.exit_code == 1 and message in outcome.stderr


@pytest.mark.thorough
def test_an_exported_network_maps_a_slide_as_its_adapter_does(adapter, planted, mapped, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if absent(package):
            pytest.skip(str(absent(package)))
    outcome = CliRunner().invoke(app, ["export", str(adapter), "--out", str(tmp_path / "m.onnx")])
    assert outcome.exit_code == 0, outcome.output
    predict(tmp_path / "m.onnx", planted, tmp_path / "m.csv")
    ours, theirs = rows(mapped[1]), rows(tmp_path / "m.csv")
    assert [(a["X"], a["Y"], a["Pred"]) for a in ours] == [(a["X"], a["Y"], a["Pred"]) for a in theirs]
    difference = [abs(float(a["Probability"]) - float(b["Probability"])) for a, b in zip(ours, theirs, strict=True)]
    assert max(difference) < 1e-3


def test_one_batch_is_as_good_as_another(tmp_path):
    slide = write_svs(tmp_path / "a.svs", tissue(400, 400), 1.0)
    maps = [predict_slide(slide, by_colour, Asked(tile_mpp=1.0, batch_size=size)).probabilities for size in (1, 7, 64)]
    for each in maps[1:]:
        np.testing.assert_allclose(each, maps[0], rtol=1e-5)  # a mean in fp32 is taken in another order
