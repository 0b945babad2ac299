"""What adapted layers and batch norms compute where the samples of a batch go to several adapters.

A plain convolution computes the base for all samples at once and adds each sample's branch, as one convolution with a
group for each sample; a grouped one runs once with a weight for each sample; where there are few adapters and many
positions, it is cheaper to take the adapters one after another, each with its W + ΔW, and so does every layer whose
forward is its own. A batch norm takes each sample's channels for channels of their own.

Batched low-rank branches for many adapters: Wen and Chaudhuri, "Batched Low-Rank Adaptation of Foundation Models",
2024 (arXiv:2312.05677).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from .change import Change
from .compiler import uncompiled
from .convolution import conv, is_pointwise, sampled
from .fast import is_batch, is_plain, prepare, sizes_of
from .functional import Factors, Geometry, autocasts, is_transformed, no_autocast
from .mix import Mix
from .paths import branch_wins
from .routing import Kind, Owner, Route


@uncompiled
def layer_forward(layer: nn.Module, base: type[nn.Module], adapters: Any, route: Route, args: Any, kwargs: Any) -> Any:
    """An adapted layer's forward, each sample with its own adapter's factors.

    Args:
        layer: the layer, of the base class ``base``.
        adapters: what it holds of them (``adapted.LayerAdapters``); samples of others go through the base alone.
        route: of this layer.
        args, kwargs: what the layer was called with.
    """
    route.check(layer)
    kinds = route.kinds(lambda owner: (adapters.told(owner), *route.own(layer, owner)))
    if len(kinds) > 1 and len(args) == 1 and not kwargs and not route.block.places[layer]:
        way = _fast_way(layer, base, args[0])
        if way is not None:
            route.check(layer, args[0].shape[0])
            route.doubt(layer, args[0])
            y = way(layer, args[0], Mixture([adapters.of(kind.owner) for kind in kinds], kinds))
            if y is not None:
                return y

    def alone(owner: Owner, *args: Any, **kwargs: Any) -> Any:
        return route.run_with(layer, owner, base.forward, *args, **kwargs)

    return route.split(layer, alone, kinds, args, kwargs)


@dataclass(frozen=True)
class Mixture:
    """What a batch needs of a layer's adapters: the change of each kind of samples, None for the base alone."""

    changes: list[Change | Mix | None]
    kinds: list[Kind]

    @cached_property
    def pairs(self) -> list[Factors] | None:
        """A and scaling · B of each kind; None where a change is no branch beside the base, as with DoRA."""
        there: list[Factors | None] = []
        for change in self.changes:
            pair = None if change is None or change.use_dora else change.factors()
            if change is not None and pair is None:
                return None
            there.append(pair and (pair[0], cast("Change | Mix", change).scaling * pair[1]))
        one_A, one_B = next(pair for pair in there if pair is not None)
        none = torch.zeros_like(one_A[:0]), torch.zeros_like(one_B[:, :0])
        return [pair or none for pair in there]

    @property
    def is_scattered(self) -> bool:
        """Whether some samples of one kind do not lie side by side."""
        return not all(kind.is_run for kind in self.kinds)

    def factors_of_samples(self, like: Tensor) -> Factors:
        """A ``(N, rank, …)`` and scaling · B ``(N, C_out, rank)`` of each sample; zeros beyond its own rank."""
        pairs = cast("list[Factors]", self.pairs)
        rank = _highest_rank(pairs)
        stacked_A = torch.stack([_filled(a, rank) for a, _ in pairs]).to(like.dtype)
        stacked_B = torch.stack([_filled(b.T, rank).T for _, b in pairs]).to(like.dtype)
        return self.each(stacked_A), self.each(stacked_B)

    def weights(self, base: Tensor) -> Tensor:
        """The weight of each sample, ``(N, *base.shape)``."""
        return self.each(torch.stack([base if c is None else c.effective_weight(base) for c in self.changes]))

    def each(self, of_kinds: Tensor) -> Tensor:
        """From one entry for each kind to one for each sample."""
        return per_sample(of_kinds, self.kinds)


def _highest_rank(pairs: list[Factors]) -> int:
    """Of several factors."""
    return max(len(a) for a, _ in pairs)


def per_sample(of_kinds: Tensor, kinds: list[Kind]) -> Tensor:
    """From one entry for each kind to one for each sample, in the batch's order."""
    kind_of = {row: index for index, kind in enumerate(kinds) for row in kind.rows}
    return of_kinds.index_select(0, torch.tensor([kind_of[row] for row in range(len(kind_of))], device=of_kinds.device))


