"""HiRA: a low-rank matrix scales the weight elementwise.

Huang et al., "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models", ICLR 2025
(https://openreview.net/forum?id=TwJrTz9cRS).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._layer.change import Change, Shape, Shapes


class HiRA(Change):
    """W ⊙ (1 + B A): where W is zero it stays zero, and the change has up to the rank of W times that of B A.

    Attributes:
        hira_A: ``(rank, C_in / groups, kH, kW)``, or ``(rank, in_features)``.
        hira_B: ``(C_out, rank, 1, 1)``, or ``(out_features, rank)``; zero at the start.
    """

    method = "hira"
    formula = "W ⊙ (1 + B A)"
    fresh = "hira_B is zero"
    fast: ClassVar[tuple[str, ...]] = ("hira_B",)
    has_alpha = False
    hira_A: Tensor
    hira_B: Tensor

    @classmethod
    def shapes(cls, weight: Shape, rank: int, **options: Any) -> Shapes:
        """Return the shapes of A and B."""
        return {"hira_A": (rank, *weight[1:]), "hira_B": (weight[0], rank, *[1] * len(weight[2:]))}

    def begin(self) -> None:
        """Initialise A uniformly from -1 to 1, larger than LoRA's, since W multiplies it; B stays zero."""
        nn.init.uniform_(self.hira_A, -1, 1)

    def is_fresh(self) -> bool:
        """Return whether A or B is still zero."""
        return not (self.hira_A.any() and self.hira_B.any())

    def changed(self, weight: Tensor) -> Tensor:
        """Compute W + W ⊙ B A in one step."""
        product = self.hira_B.flatten(1) @ self.hira_A.flatten(1)
        return torch.addcmul(weight, weight, product.view(self.weight_shape))
