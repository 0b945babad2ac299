"""Measurements for ``convlora bench``: seconds in interleaved rounds, and the bytes that autograd keeps."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._model.memory import counting


@dataclass(frozen=True)
class Quartiles:
    """First quartile, median and third quartile of some values, in the values' unit."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """Return the quartiles of these values."""
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low, median, high)


def seconds(run: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Return the seconds that one run takes, the mean of ``repeats`` runs; on CUDA, between two events."""
    if device.type == "cuda":
        event: Any = torch.cuda.Event
        start, end = event(enable_timing=True), event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)) / 1e3 / repeats
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - began) / repeats


def interleave(ways: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call every function once in each round, starting with another one each time; the first round is not counted.

    So other load on the machine affects all functions, and a ratio within a round compares neighbours in time.

    Args:
        ways: functions that return a measurement, by name.
        rounds: the number of rounds that are counted.
    """
    names = list(ways)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        first = turn % max(len(names), 1)
        gc.collect()
        for name in names[first:] + names[:first]:
            value = ways[name]()
            if turn:
                found[name].append(value)
    return found


def ratios(values: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Return value / reference for each round."""
    return [value / other for value, other in zip(values, reference, strict=True)]


def saved_bytes(forward: Callable[[], Tensor], own: Iterable[Tensor]) -> int:
    """Return the bytes that autograd keeps between forward and backward; storages of ``own`` are not counted."""
    sizes: list[int] = []
    with counting(own, sizes.append):
        forward()
    return sum(sizes)
