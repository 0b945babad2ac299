"""The synthetic data set: deterministic, labelled as said, in the challenge's layout."""

import json
import subprocess
import sys

from conftest import need_extra

need_extra("histopathology")

import h5py
import numpy as np
import pytest

from examples.histopathology.data.dataset import HistoDataset, open_splits
from examples.histopathology.errors import ExampleError
from examples.histopathology.making import synthetic
from examples.histopathology.making.hospitals import HOSPITALS, PUBLISHED, _slide
from examples.histopathology.making.nuclei import FIBROBLAST, LYMPHOCYTE, choose_cells, draw, tumour_kind
from examples.histopathology.making.synthetic import make_synthetic, render_patch
from examples.histopathology.making.tissue import Tissue, without_margin
from examples.histopathology.making.writing import SplitWriter

TUMOUR = tumour_kind(1.0)
SIZES = {"train": 40, "val": 12, "test": 12}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    make_synthetic(folder, SIZES, processes=1)
    return folder


def contents(folder):
    """Every array of every split."""
    found = {}
    for split in SIZES:
        with h5py.File(folder / f"{split}.h5", "r") as file:
            file.visititems(
                lambda name, item, split=split: found.update(
                    {f"{split}/{name}": item[()]} if isinstance(item, h5py.Dataset) else {}
                )
            )
    return found


def assert_same(a, b):
    a, b = contents(a), contents(b)
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("processes", [2])
def test_the_bits_do_not_depend_on_the_number_of_processes(made, tmp_path, processes):
    make_synthetic(tmp_path, SIZES, processes=processes)
    assert_same(made, tmp_path)


def test_workers_do_not_import_torch():
    # Each of them would spend seconds and hundreds of megabytes on it.
    code = "import sys, examples.histopathology.making.synthetic; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_patch_depends_on_seed_split_and_index_alone(made):
    data = HistoDataset(made / "val.h5")
    patch = render_patch(0, "val", 7)  # alone, not after the six before it
    assert np.array_equal(np.rint(data.read([7])[0] * 255), patch.image)
    assert not np.array_equal(patch.image, render_patch(1, "val", 7).image)
    assert not np.array_equal(patch.image, render_patch(0, "val", 8).image)


def test_the_layout_is_the_challenges(made):
    with h5py.File(made / "train.h5", "r") as file:
        assert sorted(file, key=int) == [str(i) for i in range(40)]
        for group in file.values():
            assert sorted(group) == ["img", "label", "metadata"]
            assert group["img"].shape == (3, 96, 96) and group["img"].dtype == "float32"
            assert group["label"].shape == () and group["label"].dtype == "int64"
            assert group["metadata"].shape == (4,)
            assert 0 <= group["img"][()].min() < group["img"][()].max() <= 1


def test_centres_are_those_of_the_split_and_labels_balanced(made):
    for split, data in open_splits(made).items():
        assert set(data.centres.tolist()) <= {c for c, h in HOSPITALS.items() if h.split == split}
        assert int(data.labels.sum()) * 2 == len(data)
        assert "synthetic" in data.source


def test_no_slide_is_in_two_splits(made):
    slides = {
        split: {int(v[1]) for k, v in contents(made).items() if k.startswith(split) and k.endswith("metadata")}
        for split in SIZES
    }
    assert not slides["train"] & slides["val"] and not slides["train"] & slides["test"]
    assert not slides["val"] & slides["test"] and len(slides["train"]) > 3


def test_the_label_is_tumour_in_the_central_32_pixels():
    outside = 0
    for index in range(60):
        patch = render_patch(3, "train", index)
        assert patch.label == int(patch.tumour[32:64, 32:64].any())
        outside += patch.label == 0 and patch.tumour.any()
    assert outside > 3  # the distractor: tumour that the label ignores


def test_tumour_outside_the_centre_comes_close_and_no_nucleus_of_it_reaches_in():
    region = np.ones((120, 120), bool)
    near = 0
    for seed in range(30):
        tissue = Tissue(np.random.default_rng(seed), 1.0, tumour_kind(1.0), 0.25)
        mask, seed_point = tissue._tumour_region(0)
        assert seed_point is None and not without_margin(mask)[32:64, 32:64].any()
        near += without_margin(mask)[28:68, 28:68].any()
        tissue._tumour_nuclei(region, None)  # even where the region covers the centre
        assert without_margin(tissue.haematoxylin)[32:64, 32:64].max() <= np.float32(0.03)
        assert tissue.haematoxylin.max() > 0.3
    assert near > 3


def test_label_one_always_shows_a_tumour_nucleus_in_the_centre():
    for seed in range(30):
        tissue = Tissue(np.random.default_rng(seed), 1.0, tumour_kind(0.2), 0.25)
        _, point = tissue._tumour_region(1)
        tissue._tumour_nuclei(np.zeros((120, 120), bool), point)  # no region: the one nucleus alone
        assert without_margin(tissue.haematoxylin)[32:64, 32:64].max() > 0.2


