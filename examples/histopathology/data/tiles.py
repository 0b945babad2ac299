"""A folder of tiles, one picture file each, as `Rows`, for predictions on your own pictures.

Files in the folder itself are read, in the order of their numbers if every name is a number (``12.png``), else of
their names. A tile is a square of any size, at the magnification of the training patches. It is resized to 96 pixels,
where each pixel is the mean of the area that it covers.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import ExampleError
from .layout import PATCH
from .rgb import read_picture, resized
from .rows import NO_CENTRE, Rows, choose

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
# A larger picture is a slide, and would show nothing when shrunk to a patch.
LARGEST = 1024


class TileRows(Rows):
    """The tiles of a folder; each is read once here, so that an unreadable one is found before anything is predicted.

    Args:
        path: the folder.
        limit: see `rows.choose`.

    Raises:
        ExampleError: tiles that cannot be read, are not square or are too large, all of them named.
    """

    layout = "folder of tiles"

    def __init__(self, path: Path, limit: int | None = None) -> None:
        super().__init__(path)
        files = find_tiles(path)
        numbered = all(_is_number(file) for file in files) and len({int(f.stem) for f in files}) == len(files)
        files.sort(key=(lambda file: int(file.stem)) if numbered else (lambda file: file.name))
        chosen = choose(len(files), limit, path)
        self.files: list[Path] = [files[i] for i in chosen]
        self.ids = np.array([int(file.stem) for file in self.files]) if numbered else chosen.astype(np.int64)
        self.labels = [None] * len(self.files)
        self.centres = np.full(len(self.files), NO_CENTRE, np.int64)
        self.dtypes["uint8"] = len(self.files)
        sizes = _check(path, self.files)
        self.shape = (*next(iter(sizes)), 3)
        if not numbered:
            self.notes.append("not every name is a different number, so IDs count the tiles by name, from 0")
        if set(sizes) != {(PATCH, PATCH)}:
            found = ", ".join(f"{count:,} of {width}×{width}" for (width, _), count in sorted(sizes.items()))
            self.notes.append(f"resized to {PATCH}×{PATCH}: {found}")

    def read(self, index: int, out: npt.NDArray[np.float32]) -> None:
        """Read one tile into `out`, channel first."""
        np.divide(resized(read_picture(self.files[index])).transpose(2, 0, 1), np.float32(255), out=out)

    def name(self, index: int) -> str:
        """The tile's file name."""
        return self.files[index].name


def find_tiles(folder: Path) -> list[Path]:
    """The pictures in a folder; empty if there are none."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())


def _check(folder: Path, files: list[Path]) -> Counter[tuple[int, int]]:
    """The number of tiles of each size."""
    sizes: Counter[tuple[int, int]] = Counter()
    faults = []
    for file in files:
        try:
            height, width = read_picture(file).shape[:2]
        except ExampleError as fault:
            faults.append(str(fault).removeprefix(f"{folder}/").removesuffix(" Save it as PNG or JPEG.").rstrip("."))
            continue
        if height != width or width > LARGEST:
            faults.append(f"{file.name}: {width}×{height} pixels; a tile is a square of at most {LARGEST}")
        sizes[width, height] += 1
    if faults:
        raise ExampleError(
            f"{folder}: {len(faults)} of {len(files)} tiles cannot be used: {'; '.join(faults)}. Repair or remove "
            "them; `make-data --slides` cuts larger pictures. Nothing was written."
        )
    return sizes


def _is_number(file: Path) -> bool:
    return file.stem.isascii() and file.stem.isdecimal() and len(file.stem) <= 18
