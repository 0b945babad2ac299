"""A whole slide: its microns per pixel, a grid of tiles over it, which tiles hold tissue, and their pixels.

OpenSlide (``openslide-python``) opens slides, or ``tiffslide`` if OpenSlide is absent or does not know the file.
Coordinates (x, y) are those of the slide's full resolution, as in QuPath.

A **tile** is one input of the network: 96×96 pixels at the training patches' microns per pixel. Tiles begin a stride
apart and cover the whole slide; those at its right and lower border reach beyond it, onto white. Each pixel of a tile
is the mean of the area that it covers, in the pyramid's coarsest level that is not coarser than the tile.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import ExampleError
from .layout import PATCH, SLIDES

INSTALL = 'pip install "convlora[slides]"'
BLOCK = 8
"""Side of the blocks of tiles that are read at once, so that the slide's own tiles are decoded at most twice."""
AHEAD = 4
"""The most blocks that wait to be predicted."""
# Glass varies by a few hundredths between its channels; pale stroma in H&E by a tenth and more.
_COLOURED = (0.04, 0.12)
_ROUNDING = 1.01

Bytes = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Item = TypeVar("Item")
Answer = TypeVar("Answer")


def is_slide(path: Path) -> bool:
    """Whether a path is a file with a slide's name."""
    return path.suffix.lower() in SLIDES and path.is_file()


class WholeSlide:
    """An open slide.

    Attributes:
        path: the file.
        size: width and height at full resolution.
        mpp: microns per pixel at full resolution, from its metadata; None if absent.
        power: the objective's magnification, from its metadata; None if absent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._slide = _opened(path)
        self.size: tuple[int, int] = self._slide.dimensions
        self.mpp = self._microns()
        self.power = self._number("objective-power")

    def read(self, x: float, y: float, side: tuple[float, float], scale: float, out: tuple[int, int]) -> Bytes:
        """Read and resize a rectangle: ``(out[1], out[0], 3)``; beyond the slide it is white.

        Args:
            x: column of the upper left corner at full resolution; fractions are allowed.
            y: row of the upper left corner.
            side: width and height at full resolution.
            scale: pixels at full resolution for one pixel of the result, which decides the pyramid's level.
            out: width and height of the result.
        """
        level = max(i for i, step in enumerate(self._slide.level_downsamples) if i == 0 or step <= scale * _ROUNDING)
        step, (width, height) = self._slide.level_downsamples[level], self._slide.level_dimensions[level]
        left, top = max(0, math.floor(x / step)), max(0, math.floor(y / step))
        right, bottom = math.ceil((x + side[0]) / step), math.ceil((y + side[1]) / step)
        inside = (min(right, width) - left, min(bottom, height) - top)
        region = Image.new("RGB", (right - left, bottom - top), "white")
        if min(inside) > 0:
            region.paste(self._region((round(left * step), round(top * step)), level, inside))
        box = (x / step - left, y / step - top, (x + side[0]) / step - left, (y + side[1]) / step - top)
        box = (box[0], box[1], min(box[2], region.width), min(box[3], region.height))
        return np.asarray(region.resize(out, Image.Resampling.BOX, box))

    def close(self) -> None:
        """Close the file."""
        self._slide.close()

    def _region(self, corner: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        try:
            found: Image.Image = self._slide.read_region(corner, level, size)
        except Exception as error:  # both libraries pass on any error of their decoders
            raise ExampleError(
                f"{self.path}: its pixels at x {corner[0]}, y {corner[1]} cannot be read ({_first_line(error)}). The "
                "file may be truncated: get it again."
            ) from error
        if found.mode == "RGBA":  # regions that were not scanned are transparent
            return Image.alpha_composite(Image.new("RGBA", found.size, "white"), found).convert("RGB")
        return found.convert("RGB")

    def _microns(self) -> float | None:
        both = [self._number("mpp-x"), self._number("mpp-y")]
        known = [each for each in both if each is not None]
        return sum(known) / len(known) if known else None

    def _number(self, name: str) -> float | None:
        """A property under either library's prefix; None unless it is a positive number."""
        for prefix in ("openslide", "tiffslide"):
            try:
                value = float(self._slide.properties.get(f"{prefix}.{name}") or 0)
            except ValueError:
                continue
            if 0 < value < math.inf:
                return value
        return None


