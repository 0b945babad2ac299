"""Writing a split in the challenge's layout (see `layout`), whole or not at all, and never over the real data."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from ..data.layout import DTYPES, SHAPE, SPLITS, Array, brief, open_file, read_source
from ..errors import ExampleError


class SplitWriter:
    """Writes one split whole or not at all.

    >>> with SplitWriter("data", "train", dtype="uint8") as split:      # doctest: +SKIP
    ...     split.add(image, label=1, metadata=[3, 0, 96, 192])

    Images are written to ``NAME.h5.partial``, which is renamed to ``NAME.h5`` when the block ends and deleted when it
    raises.

    Args:
        directory: made if absent.
        split: "train", "val" or "test"; keys count from 0.
        dtype: stored type of ``img``: "float16", "float32", "float64" in [0, 1], or "uint8" 0..255.
        source: which program makes the file, stored as the root attribute ``source``. A file of the same name is
            overwritten only if its attribute is the same.

    Raises:
        ExampleError: unknown split or dtype; a file of that name from elsewhere; a folder or disk that cannot
            be written; no image added.
    """

    def __init__(self, directory: str | os.PathLike[str], split: str, dtype: str = "float32", source: str = "") -> None:
        if split not in SPLITS:
            raise ExampleError(f"split={split!r}: write one of {', '.join(SPLITS)}.")
        if dtype not in DTYPES:
            raise ExampleError(f"dtype={dtype!r}: images are stored as one of {', '.join(DTYPES)}.")
        self.path = Path(directory) / f"{split}.h5"
        self.partial = self.path.with_name(self.path.name + ".partial")
        self._dtype = np.dtype(dtype)
        self._source = source
        self._count = 0

    def __enter__(self) -> SplitWriter:
        refuse_to_overwrite(self.path, self._source)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = h5py.File(self.partial, "w")
        except OSError as error:
            raise ExampleError(f"{self.path.parent}: cannot be written ({brief(error)}).") from error
        if self._source:
            self._file.attrs["source"] = self._source
        return self

    def add(self, image: Array, label: int | None, metadata: Sequence[float] | Array) -> int:
        """Append one image; returns its key.

        Args:
            image: ``(3, 96, 96)``, floating in [0, 1] or uint8 0..255; converted to the file's dtype.
            label: 0, 1, or None for no label.
            metadata: 1-D, element 0 the centre.
        """
        if image.shape != SHAPE:
            raise ValueError(f"image {self._count} has shape {image.shape}; {SHAPE} is the layout.")
        key = self._count
        try:
            self._write_group(str(key), image, label, metadata)
        except (OSError, RuntimeError) as error:
            raise ExampleError(f"{self.partial}: cannot write image {key} ({brief(error)}).") from error
        self._count += 1
        return key

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
            if kind is None:
                self._publish()
        except (OSError, RuntimeError) as fault:  # h5py raises either when the disk is full
            raise ExampleError(f"{self.path}: cannot be written ({brief(fault)}).") from fault
        finally:
            self.partial.unlink(missing_ok=True)

    def _write_group(self, key: str, image: Array, label: int | None, metadata: Sequence[float] | Array) -> None:
        group = self._file.create_group(key)
        group.create_dataset("img", data=_convert(image, self._dtype))
        if label is not None:
            group.create_dataset("label", data=np.int64(label))
        group.create_dataset("metadata", data=np.asarray(metadata))

    def _publish(self) -> None:
        if self._count == 0:
            raise ExampleError(f"{self.path}: no image was added, so nothing was written.")
        with self.partial.open("rb+") as file:
            os.fsync(file.fileno())
        self.partial.replace(self.path)


def refuse_to_overwrite(path: Path, source: str) -> None:
    """Raise unless `path` is absent or was made by the same `source`.

    Raises:
        ExampleError: the file holds something else, perhaps the real data.
    """
    if not path.exists():
        return
    with open_file(path) as file:
        if not source or read_source(file) != source:
            raise ExampleError(f"{path} exists and was not made by this command. Choose another folder.")


def _convert(image: Array, dtype: np.dtype[Any]) -> Array:
    if image.dtype == dtype:
        return image
    if image.dtype == np.uint8:
        image = image / np.float32(255)
    elif dtype == np.uint8:
        image = np.rint(np.clip(image, 0, 1) * 255)
    converted: Array = image.astype(dtype)
    return converted
