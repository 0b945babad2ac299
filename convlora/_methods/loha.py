"""LoHa: the elementwise product of two changes of low rank, whose rank is up to the square of theirs.

Hyeon-Woo et al., "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning", 2021
(arXiv:2108.06098); as adapters: Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model
Evaluation", 2023 (arXiv:2309.14859).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._layer.change import Change, Option, Shape, Shapes


class LoHa(Change):
    """W + scaling · (A₁ B₁ ⊙ A₂ B₂).

    With ``tucker``, kernels larger than 1×1 take FedPara's proposition 3, which does not flatten the kernel:
    W + scaling · (T₁ ×₁ A₁ ×₂ B₁) ⊙ (T₂ ×₁ A₂ ×₂ B₂), where ×₁ and ×₂ multiply the core's first two dimensions.

    Attributes:
        hada_w1_a, hada_w2_a: A, ``(C_out, rank)``; with a core ``(rank, C_out)``.
        hada_w1_b, hada_w2_b: B, ``(rank, fan_in)``; with a core ``(rank, C_in / groups)``. B₂ is zero
            at the start.
        hada_t1, hada_t2: the cores, ``(rank, rank, kH, kW)``; for an ``nn.Conv1d`` ``(rank, rank, k, 1)``.
    """

    method = "loha"
    formula = "W + scaling · (A₁ B₁ ⊙ A₂ B₂)"
    fresh = "hada_w2_b is zero"
    defaults: ClassVar[Mapping[str, Option]] = {"tucker": False}
    hada_w1_a: Tensor
    hada_w1_b: Tensor
    hada_w2_a: Tensor
    hada_w2_b: Tensor
    hada_t1: Tensor
    hada_t2: Tensor

    @classmethod
    def shapes(cls, weight: Shape, rank: int, *, tucker: bool = False, **options: Any) -> Shapes:
        """Return the shapes of both pairs A and B, each after its core."""
        kernel = (*weight[2:], 1) if len(weight) == 3 else weight[2:]
        has_core = tucker and math.prod(kernel) > 1
        A = (rank, weight[0]) if has_core else (weight[0], rank)
        B = (rank, weight[1] if has_core else math.prod(weight[1:]))
        shapes: Shapes = {}
        for i in (1, 2):
            shapes |= {f"hada_t{i}": (rank, rank, *kernel)} if has_core else {}
            shapes |= {f"hada_w{i}_a": A, f"hada_w{i}_b": B}
        return shapes

    def begin(self) -> None:
        """Initialise all but B₂, which stays zero, so that a first step changes W as much as LoRA's does."""
        like_lora = 1 / math.sqrt(3 * math.prod(self.weight_shape[1:]))
        has_core = "hada_t1" in self.names
        nn.init.normal_(self.hada_w1_a, std=self.rank**-0.5)
        nn.init.normal_(self.hada_w2_a, std=self.rank**-0.5 if has_core else 1.0)
        nn.init.normal_(self.hada_w1_b, std=self.rank**-0.5 if has_core else like_lora)
        if has_core:
            nn.init.normal_(self.hada_t1, std=like_lora)
            nn.init.normal_(self.hada_t2)

    def is_fresh(self) -> bool:
        """Return whether one of the tensors is still zero."""
        return not all(getattr(self, name).any() for name in self.names)

    def changed(self, weight: Tensor) -> Tensor:
        """Compute W plus the scaled product in one step."""
        return torch.addcmul(weight, self._product(1), self._product(2), value=self.scaling)

    def _product(self, i: int) -> Tensor:
        A, B = getattr(self, f"hada_w{i}_a"), getattr(self, f"hada_w{i}_b")
        core = getattr(self, f"hada_t{i}", None)
        product = A @ B if core is None else torch.einsum("pq...,po,qi->oi...", core, A, B)
        return product.reshape(self.weight_shape)
