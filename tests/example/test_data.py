"""The reader and the writer of the challenge's files, and stains."""

import multiprocessing
import pickle
import shutil

from conftest import need_extra, thorough

need_extra("histopathology")

import h5py
import numpy as np
import pytest
import torch
from laws import given, st
from layouts import write_pcam
from torch.utils.data import DataLoader
from toy_patches import write_toy

from examples.histopathology.data import stain
from examples.histopathology.data.dataset import HistoDataset, find_splits, open_splits
from examples.histopathology.errors import ExampleError
from examples.histopathology.making.writing import SplitWriter

SHAPE = (3, 96, 96)


def image(value, dtype="float32"):
    return np.full(SHAPE, value, dtype)


def write_raw(path, keys, *, img=None, label=1, metadata=(3, 7, 0, 0)):
    """A file written with h5py alone, as an independent oracle of the layout."""
    with h5py.File(path, "w") as file:
        for i, key in enumerate(keys):
            group = file.create_group(key)
            if img is not False:
                group["img"] = image(i / 100) if img is None else img
            if label is not None:
                group["label"] = label
            if metadata is not None:
                group["metadata"] = np.asarray(metadata)
    return path


@pytest.fixture
def split(tmp_path):
    with SplitWriter(tmp_path, "train") as writer:
        for i in range(12):
            writer.add(image(i / 100), i % 2, [i % 3, 5])
    return tmp_path / "train.h5"


def test_a_sample_is_image_label_and_index(split):
    data = HistoDataset(split)
    pixels, label, index = data[7]
    assert len(data) == 12 and index == 7
    assert pixels.shape == SHAPE and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, torch.full(SHAPE, 0.07))
    assert label.shape == () and label.dtype == torch.float32 and label == 1
    assert data.labels.tolist() == [0, 1] * 6
    assert data.centres.tolist() == [0, 1, 2] * 4
    assert data.ids.dtype == np.int64 and data.labels.dtype == data.centres.dtype == torch.int64


def test_keys_are_ordered_as_integers_and_pixels_follow(tmp_path):
    keys = [str(k) for k in (100, 2, 10, 0, 1)]
    data = HistoDataset(write_raw(tmp_path / "train.h5", keys))
    assert data.ids.tolist() == [0, 1, 2, 10, 100]
    assert [round(float(data[i][0].mean()), 4) for i in range(5)] == [0.03, 0.04, 0.01, 0.02, 0.0]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "uint8", ">f4"])
def test_every_stored_dtype_reads_as_the_same_float32(tmp_path, dtype):
    eighths = np.random.default_rng(0).integers(0, 9, SHAPE) / 8  # exact in float16
    stored = np.rint(eighths * 255).astype("uint8") if dtype == "uint8" else eighths.astype(dtype)
    data = HistoDataset(write_raw(tmp_path / "train.h5", ["0"], img=stored))
    wanted = stored.astype("float32") / 255 if dtype == "uint8" else eighths.astype("float32")
    assert torch.equal(data[0][0], torch.from_numpy(wanted))


def test_a_batch_read_equals_single_reads(split):
    data = HistoDataset(split, transform=lambda x: x * 2)
    for i, sample in zip([5, 0, 11], data.__getitems__([5, 0, 11]), strict=True):
        assert torch.equal(sample[0], data[i][0]) and sample[2] == i
    assert data[-1][2] == 11


def test_an_absent_label_is_nan_where_labels_are_not_required(tmp_path):
    data = HistoDataset(write_raw(tmp_path / "test.h5", ["0"], label=None, metadata=None), require_labels=False)
    assert data.labels is None and torch.isnan(data[0][1])
    assert data.centres.tolist() == [-1]


def test_limit_keeps_a_fixed_choice_in_order(split):
    few, again = HistoDataset(split, limit=5), HistoDataset(split, limit=5)
    assert len(few) == 5 and few.ids.tolist() == again.ids.tolist() == sorted(few.ids.tolist())
    assert few.labels.tolist() == [i % 2 for i in few.ids]
    assert len(HistoDataset(split, limit=99)) == 12
    with pytest.raises(ExampleError, match="limit=0"):
        HistoDataset(split, limit=0)


def test_an_open_file_is_not_pickled(split):
    data = HistoDataset(split)
    first = data[3]
    assert data.rows._handle._file is not None
    copy = pickle.loads(pickle.dumps(data))
    assert copy.rows._handle._file is None
    assert torch.equal(copy[3][0], first[0])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # meant: fork inherits the open handle
