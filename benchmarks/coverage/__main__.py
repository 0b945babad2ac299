"""Test convlora, and Hugging Face peft beside it, on many networks.

    python -m benchmarks.coverage all --jobs 2

``plan`` plans every architecture name of timm and torchvision; ``numeric`` takes the smallest network of each kind the
whole way, with random weights and no download; ``report`` writes docs/coverage.md and docs/assets/coverage.csv; ``all``
does the three. What is in the results file already is not done again.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
from functools import partial
from pathlib import Path

from . import outcomes, plans, report, zoo
from .runner import Limits, Row, Task, append, read, run

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
RESULTS = Path("runs") / "coverage.jsonl"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["plan", "numeric", "report", "all"])
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, one thread each")
    parser.add_argument("--only", default="*", metavar="GLOB", help="names such as 'timm/resnet*'")
    parser.add_argument("--again", action="store_true", help="repeat networks that have results already")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON-lines file to which results are appended")
    parser.add_argument("--page", type=Path, default=PAGE, help="where the report goes; its table: assets/ beside it")
    parser.add_argument("--seconds", type=float, default=300, help="time limit of one network")
    parser.add_argument("--memory", type=float, default=12, help="memory limit of one network in GiB")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    for what in ("plan", "numeric", "report") if options.what == "all" else (options.what,):
        if what == "report":
            rows, table = read(options.results), options.page.parent / "assets" / "coverage.csv"
            options.page.write_text(report.page(rows), encoding="utf-8")
            table.parent.mkdir(exist_ok=True)
            table.write_text(report.table(rows), encoding="utf-8")
            print(f"wrote {options.page.name}")
        else:
            _sweep(what, options)


def _sweep(kind: str, options: argparse.Namespace) -> None:
    rows = read(options.results)
    held = {row["name"] for row in rows if row["kind"] == kind and not options.again}
    tasks = [
        t for t in _tasks(kind, rows, options.only) if fnmatch.fnmatchcase(t.name, options.only) and t.name not in held
    ]
    if tasks:
        append(options.results, {"kind": "environment", "name": kind, **report.environment(options.jobs)})
    _import_once()
    counted = iter(range(1, len(tasks) + 1))

    def done(row: Row) -> None:
        append(options.results, row)
        print(
            f"{kind} {next(counted)}/{len(tasks)} {row['name']}: {outcomes.line(row)} ({row['seconds']} s)", flush=True
        )

    run(tasks, options.jobs, Limits(options.seconds, options.memory), done)


def _tasks(kind: str, rows: list[Row], only: str) -> list[Task]:
    if kind == "plan":
        return [Task(kind, name, partial(plans.check_plan, name)) for name in plans.names()]
    planned = [row for row in rows if row["kind"] == "plan"]
    if not planned and only.startswith(("*", "timm")):
        raise SystemExit(
            "timm's smallest networks are chosen from planned ones: run `plan` with these --results first."
        )
    return [Task(kind, name, partial(zoo.check_case, case)) for name, case in zoo.cases(planned).items()]


def _import_once() -> None:
    """Import the libraries that every process needs, before the first is forked."""
    import peft  # noqa: F401
    import segmentation_models_pytorch  # noqa: F401
    import transformers  # noqa: F401


if __name__ == "__main__":
    main()
