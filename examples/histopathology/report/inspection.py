"""The ``inspect`` command: what a data set holds, before anything is trained on it.

It collects facts of each split and colours of each centre, and draws the figures of the challenge report's data
analysis (shares of centres and labels, samples of each centre, augmented samples), as pictures and in one page.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure

from ..data.dataset import HistoDataset, find_splits
from ..data.rows import NO_CENTRE
from ..data.stain import Floats
from ..data.wilds import TABLE
from ..errors import ExampleError
from ..files import write_bytes, write_text
from ..methods.method import Policy
from . import figures

PAGE = "inspect.html"
COLOUR_IMAGES = 500
AUGMENTATIONS: Mapping[Policy, str] = {
    "affine": "by flips, rotations and affine",
    "crop": "by colour jitter, random crops and flips",
}
_CHUNK = 32


@dataclass(frozen=True)
class Colours:
    """Means and standard deviations of R, G, B over all pixels of some images, and the range of values."""

    images: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    lowest: float
    highest: float


@dataclass(frozen=True)
class Facts:
    """The facts of one split.

    Attributes:
        stored: number of images by stored dtype.
        shape: shape of a stored image.
        labels: number of images by label; None is the key of images without one.
        centres: number of images by centre; None is the key of images without one.
        colours: colours by centre.
        notes: remarks, a sentence each.
        warnings: a sentence each, see `leakage`.
    """

    name: str
    path: str
    layout: str
    source: str | None
    images: int
    ids: tuple[int, int]
    stored: dict[str, int]
    shape: tuple[int, ...]
    labels: dict[int | None, int]
    centres: dict[int | None, int]
    colours: dict[int | None, Colours]
    notes: list[str]
    warnings: list[str]

    @property
    def values(self) -> tuple[float, float]:
        """The lowest and the highest value of the images that were read, on the scale of 0 to 1."""
        return min(c.lowest for c in self.colours.values()), max(c.highest for c in self.colours.values())

    def lines(self) -> list[str]:
        """All facts except the colours, as lines to print."""
        stored = ", ".join(f"{count:,} × {dtype}" for dtype, count in self.stored.items())
        low, high = self.values
        looked_at = sum(c.images for c in self.colours.values())
        return [
            f"{self.name}: {self.path} ({self.layout})",
            f"  images    {self.images:,}, ids {self.ids[0]} to {self.ids[1]}",
            f"  stored    {stored}, shape {self.shape}",
            f"  values    {low:.3f} to {high:.3f} of 1, in {looked_at:,} images",
            f"  labels    {_shares(self.labels, 'without a label')}",
            f"  centres   {_shares(self.centres, 'without a centre')}",
            *([f"  source    {self.source}"] if self.source else []),
            *(f"  note      {note}" for note in self.notes),
            *(f"  WARNING   {warning}" for warning in self.warnings),
        ]


def open_all(data: Path, limit: int | None = None) -> dict[str, HistoDataset]:
    """Open the splits of a folder or a file, by name; any of them may lack labels.

    Raises:
        ExampleError: as `find_splits` and `HistoDataset`, or a folder without any split.
    """
    if data.is_file() and data.name != TABLE:
        return {data.stem: HistoDataset(data, require_labels=False, limit=limit)}
    folder = data.parent if data.is_file() else data
    paths = find_splits(folder)
    if not paths:
        raise ExampleError(
            f"{folder}: no split found. Expected train.h5, val.h5, test.h5; or camelyonpatch_level_2_split_*_x.h5 and "
            "*_y.h5; or metadata.csv and patches/."
        )
    return {split: HistoDataset(path, require_labels=False, limit=limit, split=split) for split, path in paths.items()}


def find_facts(name: str, split: HistoDataset, warnings: Sequence[str] = ()) -> Facts:
    """Collect the facts of one split, with the colours of up to 500 images of each centre."""
    rows = split.rows
    labels: dict[int | None, int] = dict(sorted(Counter(rows.labels).items(), key=_none_last))
    centres, counts = np.unique(rows.centres, return_counts=True)
    notes = list(rows.notes)
    if None in labels and name in ("train", "val"):
        notes.append(f"{labels[None]:,} images have no label, which is allowed in the test split only")
    return Facts(
        name=name,
        path=str(split.path),
        layout=split.layout,
        source=split.source,
        images=len(split),
        ids=(int(split.ids[0]), int(split.ids[-1])),
        stored=dict(rows.dtypes),
        shape=rows.shape,
        labels=labels,
        centres={_centre(c): int(n) for c, n in sorted(zip(centres, counts, strict=True), key=_none_last)},
        colours={_centre(c): colours(split, np.flatnonzero(rows.centres == c)) for c in centres},
        notes=notes,
        warnings=list(warnings),
    )


def colours(split: HistoDataset, indices: Any = None, limit: int = COLOUR_IMAGES) -> Colours:
    """Colours of up to `limit` of these images, evenly spaced; ``indices`` None means the whole split."""
    indices = np.arange(len(split)) if indices is None else np.asarray(indices)
    chosen = indices[np.unique(np.linspace(0, len(indices) - 1, min(limit, len(indices))).astype(int))]
    total, squares = np.zeros(3), np.zeros(3)
    lowest, highest = np.inf, -np.inf
    for start in range(0, len(chosen), _CHUNK):
        pixels = split.read(chosen[start : start + _CHUNK].tolist()).astype(np.float64)
        total += pixels.mean(axis=(2, 3)).sum(axis=0)
        squares += (pixels**2).mean(axis=(2, 3)).sum(axis=0)
        lowest, highest = min(lowest, float(pixels.min())), max(highest, float(pixels.max()))
    mean: Floats = total / len(chosen)
    std = np.sqrt(np.maximum(squares / len(chosen) - mean**2, 0))
    return Colours(len(chosen), tuple(mean.tolist()), tuple(std.tolist()), lowest, highest)


def draw(splits: Mapping[str, HistoDataset], facts: Mapping[str, Facts], seed: int) -> dict[str, tuple[str, Figure]]:
    """The figures, each a caption and a picture, by file name; figures that the data do not allow are left out."""
    drawn: dict[str, tuple[str, Figure]] = {}
    train = facts.get("train", next(iter(facts.values())))
    if None not in train.centres:
        caption = f"Share of the centres in {train.name}"
        drawn["fig1-centres.png"] = caption, figures.shares(train.centres, "centre", caption)
    for number, name in enumerate([name for name in facts if name != "test"][:2], start=2):
        labels = facts[name].labels
        if set(labels) - {None}:
            caption = f"Labels in {name}"
            drawn[f"fig{number}-labels-{name}.png"] = caption, figures.shares(labels, "label", caption)
    caption = "Samples of each centre; framed where the label is 1"
    drawn["samples.png"] = caption, figures.samples(splits, seed)
    for policy, words in AUGMENTATIONS.items():
        caption = f"Augmented samples of {train.name}, {words}; the first of each row is the patch itself"
        drawn[f"fig4-augmented-{policy}.png"] = caption, figures.augmented(splits[train.name], seed, policy)
    return drawn


def write(out: Path, facts: Mapping[str, Facts], drawn: Mapping[str, tuple[str, Figure]]) -> list[Path]:
    """Write the figures, ``inspect.json`` and ``inspect.html``, which holds all figures; returns the files."""
    pictures = {name: figures.as_png(figure) for name, (_, figure) in drawn.items()}
    for name, picture in pictures.items():
        write_bytes(out / name, picture)
    write_text(out / "inspect.json", json.dumps([_plain(each) for each in facts.values()], indent=2) + "\n")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    inside = [(drawn[name][0], base64.b64encode(picture).decode()) for name, picture in pictures.items()]
    page = environment.get_template("inspect.html.j2").render(facts=facts.values(), pictures=inside)
    write_text(out / PAGE, page)
    return [out / name for name in (*pictures, "inspect.json", PAGE)]


def colour_rows(facts: Mapping[str, Facts]) -> list[tuple[str, ...]]:
    """Rows of split, centre, images, means and standard deviations of R, G, B."""
    return [
        (each.name, "none" if centre is None else str(centre), f"{c.images:,}", _numbers(c.mean), _numbers(c.std))
        for each in facts.values()
        for centre, c in each.colours.items()
    ]


def _plain(facts: Facts) -> dict[str, Any]:
    """The facts as plain values for JSON, whose keys are strings."""
    fields = dataclasses.asdict(facts)
    for name in ("labels", "centres", "colours"):
        fields[name] = {"none" if key is None else str(key): value for key, value in fields[name].items()}
    return fields


def _centre(value: Any) -> int | None:
    return None if value == NO_CENTRE else int(value)


def _none_last(pair: tuple[Any, Any]) -> tuple[bool, int]:
    return (True, 0) if pair[0] is None or pair[0] == NO_CENTRE else (False, int(pair[0]))


def _shares(counts: Mapping[int | None, int], nothing: str) -> str:
    total = sum(counts.values())
    return ", ".join(
        f"{count:,} {nothing}" if key is None else f"{key}: {count:,} ({count / total:.1%})"
        for key, count in counts.items()
    )


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.2f}" for value in values)
