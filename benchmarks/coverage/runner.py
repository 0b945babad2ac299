"""Run each task in its own process, with limits of memory and time, and write results to a JSON-lines file."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A row to measure; ``kind`` is plan or numeric."""

    kind: str
    name: str
    work: Callable[[], Row]


@dataclass(frozen=True)
class Limits:
    """The limits of each process: seconds, and GiB of private memory."""

    seconds: float
    memory: float


@dataclass(frozen=True)
class _Running:
    task: Task
    process: ForkProcess
    results: Connection
    start: float


def read(path: Path) -> list[Row]:
    """Read every row, the last one of each name; an unfinished last line is ignored."""
    rows: dict[tuple[str, str], Row] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row["kind"], row["name"]] = row
    return list(rows.values())


def append(path: Path, row: Row) -> None:
    """One line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def run(tasks: list[Task], jobs: int, limits: Limits, done: Callable[[Row], None]) -> None:
    """Run all tasks, ``jobs`` at a time; ``done`` is called with each row."""
    waiting, running = list(reversed(tasks)), dict[int, _Running]()
    while waiting or running:
        while waiting and len(running) < jobs:
            started = _start(waiting.pop(), limits)
            running[started.process.sentinel] = started
        wait([r.results for r in running.values()], timeout=1.0)
        for sentinel, one in list(running.items()):
            row = _row_of(one, limits)
            if row is not None:
                del running[sentinel]
                done({"kind": one.task.kind, "name": one.task.name, **row})


def _start(task: Task, limits: Limits) -> _Running:
    # Forked from a process that has imported the libraries and computed nothing, so that they are imported once.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(task, limits, sender), daemon=True)
    process.start()
    sender.close()
    return _Running(task, process, receiver, time.monotonic())


def _row_of(one: _Running, limits: Limits) -> Row | None:
    """The row of a task that has ended, or None while it runs; a task beyond its time is ended."""
    seconds = round(time.monotonic() - one.start, 2)
    if one.results.poll():
        try:
            row: Row = one.results.recv()
        except EOFError:
            one.process.join()
            row = {"error": f"the process ended with exit code {one.process.exitcode}"}
    elif seconds > limits.seconds:
        one.process.kill()
        row = {"error": f"not done within {limits.seconds:.0f} s"}
    else:
        return None
    one.process.join()
    one.results.close()
    return {**row, "seconds": seconds}


def _work(task: Task, limits: Limits, sender: Connection) -> None:
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    size = int(limits.memory * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        row = task.work()
    except Exception as cause:
        row = {"error": f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[0]}"}
    sender.send({**row, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024})
