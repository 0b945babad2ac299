"""docs/performance.md from the JSON of runs: every figure in it is read, none is written by hand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from .arms import FULL, FULL_CONSTANT, METHODS
from .runs import Run, Settings
from .tables import (
    INFERENCE_HEAD,
    TRAINING_HEAD,
    TRAINING_UNITS,
    as_markdown,
    describe,
    inference_rows,
    legend,
    machine,
    over_constant,
    sweep_rows,
    training_rows,
)

TITLE = """# Time and memory

<!-- Written by `python -m benchmarks.overhead --report` from measurements; to change a figure, measure again. -->"""
METHOD = """## How it is measured

Networks have random weights and images are random numbers: speed depends on neither. A training step is `zero_grad`,
a forward in train mode, cross-entropy of two classes, a backward, and a step of AdamW. The methods take turns: each
round runs every method once and begins with another one; the first round is not counted. A ratio compares two times
of the same round. The tables give the median of the rounds and the quartiles. All methods run in one process, unless
the heading says *apart*: then each has a process of its own.

- *time*: over full fine-tuning's; for a forward without gradients, over the plain network's.
- *saved*: bytes that autograd keeps from the forward for the backward. Each storage counts once; the model's
  parameters and buffers do not count.
- *peak*: the most bytes of tensors at once in a step, or in a forward, beyond parameters, buffers and the optimizer's
  state. On a CPU torch's profiler counts them, on a GPU the caching allocator. What libraries below torch allocate is
  in neither.
- *rest*: parameters and buffers. *optim*: the optimizer's state.
- *train*: trainable parameters, as a share of the base's.
- *file*: what must be stored to have the trained model again, given the base. peft's files lack the running
  statistics that moved.

MB are millions of bytes. Running statistics move in full fine-tuning and in other libraries, as is their default; the
`-freeze` rows hold them constant, as convlora does by default. A rank is not the same number of parameters in every
library: loralib's factors for a k × k kernel have k times the rank, and convlora lowers a rank whose factors would
have more parameters than the layer. A method that adapts fewer convolutions than another does less work; the lists
say how many.
"""
CLOSING = """## This page again

Install with `pip install -e ".[benchmarks]"`, run the commands above with `--json FILE` on a machine that does nothing
else, and write the page:

```bash
python -m benchmarks.overhead --report FILE.json ... --plot docs/performance.svg > docs/performance.md
```
"""


def command(s: Settings, threads: object, swept: str = "", values: Sequence[object] = ()) -> str:
    """The command that measures this again."""
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
    """The page's first sentence: the range of the ratios over all networks; nothing where convlora was not measured."""
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
    """Parts that are shown when the reader opens them."""
    return [f"<details markdown>\n<summary>{heading}</summary>", *parts, "</details>"]


def _section(run: Run) -> list[str]:
    parts = [f"{machine(run.environment)}."]
    if run.training:
        head = tuple(f"{name} {unit}".strip() for name, unit in zip(TRAINING_HEAD, TRAINING_UNITS, strict=True))
        parts += ["A training step:", as_markdown([head, *training_rows(run.training)]), _bullets(legend(run.training))]
        fair = over_constant(run.training, FULL_CONSTANT)
        parts += [f"Over full fine-tuning with constant norm statistics: {', '.join(fair)}."] if fair else []
    if run.inference:
        parts += ["A forward without gradients:", as_markdown([INFERENCE_HEAD, *inference_rows(run.inference)])]
        parts += [_bullets(legend(run.inference))]
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
        _bullets(legend(first.training)),
        _again(command(first.settings, first.environment["threads"], first.sweep, values)),
    ]


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _again(line: str) -> str:
    return f"Again:\n\n```bash\n{line}\n```"


def markdown(measurements: Sequence[Sequence[Run]], picture: str = "") -> str:
    """The whole page; each measurement is the runs of one file, in order. A picture is named as the page sees it."""
    plain = [run for runs in measurements for run in runs if not run.sweep]
    parts = [TITLE, *_result(plain)]
    parts += (
        [f"![The time of a training step and the memory it keeps, over full fine-tuning's]({picture})"]
        if picture
        else []
    )
    parts += [METHOD.rstrip(), "## Every measurement"]
    for runs in measurements:
        for _, group in itertools.groupby(runs, key=lambda run: run.sweep):
            same = list(group)
            parts += _sweep(same) if same[0].sweep else [part for run in same for part in _section(run)]
    return "\n\n".join([*parts, CLOSING])
