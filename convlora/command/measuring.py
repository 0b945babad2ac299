"""What ``convlora bench`` measures with: seconds in interleaved rounds, and the bytes that autograd keeps."""

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
    """Middle and spread of some figures, in their unit."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """First quartile, median, third quartile."""
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low, median, high)


def seconds(run: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Seconds that one run takes, the mean of ``repeats`` in a row; on CUDA between two events on the stream."""
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
    """Call every way once a round, beginning one further each round; the first round is run and not counted.

    What else the machine does so falls on all of them, and a ratio within one round is of neighbours in time.
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
    """Round by round, value over reference."""
    return [value / other for value, other in zip(values, reference, strict=True)]


def saved_bytes(forward: Callable[[], Tensor], own: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward: each storage once, those of ``own`` not at all."""
    sizes: list[int] = []
    with counting(own, sizes.append):
        forward()
    return sum(sizes)
