"""The effective weight, kept between forwards that need no gradient while nothing that it came from changes.

Only a layer's own forward reads the kept weight, in the thread that runs it; other readers of ``weight`` get a newly
computed one. A forward under a dispatch mode, as the first of an injected model is, keeps nothing. A change of the
sources is detected by torch's version counters, by training (a fused optimizer does not increment the counters) and, in
host memory, by values: all elements of the factors and ``PROBED`` elements of the base. None of these detects a write
through ``.data`` or a numpy view without training in between: on the CPU, one to elements of the *base* weight that are
not probed; on an accelerator, one to any tensor.
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
"""How many elements of a base weight in host memory, evenly spread, are compared with their earlier values. Comparing
all would read as much memory as the layer's forward does; writes that bypass the counters (averaging, rounding,
loading) change nearly every element."""
NUMBERS: dict[int, Any] = {1: "B", 2: "H", 4: "I", 8: "Q"}
"""memoryview's integer format for each element size in bytes."""
_HAS_PROCESSES = torch.distributed.is_available()
_trainings = 0
"""Counts forwards of adapted layers with gradients, and steps of optimizers. Writes that no tensor shows may follow
either, so a weight that was kept at a lower count is not used."""
_watching = False
"""Whether the hook on optimizer steps is registered, which happens when the first weight is kept."""


def _count_training(*_: Any) -> None:
    global _trainings
    _trainings += 1


def _watch_optimizers() -> None:
    global _watching
    if not _watching:
        _watching = True
        register_optimizer_step_post_hook(_count_training)


class _Seen:
    """A snapshot of a tensor: the object, its memory (kept alive, so that its address is not reused), its version."""

    __slots__ = ("_address", "_copy", "_memory", "_now", "_shape", "_stride", "_tensor", "_version")

    def __init__(self, tensor: Tensor, is_probed: bool) -> None:
        """``is_probed``: in host memory, compare only ``PROBED`` of its elements."""
        self._tensor, self._memory, self._address = tensor, tensor.detach(), tensor.data_ptr()
        self._shape, self._stride = tensor.shape, tensor.stride()
        self._version = None if tensor.device.type == "cpu" and not is_probed else tensor._version
        self._now: Any = None
        self._copy: Any = None
        if tensor.device.type == "cpu":  # as bytes, which for a few thousand elements is far faster than torch.equal
            self._now = (ctypes.c_char * tensor.nbytes).from_address(self._address)
            if is_probed:  # as integers of the same size, which memoryview compares without a copy
                form = NUMBERS[tensor.itemsize]
                # An odd stride, so that the elements are not all from one column.
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
    """A kept weight, and snapshots of all that it was computed from."""

    weight: Tensor
    version: int
    sources: tuple[_Seen, ...]
    scaling: Scaling
    trainings: int
    stream: int

    def is_right(self, sources: tuple[Tensor, ...], scaling: Scaling, stream: int) -> bool:
        # Every forward of every layer runs this with cold caches: few calls, few objects.
        return (
            scaling == self.scaling
            and self.trainings == _trainings
            and stream == self.stream
            and len(sources) == len(self.sources)
            and all(map(_Seen.is_unchanged, self.sources, sources))
            and self.weight._version == self.version  # nobody wrote into the weight
        )


class Kept:
    """Keeps one layer's effective weight. Copies and pickles start empty."""

    def __init__(self) -> None:
        self._entry: _Entry | None = None
        self.serves: int | None = None
        """The thread that runs the layer's own forward and may read the kept weight; None outside of forwards. If
        several threads run it at once, some of them compute their own weight."""

    def weight(
        self, base: Tensor, factors: tuple[Tensor, ...] | None, scaling: Scaling, compute: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return W + ΔW for the layer's own forward: the kept one if no gradient flows through it, else a new one.

        Args:
            base: W.
            factors: all other tensors that ``compute`` reads; None where they cannot be named.
            scaling: what multiplies B @ A; of each adapter, where there are several, and what else tells of a change.
            compute: makes the effective weight of W.
        """
        is_written = type(scaling) is not float and isinstance(scaling, Tensor)
        if factors is None or is_written or torch._C._len_torch_dispatch_stack():
            # Unknown sources, a scaling written in place, or a dispatch mode, which must see it computed.
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
            # Before computing, so that a concurrent write counts as a change. Factors are small: all is compared.
            seen = (_Seen(base, True), *(_Seen(factor, False) for factor in factors))
            weight = compute(base)
        self._entry = _Entry(weight, weight._version, seen, scaling, trainings, stream)
        return weight

    def train(self) -> None:
        """Record a forward with gradients: from now on no weight that any layer has kept is used."""
        _count_training()
        self.clear()

    def clear(self) -> None:
        """Discard the kept weight."""
        self._entry = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


def _has_its_own_memory(source: Tensor) -> bool:
    """Return whether a plain tensor shares its memory with no other tensor or process."""
    if type(source) not in (nn.Parameter, Tensor) or source.is_inference():
        return False
    shared = not source.is_cuda and cast(Any, source).is_shared()  # on CUDA every tensor says that it is
    return not shared and source.untyped_storage().nbytes() == source.nbytes


def _stream(tensor: Tensor) -> int | None:
    """Return the CUDA stream on which the weight is ready; None while a graph is captured."""
    if torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.current_stream(tensor.device).cuda_stream
