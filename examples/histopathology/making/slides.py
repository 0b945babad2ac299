"""Cut a labelled data set from a folder of tissue pictures, to try the pipeline on real pixels.

The label needs no pathologist and says nothing about tumours: it is 1 where the haematoxylin density of a patch's
central third lies above the median of its slide. Stains are separated with the slide's own vectors (Macenko et al.
2009, see `stain`), so half of every slide's patches are 1 whatever its stain. Scanner and stain differ between splits,
as in the challenge.

Small pictures are cut with overlap. Overlapping patches are correlated: a split of a few hundred holds the information
of far fewer, and intervals computed from its size are too narrow.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data.layout import PATCH, SPLITS
from ..data.rgb import Bytes, read_picture, resized
from ..data.stain import Floats, concentrations, macenko_stains, optical_density
from ..data.wholeslide import is_slide, opened_slide
from ..errors import ExampleError
from .writing import SplitWriter, refuse_to_overwrite

SOURCE = "slides cut on a grid; label: haematoxylin of the centre above the slide's median"
TABLE = "slides.csv"
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".svs")
# Grid steps, in pixels of the patch, that are tried in turn until a slide gives enough patches.
STRIDES = (96, 48, 32, 24)
ENOUGH = 100

_KNOWN = {
    "cmu_small_region.svs": ("train", 0),
    "target_image.png": ("train", 3),
    "histo.jpg": ("val", 1),
    "ihc.png": ("test", 2),
}
_BACKGROUND = 0.9
_STAIN_PIXELS = 200_000
_FEWEST_PATCHES = 4


@dataclass(frozen=True)
class Slide:
    """A picture with its split and centre.

    Attributes:
        path: PNG, JPEG, TIFF or SVS.
        split: "train", "val" or "test".
        centre: the laboratory's number.
        mpp: microns per pixel, if ``slides.csv`` says it.
    """

    path: Path
    split: str
    centre: int
    mpp: float | None = None


def cut_slides(
    folder: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    patch: int = PATCH,
    stride: int | None = None,
    max_per_slide: int | None = None,
    dtype: str = "float32",
    magnification: float | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, int]:
    """Cut a folder of pictures into ``train.h5``, ``val.h5`` and ``test.h5``; returns patches per split.

    Args:
        folder: the pictures, and ``slides.csv`` (columns file, split, centre, and mpp if known), which assigns each.
        directory: folder for the three files.
        patch: side in the pictures' pixels; a side other than 96 is resized to 96 (192 halves the magnification).
        stride: grid step in the pictures' pixels. None takes, for each slide, the largest of 1, 1/2, 1/3
            and 1/4 of the patch that gives 100 patches, or else 1/4.
        magnification: magnification at which patch and stride are counted: 10 is 1 micron a pixel, 20 is 0.5. It needs
            each picture's microns per pixel, from ``slides.csv`` or a slide's metadata. None for the pictures' pixels.
        max_per_slide: the most patches of a slide, evenly spread over it.
        dtype: stored type of ``img``, see `SplitWriter`.
        progress: called with the number of slides done so far.

    Raises:
        ExampleError: microns per pixel that are needed and unknown; a missing or faulty ``slides.csv``; a picture that
            cannot be read, or is too large, too small, nearly empty or of one hue; an output file of another origin; a
            number out of range.
    """
    _check_numbers(patch, stride, max_per_slide, magnification)
    slides = find_slides(folder)
    scales = [1.0 if magnification is None else 10 / magnification / _microns(slide) for slide in slides]
    for split in SPLITS:
        refuse_to_overwrite(Path(directory) / f"{split}.h5", SOURCE)
    counts = dict.fromkeys(SPLITS, 0)
    done = 0
    for split in SPLITS:
        with SplitWriter(directory, split, dtype, SOURCE) as writer:
            for number, slide in enumerate(slides):
                if slide.split != split:
                    continue
                side, step = round(patch * scales[number]), stride and max(1, round(stride * scales[number]))
                counts[split] += _cut(slide, number, writer, side, step, max_per_slide)
                done += 1
                if progress is not None:
                    progress(done)
    return counts


def find_slides(folder: str | os.PathLike[str]) -> list[Slide]:
    """The folder's pictures with split and centre, from its ``slides.csv``, or from a table here for known pictures.

    Raises:
        ExampleError: no such folder, no picture, unknown pictures without ``slides.csv``, faults in it (all in one
            message), or a split without a picture.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ExampleError(f"{root}: no such folder. Give the one that holds the tissue pictures.")
    table = root / TABLE
    slides = _from_table(table) if table.exists() else _from_known_names(root)
    empty = [split for split in SPLITS if split not in {slide.split for slide in slides}]
    if empty:
        raise ExampleError(f"{root}: no picture for {', '.join(empty)}. Each split needs one; {TABLE} assigns them.")
    return slides


