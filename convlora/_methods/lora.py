"""LoRA: two factors of low rank.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021 (arXiv:2106.09685).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._layer.change import Change, Shape, Shapes
from .._layer.functional import Factors, delta_weight, plus_delta


class LoRA(Change):
    """W + scaling · B @ A.

    Attributes:
        lora_A: ``(rank, C_in / groups, kH, kW)``; in general ``(rank, *weight.shape[1:])``, so ``(rank, in_features)``
            for a linear layer and ``(rank, C_out / groups, kH, kW)`` for a transposed convolution.
        lora_B: ``(C_out, rank)``, in general ``(weight.shape[0], rank)``; zero at the start, so that a fresh adapter
            changes nothing.
    """

    method = "lora"
    inits: ClassVar[tuple[str, ...]] = ("kaiming", "gaussian", "orthogonal", "eva")
    formula = "W + scaling · B A"
    fresh = "lora_B is zero"
    fast: ClassVar[tuple[str, ...]] = ("lora_B",)
    anchored = False
    lora_A: Tensor
    lora_B: Tensor

    @classmethod
    def shapes(cls, weight: Shape, rank: int, **options: Any) -> Shapes:
        """Return the shapes of A and B."""
        return {"lora_A": (rank, *weight[1:]), "lora_B": (weight[0], rank)}

    def begin(self) -> None:
        """Initialise A as torch initialises a convolution's weight; B stays zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def is_fresh(self) -> bool:
        """Return whether B is still zero."""
        return not self.lora_B.any()

    def factors(self) -> Factors:
        """Return A ``(rank, ...)`` and B ``(C_out, rank)``, with ΔW = scaling · B @ A."""
        self.run_hooks()
        return self.lora_A, self.lora_B

    def changed(self, weight: Tensor) -> Tensor:
        """Compute W + scaling · B @ A in one fused product and sum."""
        return plus_delta(weight, *self.factors(), self.scaling)

    def delta_weight(self) -> Tensor:
        """Compute ΔW in ``weight_shape`` and the factors' dtype; with DoRA, before the magnitudes."""
        return delta_weight(*self.factors(), self.scaling)

    def delta(self, base: Tensor) -> Tensor:
        """As :meth:`delta_weight`, in the base's shape."""
        return self.delta_weight().reshape(base.shape)

    @classmethod
    def stored_shapes(cls, weight: Shape, rank: int, **options: Any) -> Shapes:
        """Return peft's shapes: there a convolution's B is the weight of a 1×1 convolution."""
        return {"lora_A.weight": (rank, *weight[1:]), "lora_B.weight": (weight[0], rank, *[1] * len(weight[2:]))}

    def stored(self) -> Mapping[str, Tensor]:
        """Return A and B as a file contains them."""
        return stored_factors(*self.factors())

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        """Load A and B from a file's tensors."""
        self.set_factors(stored["lora_A.weight"], stored["lora_B.weight"].flatten(1))

    def set_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Copy these values into A and B."""
        with torch.no_grad():
            self.lora_A.copy_(lora_A.view_as(self.lora_A))
            self.lora_B.copy_(lora_B)

    def replace_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Replace A and B by factors of any rank. May be run again."""
        for name, new in (("lora_A", lora_A), ("lora_B", lora_B)):
            now = self.get_parameter(name)
            if now is not new:
                setattr(self, name, nn.Parameter(new.to(now.dtype), requires_grad=now.requires_grad))
        self.rank = len(lora_A)


def stored_factors(lora_A: Tensor, lora_B: Tensor) -> dict[str, Tensor]:
    """Return A ``(rank, ...)`` and B ``(C_out, rank)`` by a file's names and in its shapes."""
    return {"lora_A.weight": lora_A, "lora_B.weight": lora_B.view(*lora_B.shape, *[1] * (lora_A.ndim - 2))}


class AnchoredLoRA(LoRA):
    """W + scaling · (B @ A − B0 @ A0): zero at the start whatever A and B are, and the base is untouched.

    For PiSSA and OLoRA, whose initial factors have a product that is not zero. The papers subtract it from the base's
    weight; this is the same function of the same trained parameters.

    Attributes:
        lora_A0, lora_B0: the initial values of A and B, frozen.
    """

    method = "anchored"
    inits: ClassVar[tuple[str, ...]] = ("pissa", "olora")
    formula = "W + scaling · (B A − B₀ A₀), A₀ and B₀ as they began"
    fresh = "factor is as it began"
    fast: ClassVar[tuple[str, ...]] = ()  # neither factor is zero, and a gradient reaches both at once
    anchored = True
    lora_A0: Tensor
    lora_B0: Tensor

    @classmethod
    def constants(cls, weight: Shape, rank: int, **options: Any) -> Shapes:
        """Return the shapes of A0 and B0."""
        return {f"{name}0": shape for name, shape in cls.shapes(weight, rank).items()}

    def begin(self) -> None:
        """Initialise as LoRA does; :meth:`set_factors` then sets the anchor."""
        super().begin()
        self.lora_A0.copy_(self.lora_A.detach())

    def is_fresh(self) -> bool:
        """Return whether A and B still have their initial values."""
        return torch.equal(self.lora_A, self.lora_A0) and torch.equal(self.lora_B, self.lora_B0)

    def factors(self) -> Factors:
        """Return factors of rank 2 · ``rank``: (B − B0) @ A + B0 @ (A − A0), which is exactly zero at the start."""
        A, B = super().factors()
        return torch.cat([A, A - self.lora_A0]), torch.cat([B - self.lora_B0, self.lora_B0], dim=1)

    @classmethod
    def stored_shapes(cls, weight: Shape, rank: int, **options: Any) -> Shapes:
        """Return LoRA's shapes at rank 2 · ``rank``."""
        return super().stored_shapes(weight, 2 * rank)

    def stored(self) -> Mapping[str, Tensor]:
        """Return [A; A0] and [B, −B0], which contain all four tensors bit for bit."""
        A, B = super().factors()
        return stored_factors(torch.cat([A, self.lora_A0]), torch.cat([B, -self.lora_B0], dim=1))

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        """Load A, B, A0 and B0."""
        A, B = stored["lora_A.weight"], stored["lora_B.weight"].flatten(1)
        self.lora_A0.copy_(A[self.rank :])
        self.lora_B0.copy_(-B[:, self.rank :])
        super().set_factors(A[: self.rank], B[:, : self.rank])

    def set_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Initialise A and B with these values, and anchor them there."""
        super().set_factors(lora_A, lora_B)
        self.lora_A0.copy_(self.lora_A.detach())
        self.lora_B0.copy_(self.lora_B.detach())

    def replace_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """As in LoRA; the change becomes plain LoRA."""
        super().replace_factors(lora_A, lora_B)
        self._buffers.clear()
        self.names = ("lora_A", "lora_B")
        self.__class__ = LoRA  # type: ignore[assignment]
