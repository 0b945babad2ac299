"""Reading splits: `HistoDataset` is one split of any layout; `open_splits` opens a folder's three.

The layout is recognised from the files: the challenge's HDF5 (`challenge`), the WILDS Camelyon17 folder (`wilds`),
PCam's HDF5 (`pcam`) or packed files (`packed`), which `packing` writes. `writing` writes the challenge's layout.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import ExampleError
from . import challenge, packed, pcam, tiles, wilds
from .layout import SHAPE, SPLITS
from .rows import NO_CENTRE, Rows

Transform = Callable[[Tensor], Tensor]
Sample = tuple[Tensor, Tensor, int]

# Tolerance for rounding when the file was written; 0..255 stored as floats lies far outside.
_RANGE_SLACK = 1e-3


class HistoDataset(Dataset[Sample]):
    """One split, in the order of its ids.

    >>> split = HistoDataset("data/train.h5")          # doctest: +SKIP
    >>> image, label, index = split[0]                 # doctest: +SKIP
    >>> image.shape, label, split.ids[index]           # doctest: +SKIP
    (torch.Size([3, 96, 96]), tensor(1.), 0)

    Ids, shapes, dtypes, labels and centres are checked once, here (0.5 ms an image, and no time where `indexing` has
    them cached). Pixels are checked when they are read. Each worker process opens the files again; they are never
    pickled.

    Args:
        path: an HDF5 file (the challenge's, PCam's images, or packed), a WILDS folder or its ``metadata.csv``, or a
            folder of tiles without labels (`tiles`).
        transform: called with each image, ``(3, 96, 96)`` float32 in [0, 1], after reading.
        require_labels: raise when a label is absent; otherwise one absent label makes `labels` None.
        limit: keep this many images, the same random choice each time, so that a file sorted by class or by centre
            still gives all classes and centres. None keeps all.
        split: "train", "val" or "test": which rows of a WILDS table to take. Other files hold one split.

    Attributes:
        path: as given; the table of a WILDS folder.
        layout: the layout's name.
        ids: ``(n,)`` int64: keys, row numbers, or WILDS's index.
        labels: ``(n,)`` int64 of 0 and 1, or None.
        centres: ``(n,)`` int64; -1 where none is named.
        source: which program made the file, if it says so (synthetic patches, cut slides), else None.
        rows: the layout's `rows.Rows`.

    Raises:
        ExampleError: no such file; not HDF5 or truncated; no images; an id that is not a whole number; a
            wrong shape or dtype; a label outside {0, 1} or, where required, absent; a limit below 1.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        transform: Transform | None = None,
        require_labels: bool = True,
        limit: int | None = None,
        split: str | None = None,
    ) -> None:
        self.transform = transform
        self.rows = _open_rows(Path(path), split, limit)
        self.path, self.layout, self.source = self.rows.path, self.rows.layout, self.rows.source
        self.ids = self.rows.ids
        self.labels = _labels(self.rows, require_labels)
        self.centres = torch.from_numpy(self.rows.centres)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        """Image ``(3, 96, 96)`` float32 in [0, 1] (or what `transform` makes of it), label, index.

        The label is a float32 scalar, NaN where the file has none. ``ids[index]`` is the image's id.

        Raises:
            ExampleError: the pixels cannot be read, are not finite, or lie outside [0, 1].
            IndexError: index outside the split.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """The samples of one batch, read into one array; DataLoader calls this where it exists."""
        images = torch.from_numpy(self.read(indices))
        return [self._sample(image, int(i)) for image, i in zip(images, indices, strict=True)]

    @property
    def has_centres(self) -> bool:
        """Whether every image names its hospital."""
        return bool((self.centres != NO_CENTRE).all())

    def read(self, indices: Sequence[int]) -> npt.NDArray[np.float32]:
        """The pixels without the transform: ``(len(indices), 3, 96, 96)`` float32 in [0, 1]."""
        out = np.empty((len(indices), *SHAPE), np.float32)
        for image, index in zip(out, indices, strict=True):
            self.rows.read(index, image)
        self._check_range(out, indices)
        return out

    def _sample(self, image: Tensor, index: int) -> Sample:
        label = float("nan") if self.labels is None else float(self.labels[index])
        image = image if self.transform is None else self.transform(image)
        return image, torch.tensor(label), index % len(self)

    def _check_range(self, images: npt.NDArray[np.float32], indices: Sequence[int]) -> None:
        flat = images.reshape(len(images), -1)
        low, high = flat.min(1), flat.max(1)
        # min and max propagate a NaN, and this comparison counts it as outside.
        inside = (low >= -_RANGE_SLACK) & (high <= 1 + _RANGE_SLACK)
        if not inside.all():
            bad = int(np.argmin(inside))
            raise ExampleError(
                f"{self.path}: {self.rows.name(indices[bad])} has values from {low[bad]:g} to "
                f"{high[bad]:g}; floating images must be finite and in [0, 1]. Divide by 255, or store uint8."
            )


def require_centres(dataset: HistoDataset, purpose: str) -> Tensor:
    """The centres ``(n,)`` of a split, for a step that needs them.

    Args:
        dataset: a split.
        purpose: the step, with which the error begins.

    Raises:
        ExampleError: an image without a centre; PCam names none.
    """
    if not dataset.has_centres:
        nameless = int((dataset.centres == NO_CENTRE).sum())
        raise ExampleError(
            f"{purpose} needs each image's hospital, and {dataset.path} ({dataset.layout}) names none for "
            f"{nameless:,} of {len(dataset):,} images. Use the challenge's or WILDS's data, or another method."
        )
    return dataset.centres


def find_splits(directory: str | os.PathLike[str]) -> dict[str, Path]:
    """A folder's files by split name.

    Challenge: ``train.h5``, or else the one ``.h5`` or ``.hdf5`` file with "train" in its stem, in any case. PCam:
    the images' file, ``..._train_x.h5``. WILDS: ``metadata.csv`` for each split that it lists.

    Raises:
        ExampleError: no such folder, several files that could be the same split, or files of two layouts.
    """
    folder = Path(directory)
    if not folder.is_dir():
        what = "a file, not a folder" if folder.exists() else "no such folder"
        raise ExampleError(f"{folder}: {what}. Give the folder that holds the splits. {_LAYOUTS}")
    files = sorted(folder.iterdir())
    found = {"PCam": pcam.find(files)}
    names = {path.name for path in found["PCam"].values()}
    names |= {pcam.labels_path(path).name for path in found["PCam"].values()}
    found["the challenge"] = challenge.find([path for path in files if path.name not in names])
    found["WILDS"] = wilds.find(folder) if wilds.is_wilds(folder) else {}
    present = {layout: paths for layout, paths in found.items() if paths}
    if len(present) > 1:
        listed = "; ".join(
            f"{', '.join(dict.fromkeys(path.name for path in paths.values()))} of {layout}"
            for layout, paths in present.items()
        )
        raise ExampleError(f"{folder}: files of {len(present)} layouts ({listed}). Keep each in a folder of its own.")
    return next(iter(present.values()), {})


def open_splits(
    directory: str | os.PathLike[str],
    limit: int | None = None,
    transforms: dict[str, Transform] | None = None,
) -> dict[str, HistoDataset]:
    """The training, validation and test sets of a folder; only the test set may come without labels.

    Args:
        directory: holds one file per split or a WILDS table, see `find_splits`.
        limit: the most images of each split.
        transforms: one for each split name; a split that is not named gets none.

    Raises:
        ExampleError: a split is missing, and whatever `HistoDataset` raises.
    """
    paths = find_splits(directory)
    missing = [split for split in SPLITS if split not in paths]
    if missing:
        raise ExampleError(_missing_splits(Path(directory), missing, paths))
    transforms = transforms or {}
    return {split: HistoDataset(paths[split], transforms.get(split), split != "test", limit, split) for split in SPLITS}


_LAYOUTS = (
    "That is train.h5, val.h5 and test.h5, or PCam's camelyonpatch_level_2_split_*_x.h5 and *_y.h5, or WILDS's "
    "metadata.csv and patches/."
)


def _open_rows(path: Path, split: str | None, limit: int | None) -> Rows:
    if path.is_dir():
        if not wilds.is_wilds(path) and tiles.find_tiles(path):
            return tiles.TileRows(path, limit)
        path = path / wilds.TABLE
    if path.name != wilds.TABLE:
        if packed.is_packed(path):
            return packed.PackedRows(path, limit)
        return pcam.PcamRows(path, limit) if pcam.is_pcam(path) else challenge.ChallengeRows(path, limit)
    if split not in SPLITS:
        raise ExampleError(f"{path} holds all splits; say which one is meant: {', '.join(SPLITS)}.")
    return wilds.WildsRows(path, split, limit)


def _missing_splits(folder: Path, missing: list[str], paths: dict[str, Path]) -> str:
    found = ", ".join(dict.fromkeys(path.name for path in paths.values())) or "no split"
    names = ", ".join(missing if _is_table(paths) else [f"{split}.h5" for split in missing])
    inner = [path.parent for path in sorted(folder.glob(f"*/{wilds.TABLE}"))] if not paths else []
    hint = f" {inner[0]} looks like a WILDS folder: give that one." if inner else f" {_LAYOUTS}" if not paths else ""
    return f"{folder}: no {names} (found: {found}). All three are needed.{hint}"


def _is_table(paths: dict[str, Path]) -> bool:
    return any(path.name == wilds.TABLE for path in paths.values())


def _labels(rows: Rows, required: bool) -> Tensor | None:
    present = [label for label in rows.labels if label is not None]
    if len(present) == len(rows.labels):
        return torch.tensor(present, dtype=torch.int64)
    if required:
        first = rows.labels.index(None)
        raise ExampleError(
            f"{rows.path}: {rows.name(first).removeprefix('img of ')} has no label ({len(rows.labels) - len(present)} "
            f"of {len(rows.labels)} have none). Only the test split may come without."
        )
    return None
