"""PCam's HDF5 files as `Rows`: all images of a split in one array, the labels in a file beside it.

``camelyonpatch_level_2_split_{train,valid,test}_x.h5`` holds ``x`` (N, 96, 96, 3) uint8, and ``..._y.h5`` holds
``y`` (N, 1, 1, 1), 0 or 1. A file that holds both arrays is read too. No file names a hospital, so every image has
the same centre, `NO_CENTRE`, and no shift between hospitals can be measured.

B. S. Veeling et al. Rotation equivariant CNNs for digital pathology. MICCAI 2018, arXiv:1806.03962.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from h5py import h5d, h5s

from ..errors import ExampleError
from .layout import FAULTS, PATCH, brief, is_array, open_file, read_source, remedy
from .rows import NO_CENTRE, Handle, Rows, choose
from .stored import DEFLATE, check_chunks, open_array

NOTE = "PCam names no centre: all images count as one hospital, so no shift between hospitals can be measured"
_SHAPE = (PATCH, PATCH, 3)
_MOST_IMAGES = 256 * math.prod(_SHAPE)
"""The most bytes that are inflated to read an image: chunks of up to 256 images."""
_WORDS = {"train": ("train",), "val": ("valid", "val"), "test": ("test",)}


class PcamRows(Rows):
    """One split of PCam.

    Args:
        path: the file of the images, ``..._x.h5``.
        limit: see `rows.choose`.

    Raises:
        ExampleError: no ``x``, or ``x`` of another shape or dtype; labels of another number, or other than 0 and 1.
    """

    layout = "PCam HDF5"

    def __init__(self, path: Path, limit: int | None = None) -> None:
        super().__init__(path)
        self._handle = Handle(path)
        with open_file(path) as file:
            images = _images(file, path)
            self.source = read_source(file)
            count = int(images.shape[0])
            labels = _read_labels(file, path, count)
        self.ids = choose(count, limit, path)
        self.labels = [None] * len(self.ids) if labels is None else labels[self.ids].tolist()
        self.centres = np.full(len(self.ids), NO_CENTRE, np.int64)
        self.dtypes["uint8"] = len(self.ids)
        self.shape = _SHAPE
        self.notes = [NOTE]

    def read(self, index: int, out: npt.NDArray[np.float32]) -> None:
        """Read one image into `out`, channel first."""
        stored = np.empty((1, *_SHAPE), np.uint8)
        row = int(self.ids[index])
        try:
            data = h5d.open(self._handle(), b"x")  # checked by `_images`
            _check_row(data, row, self.path)
            where = data.get_space()
            where.select_hyperslab((row, 0, 0, 0), stored.shape)
            data.read(h5s.create_simple(stored.shape), where, stored)
        except FAULTS as error:
            raise ExampleError(
                f"{self.path}: row {row} of x cannot be read ({brief(error)}). {remedy(error)}"
            ) from error
        np.divide(stored[0].transpose(2, 0, 1), np.float32(255), out=out)

    def name(self, index: int) -> str:
        """The image's row."""
        return f"row {self.ids[index]} of x"


def is_pcam(path: Path) -> bool:
    """Whether an HDF5 file holds one array of all images or labels, rather than a group per image."""
    with open_file(path) as file:
        return any(is_array(file, name) for name in ("x", "y"))


def find(files: list[Path]) -> dict[str, Path]:
    """A folder's files of PCam images by split; empty if there are none.

    Raises:
        ExampleError: two files for one split, or files that are still compressed.
    """
    found: dict[str, Path] = {}
    for path in files:
        split = _split_of(path.name.removesuffix(".gz"))
        if split is None:
            continue
        if path.suffix == ".gz":
            raise ExampleError(f"{path} is compressed: run `gunzip` on PCam's files first.")
        if split in found:
            raise ExampleError(f"{path.parent}: {found[split].name} and {path.name} are both the {split} split.")
        found[split] = path
    return {split: found[split] for split in _WORDS if split in found}


