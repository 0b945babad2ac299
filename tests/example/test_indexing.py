"""What is kept of a challenge file between two openings, and reading past HDF5."""

import os

from conftest import need_extra

need_extra("histopathology")

import h5py
import numpy as np
import pytest
from layouts import write_challenge

from examples.histopathology.data import challenge, indexing
from examples.histopathology.data.dataset import HistoDataset
from examples.histopathology.data.layout import read_image
from examples.histopathology.errors import ExampleError


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Every file is worth an entry, however small and new it is; returns where entries lie."""
    monkeypatch.setenv("HISTOPATHOLOGY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(indexing, "WORTH", 1)
    monkeypatch.setattr(indexing, "_SETTLED", -1e12)
    return tmp_path / "cache"


def must_not_be_looked_at(*_):
    raise AssertionError("a group was looked at")


def same(first, second):
    assert first.ids.tolist() == second.ids.tolist()
    assert first.rows.labels == second.rows.labels
    assert first.centres.tolist() == second.centres.tolist()
    assert (first.source, first.rows.notes, first.rows.dtypes) == (second.source, second.rows.notes, second.rows.dtypes)
    every = range(len(first))
    return np.array_equal(first.read(every), second.read(every))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "uint8"])
def test_the_second_opening_gives_the_same_without_looking_at_a_group(tmp_path, kept, monkeypatch, dtype):
    path = write_challenge(tmp_path, {"test": 9}, dtype, test_labels=dtype == "uint8") / "test.h5"
    first = HistoDataset(path, require_labels=False)
    assert len(list(kept.iterdir())) == 1
    monkeypatch.setattr(challenge, "read_row", must_not_be_looked_at)
    assert same(first, HistoDataset(path, require_labels=False))
    few = HistoDataset(path, require_labels=False, limit=4)
    monkeypatch.undo()
    monkeypatch.setenv("HISTOPATHOLOGY_CACHE", str(tmp_path / "none"))
    assert same(few, HistoDataset(path, require_labels=False, limit=4))


def test_a_file_of_the_same_size_and_time_is_looked_at_anew(tmp_path, kept):
    path = write_challenge(tmp_path, {"train": 6}) / "train.h5"
    before = path.stat()
    HistoDataset(path)
    with h5py.File(path, "r+") as file:
        file["3/label"][()] = 0
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns
    assert HistoDataset(path).labels[3] == 0


def test_a_file_that_was_just_written_leaves_nothing(tmp_path, kept, monkeypatch):
    monkeypatch.setattr(indexing, "_SETTLED", 1e12)
    HistoDataset(write_challenge(tmp_path, {"train": 6}) / "train.h5")
    assert not kept.exists()


@pytest.mark.parametrize("damage", [lambda old: old[: len(old) // 2], lambda old: b"", lambda old: b"x" * len(old)])
def test_a_damaged_entry_counts_as_none(tmp_path, kept, damage):
    path = write_challenge(tmp_path, {"train": 6}) / "train.h5"
    first = HistoDataset(path)
    (entry,) = kept.iterdir()
    entry.write_bytes(damage(entry.read_bytes()))
    assert same(first, HistoDataset(path))


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, kept):
    kept.write_text("a file where the folder would be")
    assert len(HistoDataset(write_challenge(tmp_path, {"train": 6}) / "train.h5")) == 6


def test_a_part_of_a_file_leaves_nothing(tmp_path, kept):
    HistoDataset(write_challenge(tmp_path, {"train": 6}) / "train.h5", limit=3)
    assert not kept.exists()


@pytest.mark.parametrize("stored", ["<f2", "<f4", "<f8", "u1", ">f4", "gzip", "block of its own"])
def test_what_is_read_past_hdf5_is_what_hdf5_reads(tmp_path, stored):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 96, 96), np.uint8)
    floats = pixels / 255
    block = {"userblock_size": 512} if stored == "block of its own" else {}
    with h5py.File(tmp_path / "train.h5", "w", **block) as file:
        for i in range(3):
            image = pixels[i] if stored == "u1" else floats[i].astype(stored if stored[0] in "<>" else "f4")
            file.create_dataset(f"{i}/img", data=image, compression="gzip" if stored == "gzip" else None)
            file[f"{i}/label"] = i % 2
    data = HistoDataset(tmp_path / "train.h5")
    assert (data.rows._offsets >= 0).all() == (stored in ("<f2", "<f4", "<f8", "u1"))
    oracle = np.empty((3, 3, 96, 96), np.float32)
    with h5py.File(tmp_path / "train.h5") as file:
        for i in range(3):
            read_image(file.id, b"%d" % i, oracle[i], tmp_path)
    assert np.array_equal(data.read(range(3)), oracle)


def test_a_file_that_was_cut_short_meanwhile_is_one_error(tmp_path):
    path = write_challenge(tmp_path, {"train": 3}, scrambled=False) / "train.h5"
    data = HistoDataset(path)
    data.read([0])
    os.truncate(path, int(data.rows._offsets[2]) + 100)
    with pytest.raises(ExampleError, match=r"train\.h5: key 2 cannot be read \(the file ends early\)"):
        data.read([2])
