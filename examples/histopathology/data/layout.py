"""The challenge's layout in HDF5: what a split's file holds, the checks, and the errors.

One group per image, its key a decimal index: ``img`` (3, 96, 96), ``label`` 0 or 1 (may be absent in test),
``metadata`` whose element 0 is the centre. Nothing else of ``metadata`` leaves this module: it is not
documented and may hold the label.

A file may come from a stranger: `stored` checks how an array is stored before its numbers are read.

Images are read through h5py's low-level calls: opening a group and a data set as Python objects takes longer than
reading 110 kB (``python -m benchmarks.loading`` measures it). This module must not import torch, since the worker
processes of `making.synthetic` import it.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt
from h5py import h5a, h5d, h5g, h5i, h5s, h5t

from ..errors import ExampleError
from .stored import Unfit, check_chunks, check_inside, open_array

SPLITS = ("train", "val", "test")
PATCH = 96
SHAPE = (3, PATCH, PATCH)
SLIDES = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide", ".dcm")
"""File name endings of whole slides."""
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
DTYPES = ("float16", "float32", "float64", "uint8")

Array = npt.NDArray[Any]

FAULTS = (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError)
"""The errors that h5py raises on damaged files."""
MOST_METADATA = 4096
"""The most numbers in an image's metadata."""
_MOST_SPARE = 2**20
"""The most bytes of a compressed chunk of label or metadata."""
_MOST_IMAGE = 8 * 8 * math.prod(SHAPE)
"""The most bytes that are inflated for an image: eight times its numbers at eight bytes each."""
_PLAIN = (
    (h5t.IEEE_F16LE, h5t.IEEE_F32LE, h5t.IEEE_F64LE, h5t.STD_U8LE)
    if sys.byteorder == "little" and hasattr(os, "preadv")
    else ()
)
"""Stored types that are read from the file directly, without HDF5."""

_EXPECTED = (
    "A split has one group per image, named 0, 1, 2, ..., and nothing else at its top; "
    "or, as PCam has it, one array `x` of all images."
)


def open_file(path: Path) -> h5py.File:
    """Open a split's file for reading, or raise an ExampleError that says what is wrong with it."""
    if not path.is_file():
        raise ExampleError(f"{path}: no such file. A split is one HDF5 file: train.h5, val.h5 or test.h5.")
    try:
        return h5py.File(path, "r")
    except FAULTS as error:
        if not h5py.is_hdf5(path):
            raise ExampleError(f"{path} is not an HDF5 file. {_instead(path)}") from error
        raise ExampleError(
            f"{path} is an HDF5 file that cannot be read ({brief(error)}). If it was downloaded, it may be truncated: "
            "get it again."
        ) from error


def is_array(file: h5py.File, name: str) -> bool:
    """Whether the file itself, and not a link in it, holds an array of that name."""
    try:
        is_inside = file.get(name, getclass=True, getlink=True) is h5py.HardLink
        return is_inside and file.get(name, getclass=True) is h5py.Dataset
    except FAULTS:
        return False


def _instead(path: Path) -> str:
    """The remedy for a file that is not HDF5, by its name and its first bytes."""
    suffix = path.suffix.lower()
    if suffix in SLIDES:
        return (
            "It looks like a slide: `predict` takes slides; to train on slides, give their folder as --slides, or cut "
            "them with `make-data --slides`."
        )
    if suffix in _PICTURES:
        return "It looks like a picture: `predict` takes a folder of tiles; `make-data --slides` cuts larger pictures."
    with path.open("rb") as file:
        begins = file.read(24)
    if begins.startswith(b"\x1f\x8b"):
        return "It is compressed: run `gunzip` on it first."
    if begins.startswith(b"version https://git-lfs"):
        return "It is a Git LFS pointer: run `git lfs pull`."
    return f"It begins with {begins!r}: get the file again." if begins else "It is empty: get it again."


def brief(error: BaseException) -> str:
    """The first line of HDF5's message, to be quoted in an ExampleError."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def remedy(error: BaseException) -> str:
    """The remedy for an error of reading."""
    return error.remedy if isinstance(error, Unfit) else "The file is damaged: get it again."


def read_source(file: h5py.File) -> str | None:
    """Which program made the file, if it says so: synthetic patches, cut slides. The challenge's files do not."""
    try:
        if not h5a.exists(file.id, b"source"):
            return None
        found = h5a.open(file.id, b"source")
        # A single text: each of many could be the same long text in the file.
        kind, extent = found.get_type().get_class(), found.get_space().get_simple_extent_type()
        source = file.attrs["source"] if (kind, extent) == (h5t.STRING, h5s.SCALAR) else None
    except FAULTS:
        return None
    return source[:_LONGEST] if isinstance(source, str) else None


_LONGEST = 1000


def sorted_keys(file: h5py.File, path: Path) -> tuple[Array, npt.NDArray[np.int64]]:
    """Keys as bytes, and as integers, in the order of the integers (h5py lists 0, 1, 10, 100, ...)."""
    try:
        names = list(file)
    except FAULTS as error:
        raise ExampleError(f"{path}: its keys cannot be read ({brief(error)}). Get the file again.") from error
    if not names:
        raise ExampleError(f"{path} holds no image. A split has one group per image, named 0, 1, 2, ...")
    for name in names:
        # More than 18 digits would not fit an int64.
        if not (name.isascii() and name.isdecimal() and len(name) <= 18):
            raise ExampleError(f"{path}: key {name[:40]!r} is not a decimal integer. {_EXPECTED}")
    ids = np.array([int(name) for name in names], np.int64)
    order = np.argsort(ids, kind="stable")
    ids, keys = ids[order], np.array(names, "S")[order]
    twice = np.flatnonzero(np.diff(ids) == 0)
    if twice.size:
        pair = f"{keys[twice[0]].decode()!r} and {keys[twice[0] + 1].decode()!r}"
        raise ExampleError(f"{path}: keys {pair} are the same integer. Keep one.")
    return keys, ids


