"""Draw the time of a training step and the memory that it keeps, both over full fine-tuning's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.charts import Panel, chart

from .arms import FULL
from .runs import Run

COMPARED = {"convlora": "{}, {}", "peft": "… with peft"}
"""Methods that are drawn of several runs, with their labels; of one run all methods are drawn."""


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw the training methods' ratios as an SVG file; full fine-tuning is 1."""
    labels, pairs = [], []
    for run in runs:
        by_name = {r.arm: r for r in run.training if not r.unavailable}
        for arm, result in by_name.items():
            if len(runs) > 1 and arm not in COMPARED:
                continue
            model = run.settings.model.removeprefix("tf_").split("_")[0]
            labels.append(arm if len(runs) == 1 else COMPARED[arm].format(model, run.settings.size))
            pairs.append((result, by_name[FULL]))
    ours = [i for i, (result, _) in enumerate(pairs) if result.arm.startswith("convlora")]
    panels = [
        _panel("time of a training step", [r.ratio.median for r, _ in pairs]),
        _panel("kept for the backward", [r.saved / full.saved for r, full in pairs]),
    ]
    picture = chart(
        "Time and memory over full fine-tuning's",
        labels,
        panels,
        ours,
        "network, side of an image in px; full fine-tuning is 1",
    )
    path.write_text(picture, encoding="utf-8")


def _panel(heading: str, values: Sequence[float]) -> Panel:
    return Panel(heading, values, [f"{value:.2f}" for value in values])
