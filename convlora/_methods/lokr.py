"""LoKr: the Kronecker product of two small matrices.

Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", 2023
(arXiv:2309.14859); Edalati et al., "KronA: Parameter Efficient Tuning with Kronecker Adapter", 2022 (arXiv:2212.10650).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from .._layer.change import Change, Option, Shape, Shapes
from ..errors import TargetError

MOST_ROWS = 2**12
"""The largest divisor that is tried: enough for 16 million channels."""


def split(size: int, factor: int = -1) -> int:
    """Into how many blocks so many channels are split: ``factor`` where it divides them, else the largest divisor
    up to it that is no larger than the square root.

    >>> split(64), split(96), split(96, 4), split(3, 4)
    (8, 8, 4, 1)
    """
    if factor > 0 and size % factor == 0:
        return factor
    most = min(math.isqrt(size), MOST_ROWS, factor if factor > 0 else MOST_ROWS)
    return next(n for n in range(most, 0, -1) if size % n == 0)


class LoKr(Change):
    """W + scaling · (W₁ ⊗ W₂): W₂, a small kernel, stands in each block, scaled by the number of W₁ for that block.

    W₁ is ``(rows, columns)`` and W₂ ``(C_out / rows, C_in / groups / columns, kH, kW)``. W₂ is a product of two factors
    of the rank, or of three with ``tucker``, where the rank is below half of its larger side, as in peft and LyCORIS,
    and the product has fewer numbers.

    Options:
        factor: into how many blocks C_out and C_in / groups are split; -1 splits both near their square roots.
        rows, columns: the blocks themselves, in the place of ``factor``; 0 leaves it to that.
        decompose_both: W₁ is such a product, too.
        full: W₂ is kept in full, whatever the rank.
        tucker: for kernels larger than 1×1 the product leaves the kernel unflattened.

    Attributes:
        lokr_w1: W₁, or ``lokr_w1_a`` ``(rows, rank)`` and ``lokr_w1_b`` ``(rank, columns)``.
        lokr_w2: W₂, or with c and d for its first two dimensions ``lokr_w2_a`` ``(c, rank)`` and ``lokr_w2_b``
            ``(rank, d · kH · kW)``; with ``tucker`` ``lokr_t2`` ``(rank, rank, kH, kW)``, ``lokr_w2_a`` ``(rank, c)``
            and ``lokr_w2_b`` ``(rank, d)``. W₂ is zero at the start.
    """

    method = "lokr"
    formula = "W + scaling · (W₁ ⊗ W₂)"
    fresh = "lokr_w2 is zero"
    defaults: ClassVar[Mapping[str, Option]] = {
        **{"factor": -1, "rows": 0, "columns": 0},
        **{"decompose_both": False, "full": False, "tucker": False},
    }

    @classmethod
    def shapes(
        cls,
        weight: Shape,
        rank: int,
        *,
        factor: int = -1,
        rows: int = 0,
        columns: int = 0,
        decompose_both: bool = False,
        full: bool = False,
        tucker: bool = False,
        **options: Any,
    ) -> Shapes:
        """Return the shapes of W₁ and W₂, each in full or as factors."""
        a, b, c, d = cls.blocks_of(weight, factor, rows, columns)
        kernel = weight[2:]
        first: Shapes = {"lokr_w1_a": (a, rank), "lokr_w1_b": (rank, b)} if decompose_both else {}
        second: Shapes = {"lokr_w2_a": (c, rank), "lokr_w2_b": (rank, d * math.prod(kernel))}
        if tucker and math.prod(kernel) > 1:
            second = {"lokr_t2": (rank, rank, *kernel), "lokr_w2_a": (rank, c), "lokr_w2_b": (rank, d)}
        second = {} if full else second
        return _least("lokr_w1", (a, b), first, rank) | _least("lokr_w2", (c, d, *kernel), second, rank)

    @classmethod
    def blocks_of(
        cls, weight: Shape, factor: int = -1, rows: int = 0, columns: int = 0, **options: Any
    ) -> tuple[int, int, int, int]:
        """Rows and columns of W₁, then of W₂, whose products are C_out and C_in / groups.

        Raises:
            TargetError: an option is no number of blocks for this weight.
        """
        if factor != -1 and factor < 1:
            raise TargetError(f"factor={factor} of method='lokr'; it must be -1 or at least 1.")
        for name, size, asked in (("rows", weight[0], rows), ("columns", weight[1], columns)):
            if asked < 0 or (asked and size % asked):
                raise TargetError(f"{name}={asked} of method='lokr' does not divide {size} of weight {tuple(weight)}.")
        a, b = rows or split(weight[0], factor), columns or split(weight[1], factor)
        return a, b, weight[0] // a, weight[1] // b

    def begin(self) -> None:
        """Initialise all but W₂, which stays zero, so that a first step changes W as much as LoRA's does."""
        std = {"lokr_w1": math.sqrt(self.rank / (3 * math.prod(self.weight_shape[1:])))}
        std["lokr_w1_b"] = std["lokr_w1"]
        for name in self.names:
            if name not in ("lokr_w2", "lokr_w2_b"):
                nn.init.normal_(getattr(self, name), std=std.get(name, self.rank**-0.5))

    def is_fresh(self) -> bool:
        """Return whether one of the tensors is still zero."""
        return not all(getattr(self, name).any() for name in self.names)

    def changed(self, weight: Tensor) -> Tensor:
        """Compute W plus the scaled product in one step, without forming W₁ ⊗ W₂."""
        rows, columns, inner, _ = self.blocks_of(self.weight_shape, **cast(Any, self.options))
        first = self._whole("lokr_w1").reshape(rows, 1, columns, 1)
        second = self._whole("lokr_w2").reshape(1, inner, 1, -1)
        split_up = weight.reshape(rows, inner, columns, -1)
        return torch.addcmul(split_up, first, second, value=self.scaling).reshape(self.weight_shape)

    def _whole(self, name: str) -> Tensor:
        if name in self.names:
            return cast(Tensor, getattr(self, name))
        A, B, core = getattr(self, f"{name}_a"), getattr(self, f"{name}_b"), getattr(self, "lokr_t2", None)
        return A @ B if core is None or name == "lokr_w1" else torch.einsum("pq...,pc,qd->cd...", core, A, B)


def _least(name: str, shape: Shape, factored: Shapes, rank: int) -> Shapes:
    """The tensor in full or its factors; never the factors where they hold as many numbers."""
    is_less = factored and 2 * rank < max(shape[:2]) and sum(map(math.prod, factored.values())) < math.prod(shape)
    return factored if is_less else {name: shape}
