"""The accuracy of every method, beside its trainable parameters, memory and file.

    python -m benchmarks.accuracy --out runs/accuracy                 # within an hour on two cores; can be resumed
    python -m benchmarks.accuracy --quick --out runs/quick            # two minutes
    python -m benchmarks.accuracy --data FOLDER --backbone resnet50   # your own images, any timm network
    python -m benchmarks.accuracy --arms eva-8 --out runs/accuracy    # one method, on all its tasks
    python -m benchmarks.accuracy --report --out runs/accuracy        # write docs/accuracy.md and its picture

Each method gets the same sweep of learning rates, which is extended while its best rate is the highest or lowest; the
rate that is best on validation images is then run with more seeds. Trainings run in parallel, on one thread each.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from . import backbones, report
from .arms import ARMS
from .runs import read
from .schedule import measure_all

DOCS = Path(__file__).parents[2] / "docs"


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(
        "python -m benchmarks.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--out", type=Path, default=Path("runs") / "accuracy", help="folder of results and weights")
    found.add_argument("--backbone", nargs="+", help="lite0, scratch or a timm name (default: the first two)")
    found.add_argument("--jobs", type=int, help="processes (default: one per core; one with all threads if --quick)")
    found.add_argument("--data", type=Path, help="folder with one folder of images per class (default: the digits)")
    found.add_argument("--tasks", nargs="+", help="all, or few-N (default: all few-1 few-5 few-20)")
    found.add_argument(
        "--arms", nargs="+", choices=list(ARMS), metavar="METHOD", help="methods to run (default: all of the task)"
    )
    found.add_argument("--lrs", nargs="+", type=float, default=[5e-4, 2e-3, 8e-3])
    found.add_argument("--seeds", type=int, default=3)
    found.add_argument("--epochs", type=int, default=6)
    found.add_argument("--size", type=int, default=32, help="side of an image in pixels")
    found.add_argument("--quick", action="store_true", help="few methods, rates, seeds and steps")
    found.add_argument("--report", action="store_true", help="write the page from the results, train nothing")
    found.add_argument("--page", type=Path, default=DOCS / "accuracy.md")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure missing results and print the tables, or write the page."""
    options = parser().parse_args(arguments)
    options.backbone = options.backbone or [backbones.LITE0, *([] if options.quick else [backbones.SCRATCH])]
    options.jobs = options.jobs or (1 if options.quick else os.cpu_count() or 1)
    if options.quick:
        options.lrs, options.seeds, options.epochs, options.size = options.lrs[1:], 1, 2, min(options.size, 32)
    if not options.report:
        measure_all(options)
        outcomes = read(options.out / "results.jsonl")
        print("\n\n".join([report.tables(report.rows_of(outcomes)), *report.not_measured(outcomes)]))
    else:
        outcomes = read(options.out / "results.jsonl")
        if not outcomes:
            raise SystemExit(f"{options.out} holds no results; run without --report first.")
        options.page.write_text(report.page(outcomes, options.page), encoding="utf-8")
        print(f"wrote {options.page.name}")


if __name__ == "__main__":
    main()
