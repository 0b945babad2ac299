"""Write tables, a chart and docs/accuracy.md from the results; no figure is written by hand.

The page's rows are kept in a file beside it. A row that is measured again replaces the earlier one, so a new method
costs its own trainings alone.
"""

from __future__ import annotations

import json
import platform
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.charts import Panel, chart
from benchmarks.overhead.report import folded
from benchmarks.overhead.tables import as_markdown, figure, megabytes

from .arms import ARMS, FULL
from .data import SHIFTS
from .runs import Outcome, reported

TITLE = """# The accuracy benchmark

<!-- Written by `python -m benchmarks.accuracy --report`; change a figure by measuring again. -->"""
METHOD = """## How it is measured

scikit-learn's digits, upsampled: 600 to train on, 200 to choose the learning rate by, 997 to test. Every method sees
the same batches with the same augmentation, the same number of steps (AdamW, warm-up, cosine) and the same sweep of
learning rates, which is extended by the same factor, twice at most, while its best rate is the highest or lowest tried.
The rate with the best validation accuracy at the first seed is used for all seeds.

`lite0` is EfficientNet-Lite0 with its ImageNet weights. `scratch` is a small ResNet trained here on the digits 0 to 4
and adapted to 5 to 9. It was trained twice; `lora-8`, `eva`, `lean`, `freeze-a`, `plus` and the other methods use the
later one. `few-N` trains on N images of each class.

- *accuracy*: mean over seeds ± standard deviation, in per cent.
- *noisy*: the same on noisy test images; inverted and coloured ones are in [accuracy.jsonl](accuracy.jsonl).
- *train*: trainable parameters, as a share of the network's.
- *saved*: bytes that autograd keeps for a batch of 32. *file*: bytes stored.

For times see [performance](performance.md): these rows come from several days and from busy machines, and their
processor seconds, also in `accuracy.jsonl`, do not compare.
"""


@dataclass(frozen=True)
class Row:
    """A method on a task, over seeds; accuracies are shares, times are processor seconds, sizes are bytes."""

    backbone: str
    task: str
    arm: str
    lr: float
    seeds: int
    mean: float
    spread: float
    shifted: dict[str, float]
    share: float
    """The trainable share of the network's parameters."""
    seconds: float
    saved: int
    file: int
    trainings: int
    """The number of trainings in the sweep and of the seeds."""
    reloads: int
    """The number of trainings that gave the same bits when saved and loaded again."""
    merges: int
    """The number of trainings that were merged and compared."""
    faults: list[str]
    threads: int
    torch: str
    """torch's version."""

    @classmethod
    def of(cls, chosen: Sequence[Outcome], every: Sequence[Outcome]) -> Row:
        """A row from a method's outcomes at the chosen learning rate, the first seed's first, and at every rate."""
        first, tests = chosen[0], [o.test for o in chosen]
        return cls(
            first.key.backbone,
            first.key.task,
            first.key.arm,
            first.key.lr,
            len(tests),
            statistics.mean(tests),
            statistics.stdev(tests) if len(tests) > 1 else 0.0,
            {name: statistics.mean(o.shifted[name] for o in chosen) for name in SHIFTS},
            first.share,
            min(o.seconds for o in chosen),  # other work on the machine can only add
            first.saved,
            first.file,
            len(every),
            sum("bit-equal" in o.checked for o in every),
            sum("merge" in o.checked for o in every),
            sorted({f"{o.key.arm}: {o.checked}" for o in every if "DIFFERS" in o.checked}),
            first.threads,
            torch.__version__,
        )


def rows_of(outcomes: list[Outcome]) -> list[Row]:
    """One row for each backbone, task and method that was available."""
    chosen, every = (_by_arm(found) for found in (reported(outcomes), outcomes))
    return [Row.of(sorted(found, key=lambda o: o.key.seed), every[name]) for name, found in chosen.items()]


