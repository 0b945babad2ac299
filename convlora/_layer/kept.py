"""The effective weight, kept between forwards that need no gradient while nothing that it came from changes.

Only a layer's own forward is served with what is kept, in the thread that runs it; whoever else reads ``weight`` gets
one computed afresh. What it came from is told by torch's version counters, by trainings (a fused optimizer moves no
counter) and, in host memory, by numbers: all of the factors', ``PROBED`` of the base's. What none of these shows is a
write through ``.data`` or a numpy view with no training in between, on the CPU to a part of the *base* weight that
misses the probed numbers, on an accelerator to any tensor.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .functional import is_transformed

Scaling = float | tuple[float, ...]
PROBED = 64
"""As many numbers of a base weight in host memory, spread evenly over it, are compared. All of them would be as much
reading as the layer's own; what writes past the counters (averaging, rounding, loading) writes nearly all of them."""
NUMBERS: dict[int, Any] = {1: "B", 2: "H", 4: "I", 8: "Q"}
"""Formats of as many bytes as floating types have."""
_HAS_PROCESSES = torch.distributed.is_available()
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


class _Seen:
    """A tensor as it was: the object, its memory (kept alive, so that none takes its address), how often written."""

    __slots__ = ("_address", "_copy", "_memory", "_now", "_shape", "_stride", "_tensor", "_version")

    def __init__(self, tensor: Tensor, is_probed: bool) -> None:
        """``is_probed``: of its numbers, where they lie in host memory, only some are compared."""
        self._tensor, self._memory, self._address = tensor, tensor.detach(), tensor.data_ptr()
        self._shape, self._stride = tensor.shape, tensor.stride()
        self._version = None if tensor.device.type == "cpu" and not is_probed else tensor._version
        self._now: Any = None
        self._copy: Any = None
        if tensor.device.type == "cpu":  # as bytes: next to no work beside torch.equal's for a few thousand numbers
            self._now = (ctypes.c_char * tensor.nbytes).from_address(self._address)
            if is_probed:  # as integers of their size, which memoryview compares without a copy
                form = NUMBERS[tensor.itemsize]
                # An odd stride, so not one column of it.
                self._now = memoryview(self._now).cast("B").cast(form)[:: tensor.numel() // PROBED | 1]
                self._copy = memoryview(bytearray(self._now)).cast(form)
            else:
                self._copy = bytearray(self._now)

    def is_unchanged(self, tensor: Tensor) -> bool:
        return (
            tensor is self._tensor
            and tensor.data_ptr() == self._address  # so that the bytes are the tensor's
            and tensor.shape == self._shape
            and tensor.stride() == self._stride
            and (self._version is None or tensor._version == self._version)
            and (self._copy is None or self._copy == self._now)
        )


class _Entry(NamedTuple):
    """What is kept, and all that it came from."""

    weight: Tensor
    version: int
    sources: tuple[_Seen, ...]
    scaling: Scaling
    trainings: int
    stream: int

    def is_right(self, sources: tuple[Tensor, ...], scaling: Scaling, stream: int) -> bool:
        # Each forward of each layer comes by here, its caches full of other things: few calls, few objects.
        return (
            scaling == self.scaling
            and self.trainings == _trainings
            and stream == self.stream
            and len(sources) == len(self.sources)
            and all(map(_Seen.is_unchanged, self.sources, sources))
            and self.weight._version == self.version  # nobody wrote into what we handed out
        )


class Kept:
    """One layer's effective weight, and what it came from. Copies and pickles start empty."""

    def __init__(self) -> None:
        self._entry: _Entry | None = None
        self.serves: int | None = None
        """The thread in which the layer's own forward is under way, and may have what is kept when it reads its
        ``weight``; None for none. Where several threads run it at once, some compute their own."""

    def weight(
        self, base: Tensor, factors: tuple[Tensor, ...] | None, scaling: Scaling, compute: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """W + ΔW for the layer's own forward: kept where no gradient flows through it, else computed.

        Args:
            base: W.
            factors: all other tensors that ``compute`` reads; None where they cannot be named.
            scaling: what multiplies B @ A; of each adapter, where there are several, and what else tells of a change.
            compute: makes the effective weight of W.
        """
        is_written = type(scaling) is not float and isinstance(scaling, Tensor)
        if factors is None or is_written or torch._C._len_torch_dispatch_stack():
            # Of unknown origin, or written in place, or fake or recorded under a mode, which must see it computed.
            return compute(base)
        sources, entry = (base, *factors), self._entry
        if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
            return compute(base)
        if _HAS_PROCESSES and torch.distributed.is_initialized():
            return compute(base)  # tensors may be sharded, and are then written past the counters
        stream = _stream(base) if base.is_cuda else 0
        if stream is None:
            return compute(base)
        if entry is not None and entry.is_right(sources, scaling, stream):
            return entry.weight
        if is_transformed() or type(base) is not nn.Parameter or not all(map(_has_its_own_memory, sources)):
            return compute(base)
        _watch_optimizers()
        trainings = _trainings
        with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not serve outside
            # Before computing: what is written meanwhile counts as a change. Factors are small enough to compare.
            seen = (_Seen(base, True), *(_Seen(factor, False) for factor in factors))
            weight = compute(base)
        self._entry = _Entry(weight, weight._version, seen, scaling, trainings, stream)
        return weight

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


def _has_its_own_memory(source: Tensor) -> bool:
    """A plain tensor that shares its memory with no other tensor or process."""
    if type(source) not in (nn.Parameter, Tensor) or source.is_inference():
        return False
    shared = not source.is_cuda and cast(Any, source).is_shared()  # on CUDA every tensor says that it is
    return not shared and source.untyped_storage().nbytes() == source.nbytes


def _stream(tensor: Tensor) -> int | None:
    """The queue of work on which the weight is ready, for another one would have to wait; None while it is captured."""
    if torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.current_stream(tensor.device).cuda_stream