def _microns(slide: Slide) -> float:
    """Microns per pixel from the table, or from the slide's metadata."""
    if slide.mpp is not None:
        return slide.mpp
    if is_slide(slide.path):
        with opened_slide(slide.path) as opened:
            if opened.mpp is not None:
                return opened.mpp
    raise ExampleError(
        f"{slide.path}: a magnification needs the picture's microns per pixel. Add them to {TABLE} in a column mpp."
    )


def _check_numbers(patch: int, stride: int | None, max_per_slide: int | None, magnification: float | None) -> None:
    if patch < 32:
        raise ExampleError(f"patch={patch}: give 32 pixels or more; the task's patches have 96.")
    if stride is not None and stride < 1:
        raise ExampleError(f"stride={stride}: give 1 pixel or more, or None to choose by slide.")
    if magnification is not None and not 0 < magnification < float("inf"):
        raise ExampleError(f"magnification={magnification}: give a number above 0, such as 10 or 20.")
    if max_per_slide is not None and max_per_slide < _FEWEST_PATCHES:
        raise ExampleError(f"max_per_slide={max_per_slide}: give {_FEWEST_PATCHES} or more, or None for all.")


def _from_known_names(root: Path) -> list[Slide]:
    names = sorted(p.name for p in root.iterdir() if p.suffix.lower() in SUFFIXES)
    if not names:
        raise ExampleError(f"{root}: no picture here. PNG, JPEG, TIFF and SVS are read.")
    if not set(names) <= set(_KNOWN):
        lines = ["file,split,centre", *(f"{name},{SPLITS[i % 3]},{i}" for i, name in enumerate(names[:3]))]
        raise ExampleError(
            f"{root}: which picture is for training, validation and test? Say so in {root / TABLE}, with splits "
            f"{', '.join(SPLITS)} and one centre number per laboratory, like this:\n" + "\n".join(lines)
        )
    return [Slide(root / name, *_KNOWN[name]) for name in names]


def _from_table(table: Path) -> list[Slide]:
    with table.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        if not {"file", "split", "centre"} <= set(reader.fieldnames or ()):
            raise ExampleError(f"{table}: its first line must be file,split,centre, not {reader.fieldnames}.")
        rows = [(reader.line_num, row) for row in reader]
    faults = [f"  line {line}: {fault}" for line, row in rows for fault in _row_faults(table.parent, row)]
    names = [row["file"] for _, row in rows]
    faults += [f"  {name}: listed twice" for name in sorted({n for n in names if names.count(n) > 1})]
    if faults or not rows:
        raise ExampleError(f"{table}:\n" + "\n".join(faults or ["  no picture listed"]))
    return [
        Slide(table.parent / row["file"], row["split"].strip(), int(row["centre"]), _positive(row.get("mpp")))
        for _, row in rows
    ]


