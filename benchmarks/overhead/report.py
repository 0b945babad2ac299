"""Write docs/performance.md from the JSON of runs; no figure is written by hand."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

from .arms import FULL, FULL_CONSTANT, METHODS
from .runs import Result, Run, Settings
from .tables import (
    INFERENCE_HEAD,
    TRAINING_HEAD,
    TRAINING_UNITS,
    as_markdown,
    describe,
    inference_rows,
    machine,
    over_constant,
    sweep_rows,
    training_rows,
)

TITLE = """# Time and memory

<!-- Written by `python -m benchmarks.overhead --report` from measurements; to change a figure, measure again. -->"""
METHOD = """## How it is measured

Weights and images are random: speed depends on neither. A training step is `zero_grad`, a forward in train mode,
cross-entropy of two classes, a backward and a step of AdamW. Each round runs every method once and begins with another
one; the first round is not counted. A ratio compares two times of the same round. The tables give the median of the
rounds and the quartiles. All methods run in one process; under a heading with *apart* each has its own.

- *time*: over full fine-tuning's; for a forward without gradients, over the plain network's.
- *saved*: bytes that autograd keeps for the backward, each storage once, without parameters and buffers.
- *peak*: the most bytes of tensors at once, beyond parameters, buffers and the optimizer's state, by torch's profiler
  (CPU) or caching allocator (GPU). Memory that libraries below torch allocate is not counted.
- *weights*: parameters and buffers. *optim*: the optimizer's state.
- *train*: trainable parameters, as a share of the base's.
- *file*: bytes to store the trained model, given the base. peft's files lack the running statistics that moved.

MB are millions of bytes. By default running statistics move in full fine-tuning and in other libraries; the `-freeze`
rows hold them constant, as convlora does. The same rank is not the same number of parameters in every library:
loralib's factors for a k × k kernel have k times the rank, and convlora lowers a rank whose factors would have more
parameters than the layer. A method that adapts fewer convolutions does less work.
"""
CLOSING = """## Reproducing this page

Install with `pip install -e ".[benchmarks]"`, run the commands above with `--json FILE` on an idle machine, and write
the page:

