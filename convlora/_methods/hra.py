"""HRA: Householder reflections.

Yuan et al., "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation", 2024
(arXiv:2405.17484). Several reflections as one change of low rank: Bischof and Van Loan, "The WY Representation for
Products of Householder Matrices", 1987.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._layer.change import Change, Shape, Shapes
from .._layer.functional import Factors, no_autocast
from ..errors import TargetError


class HRA(Change):
    """W · H, H = H₁ H₂ … of ``rank`` reflections H_j = I − 2 u_j u_jᵀ / ‖u_j‖²: each output channel's kernel is turned.

    W is read as the matrix ``(C_out, fan_in)``, in general ``(weight.shape[0], the rest)``.
    Reflections come in pairs that begin equal and undo each other. A pair of unit vectors u, v with d = v − u is

    .. math:: H_u H_v = I + 2 (u dᵀ − d vᵀ − ‖d‖² u vᵀ)

    so that nothing is added to W where d is zero: a fresh change is the base to the bit, not only to rounding. All
    pairs together are I + A N Bᵀ with ``rank`` columns each, and W A N and Bᵀ are trained as LoRA's factors are.

    An odd rank is lowered by one.

    Attributes:
        hra_u: u_j, ``(fan_in, rank)``, in general with as many rows as the matrix has columns. Only
            their directions count. Equal in pairs at the start.
    """

    method = "hra"
    formula = "W H, H a product of reflections"
    fresh = "pair of reflections is equal"
    ranks = "reflections come in pairs"
    has_alpha = False
    hra_u: Tensor

    @classmethod
    def rank_at(cls, weight: Shape, rank: int, **options: Any) -> int:
        """Return the largest even rank up to this one."""
        return rank - rank % 2

    @classmethod
    def shapes(cls, weight: Shape, rank: int, **options: Any) -> Shapes:
        """Return the shape of the vectors."""
        if rank % 2:
            raise TargetError(f"rank={rank}: {cls.ranks}, since an odd number of them never is the identity.")
        return {"hra_u": (math.prod(weight[1:]), rank)}

    def begin(self) -> None:
        """Initialise the vectors as the paper's code does, each one twice."""
        first = self.hra_u.detach()[:, ::2]
        drawn = nn.init.kaiming_uniform_(torch.empty_like(first, memory_format=torch.contiguous_format), a=math.sqrt(5))
        self.hra_u.detach().copy_(drawn.repeat_interleave(2, dim=1))

    def is_fresh(self) -> bool:
        """Return whether the vectors of each pair are still equal."""
        return torch.equal(self.hra_u[:, ::2], self.hra_u[:, 1::2])

    def changed(self, weight: Tensor) -> Tensor:
        """Compute W H in one fused product and sum."""
        A, B = self._factors(weight)
        return torch.addmm(weight.flatten(1), B, A.flatten(1)).view(weight.shape)

    def factors_at(self, base: Tensor) -> Factors:
        """Return Bᵀ ``(rank, ...)`` and W A N ``(C_out, rank)``."""
        with no_autocast(base.device.type):
            return self._factors(self._wide(base))

    def _factors(self, weight: Tensor) -> Factors:
        unit = F.normalize(self.hra_u, dim=0)
        u, v = unit[:, ::2], unit[:, 1::2]
        d = v - u
        # Columns of pair after pair: A has (2 u, −2 d), B has (d − ‖d‖² v, v).
        A = torch.stack([2 * u, -2 * d], 2).flatten(1)
        B = torch.stack([d - d.square().sum(0) * v, v], 2).flatten(1)
        # A later pair is multiplied with what the earlier ones add: N = (I − L)⁻¹, L = Bᵀ A above the pairs' blocks.
        pair = torch.arange(self.rank, device=u.device) // 2
        L = torch.where(pair[:, None] < pair, B.T @ A, 0)
        one = torch.eye(self.rank, dtype=L.dtype, device=L.device)
        WA = weight.flatten(1) @ A
        return B.T.reshape(self.rank, *weight.shape[1:]), torch.linalg.solve_triangular(
            one - L, WA, upper=True, left=False
        )
