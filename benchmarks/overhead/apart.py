"""A method in its own process.

Methods in one process share the C allocator's memory: one reuses what another has freed. A training run is alone in its
process, and may have to request memory from the operating system at every step.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch

from .arms import ALL_TRAINING, INFERENCE
from .bench import Bench
from .runs import Result, Settings

if TYPE_CHECKING:
    from typing_extensions import Self

P = ParamSpec("P")
T = TypeVar("T")


class Apart:
    """A :class:`Bench` in another process, which ends with the block."""

    def __init__(self, settings: Settings, name: str) -> None:
        """Start the process and build the method of this name in it.

        Raises:
            NotAvailable: as :meth:`Bench.of`.
        """
        self._pool = ProcessPoolExecutor(
            max_workers=1,
            mp_context=multiprocessing.get_context("spawn"),  # a forked process would start with this one's memory
            initializer=torch.set_num_threads,
            initargs=(torch.get_num_threads(),),
        )
        with ExitStack() as undo:
            undo.callback(self._pool.shutdown)
            self._do(_build, settings, name)
            undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def sizes(self) -> Result:
        """As :meth:`Bench.sizes`."""
        return self._do(_sizes)

    def time(self) -> float:
        """As :meth:`Bench.time`."""
        return self._do(_time)

    def _do(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return self._pool.submit(function, *args, **kwargs).result()


_benches: list[Bench] = []
"""The method, in the other process."""


def _build(settings: Settings, name: str) -> None:
    _benches.append(Bench.of(settings, (ALL_TRAINING | INFERENCE)[name], train=name in ALL_TRAINING))


def _sizes() -> Result:
    return _benches[0].sizes()


def _time() -> float:
    return _benches[0].time()
