"""The best approximation of a change by a lower rank, by singular value decomposition; on plain tensors.

A change ΔW is read as the matrix ``(C_out, fan_in)``. The first r singular values and vectors are the nearest matrix of
rank r in the Frobenius norm (Eckart and Young, 1936).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .functional import Factors, largest_rank


@dataclass(frozen=True)
class Spectrum:
    """A change ΔW = U · diag(S) · V, its singular values in falling order.

    Attributes:
        U: ``(C_out, k)``.
        S: ``(k,)``.
        V: ``(k, fan_in)``.
        shape: of the weight.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    shape: tuple[int, ...]

    @classmethod
    def of(cls, delta: Tensor) -> Spectrum:
        """Decompose a dense change, shaped like the weight."""
        matrix = delta.detach().flatten(1)
        matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        if matrix.shape[1] > 2 * matrix.shape[0]:  # wide: decomposing the triangular factor is faster
            Q, R = torch.linalg.qr(matrix.T)
            U, S, V = torch.linalg.svd(R.T, full_matrices=False)
            return cls(U, S, V @ Q.T, tuple(delta.shape))
        U, S, V = torch.linalg.svd(matrix, full_matrices=False)
        return cls(U, S, V, tuple(delta.shape))

    @classmethod
    def of_sum(cls, factors: Sequence[tuple[Tensor, Tensor, float]]) -> Spectrum:
        """Decompose Σ factor · B @ A, given as ``(A, B, factor)``, in double precision, without the dense matrix.

        Both stacks of factors are orthogonalised, and the small core between them is decomposed.
        """
        A = torch.cat([a.detach().double().flatten(1) for a, _, _ in factors])
        B = torch.cat([factor * b.detach().double() for _, b, factor in factors], dim=1)
        Q, R = torch.linalg.qr(B)
        Q_A, R_A = torch.linalg.qr(A.T)
        U, S, V = torch.linalg.svd(R @ R_A.T, full_matrices=False)
        shape = (B.shape[0], *factors[0][0].shape[1:])
        return cls(Q @ U, S, V @ Q_A.T, shape)

    @property
    def size(self) -> float:
        """‖ΔW‖, the Frobenius norm."""
        return float(torch.linalg.vector_norm(self.S))

    def lost(self, rank: int) -> float:
        """Return ‖ΔW − ΔW_r‖, the error of the best approximation of this rank."""
        return float(torch.linalg.vector_norm(self.S[rank:]))

    def rank_for(self, tolerance: float) -> int:
        """Return the smallest rank, at least 1, whose error is at most ``tolerance`` · ‖ΔW‖."""
        tails = self.S.double().square().flip(0).cumsum(0).flip(0)  # tails[r]: lost² at rank r
        return max(1, int((tails > (tolerance * self.size) ** 2).sum()))

    def factors(self, rank: int, scaling: float) -> Factors:
        """Return A and B of this rank with scaling · B @ A nearest to ΔW; each gets the root of the singular values.

        If the change has a lower rank than asked for, the rest of A is random and the rest of B is zero, as in a fresh
        adapter, so that further training can use it.
        """
        there = min(rank, int((self.S[:1] * torch.finfo(self.S.dtype).eps < self.S).sum()))
        roots = (self.S[:there] / abs(scaling)).sqrt()
        A = torch.empty(rank, self.V.shape[1], dtype=self.V.dtype, device=self.V.device)
        B = torch.zeros(self.U.shape[0], rank, dtype=self.U.dtype, device=self.U.device)
        if there < rank:
            torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        A[:there] = roots[:, None] * self.V[:there]
        B[:, :there] = math.copysign(1.0, scaling) * self.U[:, :there] * roots
        return A.view(rank, *self.shape[1:]), B

    @property
    def room(self) -> int:
        """The largest rank that the layer should have: above it, A and B have more parameters than the layer."""
        return largest_rank(self.shape)


def tolerance_of(energy: float) -> float:
    """Return the relative error that remains if this share of ‖ΔW‖² is kept.

    >>> round(tolerance_of(0.99), 6)
    0.1
    """
    return math.sqrt(max(0.0, 1.0 - energy))
