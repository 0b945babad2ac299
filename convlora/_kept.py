"""The effective weight, kept between forwards that need no gradient while nothing that it came from changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._functional import effective_weight

_trainings = 0
"""Counts forwards that ask for gradients, of any adapted layer. Training is followed by writes that leave no trace on a
tensor (an average of weights kept through ``.data``), so what was kept before it does not count after it."""


@dataclass(frozen=True)
class _Seen:
    """A tensor as it was: the object, its storage (kept alive, so that none takes its address), how often written."""

    tensor: Tensor
    storage: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Seen:
        return cls(tensor, tensor.detach(), tensor._version)

    def is_still(self, tensor: Tensor) -> bool:
        same = tensor is self.tensor and tensor._version == self.version
        return same and tensor.data_ptr() == self.storage.data_ptr()


@dataclass(frozen=True)
class _Entry:
    state: tuple[object, ...]
    sources: tuple[_Seen, ...]
    merged: _Seen

    def serves(self, state: tuple[object, ...], sources: tuple[Tensor, ...]) -> bool:
        return (
            state == self.state
            and all(seen.is_still(source) for seen, source in zip(self.sources, sources, strict=True))
            and self.merged.is_still(self.merged.tensor)  # nobody wrote into what we handed out
        )


class Kept:
    """One layer's effective weight, and what it came from. Copies and pickles start empty."""

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def weight(self, base: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        """W + ΔW: kept where no gradient flows through it, else computed.

        Changes are told by torch's own version counters, which every write through torch moves except one through
        ``.data`` or a numpy view.
        """
        sources = (base, lora_A, lora_B)
        if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
            self.train()
            return effective_weight(base, lora_A, lora_B, scaling)
        if not _can_be_watched(sources):
            return effective_weight(base, lora_A, lora_B, scaling)
        state = (_trainings, scaling, _stream(base))
        entry = self._entry
        if entry is None or not entry.serves(state, sources):
            with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not serve outside
                merged = effective_weight(base, lora_A, lora_B, scaling)
            entry = self._entry = _Entry(state, tuple(map(_Seen.of, sources)), _Seen.of(merged))
        return entry.merged.tensor

    def train(self) -> None:
        """A forward with gradients is under way: drop what was kept."""
        global _trainings
        _trainings += 1
        self._entry = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


def _can_be_watched(sources: tuple[Tensor, ...]) -> bool:
    """Parameters alone, and not where others write past the version counters: sharding, the capture of a graph."""
    return (
        all(type(source) is nn.Parameter and not source.is_inference() for source in sources)
        and not (torch.distributed.is_available() and torch.distributed.is_initialized())
        and not (sources[0].is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _stream(tensor: Tensor) -> int:
    """The queue of work on which the weight is ready; another one would have to wait for it."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0
