"""The instruments: seconds in interleaved rounds, bytes that autograd saves, the peak of a step, what has moved."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


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
    known = {tensor.untyped_storage()._cdata for tensor in own}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that none takes another's address

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors that a step holds at once, beyond what was there before it.

    On CUDA the caching allocator's own peak. On a CPU the running sum of what torch's profiler reports of each
    allocation and release: the same from run to run, whatever else the machine does, where a process's resident set
    depends on the C allocator's habits. What libraries allocate past torch (oneDNN's scratch) is in neither.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - int(before)
    with torch.autograd.profiler.profile(use_kineto=True, profile_memory=True) as profile:
        step()
    assert profile.kineto_results is not None, "the profiler has run"
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((int(event.nbytes()) for event in events), initial=0))


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the numbers in these tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state."""
    states = optimizer.state.values()
    return tensor_bytes(value for state in states for value in state.values() if isinstance(value, Tensor))


@dataclass(frozen=True)
class Movement:
    """Which tensors of a model a few steps have changed."""

    moved: tuple[str, ...]
    """Trainable parameters that moved."""
    stuck: tuple[str, ...]
    """Trainable parameters that did not."""
    strayed: tuple[str, ...]
    """Frozen parameters that moved."""
    buffers: tuple[str, ...]
    """Buffers that moved."""


def movement(model: nn.Module, steps: Callable[[], object]) -> Movement:
    """Run the steps and compare every tensor of the model with what it was."""
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    before = {name: tensor.detach().clone() for name, tensor in (parameters | buffers).items()}
    steps()
    changed = {name for name, tensor in (parameters | buffers).items() if not torch.equal(tensor, before[name])}
    trainable = {name for name, parameter in parameters.items() if parameter.requires_grad}
    return Movement(
        moved=tuple(sorted(changed & trainable)),
        stuck=tuple(sorted(trainable - changed)),
        strayed=tuple(sorted(changed & (parameters.keys() - trainable))),
        buffers=tuple(sorted(changed & buffers.keys())),
    )