class Row(NamedTuple):
    """Label (None where absent), centre (-1 where absent) and stored dtype of one image.

    ``offset`` is the byte of the file where its numbers begin. It is -1 where they are not contiguous (chunks), or of a
    type that is not this machine's.
    """

    label: int | None
    centre: int
    dtype: str
    offset: int


def read_row(file: Any, key: bytes, path: Path) -> Row:
    """Read all that is known of one image without its pixels, and check its shape and dtype."""
    name = key.decode()
    try:
        check_inside(file, key)
        group = h5g.open(file, key)
    except FAULTS as error:
        raise ExampleError(
            f"{path}: key {name} is not a group ({brief(error)}). Each image is a group with img in it."
        ) from error
    with _reading(path, name):
        image = _child(group, b"img", _MOST_IMAGE)
        dtype = _check_image(image, name, path)
        label = _child(group, b"label", _MOST_SPARE)
        metadata = _child(group, b"metadata", _MOST_SPARE)
        return Row(
            None if label is None else _as_label(_values(label, "label"), name, path),
            -1 if metadata is None else _as_centre(_values(metadata, "metadata"), name, path),
            dtype,
            _offset(image),
        )


def read_plain(descriptor: int, offset: int, dtype: str, out: npt.NDArray[np.float32], path: Path, key: bytes) -> None:
    """Read one image as `read_image` does, but directly from ``offset`` (see `Row`) of an open file, without HDF5."""
    stored: Array = out if dtype == "float32" else np.empty(SHAPE, dtype)
    if os.preadv(descriptor, [stored.data], offset) != stored.nbytes:
        raise ExampleError(f"{path}: key {key.decode()} cannot be read (the file ends early). Get the file again.")
    if stored is not out:
        _as_floats(stored, out)


def read_image(file: Any, key: bytes, out: npt.NDArray[np.float32], path: Path) -> None:
    """Read one image into `out`, ``(3, 96, 96)`` float32, whatever its stored dtype."""
    with _reading(path, key.decode()):
        data = h5d.open(file, key + b"/img")  # checked by `read_row`
        check_chunks(data, "img", (0, 0, 0), SHAPE, _MOST_IMAGE)
        if data.dtype == out.dtype:
            data.read(h5s.ALL, h5s.ALL, out)
            return
        # Converting float16 here takes a third of HDF5's time.
        stored = np.empty(SHAPE, data.dtype)
        data.read(h5s.ALL, h5s.ALL, stored)
    _as_floats(stored, out)


def _as_floats(stored: Array, out: npt.NDArray[np.float32]) -> None:
    if stored.dtype == np.uint8:
        np.divide(stored, np.float32(255), out=out)
    elif stored.dtype == np.float16:
        np.take(_halves(), stored.view(np.uint16), out=out, mode="clip")  # a third of the time of numpy's conversion
    else:
        out[...] = stored


@cache
def _halves() -> npt.NDArray[np.float32]:
    """The float32 value of each of the 65,536 float16 bit patterns."""
    return np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)


@contextmanager
def _reading(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except FAULTS as error:
        raise ExampleError(f"{path}: key {name} cannot be read ({brief(error)}). {remedy(error)}") from error


def _child(group: Any, name: bytes, most: int) -> Any | None:
    return open_array(group, name, most) if name in group else None


def _offset(image: Any) -> int:
    # A user block before HDF5's data shifts the offsets that the library returns.
    plain = image.get_create_plist().get_layout() == h5d.CONTIGUOUS and image.get_type() in _PLAIN
    offset = image.get_offset() if plain and not h5i.get_file_id(image).get_create_plist().get_userblock() else None
    return -1 if offset is None else int(offset)


def _values(data: Any, name: str) -> Array:
    if math.prod(data.shape) > MOST_METADATA:
        raise Unfit(f"{name} has shape {data.shape}; {MOST_METADATA} numbers are read at most")
    check_chunks(data, name, (0,) * len(data.shape), data.shape, _MOST_SPARE)
    values = np.empty(data.shape, data.dtype)
    data.read(h5s.ALL, h5s.ALL, values)
    return values.reshape(-1)


def _check_image(image: Any | None, name: str, path: Path) -> str:
    if image is None:
        raise ExampleError(f"{path}: key {name} has no img. Each image is a group with img, {SHAPE}, in it.")
    if tuple(image.shape) != SHAPE:
        raise ExampleError(
            f"{path}: img of key {name} has shape {tuple(image.shape)}; it must be {SHAPE}, channel first."
        )
    if image.dtype.name not in DTYPES:
        raise ExampleError(f"{path}: img of key {name} has dtype {image.dtype.name}; store one of {', '.join(DTYPES)}.")
    return str(image.dtype.name)


def _as_label(values: Array, name: str, path: Path) -> int:
    if values.size != 1 or values[0] not in (0, 1):
        shown = values.tolist()[:4] if values.size != 1 else values[0].item()
        raise ExampleError(f"{path}: label of key {name} is {shown!r}; it must be a single 0 or 1.")
    return int(values[0])


def _as_centre(values: Array, name: str, path: Path) -> int:
    if values.size == 0:
        return -1
    if not float(values[0]).is_integer() or abs(float(values[0])) >= 2**53:
        raise ExampleError(
            f"{path}: metadata of key {name} begins with {values[0].item()!r}; element 0 is the centre, a whole number."
        )
    return int(values[0])
