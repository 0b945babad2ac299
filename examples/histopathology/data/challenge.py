"""The challenge's HDF5 files as `Rows`; `layout` says what such a file holds and checks it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import ExampleError
from . import indexing
from .layout import SHAPE, SPLITS, open_file, read_image, read_plain, read_row, read_source, sorted_keys
from .rows import Handle, Rows, choose

SUFFIXES = (".h5", ".hdf5")


class ChallengeRows(Rows):
    """One file, one group per image. Raises as `layout.sorted_keys` and `layout.read_row` do.

    Labels and centres come from `indexing`'s cache if it has an entry; reading a file without a limit writes one.
    """

    layout = "challenge HDF5"

    def __init__(self, path: Path, limit: int | None = None) -> None:
        super().__init__(path)
        self._handle = Handle(path)
        self.shape = SHAPE
        columns = indexing.read(path) if path.is_file() else None
        columns = _look(path, limit) if columns is None else columns.chosen(choose(len(columns.ids), limit, path))
        self._keys, self._offsets, self._dtypes = columns.keys, columns.offsets, columns.dtypes
        self.ids, self.centres = columns.ids, columns.centres
        self.labels = [None if label == indexing.NO_LABEL else label for label in columns.labels.tolist()]
        self.dtypes.update(columns.dtypes.tolist())
        self.source, self.notes = columns.source, columns.notes

    def read(self, index: int, out: npt.NDArray[np.float32]) -> None:
        """Read one image into `out`."""
        key, offset = self._keys[index], int(self._offsets[index])
        if offset < 0:
            read_image(self._handle(), key, out, self.path)
        else:
            read_plain(self._handle.descriptor(), offset, str(self._dtypes[index]), out, self.path, key)

    def name(self, index: int) -> str:
        """The image by its key."""
        return f"img of key {self.ids[index]}"


def _look(path: Path, limit: int | None) -> indexing.Columns:
    """Read what is known of each image without its pixels, or of those that a limit keeps."""
    with open_file(path) as file:
        before = indexing.stamp(path)
        keys, ids = sorted_keys(file, path)
        notes = _notes_on_keys([name.encode() for name in file], keys.tolist(), ids)
        chosen = choose(len(ids), limit, path)
        rows = [read_row(file.id, key, path) for key in keys[chosen]]
        columns = indexing.Columns(
            keys=keys[chosen],
            ids=ids[chosen],
            labels=np.array([indexing.NO_LABEL if row.label is None else row.label for row in rows], np.int8),
            centres=np.array([row.centre for row in rows], np.int64),
            dtypes=np.array([row.dtype for row in rows]),
            offsets=np.array([row.offset for row in rows], np.int64),
            source=read_source(file),
            notes=notes,
        )
    if len(chosen) == len(ids):
        indexing.write(path, columns, before)
    return columns


def find(files: list[Path]) -> dict[str, Path]:
    """A folder's file for each split: ``train.h5``, or else the only file with "train" in its name.

    Raises:
        ExampleError: several files that could be the same split.
    """
    hdf5 = [path for path in files if path.suffix.lower() in SUFFIXES]
    found = {split: _find_split(split, hdf5) for split in SPLITS}
    return {split: path for split, path in found.items() if path is not None}


def _find_split(split: str, files: list[Path]) -> Path | None:
    exact = [p for p in files if p.name == f"{split}.h5"]
    candidates = exact or [p for p in files if split in p.stem.lower()]
    if len(candidates) > 1:
        names = ", ".join(p.name for p in candidates)
        raise ExampleError(
            f"{candidates[0].parent}: {names} could each be the {split} split. Rename the right one {split}.h5."
        )
    return candidates[0] if candidates else None


def _notes_on_keys(listed: list[bytes], keys: list[bytes], ids: npt.NDArray[np.int64]) -> list[str]:
    notes = []
    if listed != keys:
        first = ", ".join(name.decode() for name in listed[:4])
        notes.append(f"keys are listed out of order ({first}, ...); images are read in the order of their numbers")
    gaps = int(ids[-1] - ids[0] + 1 - len(ids))
    if gaps or ids[0]:
        notes.append(f"keys run from {ids[0]} to {ids[-1]}, and {gaps:,} numbers between them are missing")
    return notes