```bash
python -m benchmarks.overhead --report FILE.json ... --plot docs/performance.svg > docs/performance.md
```
"""


def command(s: Settings, threads: object, swept: str = "", values: Sequence[object] = ()) -> str:
    """The command that repeats this measurement."""
    options: dict[str, object] = {"model": s.model, "batch": s.batch, "size": s.size, "rank": s.rank}
    options.pop(swept, None)
    options |= {"rounds": s.rounds, "repeats": s.repeats, "device": s.device}
    if s.device == "cpu":
        options["threads"] = threads
    words = ["python -m benchmarks.overhead", *(f"--{name} {value}" for name, value in options.items())]
    flags = {"--channels-last": s.channels_last, "--amp": s.amp, "--apart": s.apart}
    words += [flag for flag, on in flags.items() if on]
    words += [f"--sweep {swept} {' '.join(map(str, values))}"] if swept else []
    return " ".join(words)


def _result(runs: Sequence[Run]) -> list[str]:
    """The page's first sentence, with the range of the ratios over all networks; nothing without convlora's figures."""
    ratios: dict[str, list[float]] = {"time": [], "saved": [], "forward": []}
    for run in runs:
        found = {r.arm: r for r in run.training + run.inference if not r.unavailable}
        if "convlora" in found:
            ratios["time"].append(found["convlora"].ratio.median)
            ratios["saved"].append(found["convlora"].saved / found[FULL].saved)
        if "unmerged" in found:
            ratios["forward"].append(found["unmerged"].ratio.median)
    span = {name: f"{min(found):.2f} to {max(found):.2f}" for name, found in ratios.items() if found}
    if len(span) < len(ratios):
        return []
    return [
        f"**A training step with convlora takes {span['time']} of full fine-tuning's time and keeps {span['saved']} of "
        f"its memory for the backward. A forward of the unmerged model takes {span['forward']} of the base's time.**"
    ]


def folded(heading: str, parts: Sequence[str]) -> list[str]:
    """A folded block of the page."""
    return [f"<details markdown>\n<summary>{heading}</summary>", *parts, "</details>"]


def _adapted(results: Sequence[Result]) -> list[str]:
    """How many convolutions the methods adapt, and which methods were not measured or left tensors unmoved."""
    counts: dict[str, list[str]] = {}
    for r in results:
        if r.adapted:
            counts.setdefault(f"{r.adapted} of {r.convolutions}", []).append(r.arm)
    found = [count if len(counts) == 1 else f"{count} ({', '.join(names)})" for count, names in counts.items()]
    lines = [f"Adapted convolutions: {', '.join(found)}."] if found else []
    lines += [f"Not measured: {r.arm}, {r.unavailable}." for r in results if r.unavailable]
    return lines + [f"{r.arm}: two steps did not move {r.stuck} trainable tensors." for r in results if r.stuck]


def _rows(runs: Sequence[Run]) -> list[str]:
    """The list of all methods on the page."""
    names = {r.arm: r.what for run in runs for r in run.training + run.inference}
    return folded("What each row is", [_bullets([f"{name}: {what}" for name, what in names.items()])])


def _section(run: Run, machines: Collection[str]) -> list[str]:
    parts = [f"{machine(run.environment)}."] if len(machines) > 1 else []
    if run.training:
        head = tuple(f"{name} {unit}".strip() for name, unit in zip(TRAINING_HEAD, TRAINING_UNITS, strict=True))
        parts += ["A training step:", as_markdown([head, *training_rows(run.training)])]
        fair = over_constant(run.training, FULL_CONSTANT)
        parts += [f"Over full fine-tuning with constant norm statistics: {', '.join(fair)}."] if fair else []
    if run.inference:
        parts += ["A forward without gradients:", as_markdown([INFERENCE_HEAD, *inference_rows(run.inference)])]
    parts += _adapted(run.training + run.inference)
    flag = " --methods" if any(result.arm in METHODS for result in run.training) else ""
    parts.append(_again(command(run.settings, run.environment["threads"]) + flag))
    return [f"### {describe(run.settings)}", *folded("Tables", parts)]


def _sweep(runs: Sequence[Run]) -> list[str]:
    first = runs[0]
    values = [getattr(run.settings, first.sweep) for run in runs]
    return [
        f"### {first.settings.model} by {first.sweep}",
        f"{describe(first.settings, first.sweep)}; {machine(first.environment)}.",
        "Time / bytes saved for the backward, both over full fine-tuning's:",
        as_markdown(sweep_rows(runs)),
        *_adapted(first.training),
        _again(command(first.settings, first.environment["threads"], first.sweep, values)),
    ]


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _again(line: str) -> str:
    return f"```bash\n{line}\n```"


def markdown(measurements: Sequence[Sequence[Run]], picture: str = "") -> str:
    """The whole page; each measurement is the runs of one file, in order. ``picture`` is relative to the page."""
    plain = [run for runs in measurements for run in runs if not run.sweep]
    parts = [TITLE, *_result(plain)]
    parts += (
        [f"![The time of a training step and the memory it keeps, over full fine-tuning's]({picture})"]
        if picture
        else []
    )
    machines = {machine(run.environment): None for runs in measurements for run in runs}
    parts += [METHOD.rstrip(), *([f"Machine: {next(iter(machines))}."] if len(machines) == 1 else [])]
    parts.append("## Every measurement")
    for runs in measurements:
        for _, group in itertools.groupby(runs, key=lambda run: run.sweep):
            same = list(group)
            parts += _sweep(same) if same[0].sweep else [part for run in same for part in _section(run, machines)]
    return "\n\n".join([*parts, *_rows([run for runs in measurements for run in runs]), CLOSING])
