"""`Rows`: the interface through which the dataset reads one split of any layout.

`challenge`, `wilds`, `pcam`, `packed` and `tiles` implement it. This module must not import torch.
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
    """The images of one split in the order of their ids, and all that is known of each without its pixels.

    Attributes:
        layout: the layout's name: "challenge HDF5", "WILDS Camelyon17 folder", "PCam HDF5".
        path: the split's file.
        ids: ``(n,)`` int64, rising.
        labels: 0, 1 or None for each image.
        centres: ``(n,)`` int64; `NO_CENTRE` where none is named.
        source: which program made the data, if it says so.
        dtypes: the number of images stored in each dtype.
        shape: the shape of a stored image.
        slides: the name of each image's slide; None where the layout names none.
        patients: the name of each image's patient; None where the layout names none.
        notes: remarks on the data, a sentence each.
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
        """The image's name in errors."""


class Handle:
    """An HDF5 file that each process opens when it first reads it, and that is never pickled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: h5py.File | None = None
        self._pid = -1

    def __call__(self) -> Any:
        """The low-level id of the open file."""
        # A handle inherited by fork shares the parent's file position and HDF5 state, so each process opens its own.
        if self._file is None or self._pid != os.getpid():
            self._file = open_file(self.path)
            self._pid = os.getpid()
        return self._file.id

    def descriptor(self) -> int:
        """The operating system's descriptor of the open file, to be read by position only."""
        return int(self().get_vfd_handle())

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_file": None, "_pid": -1}


def choose(count: int, limit: int | None, path: Path) -> Ids:
    """Which of `count` images a limit keeps, in rising order; None keeps all.

    The choice is random, so that a file sorted by class or by centre still gives all of them, and the same each time.

    Raises:
        ExampleError: a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ExampleError(f"limit={limit}: keep at least one image of {path}, or None for all.")
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(_LIMIT_SEED).choice(count, limit, replace=False))
