"""Write a split of any layout as `packed` reads it; reading it back gives the same bits.

A split can be packed if it has at most 256 different values, as pictures of 8 bits have in whatever type they are
stored. The value of each byte is taken from the data, so values that were rounded, to float16 perhaps, come back
rounded in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt

from ..errors import ExampleError
from ..files import replacing_file
from .dataset import HistoDataset
from .layout import FAULTS, SHAPE, Array, brief
from .packed import EVEN, LONGEST_NAME, NO_LABEL, is_packed

BATCH = 256


@dataclass(frozen=True)
class Packed:
    """The file that was written; ``largest`` is the largest rounding of a value in [0, 1]."""

    path: Path
    images: int
    size: int
    largest: float


class _Bytes:
    """Turns values into bytes, and learns the value of each byte."""

    def __init__(self, rounded: bool) -> None:
        self.rounded = rounded
        self.values = EVEN.copy() if rounded else np.full(256, np.nan, np.float32)
        self.largest = 0.0

    def take(self, images: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
        """The bytes of some images, and which of the images they give back exactly."""
        stored = np.rint(np.clip(images, 0, 1) * np.float32(255)).astype(np.uint8)
        new = np.isnan(self.values[stored])
        self.values[stored[new]] = images[new]
        off = np.abs(self.values[stored] - images)
        self.largest = max(self.largest, float(off.max()))
        return stored, ~off.any(axis=(1, 2, 3))

    def all_values(self) -> npt.NDArray[np.float32]:
        """The value of every byte, those that never occurred included."""
        return np.where(np.isnan(self.values), EVEN, self.values)


def pack(
    split: HistoDataset, path: Path, rounded: bool = False, progress: Callable[[int], object] = lambda done: None
) -> Packed:
    """Pack a split, wholly or not at all.

    Args:
        split: a split of any layout, with or without labels.
        path: the file to write; a packed file of that name is replaced.
        rounded: whether values may be rounded to the nearest of 0/255 to 255/255.
        progress: called with the number of images written.

    Raises:
        ExampleError: more than 256 different values; a file of that name that is not packed; a path that cannot be
            written.
    """
    if path.exists() and not is_packed(path):
        raise ExampleError(f"{path} exists and is not a packed file. Choose another folder.")
    table = _Bytes(rounded)
    try:
        with replacing_file(path) as partial, h5py.File(partial, "w") as file:
            if split.source:
                file.attrs["source"] = split.source
            images = file.create_dataset("images", (len(split), *SHAPE), np.uint8)
            for start in range(0, len(split), BATCH):
                chosen = range(start, min(start + BATCH, len(split)))
                images[start : start + BATCH] = _bytes(split, chosen, table)
                progress(chosen.stop)
            for name, column in _columns(split, table).items():
                file[name] = column
    except FAULTS as error:
        raise ExampleError(f"{path}: cannot be written ({brief(error)}).") from error
    return Packed(path, len(split), path.stat().st_size, table.largest)


def _bytes(split: HistoDataset, chosen: range, table: _Bytes) -> Array:
    stored, exact = table.take(split.read(chosen))
    if not table.rounded and not exact.all():
        name = split.rows.name(chosen[int(np.argmin(exact))])
        raise ExampleError(
            f"{split.path}: {name} holds values between those of 8 bits, so bytes cannot give them back. "
            "--round rounds each to the nearest, by 1/510 at most. Nothing was written."
        )
    return stored


def _columns(split: HistoDataset, table: _Bytes) -> dict[str, Array]:
    labels = [NO_LABEL if label is None else label for label in split.rows.labels]
    known = {"slides": split.rows.slides, "patients": split.rows.patients}
    return {
        "ids": split.ids,
        "labels": np.array(labels, np.int8),
        "centres": split.rows.centres,
        "values": table.all_values(),
        **{name: _as_bytes(names) for name, names in known.items() if names is not None},
    }


def _as_bytes(names: Sequence[str]) -> Array:
    """One row of bytes for each name, padded with zeros."""
    texts = np.array([name.encode()[:LONGEST_NAME] or b"-" for name in names])
    return texts.view(np.uint8).reshape(len(texts), texts.itemsize)
