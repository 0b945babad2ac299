"""Where the trainings of a comparison run: here, one after the other, or wherever an executor puts them.

An executor is what ``concurrent.futures`` calls one: it is given a function and its arguments, and gives a future.
Processes of this machine are one; dask's, Ray's or submitit's clients give others. What is sent is a training whole: it
opens the data itself, writes into the same folder as all others, and goes on from its checkpoint where it was ended.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import multiprocessing
import threading
from collections.abc import Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ..data.dataset import HistoDataset, open_splits
from ..errors import ExampleError
from ..methods.method import Method
from ..training.processes import Job, make_accelerator
from ..training.recipe import DIVERGED, Recipe
from . import content
from .experiment import run_method, try_training


class Answer(Protocol):
    """What is asked of a future."""

    def result(self) -> Any:
        """Wait; the value, or the error."""


class Trainings(Protocol):
    """Something that trains."""

    def tried(self, method: Method, recipe: Recipe, name: str) -> Answer:
        """The validation loss, see `experiment.try_training`."""

    def ran(self, method: Method, recipe: Recipe, suffix: str) -> Answer:
        """A row, see `experiment.run_method`; what it gave lies in the job's folder."""


@dataclass(frozen=True)
class Here:
    """In this process, at once."""

    splits: Mapping[str, HistoDataset]
    job: Job

    def tried(self, method: Method, recipe: Recipe, name: str) -> Answer:
        """Train now."""
        return _at_once(lambda: try_training(method, self.splits, recipe, self.job, name))

    def ran(self, method: Method, recipe: Recipe, suffix: str) -> Answer:
        """Train and predict now."""
        return _at_once(lambda: run_method(method, self.splits, recipe, self.job, suffix=suffix) and None)


@dataclass(frozen=True)
class Sent:
    """By an executor.

    Attributes:
        executor: with ``submit``; its workers see the same files under the same names.
        folder: of the data.
        limit: as of `data.open_splits`.
        images: `content.images_of` each split, so that not every worker reads them all.
        job: whose folder is written to.
    """

    executor: Any
    folder: Path
    limit: int | None
    images: Mapping[str, content.Images]
    job: Job

    def tried(self, method: Method, recipe: Recipe, name: str) -> Answer:
        """Send it."""
        self.job.done.add(name)
        return self._submit(_try, method, recipe, name, done=())

    def ran(self, method: Method, recipe: Recipe, suffix: str) -> Answer:
        """Send it."""
        done = tuple(sorted(self.job.done))
        self.job.done.add(f"{method.training}{suffix}")
        return self._submit(_run, method, recipe, suffix, done=done)

    def _submit(self, function: Any, *arguments: Any, done: tuple[str, ...]) -> Answer:
        place = (self.folder.resolve(), self.limit, self.images, self.job.out.resolve(), self.job.resume, done)
        sent: Answer = self.executor.submit(function, *arguments, place)
        return sent


def find_executor(name: str | None, jobs: int) -> Any | None:
    """What trains: None for this process, ``jobs`` processes of this machine, or what ``module:callable`` returns.

    Raises:
        ExampleError: both are given; no such module or callable; what it returns cannot ``submit``.
    """
    if name is None:
        return None if jobs == 1 else local_processes(jobs)
    if jobs != 1:
        raise ExampleError("--jobs and --executor exclude each other; give one.")
    module, _, attribute = name.partition(":")
    try:
        executor = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, TypeError, ValueError) as fault:
        raise ExampleError(
            f"--executor {name}: {fault}. Give module:callable, which takes nothing and returns an executor of "
            "concurrent.futures' kind, such as dask's client.get_executor()."
        ) from fault
    if not callable(getattr(executor, "submit", None)):
        raise ExampleError(f"--executor {name} returns a {type(executor).__name__}, which has no `submit`.")
    return executor


def local_processes(count: int) -> Executor:
    """Processes of this machine, which share its cores."""
    threads = max(1, torch.get_num_threads() // count)
    context = multiprocessing.get_context("spawn")  # a process that has computed with threads must not fork
    return ProcessPoolExecutor(count, context, torch.set_num_threads, (threads,))


def _try(method: Method, recipe: Recipe, name: str, place: Any) -> float:
    with _ALONE:
        splits, job = _opened(recipe, *place)
        return try_training(method, splits, recipe, job, name)


def _run(method: Method, recipe: Recipe, suffix: str, place: Any) -> None:
    with _ALONE:
        splits, job = _opened(recipe, *place)
        run_method(method, splits, recipe, job, suffix=suffix)


_ALONE = threading.Lock()  # a worker may have threads, and a process has one generator that dropout draws from


def _opened(
    recipe: Recipe,
    folder: Path,
    limit: int | None,
    images: Mapping[str, content.Images],
    out: Path,
    resume: bool,
    done: tuple[str, ...],
) -> tuple[dict[str, HistoDataset], Job]:
    splits = _splits(folder, limit)
    for name, split in splits.items():
        content.know(split, images[name])
    return splits, Job(out, accelerator=make_accelerator(recipe.precision), resume=resume, done=set(done))


@functools.lru_cache(1)
def _splits(folder: Path, limit: int | None) -> dict[str, HistoDataset]:
    return open_splits(folder, limit)


def _at_once(function: Any) -> Answer:
    future: Future[Any] = Future()
    try:
        future.set_result(function())
    except ExampleError as error:
        if DIVERGED not in str(error):  # which a sweep survives; anything else ends the run at once
            raise
        future.set_exception(error)
    return future


def everything_there(job: Job) -> Job:
    """The same job, which reads what was sent away and done."""
    return dataclasses.replace(job, resume=True)
