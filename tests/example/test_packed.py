"""Splits packed into one array of bytes."""

from conftest import need_extra

need_extra("histopathology")

import h5py
import numpy as np
import pytest
from layouts import write_challenge, write_pcam, write_wilds

from examples.histopathology.data import packing
from examples.histopathology.data.dataset import HistoDataset, open_splits
from examples.histopathology.data.packing import pack
from examples.histopathology.errors import ExampleError
from examples.histopathology.report.inspection import open_all

SIZES = {"train": 7, "val": 3, "test": 4}


def every(split):
    return split.read(range(len(split)))


def packed(split, folder):
    return pack(split, folder / "packed" / "train.h5").path


@pytest.mark.parametrize("layout", ["float16", "float32", "float64", "uint8", "float32 / 255", "PCam", "WILDS"])
def test_a_packed_split_is_the_split_to_the_bit(tmp_path, layout, monkeypatch):
    monkeypatch.setattr(packing, "BATCH", 3)
    if layout in ("PCam", "WILDS"):
        folder = (write_pcam if layout == "PCam" else write_wilds)(tmp_path / "data", SIZES)
    else:
        folder = write_challenge(tmp_path / "data", SIZES, layout.split()[0], test_labels=False)
    if layout == "float32 / 255":  # divided in single precision, not in double
        with h5py.File(folder / "train.h5", "r+") as file:
            for group in file.values():
                group["img"][...] = np.rint(group["img"][...] * 255).astype("float32") / np.float32(255)
    for name, split in open_all(folder).items():
        done = pack(split, tmp_path / "packed" / f"{name}.h5")
        assert (done.images, done.largest) == (len(split), 0)
    for name, split in open_splits(tmp_path / "packed").items():
        plain = open_all(folder)[name]
        assert split.layout == "packed HDF5"
        assert np.array_equal(every(split), every(plain))
        assert split.ids.tolist() == plain.ids.tolist()
        assert split.rows.labels == plain.rows.labels
        assert split.centres.tolist() == plain.centres.tolist()
        assert (split.rows.slides, split.rows.patients) == (plain.rows.slides, plain.rows.patients)
        assert (split.rows.slides is not None) == (layout == "WILDS")
        few, same = HistoDataset(split.path, None, False, 2), HistoDataset(plain.path, None, False, 2, name)
        assert few.ids.tolist() == same.ids.tolist() and few.rows.slides == same.rows.slides
        assert np.array_equal(every(few), every(same))


def test_numbers_that_bytes_cannot_give_are_refused_and_rounded_on_request(tmp_path):
    path = write_challenge(tmp_path, SIZES) / "train.h5"
    with h5py.File(path, "r+") as file:
        file["5/img"][0, 0, 0] += 1e-3
    split = HistoDataset(path)
    with pytest.raises(ExampleError, match=r"train\.h5: img of key 5 holds values between .* --round rounds each"):
        packed(split, tmp_path)
    assert not list((tmp_path / "packed").iterdir())
    done = pack(split, tmp_path / "packed" / "train.h5", rounded=True)
    assert 1e-3 - 1e-6 < done.largest < 1 / 510
    wanted = np.rint(every(split) * 255).astype(np.float32) / np.float32(255)
    assert np.array_equal(every(HistoDataset(done.path)), wanted)


def test_nothing_but_a_packed_file_is_overwritten(tmp_path):
    split = HistoDataset(write_challenge(tmp_path, SIZES) / "train.h5")
    with pytest.raises(ExampleError, match="exists and is not a packed file"):
        pack(split, split.path)
    assert packed(split, tmp_path) == packed(split, tmp_path)


def test_what_made_the_data_is_kept(tmp_path):
    path = write_challenge(tmp_path, SIZES) / "train.h5"
    with h5py.File(path, "r+") as file:
        file.attrs["source"] = "a program"
    assert HistoDataset(packed(HistoDataset(path), tmp_path)).source == "a program"


FAULTS = {
    "images": (np.zeros((2, 3, 96, 95), np.uint8), r"images has shape \(2, 3, 96, 95\)"),
    "ids": (np.array([4, 4, 5, 6, 7, 8, 9]), "ids are not in rising order"),
    "labels": (np.array([0, 1, 2, 0, 0, 0, 0], np.int8), "the label of id 2 is 2"),
    "centres": (np.zeros(7, np.float32), "centres has dtype float32"),
    "slides": (np.zeros((7, 300), np.uint8), r"slides has shape \(7, 300\)"),
    "patients": (np.zeros((6, 4), np.uint8), r"patients has shape \(6, 4\)"),
    "values": (np.zeros(255, np.float32), r"values has shape \(255,\)"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_file_that_is_packed_otherwise_is_one_error(tmp_path, name):
    path = packed(HistoDataset(write_challenge(tmp_path, SIZES) / "train.h5"), tmp_path)
    array, says = FAULTS[name]
    with h5py.File(path, "r+") as file:
        if name in file:
            del file[name]
        file[name] = array
    with pytest.raises(ExampleError, match=says):
        HistoDataset(path)


def test_images_in_chunks_or_absent_are_refused(tmp_path):
    path = packed(HistoDataset(write_challenge(tmp_path, SIZES) / "train.h5"), tmp_path)
    with h5py.File(path, "r+") as file:
        images = file["images"][...]
        del file["images"]
        file.create_dataset("images", data=images, chunks=(1, 3, 96, 96))
    with pytest.raises(ExampleError, match="images is not contiguous"):
        HistoDataset(path)
    with h5py.File(path, "r+") as file:
        del file["values"]
        del file["images"]
        file["images"] = images
    with pytest.raises(ExampleError, match="there is no array values"):
        HistoDataset(path)


def test_more_images_than_the_file_holds_are_refused(tmp_path):
    path = packed(HistoDataset(write_challenge(tmp_path, SIZES) / "train.h5"), tmp_path)
    with h5py.File(path, "r+") as file:
        del file["images"]
        file.create_dataset("images", (10**6, 3, 96, 96), np.uint8)  # never written
    with pytest.raises(ExampleError, match="more numbers than were written"):
        HistoDataset(path)