@pytest.mark.parametrize("context", [thorough("spawn"), "fork"])
def test_workers_read_what_the_main_process_reads(split, context):
    data = HistoDataset(split)
    alone = [batch[0] for batch in DataLoader(data, batch_size=5)]  # also opens the parent's handle
    loader = DataLoader(data, batch_size=5, num_workers=2, multiprocessing_context=context)
    assert all(torch.equal(a, b[0]) for a, b in zip(alone, loader, strict=True))


# -- faults of the file ------------------------------------------------------------------------------------


def test_missing_file(tmp_path):
    with pytest.raises(ExampleError, match=r"val\.h5: no such file"):
        HistoDataset(tmp_path / "val.h5")


def test_truncated_file(split, tmp_path):
    cut = tmp_path / "cut.h5"
    cut.write_bytes(split.read_bytes()[:50_000])
    with pytest.raises(ExampleError, match=r"cut\.h5 is an HDF5 file that cannot be read.*truncated"):
        HistoDataset(cut)


def test_not_hdf5(tmp_path):
    (tmp_path / "train.h5").write_text("<html>404</html>")
    with pytest.raises(ExampleError, match=r"is not an HDF5 file. It begins with b'<html>404</html>': get the file"):
        HistoDataset(tmp_path / "train.h5")


@pytest.mark.parametrize(
    ("name", "begins", "remedy"),
    [
        ("a.svs", b"II*\0", "looks like a slide: `predict` takes slides; to train on slides"),
        ("a.NDPI", b"II*\0", "looks like a slide"),
        ("a.png", b"\x89PNG", "looks like a picture: `predict` takes a folder of tiles"),
        ("a.h5", b"\x1f\x8b\x08\x00", "is compressed: run `gunzip`"),
        ("a.h5", b"version https://git-lfs.github.com/spec/v1", "run `git lfs pull`"),
        ("a.h5", b"", "is empty: get it again"),
    ],
)
def test_a_file_of_another_kind_is_told_what_to_do_with_and_not_called_damaged(tmp_path, name, begins, remedy):
    (tmp_path / name).write_bytes(begins)
    with pytest.raises(ExampleError, match=rf"{name} is not an HDF5 file. .*{remedy}") as caught:
        HistoDataset(tmp_path / name)
    assert "damaged" not in str(caught.value) and "truncated" not in str(caught.value)


@pytest.mark.parametrize("value", ["1", "tumor", np.array([b"1"])], ids=["text", "word", "bytes"])
@pytest.mark.parametrize("name", ["label", "metadata", "img"])
def test_text_in_place_of_numbers_is_told_what_to_write_and_not_called_damaged(tmp_path, name, value):
    write_toy(tmp_path, {"val": 2})
    with h5py.File(tmp_path / "val.h5", "r+") as file:
        del file["1"][name]
        file["1"][name] = value
    with pytest.raises(
        ExampleError, match=rf"key 1 cannot be read \({name} is text\)\. Write numbers .*0 or 1"
    ) as caught:
        HistoDataset(tmp_path / "val.h5")
    assert "damaged" not in str(caught.value) and "compression" not in str(caught.value)


def test_text_labels_of_pcam_are_told_the_same(tmp_path):
    path = write_pcam(tmp_path, {"val": 4}) / "camelyonpatch_level_2_split_valid_x.h5"
    with h5py.File(str(path).replace("_x", "_y"), "r+") as file:
        del file["y"]
        file["y"] = np.array([b"0", b"1", b"0", b"1"])
    with pytest.raises(ExampleError, match=r"valid_y\.h5: y cannot be read \(y is text\)\. Write numbers"):
        HistoDataset(path)


