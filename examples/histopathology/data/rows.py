"""What a layout gives of one split: `Rows`, which the dataset reads through, whatever lies underneath.

`challenge`, `wilds` and `pcam` each make one. No torch here.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from ..errors import ExampleError
from .layout import open_file

Ids = npt.NDArray[np.int64]

NO_CENTRE = -1
_LIMIT_SEED = 0


class Rows(ABC):
    """The images of one split, in the order of their ids, and what is known of each without its pixels.

    Attributes:
        layout: what was found, in words: "challenge HDF5", "WILDS Camelyon17 folder", "PCam HDF5".
        path: the file that names the split.
        ids: ``(n,)`` int64, rising.
        labels: of each image 0, 1 or None.
        centres: ``(n,)`` int64; `NO_CENTRE` where none is named.
        source: what made the data, where it says so.
        dtypes: how many images are stored in which dtype.
        shape: of a stored image.
        slides: the name of the slide that each image is of; None where the layout names none.
        patients: the same of the patient.
        notes: what a reader of the data should know, a sentence each.
    """

    layout: str

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ids: Ids = np.empty(0, np.int64)
        self.labels: list[int | None] = []
        self.centres: Ids = np.empty(0, np.int64)
        self.source: str | None = None
        self.slides: list[str] | None = None
        self.patients: list[str] | None = None
        self.dtypes: Counter[str] = Counter()
        self.shape: tuple[int, ...] = ()
        self.notes: list[str] = []

    @abstractmethod
    def read(self, index: int, out: npt.NDArray[np.float32]) -> None:
        """Read one image into `out`, ``(3, 96, 96)`` float32."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What an error calls this image."""


class Handle:
    """An HDF5 file that is opened when it is first read, again in each process, and is never pickled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: h5py.File | None = None
        self._pid = -1

    def __call__(self) -> Any:
        """The low-level id of the open file."""
        # A handle inherited by fork shares the parent's file position and HDF5 state: open an own one.
        if self._file is None or self._pid != os.getpid():
            self._file = open_file(self.path)
            self._pid = os.getpid()
        return self._file.id

    def descriptor(self) -> int:
        """The system's own descriptor of the open file, to be read by position alone."""
        return int(self().get_vfd_handle())

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_file": None, "_pid": -1}


def choose(count: int, limit: int | None, path: Path) -> Ids:
    """Which of `count` images a limit keeps, rising: the same random choice each time, None keeps all.

    Random, so that a file sorted by class or by centre still gives all of them.

    Raises:
        ExampleError: a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ExampleError(f"limit={limit}: keep at least one image of {path}, or None for all.")
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(_LIMIT_SEED).choice(count, limit, replace=False))
