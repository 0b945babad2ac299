"""Table rows from runs, and tables as text for a terminal or as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from .arms import FULL
from .measuring import Quartiles
from .peers import PACKAGES
from .runs import Result, Run, Settings

Row = tuple[str, ...]

TRAINING_HEAD = ("method", "time", "quartiles", "ms", "saved", "peak", "weights", "optim", "train", "file")
TRAINING_UNITS = ("", "×", "×", "", "MB", "MB", "MB", "MB", "%", "MB")
INFERENCE_HEAD = ("method", "time ×", "quartiles ×", "ms", "peak MB")


def figure(value: float) -> str:
    """Format a number with three digits, without an exponent."""
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def megabytes(count: int) -> str:
    """Format bytes in millions of bytes."""
    return figure(count / 1e6)


def _times(result: Result) -> Row:
    ratio = result.ratio
    return f"{ratio.median:.2f}", f"{ratio.low:.2f}–{ratio.high:.2f}", figure(1e3 * result.time.median)


def training_rows(results: Sequence[Result]) -> list[Row]:
    """One row for each method that was measured, in the columns of :data:`TRAINING_HEAD`."""
    return [
        (
            r.arm,
            *_times(r),
            *map(megabytes, (r.saved, r.peak, r.resting, r.optimizer)),
            figure(100 * r.share),
            megabytes(r.file),
        )
        for r in results
        if not r.unavailable
    ]


def inference_rows(results: Sequence[Result]) -> list[Row]:
    """One row for each method that was measured, in the columns of :data:`INFERENCE_HEAD`."""
    return [(r.arm, *_times(r), megabytes(r.peak)) for r in results if not r.unavailable]


def sweep_rows(runs: Sequence[Run]) -> list[Row]:
    """A heading, then one row for each value of the sweep: time / saved bytes, both over full fine-tuning's."""
    names = [r.arm for r in runs[0].training if r.arm != FULL and not r.unavailable]
    rows: list[Row] = [(runs[0].sweep, *names)]
    for run in runs:
        found = {r.arm: r for r in run.training if not r.unavailable}
        cells = (_time_and_saved(found[name], found[FULL]) if name in found else "–" for name in names)
        rows.append((str(getattr(run.settings, run.sweep)), *cells))
    return rows


def _time_and_saved(result: Result, full: Result) -> str:
    return f"{result.ratio.median:.2f} / {result.saved / full.saved:.2f}"


def over_constant(results: Sequence[Result], constant: str) -> list[str]:
    """The times of methods with constant norm statistics, over full fine-tuning's with constant ones."""
    fair = [r for r in results if r.arm != constant and (r.arm.endswith("-freeze") or r.arm == "convlora")]
    return [f"{r.arm} {Quartiles.of(r.other_ratios[constant]).median:.2f}" for r in fair if constant in r.other_ratios]


def legend(results: Sequence[Result]) -> list[str]:
    """A line for each method: what it is, how many convolutions it adapts, or why it was not measured."""
    return [f"{r.arm}: {'; '.join(_facts(r))}" for r in results]


def _facts(r: Result) -> list[str]:
    facts = [r.what]
    if r.unavailable:
        facts.append(f"not measured, {r.unavailable}")
    if r.adapted:
        facts.append(f"{r.adapted} of {r.convolutions} convolutions adapted")
    if r.stuck:
        facts.append(f"trainable tensors that two steps did not move: {r.stuck}")
    return facts


def describe(s: Settings, swept: str = "") -> str:
    """The settings in one line, except the swept one."""
    parts = {
        "model": s.model,
        "batch": f"batch {s.batch}",
        "size": f"{s.size} × {s.size} px",
        "amp": "bfloat16 autocast" if s.amp else "float32",
        "layout": "channels last" if s.channels_last else "",
        "rank": f"rank {s.rank}",
        "rounds": f"{s.rounds} rounds" + (f" of {s.repeats} steps each" if s.repeats > 1 else ""),
        "apart": "apart" if s.apart else "",
    }
    return ", ".join(part for name, part in parts.items() if part and name != swept)


def machine(environment: dict[str, object]) -> str:
    """The kind of machine and the versions in one line."""
    e = environment
    threads = f"{e['threads']} thread{'' if e['threads'] == 1 else 's'}"
    kind = f"CUDA {e['cuda']}" if e["cuda"] else f"{e['vectors']}, {threads}"
    peers = ", ".join(f"{name} {e[name]}" for name in PACKAGES)
    return f"{e['device']} ({kind}); Python {e['python']}, torch {e['torch']}, {peers}; {e['date']}"


def as_text(rows: Sequence[Row]) -> str:
    """A table with aligned columns for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        lines.append(" ".join((first.ljust(widths[0]), *cells)).rstrip())
    return "\n".join(lines)


def as_markdown(rows: Sequence[Row]) -> str:
    """A Markdown table; the first row is its heading."""
    lines = [rows[0], ("---", *("---:" for _ in rows[0][1:])), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def wrapped(lines: Sequence[str]) -> str:
    """Wrap lines at 80 columns, with continuation lines indented."""
    return "\n".join(textwrap.fill(line, 80, subsequent_indent="  ", break_on_hyphens=False) for line in lines)


def run_as_text(run: Run) -> str:
    """All results of one run for a terminal of 80 columns, ratios first."""
    parts = [wrapped([describe(run.settings)]), wrapped([machine(run.environment)])]
    if run.training:
        rows = [TRAINING_HEAD, TRAINING_UNITS, *training_rows(run.training)]
        parts += ["Training step: time over full fine-tuning's", as_text(rows), wrapped(legend(run.training))]
    if run.inference:
        rows = [INFERENCE_HEAD, *inference_rows(run.inference)]
        parts += ["Forward without gradients: time over the plain network's", as_text(rows)]
        parts += [wrapped(legend(run.inference))]
    return "\n\n".join(parts)


def sweep_as_text(runs: Sequence[Run]) -> str:
    """A sweep for a terminal of 80 columns."""
    first = runs[0]
    return "\n\n".join(
        (
            wrapped([describe(first.settings, first.sweep)]),
            wrapped([machine(first.environment)]),
            "Training step: time / bytes saved for the backward, over full fine-tuning's",
            as_text(sweep_rows(runs)),
            wrapped(legend(first.training)),
        )
    )
