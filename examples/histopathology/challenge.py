"""The challenge's HDF5 files as `Rows`; what such a file holds and what is checked of it is in `layout`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from .errors import ExampleError
from .layout import SHAPE, SPLITS, open_file, read_image, read_row, read_source, sorted_keys
from .rows import Handle, Rows, choose

SUFFIXES = (".h5", ".hdf5")


class ChallengeRows(Rows):
    """One file, one group per image. Raises as `layout.sorted_keys` and `layout.read_row` do."""

    layout = "challenge HDF5"

    def __init__(self, path: Path, limit: int | None = None) -> None:
        super().__init__(path)
        self._handle = Handle(path)
        self.shape = SHAPE
        with open_file(path) as file:
            self.source = read_source(file)
            keys, ids = sorted_keys(file, path)
            self.notes = _notes_on_keys([name.encode() for name in file], keys.tolist(), ids)
            chosen = choose(len(ids), limit, path)
            self._keys, self.ids = keys[chosen], ids[chosen]
            rows = [read_row(file.id, key, path) for key in self._keys]
        self.labels = [row.label for row in rows]
        self.centres = np.array([row.centre for row in rows], np.int64)
        self.dtypes.update(row.dtype for row in rows)

    def read(self, index: int, out: npt.NDArray[np.float32]) -> None:
        """Read one image into `out`."""
        read_image(self._handle(), self._keys[index], out, self.path)

    def name(self, index: int) -> str:
        """The image by its key."""
        return f"img of key {self.ids[index]}"


def find(files: list[Path]) -> dict[str, Path]:
    """Of a folder's files, the one of each split: ``train.h5``, or else the one with "train" in its name.

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
        notes.append(f"keys are listed out of order ({first}, ...): taken in the order of their numbers")
    gaps = int(ids[-1] - ids[0] + 1 - len(ids))
    if gaps or ids[0]:
        notes.append(f"keys run from {ids[0]} to {ids[-1]}, {gaps:,} numbers between them are not there")
    return notes
