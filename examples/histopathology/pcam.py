"""PCam's HDF5 files as `Rows`: all images of a split in one array, the labels in a file beside it.

``camelyonpatch_level_2_split_{train,valid,test}_x.h5`` holds ``x`` (N, 96, 96, 3) uint8, and ``..._y.h5`` holds
``y`` (N, 1, 1, 1), 0 or 1. Both arrays in one file are read too. No file names a hospital, so every image
carries the same centre, `NO_CENTRE`: there is no shift from hospital to hospital to be measured on it.

B. S. Veeling et al. Rotation equivariant CNNs for digital pathology. MICCAI 2018, arXiv:1806.03962.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from h5py import h5d, h5s

from .errors import ExampleError
from .layout import PATCH, brief, open_file, read_source
from .rows import NO_CENTRE, Handle, Rows, choose

NOTE = "PCam names no centre: all images count as one hospital, so no shift between hospitals can be measured"
_SHAPE = (PATCH, PATCH, 3)
_WORDS = {"train": ("train",), "val": ("valid", "val"), "test": ("test",)}


class PcamRows(Rows):
    """One split of PCam.

    Args:
        path: the file of the images, ``..._x.h5``.
        limit: see `rows.choose`.

    Raises:
        ExampleError: no ``x``, or of another shape or dtype; labels that do not fit it or are not 0 and 1.
    """

    layout = "PCam HDF5"

    def __init__(self, path: Path, limit: int | None = None) -> None:
        super().__init__(path)
        self._handle = Handle(path)
        with open_file(path) as file:
            images = _images(file, path)
            self.source = read_source(file)
            labels = _read_labels(file, path, len(images))
        self.ids = choose(len(images), limit, path)
        self.labels = [None] * len(self.ids) if labels is None else labels[self.ids].tolist()
        self.centres = np.full(len(self.ids), NO_CENTRE, np.int64)
        self.dtypes["uint8"] = len(self.ids)
        self.shape = _SHAPE
        self.notes = [NOTE]

    def read(self, index: int, out: npt.NDArray[np.float32]) -> None:
        """Read one image into `out`, channel first."""
        stored = np.empty((1, *_SHAPE), np.uint8)
        try:
            data = h5d.open(self._handle(), b"x")
            where = data.get_space()
            where.select_hyperslab((int(self.ids[index]), 0, 0, 0), (1, *_SHAPE))
            data.read(h5s.create_simple(stored.shape), where, stored)
        except OSError as error:
            raise ExampleError(
                f"{self.path}: row {self.ids[index]} of x cannot be read ({brief(error)}). The file is damaged: "
                "get it again."
            ) from error
        np.divide(stored[0].transpose(2, 0, 1), np.float32(255), out=out)

    def name(self, index: int) -> str:
        """The image by its row."""
        return f"row {self.ids[index]} of x"


def is_pcam(path: Path) -> bool:
    """Whether an HDF5 file holds an array of all images or of all labels, rather than a group per image."""
    with open_file(path) as file:
        return any(isinstance(file.get(name), h5py.Dataset) for name in ("x", "y"))


def find(files: list[Path]) -> dict[str, Path]:
    """Of a folder's files, PCam's images by split; empty where there are none.

    Raises:
        ExampleError: two files for one split, or files that are still compressed.
    """
    found: dict[str, Path] = {}
    for path in files:
        split = _split_of(path.name.removesuffix(".gz"))
        if split is None:
            continue
        if path.suffix == ".gz":
            raise ExampleError(f"{path} is compressed: run `gunzip` on it and on its neighbours first.")
        if split in found:
            raise ExampleError(f"{path.parent}: {found[split].name} and {path.name} are both the {split} split.")
        found[split] = path
    return {split: found[split] for split in _WORDS if split in found}


def labels_path(path: Path) -> Path:
    """Where the labels of ``..._x.h5`` lie: ``..._y.h5`` beside it."""
    return path.with_name(f"{path.stem.removesuffix('_x')}_y{path.suffix}")


def _split_of(name: str) -> str | None:
    stem, _, suffix = name.lower().rpartition(".")
    if suffix not in ("h5", "hdf5") or not stem.endswith("_x"):
        return None
    return next((split for split, words in _WORDS.items() for word in words if word in stem.split("_")), None)


def _images(file: h5py.File, path: Path) -> Any:
    images = file.get("x")
    if images is None:
        raise ExampleError(f"{path}: no array x in it, only {', '.join(file)}. Name the file of the images, ..._x.h5.")
    if images.ndim != 4 or images.shape[1:] != _SHAPE or images.dtype != np.uint8 or not len(images):
        raise ExampleError(
            f"{path}: x has shape {images.shape} and dtype {images.dtype}; PCam has (N, 96, 96, 3), uint8."
        )
    return images


def _read_labels(file: h5py.File, path: Path, count: int) -> npt.NDArray[np.int64] | None:
    if "y" in file:
        return _checked(file["y"], path, count)
    beside = labels_path(path)
    if not beside.is_file():
        return None
    with open_file(beside) as other:
        if "y" not in other:
            raise ExampleError(f"{beside}: no array y in it, only {', '.join(other) or 'nothing'}.")
        return _checked(other["y"], beside, count)


def _checked(labels: Any, path: Path, count: int) -> npt.NDArray[np.int64]:
    values = np.asarray(labels[()]).reshape(-1)
    if labels.shape[:1] != (count,) or len(values) != count:
        raise ExampleError(f"{path}: y has shape {labels.shape}; {count:,} images need ({count}, 1, 1, 1).")
    bad = np.flatnonzero(~np.isin(values, (0, 1)))
    if bad.size:
        raise ExampleError(f"{path}: y of row {bad[0]} is {values[bad[0]].item()!r}; it must be 0 or 1.")
    return values.astype(np.int64)
