"""Packed files as `Rows`: a split's patches as one contiguous array of bytes, read directly, without HDF5.

``images`` (N, 3, 96, 96) uint8, ``ids`` (N,) rising, ``labels`` (N,) 0, 1 or -1 for none, ``centres`` (N,), and
``values`` (256,) float32, the number that each byte encodes. If the slide and the patient of each patch are known,
``slides`` and ``patients`` (N, W) uint8 hold their names in UTF-8, padded with zeros. `packing` writes these files.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from h5py import h5d, h5s

from ..errors import ExampleError
from .layout import FAULTS, SHAPE, Array, brief, is_array, open_file, read_source, remedy
from .rows import Handle, Rows, choose
from .stored import Unfit, check_chunks, open_array

NO_LABEL = -1
EVEN = np.arange(256, dtype=np.float32) / np.float32(255)
"""The value of each byte in a picture of 8 bits."""
NAMES = ("slides", "patients")
LONGEST_NAME = 256
"""The most bytes of a slide's or a patient's name."""
_BYTES = math.prod(SHAPE)
_MOST = 2**28
"""The most bytes of a column: ids of 30 million patches."""


class PackedRows(Rows):
    """One split, packed.

    Raises:
        ExampleError: an array that is absent, of another shape or type, or in chunks; ids that do not rise; labels
            other than 0, 1 and -1.
    """

    layout = "packed HDF5"

    def __init__(self, path: Path, limit: int | None = None) -> None:
        super().__init__(path)
        self._handle = Handle(path)
        self.shape = SHAPE
        with open_file(path) as file:
            try:
                self._offset, count = _images(file.id)
                columns = {name: _column(file.id, name, count) for name in ("ids", "labels", "centres")}
                values = _column(file.id, "values", 256).astype(np.float32)
                names = {name: _names(file.id, name, count) for name in NAMES}
            except FAULTS as error:
                raise ExampleError(f"{path} cannot be read ({brief(error)}). {remedy(error)}") from error
            self.source = read_source(file)
        _check(path, columns["ids"], columns["labels"])
        self._values = None if np.array_equal(values, EVEN) else values
        self._rows = choose(count, limit, path)
        self.ids, labels, self.centres = (column[self._rows].astype(np.int64) for column in columns.values())
        self.labels = [None if label == NO_LABEL else label for label in labels.tolist()]
        self.slides, self.patients = (
            None
            if column is None
            else [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in column[self._rows]]
            for column in names.values()
        )
        self.dtypes["uint8"] = len(self.ids)

    def read(self, index: int, out: npt.NDArray[np.float32]) -> None:
        """Read one image into `out`."""
        stored = np.empty(SHAPE, np.uint8)
        place = self._offset + int(self._rows[index]) * _BYTES
        if os.preadv(self._handle.descriptor(), [stored.data], place) != _BYTES:
            raise ExampleError(
                f"{self.path}: {self.name(index)} cannot be read (the file ends early). Get the file again."
            )
        if self._values is None:
            np.divide(stored, np.float32(255), out=out)
        else:
            np.take(self._values, stored, out=out, mode="clip")  # "clip" spares numpy's check of each index

    def name(self, index: int) -> str:
        """The image's id, worded as for the challenge's files, so that prediction files are the same text."""
        return f"img of key {self.ids[index]}"


def is_packed(path: Path) -> bool:
    """Whether an HDF5 file is packed."""
    with open_file(path) as file:
        return is_array(file, "images") and is_array(file, "ids")


def _images(file: Any) -> tuple[int, int]:
    """The byte where the images begin, and their number."""
    data = open_array(file, b"images", _BYTES)
    shape = tuple(data.shape)
    if len(shape) != 4 or shape[1:] != SHAPE or data.dtype != np.uint8 or not shape[0]:
        raise Unfit(f"images has shape {shape} and dtype {data.dtype}; it must be (N, 3, 96, 96) of uint8")
    offset = data.get_offset() if data.get_create_plist().get_layout() == h5d.CONTIGUOUS else None
    if offset is None or file.get_create_plist().get_userblock():
        raise Unfit("images is not contiguous")
    return int(offset), int(shape[0])


def _column(file: Any, name: str, count: int) -> Array:
    if name.encode() not in file:
        raise Unfit(f"there is no array {name}")
    data = open_array(file, name.encode(), _MOST)
    if tuple(data.shape) != (count,):
        raise Unfit(f"{name} has shape {tuple(data.shape)}; it must be ({count},)")
    if name != "values" and data.dtype.kind not in "iu":
        raise Unfit(f"{name} has dtype {data.dtype}; it must hold whole numbers")
    check_chunks(data, name, (0,), (count,), _MOST)
    values = np.empty(data.shape, data.dtype)
    data.read(h5s.ALL, h5s.ALL, values)
    return values


def _names(file: Any, name: str, count: int) -> Array | None:
    if name.encode() not in file:
        return None
    data = open_array(file, name.encode(), _MOST)
    shape = tuple(data.shape)
    if len(shape) != 2 or shape[0] != count or not 1 <= shape[1] <= LONGEST_NAME or data.dtype != np.uint8:
        raise Unfit(f"{name} has shape {shape} and dtype {data.dtype}; it must be ({count}, W) of uint8, W up to 256")
    check_chunks(data, name, (0, 0), shape, _MOST)
    values = np.empty(shape, np.uint8)
    data.read(h5s.ALL, h5s.ALL, values)
    return values


def _check(path: Path, ids: Array, labels: Array) -> None:
    if ids[0] < 0 or (ids[1:] <= ids[:-1]).any():
        raise ExampleError(f"{path}: ids are not in rising order. Pack the split again.")
    bad = np.flatnonzero(~np.isin(labels, (0, 1, NO_LABEL)))
    if bad.size:
        raise ExampleError(
            f"{path}: the label of id {ids[bad[0]]} is {labels[bad[0]]}; it must be 0, 1 or -1 for none."
        )
