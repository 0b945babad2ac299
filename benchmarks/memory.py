"""The memory that a training step keeps, its peak, and the largest batch that fits, full against lean.

    python -m benchmarks.memory --model resnet50 tf_efficientnet_lite0 mobilenetv3_large_100 convnext_atto

For each method: the bytes that autograd keeps for the backward, as ``convlora.saved_bytes`` counts them; the peak of a
step; and the largest batch that fits a budget for parameters, buffers, the optimizer's state and the step's peak. On a
CPU torch's allocations are counted, not the process's size, so the figures do not depend on other load.
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
"""Methods of ``benchmarks.overhead``, in the order of the table."""


@dataclass(frozen=True)
class Needs:
    """The memory of one method, in bytes."""

    arm: str
    saved: int
    """Bytes kept from the forward for the backward."""
    peak: int
    """The peak of a step beyond parameters, buffers and the optimizer's state."""
    resting: int
    """Parameters, buffers and the optimizer's state."""
    batch: int
    """The largest batch that fits the budget; 0 if none does."""


def of_a_step(settings: Settings, arm: str) -> tuple[int, int, int]:
    """Saved, peak and weight bytes of one method at the settings' batch."""
    bench = Bench.of(settings, TRAINING[arm], train=True)
    bench.two_steps()  # afterwards the optimizer has its state, and B is no longer zero
    bench.optimizer.zero_grad()
    own = [*bench.subject.model.parameters(), *bench.subject.model.buffers()]
    saved = measuring.saved_bytes(bench.forward, own)
    peak = measuring.peak_bytes(bench.step, bench.device)
    resting = measuring.tensor_bytes(own)
    return saved, peak, resting + measuring.optimizer_bytes(bench.optimizer)


def largest_batch(needed: Callable[[int], int], budget: float, first: int) -> int:
    """The largest batch that fits the budget; 0 if none does.

    Memory grows about linearly, so a line through two tried batches gives the next batch to try. It is at most twice
    the largest one tried, since in small batches the growing part is small.

    Args:
        needed: gives the bytes of a batch.
        budget: bytes.
        first: the first batch to try; twice that is tried too.
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
    """Measure each method; the first is the reference of the ratios."""
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
    """A table with a row for each method, with ratios to the first."""
    first = found[0]
    rows: list[Row] = [("method", "saved ×", "saved MB", "peak ×", "peak MB", "weights MB", "largest batch")]
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
    found.add_argument("--model", nargs="+", default=["resnet50"], help="timm names, or torchvision:NAME")
    found.add_argument(
        "--arms", nargs="+", default=ARMS, choices=list(TRAINING), help="methods; the first is the reference"
    )
    found.add_argument("--batch", type=int, default=4)
    found.add_argument("--size", type=int, default=96, help="side of an image in pixels")
    found.add_argument("--rank", type=int, default=8)
    found.add_argument("--budget", type=float, default=1e9, help="bytes for the largest batch; 0 skips that search")
    found.add_argument("--threads", type=int, help="torch's threads on a CPU")
    found.add_argument("--device", default="cpu")
    found.add_argument("--json", type=Path, help="file for all results")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
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
