"""The picture at the head of the README: accuracy, memory and time of one network, from the figures of two docs pages.

    python -m benchmarks.front

Accuracy and memory are rows of `docs/accuracy.jsonl`; the times stand in the table of `docs/performance.md`. Nothing is
measured here, so the picture can claim nothing that these two do not.
"""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.accuracy.report import Row, kept

from .charts import Panel, chart

DOCS = Path(__file__).parent.parent / "docs"
PICTURE = DOCS / "assets" / "front.svg"
SHOWN = {
    "full": ("full fine-tuning", "full"),
    "full-freeze": ("full, norms fixed", "full-freeze"),
    "peft-8": ("peft LoRA", "peft"),
    "lora-8": ("convlora", "convlora"),
    "lean-16": ("convlora, lean", ""),
}
"""Methods of the accuracy benchmark, each with its label and its name in `performance.md`, or "" if it has none."""


def times(page: str, network: str) -> dict[str, float]:
    """Each method's time of a training step over full fine-tuning's, from the first table of the network's section."""
    section = page.split(f"## {network},", 1)[1].split("A forward without gradients", 1)[0]
    return {arm: float(time) for arm, time in re.findall(r"^\| ([\w-]+) \| ([\d.]+) \|", section, re.MULTILINE)}


def picture() -> str:
    """The SVG text."""
    found = {row.arm: row for row in kept(DOCS / "accuracy.jsonl") if (row.backbone, row.task) == ("lite0", "all")}
    rows: list[Row] = [found[arm] for arm in SHOWN]
    took = times((DOCS / "performance.md").read_text(encoding="utf-8"), "tf_efficientnet_lite0")
    steps = [took[arm] if arm else None for _, arm in SHOWN.values()]
    panels = [
        Panel("accuracy, %", [100 * r.mean for r in rows], [f"{100 * r.mean:.1f}" for r in rows],
              [100 * r.spread for r in rows], start=85),
        Panel("memory, MB", [r.saved / 1e6 for r in rows], [f"{r.saved / 1e6:.0f}" for r in rows]),
        Panel("time of a step", steps, ["–" if step is None else f"{step:.2f}" for step in steps]),
    ]  # fmt: skip
    labels = [label for label, _ in SHOWN.values()]
    ours = [i for i, label in enumerate(labels) if label.startswith("convlora")]
    return chart("EfficientNet-Lite0, ImageNet weights → 600 digits", labels, panels, ours,
                 "rank 8, lean 16 · memory kept for the backward · time over full’s")  # fmt: skip


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
