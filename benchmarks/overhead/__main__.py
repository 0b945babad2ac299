"""Time and memory of a training step and a forward with an adapter, beside full fine-tuning and other libraries.

    python -m benchmarks.overhead --model resnet50 --batch 16 --size 224 --json resnet50.json --plot resnet50.svg
    python -m benchmarks.overhead --model resnet50 --sweep rank 1 4 8 16 32 64 --json ranks.json
    python -m benchmarks.overhead --methods --model resnet18 --batch 8 --size 64 --threads 1 --json methods.json
    python -m benchmarks.overhead --report resnet50.json ranks.json --plot docs/performance.svg > docs/performance.md

A ratio compares two times of the same round. Libraries that are not installed are named, not measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from .arms import ALL_TRAINING, FULL_CONSTANT, INFERENCE, METHODS, SWEPT, TRAINING
from .plot import draw
from .report import markdown
from .rounds import run
from .runs import Run, Settings
from .tables import run_as_text, sweep_as_text

SWEEPS = ("rank", "batch", "size")


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(
        "python -m benchmarks.overhead", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--model", default="resnet50", help="a timm name, or torchvision:NAME")
    found.add_argument("--batch", type=int, default=16)
    found.add_argument("--size", type=int, default=224, help="side of an image in pixels")
    found.add_argument("--rank", type=int, default=8)
    found.add_argument("--rounds", type=int, default=7, help="counted rounds; one more warms up")
    found.add_argument("--repeats", type=int, help="steps in a row for one figure (1; 10 on a GPU)")
    found.add_argument("--threads", type=int, help="torch's threads on a CPU")
    found.add_argument("--device", default="auto")
    found.add_argument("--channels-last", action="store_true")
    found.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    found.add_argument("--apart", action="store_true", help="run each method in its own process, as in real training")
    found.add_argument(
        "--arms", nargs="+", choices=[*ALL_TRAINING, *INFERENCE], metavar="METHOD", help="methods to run (default: all)"
    )
    found.add_argument(
        "--methods", action="store_true", help="run convlora's methods beside peft's and LyCORIS' instead"
    )
    found.add_argument("--sweep", nargs="+", metavar=("WHAT", "VALUE"), help="rank, batch or size, and its values")
    found.add_argument("--json", type=Path, help="file for all results")
    found.add_argument("--plot", type=Path, help="file for a picture (not of a sweep); with --report, of all networks")
    found.add_argument("--report", nargs="+", type=Path, metavar="JSON", help="print the docs page, measure nothing")
    return found


def settings_of(options: argparse.Namespace) -> Settings:
    """The settings that the options give on this machine."""
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Settings(
        model=options.model,
        batch=options.batch,
        size=options.size,
        rank=options.rank,
        rounds=options.rounds,
        repeats=options.repeats or (10 if torch.device(device).type == "cuda" else 1),
        device=device,
        channels_last=options.channels_last,
        amp=options.amp,
        apart=options.apart,
    )


def sweep(settings: Settings, what: str, values: Sequence[int], arms: Sequence[str]) -> list[Run]:
    """Measure a run for each value."""
    points = [Settings(**{**asdict(settings), what: value}) for value in values]
    return [run(point, arms, (), note, sweep=what) for point in points]


def note(line: str) -> None:
    """Print progress on stderr."""
    print(line, file=sys.stderr)


def read(path: Path) -> list[Run]:
    """Read the runs of a file."""
    return [Run.from_json(item) for item in json.loads(path.read_text(encoding="utf-8"))["runs"]]


def write(path: Path, runs: Sequence[Run]) -> None:
    """Write runs to a file."""
    data = {"runs": [item.to_json() for item in runs]}
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print, or print the page from earlier results."""
    found = parser()
    options = found.parse_args(arguments)
    if options.report:
        measurements = [read(path) for path in options.report]
        if options.plot:
            shown = [
                run for runs in measurements for run in runs if run.training and not (run.sweep or run.settings.apart)
            ]
            draw(shown, options.plot)
        print(markdown(measurements, options.plot.name if options.plot else ""), end="")
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    settings, arms = settings_of(options), options.arms or [*TRAINING, *INFERENCE]
    if options.methods:
        arms = [FULL_CONSTANT, *METHODS]
    training, inference = ([name for name in arms if name in kind] for kind in (ALL_TRAINING, INFERENCE))
    if options.plot and (options.sweep or not training):
        found.error("--plot draws training methods, not a sweep")
    if options.sweep:
        what, *values = options.sweep
        if what not in SWEEPS or not values or not all(value.isdecimal() and int(value) for value in values):
            found.error(f"--sweep takes one of {', '.join(SWEEPS)} and whole numbers above zero")
        runs = sweep(settings, what, [int(value) for value in values], training if options.arms else SWEPT)
        print(sweep_as_text(runs))
    else:
        runs = [run(settings, training, inference, note)]
        print(run_as_text(runs[0]))
    if options.json:
        write(options.json, runs)
    if options.plot:
        draw(runs, options.plot)


if __name__ == "__main__":
    main()
