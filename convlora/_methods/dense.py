"""The whole difference: what a layer too small to factor wants.

LyCORIS has it as ``algo="full"``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._layer.change import Change, Shape, Shapes
from .._layer.functional import Factors
from .lora import LoRA, stored_factors


class Dense(Change):
    """W + D, at the price of the layer itself.

    D is a product of factors one of which is the identity, so that all that goes through factors goes here, too. A file
    holds both: stock peft reads it as LoRA.

    Attributes:
        diff: D, shaped like the weight; zero at the start.
    """

    method = "dense"
    formula = "W + D"
    fresh = "diff is zero"
    has_rank = False
    has_alpha = False
    diff: Tensor

    @classmethod
    def shapes(cls, weight: Shape, rank: int, **options: Any) -> Shapes:
        """D."""
        return {"diff": weight}

    def begin(self) -> None:
        """Zero, as it is."""

    def is_fresh(self) -> bool:
        """Whether D is zero still."""
        return not self.diff.any()

    def changed(self, weight: Tensor) -> Tensor:
        """The sum."""
        return weight + self.diff

    def factors(self) -> Factors:
        """D and the identity, on the side where that is smaller."""
        self.run_hooks()
        return _factors(self.diff)

    @classmethod
    def stored_shapes(cls, weight: Shape, rank: int, **options: Any) -> Shapes:
        """Those of LoRA with the rank that the weight can have at most."""
        return LoRA.stored_shapes(weight, min(weight[0], math.prod(weight[1:])))

    def stored(self) -> Mapping[str, Tensor]:
        """D as factors."""
        return self.stored_as(self.diff)

    @staticmethod
    def stored_as(diff: Tensor) -> dict[str, Tensor]:
        """What a file holds of this D."""
        return stored_factors(*_factors(diff))

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        """D, from whichever factor holds it."""
        A, B = stored["lora_A.weight"], stored["lora_B.weight"]
        self.diff.copy_(A if B.shape[0] == A.shape[0] else B.flatten(1).view_as(self.diff))


def _factors(diff: Tensor) -> Factors:
    rows, columns = diff.shape[0], diff[0].numel()
    one = torch.eye(min(rows, columns), dtype=diff.dtype, device=diff.device)
    if rows <= columns:
        return diff, one
    return one.view(columns, *diff.shape[1:]), diff.flatten(1)