def _filled(rows: Tensor, count: int) -> Tensor:
    """As many rows as asked for, the further ones zero."""
    missing = count - len(rows)
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows


Way = Callable[[Any, Tensor, Mixture], "Tensor | None"]


def _fast_way(layer: nn.Module, base: Any, x: Any) -> Way | None:
    weight = layer._parameters.get("weight")
    if weight is None or not isinstance(x, Tensor) or not x.numel() or is_transformed():
        return None
    if base.forward is nn.Linear.forward and x.ndim > 1:
        return _linear
    if is_plain(layer, base) and is_batch(cast(_ConvNd, layer), x, weight):
        return _convolution
    return None


def _convolution(layer: _ConvNd, x: Tensor, mixture: Mixture) -> Tensor | None:
    """A plain convolution; None where it is cheaper to take the adapters one after another."""
    weight = cast(Tensor, layer._parameters["weight"])
    dtype = torch.get_autocast_dtype(x.device.type) if autocasts(x.device.type) else weight.dtype
    prepared = prepare(layer, x, dtype)
    if prepared is None:
        return None
    x, geometry = prepared
    if layer.groups == 1:
        if mixture.pairs is None:
            return None
        sizes = sizes_of(layer, x, geometry, _highest_rank(mixture.pairs))
        if not branch_wins(sizes, len(mixture.kinds), mixture.is_scattered):
            return None
    with no_autocast(x.device.type):
        if layer.groups > 1:
            return _conv_each(x, mixture.weights(weight).to(dtype), layer.bias, geometry)
        A, B = mixture.factors_of_samples(x)
        y = conv(x, weight.to(dtype), layer.bias, geometry)
        if is_pointwise(A.shape[3:], geometry):
            h = torch.bmm(A.flatten(2), sampled(x, geometry.stride).flatten(2))
        else:
            h = _conv_each(x, A, None, geometry).flatten(2)
        if y.is_contiguous():
            y.flatten(2).baddbmm_(B, h)
            return y
        return y.add_(torch.bmm(B, h).view(y.shape))


def _conv_each(x: Tensor, weights: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """A convolution with a kernel of its own for each sample: one with the samples side by side as groups.

    Args:
        x: ``(N, C_in, *spatial)``.
        weights: ``(N, C_out, C_in / groups, *kernel)``.
        bias: ``(C_out,)``, the same for all.
        geometry: of each.
    """
    n = x.shape[0]
    side_by_side = x.reshape(1, -1, *x.shape[2:])
    biases = None if bias is None else bias.repeat(n)
    y = conv(side_by_side, weights.flatten(0, 1), biases, geometry._replace(groups=n * geometry.groups))
    return y.view(n, -1, *y.shape[2:])


def _linear(layer: nn.Module, x: Tensor, mixture: Mixture) -> Tensor | None:
    if mixture.pairs is None:
        return None
    weight = cast(Tensor, layer._parameters["weight"])
    y = F.linear(x, weight, cast("Tensor | None", layer.bias))
    with no_autocast(x.device.type):
        A, B = mixture.factors_of_samples(y)
        h = x.to(y.dtype).reshape(len(x), -1, x.shape[-1]) @ A.transpose(1, 2)
        return y + (h @ B.transpose(1, 2)).view(y.shape)


def batch_norm(norm: nn.Module, route: Route, x: Tensor) -> Tensor:
    """torch's batch norm in eval mode, each sample with its own adapter's statistics, scale and shift.

    Args:
        norm: the layer.
        route: of this layer.
        x: ``(N, C, *spatial)`` or ``(N, C)``.
    """
    kinds = route.kinds(lambda owner: owner)
    tensors = [[route.tensor(norm, name, kind.owner) for kind in kinds] for name in BATCH_NORM]
    eps = cast(float, norm.eps)
    if len(kinds) == 1:
        mean, var, weight, bias = (each[0] for each in tensors)
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)
    route.check(norm, x.shape[0])
    mean, var, weight, bias = (_side_by_side(each, kinds) for each in tensors)
    y = F.batch_norm(x.reshape(1, -1, *x.shape[2:]), mean, var, weight, bias, training=False, eps=eps)
    return y.view(x.shape)


BATCH_NORM = ("running_mean", "running_var", "weight", "bias")


def _side_by_side(of_kinds: list[Tensor | None], kinds: list[Kind]) -> Tensor | None:
    """``(N · C,)``; None where no kind has one."""
    there = [tensor for tensor in of_kinds if tensor is not None]
    return per_sample(torch.stack(there), kinds).flatten() if there else None
