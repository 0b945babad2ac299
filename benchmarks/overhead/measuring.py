"""The instruments: seconds in interleaved rounds, bytes that autograd saves, the peak of a step, moved tensors.

The first few are those of ``convlora bench``.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convlora.command.measuring import Quartiles as Quartiles
from convlora.command.measuring import interleave as interleave
from convlora.command.measuring import ratios as ratios
from convlora.command.measuring import saved_bytes as saved_bytes
from convlora.command.measuring import seconds as seconds


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The peak bytes of tensors in a step, beyond those before it.

    On CUDA it is the caching allocator's peak. On a CPU it is the running sum of the allocations and releases that
    torch's profiler reports, which is the same in every run, unlike a process's resident set. Memory that libraries
    allocate outside torch (oneDNN's scratch) is in neither.
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
    """Bytes of the elements of these tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state."""
    states = optimizer.state.values()
    return tensor_bytes(value for state in states for value in state.values() if isinstance(value, Tensor))


@dataclass(frozen=True)
class Movement:
    """The tensors of a model that a few steps changed."""

    moved: tuple[str, ...]
    """Trainable parameters that moved."""
    stuck: tuple[str, ...]
    """Trainable parameters that did not move."""
    strayed: tuple[str, ...]
    """Frozen parameters that moved."""
    buffers: tuple[str, ...]
    """Buffers that moved."""


def movement(model: nn.Module, steps: Callable[[], object]) -> Movement:
    """Run the steps and compare every tensor of the model with its earlier value."""
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
