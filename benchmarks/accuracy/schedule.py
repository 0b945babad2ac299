"""Run all requested methods over processes of one thread each.

This is a module of its own because a spawned process finds its work by import, which ``__main__`` does not allow.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch
from torch import nn

from examples.histopathology.runs.rates import FURTHER

from . import backbones, data, report
from .arms import ALL_IMAGES, ARMS, EVERYWHERE, FIRST_ALONE, QUICK
from .runs import Make, Sweep, Work, append, mend, missing, read
from .training import Recipe


def works(options: argparse.Namespace) -> dict[str, Work]:
    """The shared work of each backbone, by its name."""
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
"""A unit of work for one process: a backbone, a task and a method."""


def units(options: argparse.Namespace) -> list[Unit]:
    """Run all requested methods, each on its own tasks, or on the tasks that are named."""
    found = []
    for backbone in options.backbone:
        for task in options.tasks or (["all"] if options.quick else ["all", "few-1", "few-5", "few-20"]):
            belonging = _arms(backbone, task, options.quick)
            found += [(backbone, task, arm) for arm in options.arms or belonging if options.tasks or arm in belonging]
    return found


def measure(unit: Unit, work: Work, options: argparse.Namespace) -> None:
    """Run one method as far as it is not in the results yet."""
    _, task, arm = unit
    path = options.out / "results.jsonl"
    sweep = Sweep(tuple(sorted(options.lrs)), options.seeds, further=0 if options.quick else FURTHER)
    for outcome in missing(work, task, ARMS[arm], sweep, read(path)):
        append(path, outcome)
        print(report.line(outcome), file=sys.stderr)


def measure_all(options: argparse.Namespace) -> None:
    """Run every unit over processes of one thread each."""
    mend(options.out / "results.jsonl")
    made, todo = works(options), units(options)
    if options.jobs == 1:
        for unit in todo:
            measure(unit, made[unit[0]], options)
        return
    # Spawned, not forked: torch has used threads here.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, context, _begin) as pool:
        for future in as_completed([pool.submit(_measure, unit, options) for unit in todo]):
            future.result()


def _begin() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent is killed, so that it does not continue beside the next run."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _measure(unit: Unit, options: argparse.Namespace) -> None:
    if not _made:
        _made.update(works(options))
    measure(unit, _made[unit[0]], options)


_made: dict[str, Work] = {}
"""The work of this process."""


def _arms(backbone: str, task: str, is_quick: bool) -> Sequence[str]:
    if is_quick:
        return QUICK
    least = EVERYWHERE if task != "all" else ALL_IMAGES if backbone == backbones.SCRATCH else FIRST_ALONE
    return [name for name, arm in ARMS.items() if arm.where >= least]