@pytest.mark.parametrize("kind", [LYMPHOCYTE, TUMOUR, FIBROBLAST], ids=["lymphocyte", "tumour", "fibroblast"])
def test_nuclei_have_the_area_of_their_diameter(kind):
    rng = np.random.default_rng(0)
    cells = choose_cells(rng, kind, rng.uniform(20, 90, (200, 2)), 1.0, None)
    bodies = draw(rng, kind, cells)[:, 0]
    areas, wanted = bodies.sum((1, 2)), np.pi * cells.radius**2
    # Two kinds of waves of depth d add d² of the area; pixels and the soft edge cost a few percent of a small one.
    np.testing.assert_allclose(areas.mean(), (wanted * (1 + kind.irregular**2)).mean(), rtol=0.05)
    border = np.concatenate([bodies[:, 0], bodies[:, -1], bodies[:, :, 0], bodies[:, :, -1]])
    assert border.max() == 0  # the window holds all of it


def test_slides_of_a_hospital_differ_in_stain_scan_and_tumour():
    slides = [_slide(0, 4, number) for number in range(HOSPITALS[4].slides)]
    for name in ("jpeg", "blur", "microns", "tumour_eosin"):
        assert len({getattr(slide, name) for slide in slides}) > 5
    assert len({slide.tumour.diameter for slide in slides}) == len(slides)
    assert _slide(0, 4, 0) is _slide(0, 4, 0) and (_slide(1, 4, 0).white != _slide(0, 4, 0).white).any()


@pytest.mark.thorough
def test_colours_are_the_challenges():
    means = {}
    for split in SIZES:
        images = np.stack([render_patch(0, split, index).image for index in range(200)]) / 255
        means[split] = images.mean((0, 2, 3))
        if split in PUBLISHED:
            # Published to .005; 200 patches whose means differ by .09 have a standard error of .006, and the few
            # slides that a hospital sent move its mean by about .01.
            np.testing.assert_allclose(means[split], PUBLISHED[split][0], atol=0.02)
            # Spreads stay below green's published one: see benchmarks/colours.py.
            np.testing.assert_allclose(images.std((0, 2, 3)), PUBLISHED[split][1], atol=0.03)
    assert (means["val"] < means["test"]).all() and means["test"][2] > means["test"][0]  # paler, and bluer


def test_the_same_request_is_not_rendered_twice(made, monkeypatch):
    monkeypatch.setattr(synthetic, "_render_all", lambda *_: pytest.fail("rendered again"))
    assert make_synthetic(made, SIZES) == made / "synthetic.json"


def test_another_request_replaces_files_and_note(tmp_path):
    sizes = dict.fromkeys(SIZES, 2)
    make_synthetic(tmp_path, sizes, processes=1)
    done = []
    make_synthetic(tmp_path, sizes, seed=5, dtype="uint8", processes=1, progress=done.append)
    note = json.loads((tmp_path / "synthetic.json").read_text())
    assert note["synthetic"] is True and note["seed"] == 5 and note["sizes"] == sizes and note["dtype"] == "uint8"
    assert note["version"] == synthetic.VERSION
    assert done == [1, 2, 3, 4, 5, 6]
    with h5py.File(tmp_path / "val.h5", "r") as file:
        assert file["0/img"].dtype == "uint8"


def test_an_interrupted_run_leaves_no_note_and_can_be_repeated(tmp_path):
    sizes = dict.fromkeys(SIZES, 2)
    make_synthetic(tmp_path, sizes, processes=1)

    def stop(done):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_synthetic(tmp_path, sizes, seed=1, processes=1, progress=stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["test.h5", "train.h5", "val.h5"]
    make_synthetic(tmp_path, sizes, seed=1, processes=1)
    assert (tmp_path / "synthetic.json").exists()


def test_real_data_is_never_overwritten(tmp_path):
    with SplitWriter(tmp_path, "test") as writer:
        writer.add(np.zeros((3, 96, 96)), None, [2])
    before = (tmp_path / "test.h5").read_bytes()
    with pytest.raises(ExampleError, match=r"test\.h5 exists"):
        make_synthetic(tmp_path, SIZES)
    assert [p.name for p in tmp_path.iterdir()] == ["test.h5"]
    assert (tmp_path / "test.h5").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": {"train": 2}}, "for each of train, val, test"),
        ({"sizes": SIZES | {"val": 0}}, "1 or more"),
        ({"seed": -1}, "seed=-1"),
        ({"dtype": "int8"}, "dtype='int8'"),
    ],
)
def test_faults_are_named(tmp_path, change, message):
    with pytest.raises(ExampleError, match=message):
        make_synthetic(tmp_path, **({"sizes": dict.fromkeys(SIZES, 1), "processes": 1} | change))
    assert not list(tmp_path.iterdir())
