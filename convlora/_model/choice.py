"""What one layer gets of what was asked for: its rank and alpha, or the reason why it is left alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from .._layer.adapted import AdaptedLayer
from .._layer.computed import weight_shape
from .._layer.functional import largest_rank, scaling_of
from .._layer.swap import check_swappable, original_class
from .._plan import ANCHORED, LayerPlan
from .checks import check_adaptable, check_any_conv, check_variant
from .options import Request, check_alpha, checked_rank
from .targets import ByPattern, Named, Targets, is_adaptable, is_conv2d, is_convolution, is_packed, select


class Choice:
    """What the user asks for, its patterns matched once against the model's adaptable layers."""

    def __init__(self, model: nn.Module, named: list[Named], inside_saved: set[nn.Module], request: Request) -> None:
        adaptable = [n for n in named if is_adaptable(n.module)]

        def matched(targets: Targets, argument: str) -> set[nn.Module]:
            return {n.module for n in select(adaptable, targets, argument, model)}

        if request.target_modules is None:
            check_any_conv(adaptable, model)
            self.targets = {n.module for n in adaptable if is_conv2d(n.module)}
        else:
            self.targets = matched(request.target_modules, "target_modules")
        self.request, self.inside_saved = request, inside_saved
        self.ranks, self.alphas = ByPattern(request.rank_pattern or {}), ByPattern(request.alpha_pattern or {})
        self.excluded = matched(request.exclude_modules, "exclude_modules")
        matched(self.ranks.patterns, "rank_pattern")
        matched(self.alphas.patterns, "alpha_pattern")
        # Every convolution is listed, so that none is missed in silence; linear layers where they were asked for.
        self.listed = [n for n in named if n.module in self.targets or _is_to_be_listed(n.module)]

    def layer(self, n: Named, rank: int) -> LayerPlan:
        """What one layer gets."""
        rank = checked_rank(self.ranks.of(n, rank), f"rank_pattern for {n.name}")
        return self.at(n, rank)

    def at(self, n: Named, rank: int) -> LayerPlan:
        """What one layer gets where this rank is asked for."""
        asked = self.request
        alpha = self.alphas.of(n, asked.alpha_at(rank))
        check_alpha(alpha, f"alpha_pattern for {n.name}")
        shape = weight_shape(n.module)
        note = self._reason_to_leave(n)
        kind = original_class(n.module).__name__
        planned = LayerPlan(n.name, kind, shape, 1, 1.0, geometry=geometry(n.module), use_dora=asked.use_dora)
        fitting = 0 if note else min(rank, largest_rank(shape, planned.magnitudes))
        if fitting:
            check_swappable(n.name, n.module, AdaptedLayer)
            check_adaptable(n, asked.dropout)
            check_variant(n, asked.beginning, asked.use_dora)
        if not note and fitting < rank:
            note = f"rank {rank} would outweigh the layer" if fitting else "even rank 1 would outweigh the layer"
            # A capped layer keeps the scaling that was asked for: the cap is ours, not a wish for a larger step.
            alpha *= self._scaling(rank) / self._scaling(max(fitting, 1))
        anchored = bool(fitting) and asked.beginning in ANCHORED
        return replace(planned, rank=fitting, alpha=float(alpha), note=note, anchored=anchored)

    def _scaling(self, rank: int) -> float:
        return scaling_of(1.0, rank, self.request.use_rslora)

    def _reason_to_leave(self, n: Named) -> str:
        if is_packed(n.module):
            return "its weight is packed (quantized)"
        if n.module in self.inside_saved:
            return "trained in full"
        if n.module in self.excluded:
            return "excluded"
        if n.module not in self.targets:
            return "not a target"
        if not weight_shape(n.module):
            return "it has no weight, or one computed in a way that is not torch's"
        return ""


def _is_to_be_listed(module: nn.Module) -> bool:
    packed = hasattr(module, "kernel_size") and is_packed(module)
    return is_convolution(module) or packed


def geometry(module: nn.Module) -> dict[str, Any]:
    """A convolution's stride, padding, dilation, groups and padding_mode as JSON data; empty for others."""
    if not is_convolution(module):
        return {}
    names = ("stride", "padding", "output_padding", "dilation", "groups", "padding_mode", "transposed")
    values = {name: getattr(module, name) for name in names if hasattr(module, name)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
