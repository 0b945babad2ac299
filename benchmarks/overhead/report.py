"""docs/performance.md from the JSON of runs: every figure in it is read, none is written by hand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from .arms import FULL_CONSTANT, METHODS
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

INTRODUCTION = """# What it costs

Written by `python -m benchmarks.overhead --report` from measurements; to change a figure, measure again.

Networks have random weights and images are random numbers: speed depends on neither. A training step is `zero_grad`,
forward in train mode, cross-entropy of two classes, backward, and a step of AdamW. Arms run in rounds: each round runs
every arm once and begins with another one; the first round is not counted. A ratio is of two times of the same round;
given are the median of the rounds and the quartiles. All arms run in one process, where one takes up the memory that
another gave back; or, where the heading says *apart*, each in a process of its own, as one trains.

- *time*: over full fine-tuning's, or for a forward without gradients over the plain network's.
- *saved*: bytes that autograd keeps from the forward for the backward, each storage once, the model's own parameters
  and buffers not counted.
- *peak*: the most bytes of tensors at once in a step, or in a forward, beyond parameters, buffers and the optimizer's
  state; on a CPU what torch's profiler counts, on a GPU the caching allocator's peak. What libraries below torch
  allocate is in neither.
- *rest*: parameters and buffers. *optim*: the optimizer's state.
- *train*: trainable numbers as a share of the base's parameters.
- *file*: what is stored to have the trained model again, the base given: as the library writes it; elsewhere all that
  moves in training, as safetensors. peft's files are without the norm statistics that moved.

MB are millions of bytes. Norm statistics move in full fine-tuning and in other libraries as they come; the `-freeze`
arms hold them constant, as this library does by default. A rank is not the same number of parameters in every library:
loralib's factors for a kernel of k × k have k times the rank, and this library lowers a rank that would outweigh its
layer. Where an arm adapts fewer convolutions than another it does less work; the lists below say how many.
"""
CLOSING = """## This page again

Install with `pip install -e ".[benchmarks]"`, run the commands above with `--json FILE` on a machine that does nothing
else, and write the page:

```bash
python -m benchmarks.overhead --report FILE.json ... --plot docs/performance.png > docs/performance.md
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


def _section(run: Run) -> list[str]:
    parts = [f"## {describe(run.settings)}", f"{machine(run.environment)}."]
    if run.training:
        head = tuple(f"{name} {unit}".strip() for name, unit in zip(TRAINING_HEAD, TRAINING_UNITS, strict=True))
        parts += ["A training step:", as_markdown([head, *training_rows(run.training)]), _bullets(legend(run.training))]
        fair = over_constant(run.training, FULL_CONSTANT)
        parts += [f"Over full fine-tuning with constant norm statistics: {', '.join(fair)}."] if fair else []
    if run.inference:
        parts += ["A forward without gradients:", as_markdown([INFERENCE_HEAD, *inference_rows(run.inference)])]
        parts += [_bullets(legend(run.inference))]
    flag = " --methods" if any(result.arm in METHODS for result in run.training) else ""
    return [*parts, _again(command(run.settings, run.environment["threads"]) + flag)]


def _sweep(runs: Sequence[Run]) -> list[str]:
    first = runs[0]
    values = [getattr(run.settings, first.sweep) for run in runs]
    return [
        f"## {first.settings.model} by {first.sweep}",
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
    parts = [INTRODUCTION.rstrip()]
    parts += [f"![time and peak memory over full fine-tuning's]({picture})"] if picture else []
    for runs in measurements:
        for _, group in itertools.groupby(runs, key=lambda run: run.sweep):
            same = list(group)
            parts += _sweep(same) if same[0].sweep else [part for run in same for part in _section(run)]
    return "\n\n".join([*parts, CLOSING])
