"""Run the trainings of a comparison in this process, one after the other, or on an executor.

An executor has the interface of ``concurrent.futures``: ``submit`` takes a function and its arguments and returns a
future. A pool of processes is one; dask's, Ray's and submitit's clients return others. A whole training is submitted:
it opens the data itself, writes to the job's folder, and continues from its checkpoint if it was interrupted.
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
    """The part of a future that is used."""

    def result(self) -> Any:
        """Wait for the value, or raise the error."""


class Trainings(Protocol):
    """A place where trainings run."""

    def tried(self, method: Method, recipe: Recipe, name: str) -> Answer:
        """Train for a sweep; the answer is the validation loss, see `experiment.try_training`."""

    def ran(self, method: Method, recipe: Recipe, suffix: str) -> Answer:
        """Run a method, see `experiment.run_method`; its result is written to the job's folder."""


@dataclass(frozen=True)
class Here:
    """Run trainings in this process, at once."""

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
    """Run trainings on an executor.

    Attributes:
        executor: has ``submit``; its workers see the same files under the same paths.
        folder: the data's folder.
        limit: as in `data.open_splits`.
        images: `content.images_of` each split, so that the workers need not read all images.
        job: the job, whose folder is written to.
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
    """The executor: None for this process, ``jobs`` processes of this machine, or the one ``module:callable`` returns.

    Raises:
        ExampleError: both are given; no such module or callable; the returned object has no ``submit``.
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
            f"--executor {name}: {fault}. Give module:callable that takes no arguments and returns an executor like "
            "those of concurrent.futures, such as dask's client.get_executor()."
        ) from fault
    if not callable(getattr(executor, "submit", None)):
        raise ExampleError(f"--executor {name} returns a {type(executor).__name__}, which has no `submit`.")
    return executor


def local_processes(count: int) -> Executor:
    """A pool of processes of this machine, which share its cores."""
    threads = max(1, torch.get_num_threads() // count)
    context = multiprocessing.get_context("spawn")  # a process that has used threads must not fork
    return ProcessPoolExecutor(count, context, torch.set_num_threads, (threads,))


def _try(method: Method, recipe: Recipe, name: str, place: Any) -> float:
    with _ALONE:
        splits, job = _opened(recipe, *place)
        return try_training(method, splits, recipe, job, name)


def _run(method: Method, recipe: Recipe, suffix: str, place: Any) -> None:
    with _ALONE:
        splits, job = _opened(recipe, *place)
        run_method(method, splits, recipe, job, suffix=suffix)


_ALONE = threading.Lock()  # a worker may have threads, and dropout draws from the process's only generator


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
        if DIVERGED not in str(error):  # a sweep continues after a diverged training; other errors end the run
            raise
        future.set_exception(error)
    return future


def everything_there(job: Job) -> Job:
    """The same job in resume mode, which reads the finished trainings of other processes."""
    return dataclasses.replace(job, resume=True)
