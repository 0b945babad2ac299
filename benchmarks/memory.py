"""What does a training step keep, what does it need at its peak, and which batch fits, full against lean?

    python -m benchmarks.memory --model resnet50 tf_efficientnet_lite0 mobilenetv3_large_100 convnext_atto

For each way of training: the bytes that autograd keeps from the forward for the backward, counted as
``convlora.saved_bytes`` counts them; the peak of a step; and the largest batch that fits a budget of bytes for all that
training holds: parameters, buffers, the optimizer's state and the step's peak. On a CPU what torch allocates is
counted, not the process's size: the figures are the same from run to run, whatever else the machine does.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks.overhead import measuring
from benchmarks.overhead.arms import FULL, TRAINING
from benchmarks.overhead.bench import Bench
from benchmarks.overhead.runs import Settings, environment
from benchmarks.overhead.tables import Row, as_markdown, machine, megabytes, wrapped

ARMS = (FULL, "convlora", "convlora-masks", "convlora-freeze-A", "convlora-lean", "convlora-lean-bits")
"""Of ``benchmarks.overhead``, in the order of the table."""


@dataclass(frozen=True)
class Needs:
    """What one way of training needs, in bytes."""

    arm: str
    saved: int
    """Kept from the forward for the backward."""
    peak: int
    """At once in a step, beyond what rests between steps."""
    resting: int
    """Parameters, buffers and the optimizer's state."""
    batch: int
    """The largest that fits the budget; 0 where none does."""


def of_a_step(settings: Settings, arm: str) -> tuple[int, int, int]:
    """Saved, peak and resting bytes of one arm at the settings' batch."""
    bench = Bench.of(settings, TRAINING[arm], train=True)
    bench.two_steps()  # the optimizer's state is there, and B is no longer zero
    bench.optimizer.zero_grad()
    own = [*bench.subject.model.parameters(), *bench.subject.model.buffers()]
    saved = measuring.saved_bytes(bench.forward, own)
    peak = measuring.peak_bytes(bench.step, bench.device)
    resting = measuring.tensor_bytes(own)
    return saved, peak, resting + measuring.optimizer_bytes(bench.optimizer)


def largest_batch(needed: Callable[[int], int], budget: float, first: int) -> int:
    """The largest batch for which no more is needed than the budget, 0 where there is none.

    What is needed grows about linearly: a line through two batches that were tried gives the next, and never more than
    twice the largest that was tried, since small batches need little of what grows.

    Args:
        needed: bytes, for a batch.
        budget: in bytes.
        first: a batch to begin with; twice as many is tried, too.
    """
    tried = {batch: needed(batch) for batch in (first, 2 * first)}
    while True:
        fits = max((batch for batch, need in tried.items() if need <= budget), default=0)
        too_large = min((batch for batch, need in tried.items() if need > budget), default=sys.maxsize)
        if too_large - fits <= 1:
            return fits
        (low, at_low), (high, at_high) = sorted(tried.items(), key=lambda item: abs(item[1] - budget))[:2]
        guess = low + int((budget - at_low) * (high - low) / (at_high - at_low or 1))
        guess = min(max(guess, fits + 1), too_large - 1, 2 * max(tried))
        tried[guess] = needed(guess)


def measured(settings: Settings, arms: Sequence[str], budget: float) -> list[Needs]:
    """What each arm needs, the first one being what the others are compared with."""
    found = []
    for arm in arms:
        print(f"{settings.model}: {arm}", file=sys.stderr)
        saved, peak, resting = of_a_step(settings, arm)

        def needed(batch: int, arm: str = arm) -> int:
            return sum(of_a_step(replace(settings, batch=batch), arm)[1:])

        batch = largest_batch(needed, budget, settings.batch) if budget else 0
        found.append(Needs(arm, saved, peak, resting, batch))
    return found


def table(found: Sequence[Needs]) -> str:
    """A row for each arm; ratios to the first one's."""
    first = found[0]
    rows: list[Row] = [("arm", "saved ×", "saved MB", "peak ×", "peak MB", "rest MB", "largest batch")]
    for each in found:
        shares = f"{each.saved / first.saved:.2f}", f"{each.peak / first.peak:.2f}"
        cells = shares[0], megabytes(each.saved), shares[1], megabytes(each.peak), megabytes(each.resting)
        rows.append((each.arm, *cells, str(each.batch or "–")))
    return as_markdown(rows)


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(
        "python -m benchmarks.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--model", nargs="+", default=["resnet50"], help="timm, or torchvision:NAME")
    found.add_argument("--arms", nargs="+", default=ARMS, choices=list(TRAINING), help="the first is the reference")
    found.add_argument("--batch", type=int, default=4)
    found.add_argument("--size", type=int, default=96, help="side of an image in pixels")
    found.add_argument("--rank", type=int, default=8)
    found.add_argument("--budget", type=float, default=1e9, help="bytes for the largest batch; 0 leaves it out")
    found.add_argument("--threads", type=int, help="of torch on a CPU")
    found.add_argument("--device", default="cpu")
    found.add_argument("--json", type=Path, help="write everything there")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    options = parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    where = environment(torch.device(options.device))
    everything = {}
    for model in options.model:
        settings = Settings(model, options.batch, options.size, options.rank, device=options.device)
        found = measured(settings, options.arms, options.budget)
        heading = f"{model}, batch {options.batch}, {options.size} × {options.size} px, rank {options.rank}"
        budget = f"; the largest batch within {options.budget / 1e6:,.0f} MB" if options.budget else ""
        print(f"{heading}{budget}\n\n{table(found)}\n", flush=True)
        everything[model] = [asdict(each) for each in found]
    legend = [f"{arm}: {TRAINING[arm].what}" for arm in options.arms]
    print(wrapped([*legend, machine(where)]))
    if options.json:
        options.json.write_text(json.dumps({"environment": where, "found": everything}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
