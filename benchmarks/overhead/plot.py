"""A picture of a run: for each arm its time and its memory over full fine-tuning's."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from .arms import FULL
from .runs import Run
from .tables import describe


def draw(run: Run, path: Path) -> None:
    """Bars of the training arms' ratios, with the quartiles of the times, into an image file."""
    results = [r for r in run.training if not r.unavailable][::-1]
    full = next(r for r in results if r.arm == FULL)
    rows, ratios = range(len(results)), [r.ratio for r in results]
    spread = [[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]]
    figure = Figure(figsize=(8, 1.5 + 0.45 * len(results)), layout="constrained")
    axes = figure.subplots()
    axes.barh([y + 0.2 for y in rows], [r.median for r in ratios], 0.36, xerr=spread, label="time", color="C0")
    axes.barh([y - 0.2 for y in rows], [r.peak / full.peak for r in results], 0.36, label="peak memory", color="C1")
    axes.set_yticks(list(rows), [r.arm for r in results])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("over full fine-tuning's")
    axes.set_title(describe(run.settings), fontsize="small")
    axes.legend()
    figure.savefig(path, dpi=120)