@contextmanager
def opened_slide(path: Path) -> Iterator[WholeSlide]:
    """Open a slide, and close it after the block.

    Raises:
        ExampleError: no such file; neither library is installed; neither reads it.
    """
    slide = WholeSlide(path)
    try:
        yield slide
    finally:
        slide.close()


def microns_per_pixel(slide: WholeSlide, given: float | None) -> float:
    """The given microns per pixel, or else those of the slide's metadata.

    Raises:
        ExampleError: neither.
    """
    if given is not None:
        return given
    if slide.mpp is None:
        hint = "" if slide.power is None else f" Its objective was {slide.power:g}×: about --mpp {10 / slide.power:g}."
        raise ExampleError(
            f"{slide.path}: its metadata do not say the microns per pixel. Give --mpp, for instance 0.25 for a scan at "
            f"40×, 0.5 at 20×.{hint}"
        )
    return slide.mpp


@dataclass(frozen=True)
class Grid:
    """The positions of a slide's tiles.

    Attributes:
        step: distance between tiles in pixels at full resolution, usually a fraction.
        side: side of a tile in pixels at full resolution.
        stride: distance between tiles in pixels of a tile.
        columns: number of columns of tiles.
        rows: number of rows of tiles.
    """

    step: float
    side: float
    stride: int
    columns: int
    rows: int

    @property
    def scale(self) -> float:
        """Pixels at full resolution for one pixel of a tile."""
        return self.side / PATCH

    def corner(self, column: int, row: int) -> tuple[int, int]:
        """A tile's upper left corner (x, y) at full resolution, rounded to pixels."""
        return round(column * self.step), round(row * self.step)


def make_grid(size: tuple[int, int], mpp: float, tile_mpp: float, stride: int = PATCH) -> Grid:
    """The grid of the fewest tiles that cover a slide of this size.

    >>> make_grid((2220, 2967), mpp=0.499, tile_mpp=0.97)
    Grid(step=186.6132264529058, side=186.6132264529058, stride=96, columns=12, rows=16)
    """
    side, step = PATCH * (tile_mpp / mpp), stride * (tile_mpp / mpp)
    # an excess that is only rounding adds no tile
    columns, rows = (1 + max(0, math.ceil((length - side) / step - 1e-6)) for length in size)
    return Grid(step, side, stride, columns, rows)


def overview(slide: WholeSlide, grid: Grid, cell: int) -> Bytes:
    """A small picture of all that the grid covers, with ``cell`` pixels for each stride.

    It is read in blocks, since a slide may have no pyramid.

    Returns:
        ``(height, width, 3)``.
    """
    scale = grid.step / cell
    margin = round((grid.side - grid.step) / scale)
    width, height = grid.columns * cell + margin, grid.rows * cell + margin
    block = max(1, math.floor(2048 / max(1.0, scale)))
    picture = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, block):
        for left in range(0, width, block):
            out = (min(block, width - left), min(block, height - top))
            side = (out[0] * scale, out[1] * scale)
            picture[top : top + out[1], left : left + out[0]] = slide.read(left * scale, top * scale, side, scale, out)
    return picture


def tissue_mask(picture: Bytes) -> Mask:
    """Which pixels are stained ``(H, W)``: their channels differ by more than Otsu's threshold, clipped to bounds."""
    colour = (picture.max(2).astype(np.float32) - picture.min(2)) / 255
    stained: Mask = colour > np.clip(_otsu(colour), *_COLOURED)
    return stained