def _by_arm(outcomes: Iterable[Outcome]) -> dict[tuple[str, str, str], list[Outcome]]:
    groups: dict[tuple[str, str, str], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        groups[outcome.key.backbone, outcome.key.task, outcome.key.arm].append(outcome)
    return groups


def kept(path: Path) -> list[Row]:
    """Rows of a file that :func:`keep` wrote; none if there is no file."""
    if not path.is_file():
        return []
    return [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def keep(path: Path, rows: Iterable[Row]) -> list[Row]:
    """Write rows into the file; each replaces a row of the same name that has no more seeds. Returns all rows."""
    together: dict[tuple[str, str, str], Row] = {}
    for row in [*kept(path), *rows]:
        name = (row.backbone, row.task, row.arm)
        if name not in together or row.seeds >= together[name].seeds:
            together[name] = row
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in together.values()), encoding="utf-8")
    return list(together.values())


def by_task(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows in the methods' order, for each backbone and task."""
    groups: dict[tuple[str, str], dict[str, Row]] = defaultdict(dict)
    for row in sorted(rows, key=lambda row: (row.backbone, row.task != "all", len(row.task), row.task)):
        groups[row.backbone, row.task][row.arm] = row
    return {key: [found[arm] for arm in ARMS if arm in found] for key, found in groups.items()}


HEAD = ("method", "accuracy", "noisy", "lr", "train %", "saved MB", "file MB")


def cells(row: Row) -> tuple[str, ...]:
    """One line of the table."""
    return (
        row.arm,
        f"{100 * row.mean:.1f} ± {100 * row.spread:.1f}",
        f"{100 * row.shifted['noisy']:.1f}",
        f"{row.lr:g}",
        figure(100 * row.share),
        megabytes(row.saved),
        f"{row.file / 1e6:.2f}",
    )


def tables(rows: Iterable[Row]) -> str:
    """The tables of all tasks."""
    parts = []
    for (backbone, task), found in by_task(rows).items():
        table = folded("Table", [as_markdown([HEAD, *map(cells, found)])])
        parts += [f"### {backbone}, {task}", *verdict(found), *table]
    return "\n\n".join(parts)


def not_measured(outcomes: Iterable[Outcome]) -> list[str]:
    """A paragraph on methods that are not available here, and why; nothing if all are."""
    missing = sorted({f"{o.key.arm}: {o.unavailable}" for o in outcomes if o.unavailable})
    return ["Not measured:\n\n" + "\n".join(f"- {line}" for line in missing)] if missing else []


def verdict(rows: Sequence[Row]) -> list[str]:
    """A sentence on full fine-tuning or smaller methods that beat the default; nothing without these methods."""
    by_name = {row.arm: row for row in rows}
    default, best = by_name.get("lora-8"), max(rows, key=lambda row: row.mean)
    if default is None:
        return []
    off = f"{100 * (best.mean - default.mean):.1f} points below it"
    words = [f"Best: {best.arm}, {100 * best.mean:.1f} %."]
    words += [f"`inject(model)` (lora-8) is {off}."] if best is not default else []
    smaller = 0.99 * default.share  # rows of another day may be rounded differently
    losing = [row.arm for row in rows if row.share < smaller and row.mean > default.mean]
    words += [f"Smaller and better than lora-8: {', '.join(losing)}."] if losing else []
    full = by_name.get(FULL)
    if full is not None and full.mean > default.mean:
        words.append(f"lora-8 loses to full fine-tuning by {100 * (full.mean - default.mean):.1f} points.")
    return [" ".join(words)]


CHARTED = (
    ("probe", "the head alone"),
    ("norms", "norms, head"),
    ("lora-1", "convlora, rank 1"),
    ("lora-2", "convlora, rank 2"),
    ("lora-8", "convlora, rank 8"),
    ("lora-32", "convlora, rank 32"),
    ("lora-8-track", "norms moving"),
    ("lean-16", "lean, rank 16"),
    ("lokr-8", "LoKr, rank 8"),
    ("peft-8", "peft LoRA, rank 8"),
    ("full-freeze", "full, norms fixed"),
    (FULL, "full fine-tuning"),
)
"""Methods that the chart shows, with their labels; the others are only in the tables."""


def result(rows: Sequence[Row]) -> list[str]:
    """The page's first sentence; nothing if one of the methods in it was not measured."""
    found = {row.arm: f"{100 * row.mean:.1f} %" for row in rows}
    if not {"lora-8", "lean-16", "probe", "full-freeze", FULL} <= found.keys():
        return []
    return [
        f"**On EfficientNet-Lite0 with its ImageNet weights, `inject(model)` reaches {found['lora-8']} and lean "
        f"training of rank 16 {found['lean-16']}; full fine-tuning reaches {found['full-freeze']} with fixed running "
        f"statistics and {found[FULL]} with moving ones, the head alone {found['probe']}.**"
    ]


def draw(groups: dict[tuple[str, str], list[Row]], path: Path) -> None:
    """Draw accuracy, trained share and memory of the main methods on the pretrained network as an SVG file."""
    found = {row.arm: row for row in next(iter(groups.values()))}
    shown = [(found[arm], label) for arm, label in CHARTED if arm in found]
    rows, labels = [row for row, _ in shown], [label for _, label in shown]
    ours = [i for i, row in enumerate(rows) if row.arm.startswith(("lora", "lean", "lokr"))]
    panels = [
        Panel("accuracy, %", [100 * r.mean for r in rows], [f"{100 * r.mean:.1f}" for r in rows],
              [100 * r.spread for r in rows], start=min(100 * r.mean for r in rows) - 2),
        Panel("trained, %", [100 * r.share for r in rows], [figure(100 * r.share) for r in rows]),
        Panel("memory, MB", [r.saved / 1e6 for r in rows], [figure(r.saved / 1e6) for r in rows]),
    ]  # fmt: skip
    picture = chart(
        f"Accuracy: {', '.join(next(iter(groups)))}", labels, panels, ours, "memory: kept for the backward of 32 images"
    )
    path.write_text(picture, encoding="utf-8")


def page(outcomes: list[Outcome], path: Path) -> str:
    """The page; its picture and its rows are written beside it."""
    rows = keep(path.with_suffix(".jsonl"), rows_of(outcomes))
    draw(by_task(rows), path.with_suffix(".svg"))
    threads, versions = (
        ", ".join(sorted(found)) for found in ({str(r.threads) for r in rows}, {r.torch for r in rows})
    )
    trainings, reloads, merges = (sum(getattr(r, name) for r in rows) for name in ("trainings", "reloads", "merges"))
    faults = [fault for row in rows for fault in row.faults]
    legend = "\n".join(f"- {arm.name}: {arm.what}" for arm in ARMS.values())
    groups = by_task(rows)
    parts = [
        TITLE,
        *result(next(iter(groups.values()))),
        f"![Accuracy, trained share and memory]({path.with_suffix('.svg').name})",
        METHOD.rstrip(),
        "## Every measurement",
        tables(rows),
        *not_measured(outcomes),
        f"Saved and loaded again: {reloads} runs bit-equal, {len(faults)} not; merged and compared: {merges}.",
        *faults,
        *folded("What each row is", [legend]),
        f"Machine: {platform.machine()}, threads of each training: {threads}, torch {versions}; {trainings} trainings.",
    ]
    return "\n\n".join([*parts, AGAIN])


AGAIN = """\
To repeat all of it, or one method alone (the other rows are kept in `accuracy.jsonl`; a new method is one line in
`benchmarks/accuracy/arms.py`):

```bash
python -m benchmarks.accuracy && python -m benchmarks.accuracy --report
python -m benchmarks.accuracy --arms eva-8 && python -m benchmarks.accuracy --report
```
"""


def line(outcome: Outcome) -> str:
    """A line of progress."""
    key = outcome.key
    what = outcome.unavailable or f"validation {outcome.validation:.3f} test {outcome.test:.3f} {outcome.seconds:.0f} s"
    return f"{key.backbone} {key.task} {key.arm} lr {key.lr:g} seed {key.seed}: {what} {outcome.checked}"
