"""OFT and BOFT: rotations of the weight's rows, which preserve their norms and the angles between them.

OFT: Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", 2023 (arXiv:2306.07280). BOFT: Liu et
al., "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", 2023 (arXiv:2311.06243). The series in the
place of an inverse: Qiu et al., "Orthogonal Finetuning Made Scalable", 2025 (arXiv:2506.19847).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from .._layer.change import Change, Option, Shape, Shapes
from .._layer.dora import scaled_weight
from ..errors import TargetError

MOST_TERMS = 100


class OFT(Change):
    """W · Rᵀ, R block-diagonal of rotations: each output channel's kernel is turned.

    W is read as the matrix ``(C_out, fan_in)``, in general ``(weight.shape[0], the rest)``. Each block
    of R, ``rank`` numbers wide, is the Cayley transform of a skew-symmetric Q, (I − Q)(I + Q)⁻¹. What is added to W is
    W (R − I)ᵀ with R − I = −2 Q (I + Q)⁻¹, which is exactly zero at the start.

    The rank is the largest divisor of the matrix's columns up to the one that is asked for, since all blocks are of one
    size; a layer whose columns have no divisor from 2 on is skipped, and the plan says so.

    With ``on_output`` R W: the columns, one number for each output channel, are turned instead, as in LyCORIS. With
    ``neumann`` R is I + 2 Q + 2 Q² + … + Qᵗ⁻¹, of so many terms t, as in peft by default. That comes near to the
    transpose of the above for small Q and is not orthogonal; 0 is the exact one.

    Attributes:
        oft_R: the upper triangle of each Q, row by row: ``(columns / rank, rank · (rank − 1) / 2)``. Zero at the start.
    """

    method = "oft"
    formula = "W Rᵀ, R block-diagonal and orthogonal"
    fresh = "oft_R is zero"
    ranks = "no block of such a size divides the layer's fan-in"
    has_alpha = False
    defaults: ClassVar[Mapping[str, Option]] = {"on_output": False, "neumann": 0}
    oft_R: Tensor

    @classmethod
    def rank_at(cls, weight: Shape, rank: int, *, on_output: bool = False, **options: Any) -> int:
        """Return the largest divisor, at least 2, of the number of columns; 0 if there is none."""
        size = _size(weight, on_output)
        return next((block for block in range(min(rank, size), 1, -1) if not size % block), 0)

    @classmethod
    def shapes(cls, weight: Shape, rank: int, *, on_output: bool = False, neumann: int = 0, **options: Any) -> Shapes:
        """Return the shape of the triangles."""
        if not 0 <= neumann <= MOST_TERMS:
            raise TargetError(f"neumann={neumann}; it must be from 0, which is exact, to {MOST_TERMS}.")
        return {"oft_R": _triangles(weight, rank, on_output)}

    def begin(self) -> None:
        """Do nothing: the triangles are zero."""

    def is_fresh(self) -> bool:
        """Return whether the triangles are still zero."""
        return not self.oft_R.any()

    def changed(self, weight: Tensor) -> Tensor:
        """Compute W Rᵀ as W plus W (R − I)ᵀ."""
        rows = self._rows(weight)
        return self._weight(rows + _turned(rows, self._turn(self.oft_R)), weight)

    def _rows(self, weight: Tensor) -> Tensor:
        """Return the matrix whose rows are rotated."""
        matrix = weight.flatten(1)
        return matrix.T if self.options["on_output"] else matrix

    def _weight(self, rows: Tensor, like: Tensor) -> Tensor:
        """Undo :meth:`_rows`."""
        return (rows.T if self.options["on_output"] else rows).reshape(like.shape)

    def _turn(self, triangles: Tensor) -> Tensor:
        """Compute R − I of each block: ``(blocks, rank, rank)``."""
        Q = _skew(triangles, self.rank)
        terms = int(self.options.get("neumann", 0))
        if not terms:
            one = torch.eye(self.rank, dtype=Q.dtype, device=Q.device)
            return cast(Tensor, torch.linalg.solve(one + Q, -2 * Q))
        power, turn = Q, 2 * Q if terms > 1 else 0 * Q
        for exponent in range(2, max(terms, 4) if terms > 2 else 2):  # peft's third term brings the fourth with it
            power = power @ Q
            turn = turn + (power if exponent == max(terms, 4) - 1 else 2 * power)
        return turn

    @classmethod
    def stored_shapes(cls, weight: Shape, rank: int, **options: Any) -> Shapes:
        """As in peft."""
        return {"oft_R.weight": cls.shapes(weight, rank, **options)["oft_R"]}

    def stored(self) -> Mapping[str, Tensor]:
        """The triangles."""
        return {"oft_R.weight": self.oft_R}

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        """The triangles."""
        self.oft_R.copy_(stored["oft_R.weight"])


class BOFT(OFT):
    """s · W · Rᵀ, R a product of sparse rotations, the butterfly's factors, and s a scale for each output channel.

    The factor i, counted from 0, turns blocks of ``rank`` numbers of which one half lies 2ⁱ · rank / 2 behind the
    other, so that with log₂(columns / rank) + 1 factors each number reaches every other. Where the columns do not allow
    as many ``factors`` as asked for, there are as many as they allow; with one it is OFT with a scale.

    Attributes:
        boft_R: the upper triangle of each skew-symmetric Q: ``(factors, columns / rank, rank · (rank − 1) / 2)``. Zero
            at the start. A file holds the whole Q, as in peft.
        boft_s: s, ``(1, C_out)``, or ``(out_features, 1)`` for a linear layer. One at the start.
    """

    method = "boft"
    formula = "s · W Rᵀ, R a product of sparse rotations, s for each output channel"
    fresh = "boft_R is zero and boft_s is one"
    by_channel = True
    defaults: ClassVar[Mapping[str, Option]] = {"on_output": False, "factors": 2}
    boft_R: Tensor
    boft_s: Tensor

    @classmethod
    def shapes(
        cls,
        weight: Shape,
        rank: int,
        *,
        on_output: bool = False,
        factors: int = 2,
        groups: int = 1,
        transposed: bool = False,
        **options: Any,
    ) -> Shapes:
        """The triangles and the scale."""
        if factors < 1:
            raise TargetError(f"factors={factors}; a butterfly has at least one.")
        triangles, size, there = _triangles(weight, rank, on_output), _size(weight, on_output), 1
        while there < factors and not rank % 2 and not size % (rank << there):
            there += 1
        channels = weight[1] * groups if transposed else weight[0]
        return {"boft_R": (there, *triangles), "boft_s": (1, channels) if len(weight) > 2 else (channels, 1)}

    def begin(self) -> None:
        """Triangles of zeros, a scale of one."""
        nn.init.ones_(self.boft_s)

    def is_fresh(self) -> bool:
        """Whether they are so still."""
        return not self.boft_R.any() and bool((self.boft_s == 1).all())

    def changed(self, weight: Tensor) -> Tensor:
        """W turned by one factor after another, then scaled."""
        rows, half = self._rows(weight), self.rank // 2
        for i, triangles in enumerate(self.boft_R.unbind()):
            turn = self._turn(triangles)
            if not i:
                rows = rows + _turned(rows, turn)
                continue
            near = rows.reshape(rows.shape[0], -1, 2, 2**i, half).transpose(2, 3)
            rows = rows + _turned(near.flatten(1), turn).view(near.shape).transpose(2, 3).reshape(rows.shape)
        return scaled_weight(self._weight(rows, weight), self.boft_s.flatten(), self.groups)

    @classmethod
    def stored_shapes(cls, weight: Shape, rank: int, **options: Any) -> Shapes:
        """As in peft: each Q whole."""
        shapes = cls.shapes(weight, rank, **options)
        return shapes | {"boft_R": (*shapes["boft_R"][:2], rank, rank)}

    def stored(self) -> Mapping[str, Tensor]:
        """The whole of each Q, and the scale."""
        return {"boft_R": _skew(self.boft_R, self.rank), "boft_s": self.boft_s}

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        """The upper triangles of (R − Rᵀ) / 2, which is what peft turns by, and the scale."""
        R = stored["boft_R"]
        self.boft_R.copy_(((R - R.mT) / 2).flatten(2)[..., _upper(self.rank, R.device)])
        self.boft_s.copy_(stored["boft_s"])


def _size(weight: Shape, on_output: bool) -> int:
    return weight[0] if on_output else math.prod(weight[1:])


def _triangles(weight: Shape, rank: int, on_output: bool) -> Shape:
    size = _size(weight, on_output)
    if rank < 2 or size % rank:
        raise TargetError(f"rank={rank} divides {size}, the numbers to turn, into no blocks of 2 or more.")
    return (size // rank, rank * (rank - 1) // 2)


def _upper(size: int, device: torch.device) -> Tensor:
    """Places of a matrix's upper triangle, row by row, among all its numbers."""
    upper = torch.triu_indices(size, size, 1, device=device)
    return upper[0] * size + upper[1]


def _skew(triangles: Tensor, size: int) -> Tensor:
    """U − Uᵀ with these upper triangles: ``(..., size, size)``."""
    whole = triangles.new_zeros(*triangles.shape[:-1], size * size)
    upper = whole.index_copy(-1, _upper(size, triangles.device), triangles).view(*triangles.shape[:-1], size, size)
    return upper - upper.mT


def _turned(rows: Tensor, turn: Tensor) -> Tensor:
    """Each row's blocks times these matrices: ``(rows, blocks · size)``."""
    blocks = rows.reshape(rows.shape[0], turn.shape[0], -1)
    return torch.einsum("mkb,kcb->mkc", blocks, turn).flatten(1)
