"""What adapting buys: accuracy of every way of adapting, beside what it trains, saves and takes.

    python -m benchmarks.accuracy --out runs/accuracy                 # ends within an hour on two cores; may be resumed
    python -m benchmarks.accuracy --quick --out runs/quick            # two minutes
    python -m benchmarks.accuracy --data FOLDER --backbone resnet50   # one's own images, any timm network
    python -m benchmarks.accuracy --report --out runs/accuracy        # writes docs/accuracy.md and its picture

Each arm gets the same sweep of learning rates, which goes on while its best is at an end; the rate that does best on
validation images is then run with more seeds. Arms run side by side, each training on one thread.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from torch import nn

from . import backbones, data, report
from .arms import ARMS, FEW, QUICK, SECOND
from .runs import Make, Sweep, Work, append, mend, missing, read
from .training import Recipe

DOCS = Path(__file__).parents[2] / "docs"


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(
        "python -m benchmarks.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--out", type=Path, default=Path("runs") / "accuracy", help="results and weights made here")
    found.add_argument("--backbone", nargs="+", help="lite0, scratch or a timm name; default the first two")
    found.add_argument("--jobs", type=int, help="processes; default one a core, in a quick run one with all threads")
    found.add_argument("--data", type=Path, help="a folder with one folder of images a class; default the digits")
    found.add_argument("--tasks", nargs="+", help="all, or few-N; default all few-1 few-5 few-20 (scratch: all)")
    found.add_argument(
        "--arms", nargs="+", choices=list(ARMS), metavar="ARM", help="default: all; few-N and scratch: a part"
    )
    found.add_argument("--lrs", nargs="+", type=float, default=[5e-4, 2e-3, 8e-3])
    found.add_argument("--seeds", type=int, default=3)
    found.add_argument("--epochs", type=int, default=6)
    found.add_argument("--size", type=int, default=32, help="side of an image in pixels")
    found.add_argument("--quick", action="store_true", help="few arms, rates, seeds and steps")
    found.add_argument("--report", action="store_true", help="write the page from the results, train nothing")
    found.add_argument("--page", type=Path, default=DOCS / "accuracy.md")
    return found


def works(options: argparse.Namespace) -> dict[str, Work]:
    """One for each backbone, by its name."""
    splits = data.digits(options.size) if options.data is None else data.folder(options.data, options.size)
    found = {}
    for name in options.backbone:
        if name == backbones.SCRATCH:
            recipe = Recipe(3e-3, 4 * options.epochs)
            pretrained, known = backbones.from_scratch(splits, recipe, options.out / "scratch.safetensors")
            print(f"{name}: {known:.1%} on the classes that it was trained on", file=sys.stderr)
            new = splits.only(backbones.NEW)
            found[name] = Work(name, _make(name, new.classes, pretrained), new, options.epochs)
        else:
            found[name] = Work(name, _make(name, splits.classes, None), splits, options.epochs)
    return found


def _make(name: str, classes: int, pretrained: nn.Module | None) -> Make:
    return lambda seed: backbones.network(name, classes, seed, pretrained)


Unit = tuple[str, str, str]
"""A backbone, a task and an arm: what one process does."""


def units(options: argparse.Namespace) -> list[Unit]:
    """Everything that is asked for."""
    found = []
    for backbone in options.backbone:
        small = options.quick or backbone == backbones.SCRATCH
        for task in options.tasks or (["all"] if small else ["all", "few-1", "few-5", "few-20"]):
            found += [(backbone, task, arm) for arm in options.arms or _arms(backbone, task, options.quick)]
    return found


def measure(unit: Unit, work: Work, options: argparse.Namespace) -> None:
    """The runs of one arm that are not in the results yet."""
    _, task, arm = unit
    path = options.out / "results.jsonl"
    sweep = Sweep(tuple(sorted(options.lrs)), options.seeds, further=0 if options.quick else 2)
    for outcome in missing(work, task, ARMS[arm], sweep, read(path)):
        append(path, outcome)
        print(report.line(outcome), file=sys.stderr)


def measure_all(options: argparse.Namespace) -> None:
    """Every unit, over processes that each have one thread."""
    mend(options.out / "results.jsonl")
    made, todo = works(options), units(options)
    if options.jobs == 1:
        for unit in todo:
            measure(unit, made[unit[0]], options)
        return
    # Spawned, not forked: torch has computed here.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, context, torch.set_num_threads, (1,)) as pool:
        for future in as_completed([pool.submit(_measure, unit, options) for unit in todo]):
            future.result()


def _measure(unit: Unit, options: argparse.Namespace) -> None:
    if not _made:
        _made.update(works(options))
    measure(unit, _made[unit[0]], options)


_made: dict[str, Work] = {}
"""Of this process."""


def _arms(backbone: str, task: str, is_quick: bool) -> Sequence[str]:
    if is_quick:
        return QUICK
    return FEW if task != "all" else SECOND if backbone == backbones.SCRATCH else tuple(ARMS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, and print the table; or write the page."""
    options = parser().parse_args(arguments)
    options.backbone = options.backbone or [backbones.LITE0, *([] if options.quick else [backbones.SCRATCH])]
    options.jobs = options.jobs or (1 if options.quick else os.cpu_count() or 1)
    if options.quick:
        options.lrs, options.seeds, options.epochs, options.size = options.lrs[1:], 1, 2, min(options.size, 32)
    if not options.report:
        measure_all(options)
        print(report.tables(read(options.out / "results.jsonl")))
    else:
        outcomes = read(options.out / "results.jsonl")
        if not outcomes:
            raise SystemExit(f"{options.out} holds no results; run without --report first.")
        options.page.write_text(report.page(outcomes, options.page), encoding="utf-8")
        print(f"wrote {options.page.name}")


if __name__ == "__main__":
    main()
