"""Reading the challenge's splits: `HistoDataset` is one, `open_splits` gives a folder's three.

What a file holds and what is checked of it is in `layout`; `writing` makes such files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .errors import ExampleError
from .layout import SHAPE, SPLITS, open_file, read_image, read_row, read_source, sorted_keys

Transform = Callable[[Tensor], Tensor]
Sample = tuple[Tensor, Tensor, int]

# Room for the rounding of whoever wrote the file; 0..255 stored as floats is far outside.
_RANGE_SLACK = 1e-3
_LIMIT_SEED = 0


class HistoDataset(Dataset[Sample]):
    """One split, in the order of its integer keys.

    >>> split = HistoDataset("data/train.h5")          # doctest: +SKIP
    >>> image, label, index = split[0]                 # doctest: +SKIP
    >>> image.shape, label, split.ids[index]           # doctest: +SKIP
    (torch.Size([3, 96, 96]), tensor(1.), 0)

    Every key, shape, dtype, label and centre is checked here, once (about 0.1 ms an image); pixels when
    they are read. The file is opened again in each worker process and never pickled.

    Args:
        path: an HDF5 file in the challenge's layout.
        transform: applied to each image, ``(3, 96, 96)`` float32 in [0, 1], after reading.
        require_labels: raise when a label is absent; otherwise one absent label makes `labels` None.
        limit: keep this many images, the same random choice each time, so that a file sorted by class
            or by centre still gives all of them. None keeps all.

    Attributes:
        ids: ``(n,)`` int64, the keys.
        labels: ``(n,)`` int64 of 0 and 1, or None.
        centres: ``(n,)`` int64; -1 where the file names none.
        source: what made the file, where it says so (a stand-in, cut slides), else None.

    Raises:
        ExampleError: no such file; not HDF5 or truncated; no images; a key that is no decimal integer; a
            wrong shape or dtype; a label outside {0, 1} or, where required, absent; a limit below 1.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        transform: Transform | None = None,
        require_labels: bool = True,
        limit: int | None = None,
    ) -> None:
        self.path = Path(path)
        self.transform = transform
        self._file: h5py.File | None = None
        self._pid = -1
        with open_file(self.path) as file:
            self.source: str | None = read_source(file)
            self._keys, self.ids = sorted_keys(file, self.path)
            if limit is not None:
                self._keep(limit)
            rows = [read_row(file.id, key, self.path) for key in self._keys]
        labels = [label for label, _ in rows]
        self.labels = _labels(labels, self.ids, self.path, require_labels)
        self.centres = torch.tensor([centre for _, centre in rows], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        """Image ``(3, 96, 96)`` float32 in [0, 1] (or what `transform` makes of it), label, index.

        The label is a float32 scalar, NaN where the file has none. ``ids[index]`` is the image's key.

        Raises:
            ExampleError: the pixels cannot be read, are not finite, or lie outside [0, 1].
            IndexError: index outside the split.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """The samples of one batch, read into one array; DataLoader calls this where it exists."""
        images = torch.from_numpy(self.read(indices))
        return [self._sample(image, int(i)) for image, i in zip(images, indices, strict=True)]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None, "_pid": -1}

    def read(self, indices: Sequence[int]) -> npt.NDArray[np.float32]:
        """Pixels alone, without transform: ``(len(indices), 3, 96, 96)`` float32 in [0, 1]."""
        out = np.empty((len(indices), *SHAPE), np.float32)
        handle = self._handle()
        for row, index in zip(out, indices, strict=True):
            read_image(handle, self._keys[index], row, self.path)
        self._check_range(out, indices)
        return out

    def _sample(self, image: Tensor, index: int) -> Sample:
        label = float("nan") if self.labels is None else float(self.labels[index])
        image = image if self.transform is None else self.transform(image)
        return image, torch.tensor(label), index % len(self)

    def _keep(self, limit: int) -> None:
        if limit < 1:
            raise ExampleError(f"limit={limit}: keep at least one image of {self.path}, or None for all.")
        if limit < len(self.ids):
            chosen = np.random.default_rng(_LIMIT_SEED).choice(len(self.ids), limit, replace=False)
            chosen.sort()
            self._keys, self.ids = self._keys[chosen], self.ids[chosen]

    def _handle(self) -> Any:
        # A handle inherited by fork shares the parent's file position and HDF5 state: open an own one.
        if self._file is None or self._pid != os.getpid():
            self._file = open_file(self.path)
            self._pid = os.getpid()
        return self._file.id

    def _check_range(self, images: npt.NDArray[np.float32], indices: Sequence[int]) -> None:
        flat = images.reshape(len(images), -1)
        low, high = flat.min(1), flat.max(1)
        # Written so that a NaN, which min and max carry along, counts as outside.
        inside = (low >= -_RANGE_SLACK) & (high <= 1 + _RANGE_SLACK)
        if not inside.all():
            bad = int(np.argmin(inside))
            raise ExampleError(
                f"{self.path}: img of key {self.ids[indices[bad]]} has values from {low[bad]:g} to "
                f"{high[bad]:g}; floating images must be finite and in [0, 1]. Divide by 255, or store uint8."
            )


def find_splits(directory: str | os.PathLike[str]) -> dict[str, Path]:
    """The file of each split that a folder holds, by split name.

    ``train.h5``, or else the one ``.h5`` or ``.hdf5`` file with "train" in its stem, in any case.

    Raises:
        ExampleError: no such folder, or several files that could be the same split.
    """
    folder = Path(directory)
    if not folder.is_dir():
        what = "a file, not a folder" if folder.exists() else "no such folder"
        raise ExampleError(f"{folder}: {what}. Give the folder that holds train.h5, val.h5 and test.h5.")
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in {".h5", ".hdf5"})
    found = {split: _find_split(split, files) for split in SPLITS}
    return {split: path for split, path in found.items() if path is not None}


def open_splits(
    directory: str | os.PathLike[str],
    limit: int | None = None,
    transforms: dict[str, Transform] | None = None,
) -> dict[str, HistoDataset]:
    """Train, validation and test sets of a folder; the test set alone may come without labels.

    Args:
        directory: holds one file per split, see `find_splits`.
        limit: at most this many images of each split.
        transforms: by split name; a split that is not named gets none.

    Raises:
        ExampleError: a split is missing, and whatever `HistoDataset` raises.
    """
    paths = find_splits(directory)
    missing = [f"{split}.h5" for split in SPLITS if split not in paths]
    if missing:
        found = ", ".join(path.name for path in paths.values()) or "no split"
        raise ExampleError(f"{directory}: no {', '.join(missing)} (found: {found}). All three are needed.")
    transforms = transforms or {}
    return {
        split: HistoDataset(paths[split], transforms.get(split), require_labels=split != "test", limit=limit)
        for split in SPLITS
    }


def _find_split(split: str, files: list[Path]) -> Path | None:
    exact = [p for p in files if p.name == f"{split}.h5"]
    candidates = exact or [p for p in files if split in p.stem.lower()]
    if len(candidates) > 1:
        names = ", ".join(p.name for p in candidates)
        raise ExampleError(
            f"{candidates[0].parent}: {names} could each be the {split} split. Rename the right one {split}.h5."
        )
    return candidates[0] if candidates else None


def _labels(labels: list[int | None], ids: npt.NDArray[np.int64], path: Path, required: bool) -> torch.Tensor | None:
    present = [label for label in labels if label is not None]
    if len(present) == len(labels):
        return torch.tensor(present, dtype=torch.int64)
    if required:
        raise ExampleError(
            f"{path}: key {ids[labels.index(None)]} has no label ({len(labels) - len(present)} of "
            f"{len(labels)} have none). Only the test split may come without."
        )
    return None