@pytest.mark.parametrize(
    ("keys", "parts", "message"),
    [
        ([], {}, "holds no image"),
        (["0", "abc"], {}, "key 'abc' is not a decimal integer"),
        (["0", "-1"], {}, "key '-1' is not a decimal integer"),
        (["٣"], {}, "not a decimal integer"),
        (["9" * 19], {}, "not a decimal integer"),
        (["1", "01"], {}, "same integer"),
        (["0"], {"img": False}, "key 0 has no img"),
        (["4"], {"img": np.zeros((96, 96, 3), "f4")}, r"img of key 4 has shape \(96, 96, 3\)"),
        (["0"], {"img": np.zeros(SHAPE, "int32")}, "img of key 0 has dtype int32"),
        (["0"], {"label": 2}, "label of key 0 is 2"),
        (["0"], {"label": float("nan")}, "label of key 0 is nan"),
        (["0"], {"label": [0, 1]}, r"label of key 0 is \[0, 1\]"),
        (["0", "1"], {"label": None}, "key 0 has no label .2 of 2"),
        (["0"], {"metadata": [float("nan")]}, "metadata of key 0 begins with nan"),
        (["0"], {"metadata": [0.5]}, "metadata of key 0 begins with 0.5"),
    ],
)
def test_construction_names_file_and_key(tmp_path, keys, parts, message):
    path = write_raw(tmp_path / "train.h5", keys, **parts)
    with pytest.raises(ExampleError, match=message) as caught:
        HistoDataset(path)
    assert str(path) in str(caught.value)


def test_a_key_that_is_no_group(tmp_path):
    with h5py.File(tmp_path / "train.h5", "w") as file:
        file["0"] = 1.0
    with pytest.raises(ExampleError, match="key 0 is not a group"):
        HistoDataset(tmp_path / "train.h5")


def test_img_that_is_a_group(tmp_path):
    with h5py.File(tmp_path / "train.h5", "w") as file:
        file.create_group("0/img")
    with pytest.raises(ExampleError, match=r"key 0 cannot be read .*img is not an array"):
        HistoDataset(tmp_path / "train.h5")


@pytest.mark.parametrize("label", [True, np.float32(1), np.array([1]), np.uint8(1)])
def test_a_label_may_be_any_single_number(tmp_path, label):
    assert HistoDataset(write_raw(tmp_path / "train.h5", ["0"], label=label)).labels.tolist() == [1]


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.5, 255.0])
def test_pixels_outside_the_unit_interval_name_the_key(tmp_path, value):
    pixels = image(0.5)
    pixels[1, 2, 3] = value
    with h5py.File(write_raw(tmp_path / "train.h5", ["0", "17"]), "r+") as file:
        file["17/img"][...] = pixels
    data = HistoDataset(tmp_path / "train.h5")
    data[0]
    with pytest.raises(ExampleError, match=r"train\.h5: img of key 17 has values"):
        data.__getitems__([0, 1])


# -- folders -----------------------------------------------------------------------------------------------


def test_splits_are_found_by_name_or_by_stem(split, tmp_path):
    shutil.copy(split, tmp_path / "camelyon17_Val.hdf5")
    shutil.copy(split, tmp_path / "TEST_final.h5")
    assert {k: p.name for k, p in find_splits(tmp_path).items()} == {
        "train": "train.h5",
        "val": "camelyon17_Val.hdf5",
        "test": "TEST_final.h5",
    }
    opened = open_splits(tmp_path, limit=3, transforms={"val": lambda x: x - 1})
    assert [len(d) for d in opened.values()] == [3, 3, 3]
    assert opened["val"][0][0].max() < 0 <= opened["train"][0][0].min()


def test_two_files_for_one_split_are_named(split, tmp_path):
    for name in ("val_a.h5", "val_b.h5"):
        shutil.copy(split, tmp_path / name)
    with pytest.raises(ExampleError, match=r"val_a\.h5, val_b\.h5 could each be the val split"):
        find_splits(tmp_path)


def test_missing_splits_are_named(split, tmp_path):
    with pytest.raises(ExampleError, match=r"no val\.h5, test\.h5 \(found: train\.h5\)"):
        open_splits(tmp_path)
    with pytest.raises(ExampleError, match="no such folder"):
        open_splits(tmp_path / "elsewhere")


def test_only_the_test_split_may_come_without_labels(split, tmp_path):
    shutil.copy(split, tmp_path / "val.h5")
    write_raw(tmp_path / "test.h5", ["0"], label=None)
    assert open_splits(tmp_path)["test"].labels is None
    write_raw(tmp_path / "val.h5", ["0"], label=None)
    with pytest.raises(ExampleError, match=r"val\.h5: key 0 has no label"):
        open_splits(tmp_path)