def tissue_tiles(mask: Mask, grid: Grid, cell: int, least: float) -> Mask:
    """Which tiles ``(rows, columns)`` hold at least this share of tissue."""
    side = round(cell * PATCH / grid.stride)
    sums = np.pad(mask.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    top, left = np.arange(grid.rows)[:, None] * cell, np.arange(grid.columns)[None] * cell
    bottom, right = np.minimum(top + side, mask.shape[0]), np.minimum(left + side, mask.shape[1])
    count = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    chosen: Mask = count >= least * side**2
    return chosen


Tiles = tuple[list[tuple[int, int]], Bytes]
"""(row, column) of tiles, and their pixels ``(n, 96, 96, 3)``."""


def read_tiles(slide: WholeSlide, grid: Grid, chosen: Mask, threads: int = 2) -> Iterator[Tiles]:
    """The chosen tiles, block by block; threads read a few blocks ahead."""

    def read(places: Sequence[tuple[int, int]]) -> Tiles:
        return list(places), _block(slide, grid, places)

    return read_ahead(read, _blocks(chosen), threads)


def read_ahead(
    read: Callable[[Item], Answer], items: Iterable[Item], threads: int = 2, ahead: int = AHEAD
) -> Iterator[Answer]:
    """Yield ``read(item)`` in order; threads read at most ``ahead`` items in advance."""
    waiting: deque[Future[Answer]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(read, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for each in waiting:
                each.cancel()


def _blocks(chosen: Mask) -> Iterator[list[tuple[int, int]]]:
    """The places of the chosen tiles, grouped by squares of the grid."""
    rows, columns = chosen.shape
    for top in range(0, rows, BLOCK):
        for left in range(0, columns, BLOCK):
            found = np.argwhere(chosen[top : top + BLOCK, left : left + BLOCK])
            if len(found):
                yield [(top + int(row), left + int(column)) for row, column in found]


def _block(slide: WholeSlide, grid: Grid, places: Sequence[tuple[int, int]]) -> Bytes:
    """The pixels of a block's tiles, cut from the rectangle around them."""
    (top, left), (bottom, right) = np.min(places, 0), np.max(places, 0)
    out = (int(right - left) * grid.stride + PATCH, int(bottom - top) * grid.stride + PATCH)
    side = (out[0] * grid.scale, out[1] * grid.scale)
    pixels = slide.read(left * grid.step, top * grid.step, side, grid.scale, out)
    corners = [((row - top) * grid.stride, (column - left) * grid.stride) for row, column in places]
    return np.stack([pixels[y : y + PATCH, x : x + PATCH] for y, x in corners])


def _otsu(values: npt.NDArray[np.float32]) -> float:
    """Otsu's threshold (1979) for values in [0, 1]: it maximises the variance between the two groups."""
    counts, edges = np.histogram(values, 256, (0.0, 1.0))
    centres = (edges[1:] + edges[:-1]) / 2
    below, total = counts.cumsum(), (counts * centres).cumsum()
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (total / below - (total[-1] - total) / above) ** 2
    return float(edges[1:][np.nan_to_num(between).argmax()])


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise ExampleError(f"{path}: no such slide.")
    faults: list[str] = []
    for open_by in (_by_openslide, _by_tiffslide):
        with suppress(ImportError), _noting(faults):
            return open_by(path)
    if not faults:
        raise ExampleError(f"{path}: reading a slide needs openslide-python or tiffslide: {INSTALL}.")
    raise ExampleError(
        f"{path}: cannot be read as a slide ({'; '.join(faults)}). Aperio, Hamamatsu, MIRAX, Leica, Philips, Ventana "
        "and pyramidal TIFF are read; to predict single tiles, give the folder that holds them."
    )


@contextmanager
def _noting(faults: list[str]) -> Iterator[None]:
    """Collect the error of a library that does not read the file; a library that is not installed adds none."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # the libraries and their decoders have errors of many kinds
        faults.append(_first_line(error))


def _by_openslide(path: Path) -> Any:
    import openslide

    return openslide.OpenSlide(str(path))


def _by_tiffslide(path: Path) -> Any:
    import tiffslide

    return tiffslide.TiffSlide(str(path))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
