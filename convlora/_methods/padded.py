"""Padded LoRA: the same tensors hold LoRA of any rank and strength, for models prepared for hot swaps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._layer.change import Change, Shape
from .._layer.functional import Factors, no_autocast, plus_delta
from .._layer.kept import Scaling
from .._layer.mix import Mix
from .dense import Dense
from .lora import LoRA, stored_factors


class PaddedLoRA(LoRA):
    """LoRA whose A and B are padded with zeros to a width that fits every rank.

    A file contains it without the zeros and in its original method: dense changes and anchored LoRA are products of two
    factors in a file, too.

    Attributes:
        lora_A: ``(width, ...)``; rows from ``rank`` on are zero, and stay so in training.
        lora_B: ``(C_out, width)``; columns from ``rank`` on likewise.
        gain: scaling · strength · weight among the active adapters, as a tensor.
        is_dense: whether a file contains it as a dense change.
    """

    is_dense = False
    share = 1.0
    gain: Tensor

    @classmethod
    def of(
        cls, weight: Shape, like: Tensor, width: int, channels: Mapping[str, Any], change: Change | None = None
    ) -> PaddedLoRA:
        """Return a change in padded form; without a change, zeros.

        Args:
            weight: the shape of the layer's weight.
            like: the base's weight, whose device it is on.
            width: the largest rank.
            channels: ``groups`` and ``transposed`` of the layer.
            change: of the base's weight, what it is now.
        """
        own: dict[str, Any] = {}
        if change is not None:
            like = like.new_empty(0, dtype=torch.promote_types(like.dtype, change.own_dtype()))
            own = {"dropout": change.dropout, "training_path": change.training_path}
        padded = cls(weight, like, width, 1.0, **own, **channels)
        padded.register_buffer("gain", torch.ones((), dtype=padded.own_dtype(), device=like.device))
        padded.rank = 0
        if change is not None:
            is_dense = change.is_dense if isinstance(change, PaddedLoRA) else isinstance(change, Dense)
            padded.load_stored(change.stored(), change.scaling, change.strength, is_dense)
        return padded

    def begin(self) -> None:
        """Zero, as it is."""

    def load_stored(self, stored: Mapping[str, Tensor], scaling: float, strength: float, is_dense: bool) -> None:
        """Load what a file contains, in place: every tensor stays the same object."""
        self.restore(stored)
        self.scaling, self.strength, self.is_dense = float(scaling), strength, is_dense

    def clear(self) -> None:
        """Set the change to zero."""
        self.set_factors(self.lora_A[:0], self.lora_B[:, :0])
        self.scaling, self.strength, self.is_dense = 1.0, 1.0, False

    def set_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Copy factors of any rank up to the width, and fill the rest with zeros."""
        rank = len(lora_A)
        with torch.inference_mode(False), torch.no_grad():
            self.lora_A[:rank].copy_(lora_A.view_as(self.lora_A[:rank]))
            self.lora_B[:, :rank].copy_(lora_B)
            self.lora_A[rank:].zero_()
            self.lora_B[:, rank:].zero_()
        self.rank = rank

    def replace_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """As :meth:`set_factors`."""
        self.set_factors(lora_A, lora_B)

    def factors(self) -> Factors:
        """Return A and B without the zeros."""
        self.run_hooks()
        return self.lora_A[: self.rank], self.lora_B[:, : self.rank]

    def stored(self) -> Mapping[str, Tensor]:
        """Return what a file contains: without the zeros, in the original method."""
        A, B = self.factors()
        return Dense.stored_as((B @ A.flatten(1)).view(self.weight_shape)) if self.is_dense else stored_factors(A, B)

    def live(self, share: float) -> Live:
        """Return what the layer computes with while this change is active."""
        self.share = share
        return Live(((self, share * self.strength),))

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute and update ``gain``, also if the user sets ``scaling``."""
        super().__setattr__(name, value)
        if name in ("scaling", "strength", "share"):
            self._follow()

    def _follow(self) -> None:
        gain = self._buffers.get("gain")
        if gain is not None:
            with torch.inference_mode(False), torch.no_grad():
                gain.fill_(self.scaling * self.strength * self.share)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        self._follow()  # a narrower dtype may have rounded it
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._follow()  # a state dict does not contain the adapter's strength


class Live(Mix):
    """One padded change, scaled by a tensor: a compiler sees the same tensors whichever adapter is active."""

    changes: tuple[PaddedLoRA, ...]

    @property
    def numbers(self) -> Scaling:
        """Empty, since the effective weight depends on tensors alone."""
        return ()

    def effective_weight(self, base: Tensor) -> Tensor:
        """Compute the weight as for a single change."""
        (change,) = self.changes
        with no_autocast(base.device.type):
            B = change.gain * change.lora_B
            return change._narrow(plus_delta(change._wide(base), change.lora_A, B, 1.0), base)

    def factors_at(self, base: Tensor) -> None:
        """Autograd goes through the effective weight."""
