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
        """A and B."""
        return {"lora_A": (rank, *weight[1:]), "lora_B": (weight[0], rank)}

    def begin(self) -> None:
        """A drawn as torch draws a convolution's weight, B zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def is_fresh(self) -> bool:
        """Whether B is zero still."""
        return not self.lora_B.any()

    def factors(self) -> Factors:
        """A ``(rank, ...)`` and B ``(C_out, rank)`` with ΔW = scaling · B @ A."""
        self.run_hooks()
        return self.lora_A, self.lora_B

    def changed(self, weight: Tensor) -> Tensor:
        """One product that starts from W."""
        return plus_delta(weight, *self.factors(), self.scaling)

    def delta_weight(self) -> Tensor:
        """ΔW, in ``weight_shape`` and the factors' dtype; with DoRA, before the magnitudes."""
        return delta_weight(*self.factors(), self.scaling)

    def delta(self, base: Tensor) -> Tensor:
        """As :meth:`delta_weight`, in the base's shape."""
        return self.delta_weight().reshape(base.shape)

    @classmethod
    def stored_shapes(cls, weight: Shape, rank: int, **options: Any) -> Shapes:
        """As in peft, which keeps a convolution's B as a 1×1 convolution."""
        return {"lora_A.weight": (rank, *weight[1:]), "lora_B.weight": (weight[0], rank, *[1] * len(weight[2:]))}

    def stored(self) -> Mapping[str, Tensor]:
        """A and B."""
        return stored_factors(*self.factors())

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        """A and B."""
        self.set_factors(stored["lora_A.weight"], stored["lora_B.weight"].flatten(1))

    def set_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Write numbers into the factors."""
        with torch.no_grad():
            self.lora_A.copy_(lora_A.view_as(self.lora_A))
            self.lora_B.copy_(lora_B)

    def replace_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Put other factors, of any rank, in the place of all that there are; may be run twice."""
        for name, new in (("lora_A", lora_A), ("lora_B", lora_B)):
            now = self.get_parameter(name)
            if now is not new:
                setattr(self, name, nn.Parameter(new.to(now.dtype), requires_grad=now.requires_grad))
        self.rank = len(lora_A)


def stored_factors(lora_A: Tensor, lora_B: Tensor) -> dict[str, Tensor]:
    """A ``(rank, ...)`` and B ``(C_out, rank)`` as a file holds them."""
    return {"lora_A.weight": lora_A, "lora_B.weight": lora_B.view(*lora_B.shape, *[1] * (lora_A.ndim - 2))}


class AnchoredLoRA(LoRA):
    """W + scaling · (B @ A − B0 @ A0): zero at the start whatever A and B are, and the base is untouched.

    For PiSSA and OLoRA, which begin with factors whose product is not zero, and take it away from the base's weight in
    the papers. This is the same function of the same trained numbers.

    Attributes:
        lora_A0, lora_B0: the frozen factors that A and B began as.
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
        """A0 and B0."""
        return {f"{name}0": shape for name, shape in cls.shapes(weight, rank).items()}

    def begin(self) -> None:
        """As LoRA, until :meth:`set_factors`."""
        super().begin()
        self.lora_A0.copy_(self.lora_A.detach())

    def is_fresh(self) -> bool:
        """Whether A and B are as they began."""
        return torch.equal(self.lora_A, self.lora_A0) and torch.equal(self.lora_B, self.lora_B0)

    def factors(self) -> Factors:
        """Of twice the rank: (B − B0) @ A + B0 @ (A − A0), which is exactly zero at the start."""
        A, B = super().factors()
        return torch.cat([A, A - self.lora_A0]), torch.cat([B - self.lora_B0, self.lora_B0], dim=1)

    @classmethod
    def stored_shapes(cls, weight: Shape, rank: int, **options: Any) -> Shapes:
        """Those of the change that it is, of twice the rank."""
        return super().stored_shapes(weight, 2 * rank)

    def stored(self) -> Mapping[str, Tensor]:
        """[A; A0] and [B, −B0], which hold all bits of the four."""
        A, B = super().factors()
        return stored_factors(torch.cat([A, self.lora_A0]), torch.cat([B, -self.lora_B0], dim=1))

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        """All four."""
        A, B = stored["lora_A.weight"], stored["lora_B.weight"].flatten(1)
        self.lora_A0.copy_(A[self.rank :])
        self.lora_B0.copy_(-B[:, self.rank :])
        super().set_factors(A[: self.rank], B[:, : self.rank])

    def set_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Begin as these."""
        super().set_factors(lora_A, lora_B)
        self.lora_A0.copy_(self.lora_A.detach())
        self.lora_B0.copy_(self.lora_B.detach())

    def replace_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """As in LoRA, which it is from then on."""
        super().replace_factors(lora_A, lora_B)
        self._buffers.clear()
        self.names = ("lora_A", "lora_B")
        self.__class__ = LoRA  # type: ignore[assignment]