def labels_path(path: Path) -> Path:
    """The path of the labels of ``..._x.h5``: ``..._y.h5`` beside it."""
    return path.with_name(f"{path.stem.removesuffix('_x')}_y{path.suffix}")


def _split_of(name: str) -> str | None:
    stem, _, suffix = name.lower().rpartition(".")
    if suffix not in ("h5", "hdf5") or not stem.endswith("_x"):
        return None
    return next((split for split, words in _WORDS.items() for word in words if word in stem.split("_")), None)


def _images(file: h5py.File, path: Path) -> Any:
    names = _names(file, path)
    if "x" not in names:
        raise ExampleError(f"{path} has no array x, only {', '.join(names)}. Name the file of the images, ..._x.h5.")
    images = _checked_array(file, "x", path, _MOST_IMAGES)
    shape, dtype = tuple(images.shape), images.dtype
    if len(shape) != 4 or shape[1:] != _SHAPE or dtype != np.uint8 or not shape[0]:
        raise ExampleError(f"{path}: x has shape {shape} and dtype {dtype}; PCam has (N, 96, 96, 3), uint8.")
    if math.prod(shape) > DEFLATE * path.stat().st_size:
        raise ExampleError(f"{path}: x has shape {shape}, more images than a file of this size can hold.")
    _check_row(images, 0, path)  # finds unreadable chunks before training begins
    return images


def _check_row(images: Any, row: int, path: Path) -> None:
    try:
        check_chunks(images, "x", (row, 0, 0, 0), (1, *_SHAPE), _MOST_IMAGES)
    except FAULTS as error:
        raise _row_fault(path, row, error) from error


def _row_fault(path: Path, row: int, error: BaseException) -> ExampleError:
    return ExampleError(f"{path}: row {row} of x cannot be read ({brief(error)}). {remedy(error)}")


def _names(file: h5py.File, path: Path) -> list[str]:
    try:
        return [str(name) for name in file]  # h5py returns bytes where a name is not UTF-8
    except FAULTS as error:
        raise ExampleError(f"{path}: its names cannot be read ({brief(error)}). Get the file again.") from error


def _checked_array(file: h5py.File, name: str, path: Path, most: int) -> Any:
    try:
        return open_array(file.id, name.encode(), most)
    except FAULTS as error:
        raise ExampleError(f"{path}: {name} cannot be read ({brief(error)}). {remedy(error)}") from error


def _read_labels(file: h5py.File, path: Path, count: int) -> npt.NDArray[np.int64] | None:
    if "y" in _names(file, path):
        return _labels(file, path, count)
    beside = labels_path(path)
    if not beside.is_file():
        return None
    with open_file(beside) as other:
        names = _names(other, beside)
        if "y" not in names:
            raise ExampleError(f"{beside} has no array y, only {', '.join(names) or 'nothing'}.")
        return _labels(other, beside, count)


def _labels(file: h5py.File, path: Path, count: int) -> npt.NDArray[np.int64]:
    most = max(2**20, 16 * count)  # twice eight bytes a label, or the size of h5py's chunks
    labels = _checked_array(file, "y", path, most)
    shape = tuple(labels.shape)
    if shape[:1] != (count,) or math.prod(shape) != count:
        raise ExampleError(f"{path}: y has shape {shape}; {count:,} images need ({count}, 1, 1, 1).")
    values = np.empty(shape, labels.dtype)
    try:
        check_chunks(labels, "y", (0,) * len(shape), shape, most)
        labels.read(h5s.ALL, h5s.ALL, values)
    except FAULTS as error:
        raise ExampleError(f"{path}: y cannot be read ({brief(error)}). {remedy(error)}") from error
    values = values.reshape(-1)
    bad = np.flatnonzero(~np.isin(values, (0, 1)))
    if bad.size:
        raise ExampleError(f"{path}: y of row {bad[0]} is {values[bad[0]].item()!r}; it must be 0 or 1.")
    return values.astype(np.int64)