def _positive(text: str | None) -> float | None:
    """A number above 0; None for an empty cell, NaN for anything else."""
    if not (text or "").strip():
        return None
    try:
        value = float(text or "")
    except ValueError:
        return float("nan")
    return value if 0 < value < float("inf") else float("nan")


def _row_faults(root: Path, row: dict[str, str | None]) -> Iterator[str]:
    name, split, centre = (row[key] or "" for key in ("file", "split", "centre"))
    if not (root / name).is_file():
        yield f"no file {name!r} in {root}"
    if split.strip() not in SPLITS:
        yield f"split {split!r} is none of {', '.join(SPLITS)}"
    if not centre.strip().isdecimal():
        yield f"centre {centre!r} is not a number"
    if (mpp := _positive(row.get("mpp"))) is not None and mpp != mpp:
        yield f"mpp {row['mpp']!r} is not a number above 0"


def _cut(
    slide: Slide, number: int, writer: SplitWriter, patch: int, stride: int | None, max_per_slide: int | None
) -> int:
    picture = read_picture(slide.path)
    corners = _corners(picture, slide.path, patch, stride)
    if max_per_slide is not None and len(corners) > max_per_slide:
        corners = [corners[i] for i in np.linspace(0, len(corners) - 1, max_per_slide).astype(int)]
    density = _haematoxylin(picture, slide.path, corners, patch)
    labels = density > np.median(density)
    if not labels.any():
        raise ExampleError(f"{slide.path}: all patches have the same haematoxylin density. Leave this picture out.")
    for (y, x), label in zip(corners, labels, strict=True):
        image = resized(picture[y : y + patch, x : x + patch])
        writer.add(image.transpose(2, 0, 1), int(label), np.array([slide.centre, number, x, y], np.int64))
    return len(corners)


def _corners(picture: Bytes, path: Path, patch: int, stride: int | None) -> list[tuple[int, int]]:
    """Upper left corners (y, x) of the patches that hold tissue."""
    height, width = picture.shape[:2]
    if min(height, width) < patch:
        raise ExampleError(f"{path}: {width}×{height} pixels hold no patch of {patch}×{patch}. Leave this picture out.")
    steps = [stride] if stride is not None else [max(1, s * patch // PATCH) for s in STRIDES]
    for step in steps:
        grid = [(y, x) for y in range(0, height - patch + 1, step) for x in range(0, width - patch + 1, step)]
        corners = [(y, x) for y, x in grid if is_tissue(picture[y : y + patch, x : x + patch])]
        if len(corners) >= ENOUGH:
            break
    if len(corners) < _FEWEST_PATCHES:
        raise ExampleError(
            f"{path}: {len(corners)} of {len(grid)} patches hold tissue (mean at most {_BACKGROUND}); "
            f"{_FEWEST_PATCHES} are needed. Take a larger picture or a smaller stride."
        )
    return corners


def is_tissue(pixels: Bytes) -> bool:
    """Whether a patch is darker than glass."""
    return bool(pixels.mean() <= _BACKGROUND * 255)


def _haematoxylin(picture: Bytes, path: Path, corners: Sequence[tuple[int, int]], patch: int) -> Floats:
    """The mean haematoxylin concentration of each patch's central third, ``(n,)``, by the slide's own stains."""
    # Every k-th pixel is enough: percentiles of 200,000 angles do not change with more.
    sample = picture.reshape(-1, 3)[:: max(1, picture.size // 3 // _STAIN_PIXELS)]
    try:
        stains = macenko_stains(optical_density(sample / np.float32(255)))
    except ValueError as error:
        raise ExampleError(f"{path}: its stains cannot be separated: {error}. Leave this picture out.") from error
    side = patch // 3
    first = (patch - side) // 2
    density = np.empty(len(corners))
    for i, (y, x) in enumerate(corners):
        centre = picture[y + first : y + first + side, x + first : x + first + side]
        density[i] = concentrations(optical_density(centre / np.float32(255)), stains)[..., 0].mean()
    return density
