"""Dense: the whole difference of the weight is trained, for layers too small to factor.

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
    """W + D, with as many parameters as the layer.

    D can be written as a product of two factors, one of which is the identity. So every function that needs factors
    works here too, and a file, which contains both, is read as LoRA by stock peft.

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
        """Return the shape of D."""
        return {"diff": weight}

    def begin(self) -> None:
        """Do nothing: D is zero."""

    def is_fresh(self) -> bool:
        """Return whether D is still zero."""
        return not self.diff.any()

    def changed(self, weight: Tensor) -> Tensor:
        """Compute W + D."""
        return weight + self.diff

    def factors(self) -> Factors:
        """Return D and an identity, on the side where the identity is smaller."""
        self.run_hooks()
        return _factors(self.diff)

    @classmethod
    def stored_shapes(cls, weight: Shape, rank: int, **options: Any) -> Shapes:
        """Return LoRA's shapes at the weight's full rank."""
        return LoRA.stored_shapes(weight, min(weight[0], math.prod(weight[1:])))

    def stored(self) -> Mapping[str, Tensor]:
        """Return D as factors."""
        return self.stored_as(self.diff)

    @staticmethod
    def stored_as(diff: Tensor) -> dict[str, Tensor]:
        """Return what a file contains for this D."""
        return stored_factors(*_factors(diff))

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        """Load D from the factor that is not the identity."""
        A, B = stored["lora_A.weight"], stored["lora_B.weight"]
        self.diff.copy_(A if B.shape[0] == A.shape[0] else B.flatten(1).view_as(self.diff))


def _factors(diff: Tensor) -> Factors:
    rows, columns = diff.shape[0], diff[0].numel()
    one = torch.eye(min(rows, columns), dtype=diff.dtype, device=diff.device)
    if rows <= columns:
        return diff, one
    return one.view(columns, *diff.shape[1:]), diff.flatten(1)
