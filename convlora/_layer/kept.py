"""The effective weight, kept between forwards that need no gradient while nothing that it came from changes.

Only a layer's own forward is served with what is kept; whoever else reads ``weight`` gets one computed afresh. What it
came from is told by torch's version counters, by the optimizers' steps (a fused one moves no counter) and, where the
factors lie in host memory, by their numbers. What none of these shows is a write to the *base* weight through ``.data``
or a numpy view; on an accelerator the same holds for the factors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_trainings = 0
"""Counts what may be followed by writes that leave no trace on a tensor: forwards of adapted layers that ask for
gradients, and steps of optimizers. What was kept before does not count after it."""
_watching = False
"""Whether optimizers tell of their steps: from the first weight that is kept."""


def _count_training(*_: Any) -> None:
    global _trainings
    _trainings += 1


def _watch_optimizers() -> None:
    global _watching
    if not _watching:
        _watching = True
        register_optimizer_step_post_hook(_count_training)


@dataclass(frozen=True)
class _Seen:
    """A tensor as it was: the object, its memory (kept alive, so that none takes its address), how often written."""

    tensor: Tensor
    memory: Tensor
    version: int
    form: tuple[object, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> _Seen:
        return cls(tensor, tensor.detach(), tensor._version, _form(tensor))

    def is_still(self, tensor: Tensor) -> bool:
        return tensor is self.tensor and tensor._version == self.version and _form(tensor) == self.form


def _form(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


@dataclass(frozen=True)
class _Copied:
    """A tensor by its numbers: no way of writing it goes unseen."""

    numbers: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> _Copied:
        return cls(tensor.detach().clone())

    def is_still(self, tensor: Tensor) -> bool:
        numbers = self.numbers
        return tensor.dtype is numbers.dtype and tensor.device == numbers.device and torch.equal(tensor, numbers)


@dataclass(frozen=True)
class _Entry:
    state: tuple[object, ...]
    sources: tuple[_Seen | _Copied, ...]
    merged: _Seen

    def serves(self, state: tuple[object, ...], sources: tuple[Tensor, ...]) -> bool:
        if state != self.state:
            return False
        for seen, source in zip(self.sources, sources, strict=True):  # each forward of each layer comes by here
            if not seen.is_still(source):
                return False
        return self.merged.is_still(self.merged.tensor)  # nobody wrote into what we handed out


class Kept:
    """One layer's effective weight, and what it came from. Copies and pickles start empty."""

    def __init__(self) -> None:
        self._entry: _Entry | None = None
        self.is_serving = False
        """Whether the layer's own forward is under way: then :meth:`weight` may be the one that is kept."""

    def weight(
        self, base: Tensor, factors: tuple[Tensor, ...], scaling: float, compute: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """W + ΔW: kept where the layer's own forward asks and no gradient flows through it, else computed.

        Args:
            base: W.
            factors: all other tensors that ``compute`` reads.
            scaling: what multiplies B @ A.
            compute: makes the effective weight of W.
        """
        sources = (base, *factors)
        gradient = torch.is_grad_enabled() and any(source.requires_grad for source in sources)
        if gradient or not self.is_serving or _is_written_past_counters(base):
            return compute(base)
        state = (_trainings, scaling, _stream(base))
        entry = self._entry
        if entry is None or not entry.serves(state, sources):
            if type(base) is not nn.Parameter or not all(map(_has_its_own_memory, sources)):
                return compute(base)
            _watch_optimizers()
            with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not serve outside
                # Before computing: what is written meanwhile counts as a change. Factors are small enough to compare.
                look: type[_Copied] | type[_Seen] = _Copied if base.device.type == "cpu" else _Seen
                seen = (_Seen.of(base), *(look.of(factor) for factor in factors))
                merged = compute(base)
            entry = self._entry = _Entry(state, seen, _Seen.of(merged))
        return entry.merged.tensor

    def train(self) -> None:
        """A forward with gradients is under way: nothing that was kept anywhere counts any more."""
        _count_training()
        self.clear()

    def clear(self) -> None:
        """Keep nothing."""
        self._entry = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


def _is_written_past_counters(base: Tensor) -> bool:
    """While tensors may be sharded over processes, or a graph is captured."""
    in_processes = torch.distributed.is_available() and torch.distributed.is_initialized()
    return in_processes or (base.is_cuda and torch.cuda.is_current_stream_capturing())


def _has_its_own_memory(source: Tensor) -> bool:
    """A plain tensor that shares its memory with no other tensor or process."""
    if type(source) not in (nn.Parameter, Tensor) or source.is_inference():
        return False
    shared = not source.is_cuda and cast(Any, source).is_shared()  # on CUDA every tensor says that it is
    return not shared and source.untyped_storage().nbytes() == source.nbytes


def _stream(tensor: Tensor) -> int:
    """The queue of work on which the weight is ready; another one would have to wait for it."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0