# -- writing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "uint8"])
def test_the_writer_keeps_the_exact_layout(tmp_path, dtype):
    with SplitWriter(tmp_path, "val", dtype, source="a test") as writer:
        assert writer.add(image(0.25), 1, [4.0, 2.0]) == 0
        assert writer.add(image(64, "uint8"), None, np.array([1, 2, 3])) == 1
    with h5py.File(tmp_path / "val.h5", "r") as file:
        assert sorted(file) == ["0", "1"] and file.attrs["source"] == "a test"
        assert sorted(file["0"]) == ["img", "label", "metadata"] and sorted(file["1"]) == ["img", "metadata"]
        assert file["0/img"].shape == SHAPE and file["0/img"].dtype == dtype
        assert file["0/label"].shape == () and file["0/label"].dtype == "int64"
        assert file["0/metadata"].ndim == 1 and file["0/metadata"][0] == 4
        scale = 255 if dtype == "uint8" else 1
        # One step of 8 bits either way: 0.25 is 63.75 of 255.
        np.testing.assert_allclose(file["0/img"][0, 0, 0] / scale, 0.25, atol=1 / 255)
    data = HistoDataset(tmp_path / "val.h5", require_labels=False)
    assert data.source == "a test" and data.centres.tolist() == [4, 1]


def test_a_failing_write_leaves_nothing_new_behind(split, tmp_path):
    before = split.read_bytes()
    with pytest.raises(KeyboardInterrupt), SplitWriter(tmp_path, "val") as writer:
        writer.add(image(0), 0, [0])
        assert (tmp_path / "val.h5.partial").exists()
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="shape"), SplitWriter(tmp_path, "val") as writer:
        writer.add(np.zeros((96, 96, 3)), 0, [0])
    with pytest.raises(ExampleError, match="no image was added"), SplitWriter(tmp_path, "val"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["train.h5"] and split.read_bytes() == before


def test_a_file_of_another_origin_is_not_overwritten(split, tmp_path):
    before = split.read_bytes()
    with pytest.raises(ExampleError, match=r"train\.h5 exists"), SplitWriter(tmp_path, "train", source="other"):
        pass
    assert split.read_bytes() == before


def test_the_writer_refuses_unknown_names(tmp_path):
    with pytest.raises(ExampleError, match="split='valid'"):
        SplitWriter(tmp_path, "valid")
    with pytest.raises(ExampleError, match="dtype='int8'"):
        SplitWriter(tmp_path, "val", "int8")
    (tmp_path / "file").touch()
    with pytest.raises(ExampleError, match="cannot be written"), SplitWriter(tmp_path / "file", "val"):
        pass


# -- stains ------------------------------------------------------------------------------------------------

TURNED = stain.unit_rows([(0.55, 0.74, 0.38), (0.20, 0.88, 0.43)])


@given(st.integers(0, 2**32 - 1), st.floats(0.8, 1.0))
def test_density_and_intensity_are_inverse(seed, white):
    light = np.random.default_rng(seed).uniform(0.01, white, (5, 3))
    back = stain.intensity(stain.optical_density(light, white), white)
    np.testing.assert_allclose(back, light, rtol=1e-12)


@given(st.integers(0, 2**32 - 1))
def test_concentrations_are_least_squares(seed):
    rng = np.random.default_rng(seed)
    density = rng.uniform(0, 1, (7, 3))
    oracle = np.linalg.lstsq(stain.RUIFROK.T, density.T, rcond=None)[0].T
    np.testing.assert_allclose(stain.concentrations(density, stain.RUIFROK), oracle, atol=1e-10)


@given(st.integers(0, 2**32 - 1), st.sampled_from([stain.RUIFROK, TURNED]), st.booleans())
def test_macenko_finds_the_stains_that_mixed_the_pixels(seed, stains, swap):
    rng = np.random.default_rng(seed)
    amounts = rng.uniform(0.3, 1.0, (4000, 2)) * np.eye(2)[rng.integers(0, 2, 4000)]
    amounts[:400] = rng.uniform(0.2, 1.0, (400, 2))
    found = stain.macenko_stains((amounts[:, ::-1] @ stains[::-1]) if swap else amounts @ stains)
    # Pure pixels lie exactly on the stains, so only rounding separates them.
    np.testing.assert_allclose(found, stains, atol=1e-6)


def test_macenko_refuses_gray_and_empty():
    gray = np.random.default_rng(0).uniform(0.2, 1, (500, 1)) * np.ones(3)
    with pytest.raises(ValueError, match="one hue"):
        stain.macenko_stains(gray)
    with pytest.raises(ValueError, match="only 0 pixels"):
        stain.macenko_stains(np.zeros((500, 3)))
