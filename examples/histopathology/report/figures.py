"""Pictures of a data set: shares as bars, and sheets of patches with frames for label 1."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle

from ..augment.draws import Draws
from ..augment.transforms import Normalisation, Normalise, TrainTransform
from ..data.dataset import HistoDataset
from ..data.layout import PATCH
from ..data.stain import Floats
from ..methods.method import Augment, Policy

# Okabe and Ito's colours, which colour-blind readers can distinguish.
_BAR, _FRAME = "#0072b2", "#d55e00"
_PER_ROW = 8
_CENTRE = (PATCH / 3 - 0.5, PATCH / 3 - 0.5)


def shares(counts: Mapping[int | None, int], what: str, title: str) -> Figure:
    """Counts and their shares as horizontal bars."""
    total = sum(counts.values())
    names = [f"no {what}" if key is None else f"{what} {key}" for key in counts]
    figure = Figure(figsize=(5, 0.9 + 0.45 * len(counts)), layout="constrained")
    axes = figure.add_subplot(xlabel="images", title=title)
    bars = axes.barh(names, list(counts.values()), color=_BAR)
    axes.bar_label(bars, [f"{count:,} ({count / total:.1%})" for count in counts.values()], padding=4)
    axes.set_xlim(0, 1.35 * max(counts.values()))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def samples(splits: Mapping[str, HistoDataset], seed: int) -> Figure:
    """Up to eight patches of each centre and split, in one row; a frame around the centre marks label 1."""
    rows, titles, framed = [], [], []
    for name, split in splits.items():
        centres = split.centres.numpy()
        for centre in np.unique(centres):
            chosen = _some(np.flatnonzero(centres == centre), seed)
            rows.append(_channel_last(split.read(chosen)))
            titles.append(name if centre < 0 else f"{name}\ncentre {centre}")
            framed.append([split.labels is not None and bool(split.labels[i]) for i in chosen])
    return sheet(rows, titles, framed)


def augmented(split: HistoDataset, seed: int, policy: Policy, patches: int = 4) -> Figure:
    """A few patches, each followed by augmented versions that are not normalised."""
    plain = Normalisation("none", "", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    augment = TrainTransform(PATCH, Normalise(plain), Augment(policy))
    chosen = _some(np.arange(len(split)), seed)[:patches]
    images = torch.from_numpy(split.read(chosen))
    columns = [images, *(augment(images, Draws(seed, epoch, chosen)) for epoch in range(_PER_ROW - 1))]
    rows = [_channel_last(row.clamp(0, 1).numpy()) for row in torch.stack(columns, 1)]
    return sheet(rows, [str(split.ids[i]) for i in chosen])


def sheet(
    rows: Sequence[Floats], titles: Sequence[str], framed: Sequence[Sequence[bool]] | None = None, title: str = ""
) -> Figure:
    """Patches in rows, each row with a title before it.

    Args:
        rows: each ``(n, height, width, 3)`` in [0, 1], n up to eight.
        titles: the rows' titles.
        framed: which patches get a frame around their central 32×32.
        title: the figure's title.
    """
    width = max(len(row) for row in rows)
    close = ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)
    figure = Figure(figsize=(1.2 + width, 0.2 + 0.3 * bool(title) + len(rows)), layout=close)
    grid = figure.subplots(len(rows), width, squeeze=False)
    if title:
        figure.suptitle(title, fontsize=9)
    for i, (line, row) in enumerate(zip(grid, rows, strict=True)):
        for j, axes in enumerate(line):
            axes.set(xticks=[], yticks=[], frame_on=False)
            if j < len(row):
                axes.imshow(row[j], interpolation="nearest")
                if framed is not None and framed[i][j]:
                    axes.add_patch(Rectangle(_CENTRE, PATCH / 3, PATCH / 3, fill=False, edgecolor=_FRAME, lw=1.2))
        line[0].set_ylabel(titles[i], rotation=0, ha="right", va="center", fontsize=8)
    return figure


def as_png(figure: Figure, dpi: int = 110) -> bytes:
    """The figure as PNG, without date or version."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi, metadata={"Software": None})
    return stream.getvalue()


def _some(indices: npt.NDArray[Any], seed: int) -> list[int]:
    """Up to eight of the indices, in order; the choice depends on the seed alone."""
    wanted = min(_PER_ROW, len(indices))
    chosen: list[int] = np.random.default_rng(seed).choice(indices, wanted, replace=False).tolist()
    return sorted(chosen)


def _channel_last(images: Floats) -> Floats:
    turned: Floats = np.clip(images, 0, 1).transpose(0, 2, 3, 1)
    return turned
