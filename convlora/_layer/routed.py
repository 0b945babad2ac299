"""The forwards of adapted layers and batch norms for a batch whose samples use several adapters.

A plain convolution computes the base for all samples at once and adds each sample's branch, as one convolution with a
group for each sample. A grouped convolution runs once with a weight for each sample. With few adapters and many
positions it is cheaper to run the adapters one after another, each with its W + ΔW; layers with a custom forward always
do that. A batch norm folds the samples into the channel dimension.

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
from .routing import Owner, Route, SampleGroup


@uncompiled
def layer_forward(layer: nn.Module, base: type[nn.Module], adapters: Any, route: Route, args: Any, kwargs: Any) -> Any:
    """Compute an adapted layer's forward, each sample with its own adapter.

    Args:
        layer: the layer, of the base class ``base``.
        adapters: what it holds of them (``LayerAdapters``); samples of adapters that it lacks use the base's weight.
        route: of this layer.
        args, kwargs: what the layer was called with.
    """
    route.check(layer)
    sample_groups = route.sample_groups(lambda owner: (adapters.change_key(owner), *route.tensors_key(layer, owner)))
    if len(sample_groups) > 1 and len(args) == 1 and not kwargs and not route.block.places[layer]:
        batched = _batched_forward(layer, base, args[0])
        if batched is not None:
            route.check(layer, args[0].shape[0])
            route.note_ambiguous(layer, args[0])
            y = batched(layer, args[0], Mixture([adapters.of(group.owner) for group in sample_groups], sample_groups))
            if y is not None:
                return y

    def alone(owner: Owner, *args: Any, **kwargs: Any) -> Any:
        return route.run_as(layer, owner, base.forward, *args, **kwargs)

    return route.split(layer, alone, sample_groups, args, kwargs)


@dataclass(frozen=True)
class Mixture:
    """The groups of a batch's samples and the layer's change for each group; None for the base's weight."""

    changes: list[Change | Mix | None]
    sample_groups: list[SampleGroup]

    @cached_property
    def pairs(self) -> list[Factors] | None:
        """A and scaling · B of each group; None if a change cannot be computed as a branch, as with DoRA."""
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
        """Whether the samples of some group are not consecutive."""
        return not all(group.is_contiguous for group in self.sample_groups)

    def factors_of_samples(self, like: Tensor) -> Factors:
        """Stack A to ``(N, rank, …)`` and scaling · B to ``(N, C_out, rank)``, zero-padded to the highest rank."""
        pairs = cast("list[Factors]", self.pairs)
        rank = _highest_rank(pairs)
        stacked_A = torch.stack([_filled(a, rank) for a, _ in pairs]).to(like.dtype)
        stacked_B = torch.stack([_filled(b.T, rank).T for _, b in pairs]).to(like.dtype)
        return self.each(stacked_A), self.each(stacked_B)

    def weights(self, base: Tensor) -> Tensor:
        """Stack the effective weights of all samples: ``(N, *base.shape)``."""
        return self.each(torch.stack([base if c is None else c.effective_weight(base) for c in self.changes]))

    def each(self, of_groups: Tensor) -> Tensor:
        """As :func:`per_sample`."""
        return per_sample(of_groups, self.sample_groups)


def _highest_rank(pairs: list[Factors]) -> int:
    """Return the highest rank among these factors."""
    return max(len(a) for a, _ in pairs)


def per_sample(of_groups: Tensor, sample_groups: list[SampleGroup]) -> Tensor:
    """Expand a tensor with one entry per group to one entry per sample, in the batch's order."""
    group_of = {row: index for index, group in enumerate(sample_groups) for row in group.rows}
    return of_groups.index_select(
        0, torch.tensor([group_of[row] for row in range(len(group_of))], device=of_groups.device)
    )


def _filled(rows: Tensor, count: int) -> Tensor:
    """Pad with zero rows up to ``count`` rows."""
    missing = count - len(rows)
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows


BatchedForward = Callable[[Any, Tensor, Mixture], "Tensor | None"]


def _batched_forward(layer: nn.Module, base: Any, x: Any) -> BatchedForward | None:
    weight = layer._parameters.get("weight")
    if weight is None or not isinstance(x, Tensor) or not x.numel() or is_transformed():
        return None
    if base.forward is nn.Linear.forward and x.ndim > 1:
        return _linear
    if is_plain(layer, base) and is_batch(cast(_ConvNd, layer), x, weight):
        return _convolution
    return None


def _convolution(layer: _ConvNd, x: Tensor, mixture: Mixture) -> Tensor | None:
    """Compute a plain convolution for all samples at once; None if running the adapters in turn is cheaper."""
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
        if not branch_wins(sizes, len(mixture.sample_groups), mixture.is_scattered):
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
    """Convolve each sample with its own kernel: one grouped convolution, with the samples as groups.

    Args:
        x: ``(N, C_in, *spatial)``.
        weights: ``(N, C_out, C_in / groups, *kernel)``.
        bias: ``(C_out,)``, the same for all.
        geometry: of the layer.
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
    """Compute torch's batch norm in eval mode, each sample with its own adapter's statistics, scale and shift.

    Args:
        norm: the layer.
        route: of this layer.
        x: ``(N, C, *spatial)`` or ``(N, C)``.
    """
    sample_groups = route.sample_groups(lambda owner: owner)
    tensors = [[route.tensor(norm, name, group.owner) for group in sample_groups] for name in BATCH_NORM]
    eps = cast(float, norm.eps)
    if len(sample_groups) == 1:
        mean, var, weight, bias = (each[0] for each in tensors)
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)
    route.check(norm, x.shape[0])
    mean, var, weight, bias = (_side_by_side(each, sample_groups) for each in tensors)
    y = F.batch_norm(x.reshape(1, -1, *x.shape[2:]), mean, var, weight, bias, training=False, eps=eps)
    return y.view(x.shape)


BATCH_NORM = ("running_mean", "running_var", "weight", "bias")


def _side_by_side(of_groups: list[Tensor | None], sample_groups: list[SampleGroup]) -> Tensor | None:
    """Expand the groups' tensors ``(C,)`` to ``(N · C,)``; None if no group has one."""
    there = [tensor for tensor in of_groups if tensor is not None]
    return per_sample(torch.stack(there), sample_groups).flatten() if there else None
