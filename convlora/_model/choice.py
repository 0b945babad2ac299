"""The choice for one layer: its method, rank and scaling, or the reason why it is skipped."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from typing import Any

from torch import nn

from .._layer.adapted import AdaptedLayer
from .._layer.change import Change, Option
from .._layer.computed import weight_shape
from .._layer.functional import scaling_of
from .._layer.swap import check_swappable, original_class
from .._methods.dense import Dense
from .._methods.registry import METHODS, method_for, named_methods
from .._plan import LayerPlan
from ..errors import TargetError
from .checks import check_adaptable, check_any_conv, check_variant
from .options import Request, check_alpha, check_among, checked_rank
from .state import injections
from .targets import (
    ByPattern,
    Named,
    Targets,
    is_adaptable,
    is_convolution,
    is_counting,
    is_packed,
    narrow_names,
    select,
)


class Choice:
    """A user's request whose patterns have been matched, once, against the model's adaptable layers."""

    def __init__(self, model: nn.Module, named: list[Named], inside_saved: set[nn.Module], request: Request) -> None:
        adaptable = [n for n in named if is_adaptable(n.module)]

        self.notes: list[str] = []

        def matched(targets: Targets, argument: str) -> set[nn.Module]:
            found = select(adaptable, targets, argument, model)
            self.notes += narrow_names(adaptable, targets, argument, found)
            return {n.module for n in found}

        if request.target_modules is None:
            check_any_conv(adaptable, model)
            self.targets = {n.module for n in adaptable if is_convolution(n.module)}
        else:
            self.targets = matched(request.target_modules, "target_modules")
        self.request, self.inside_saved = request, inside_saved
        self.ranks, self.alphas = ByPattern(request.rank_pattern or {}), ByPattern(request.alpha_pattern or {})
        self.excluded = matched(request.exclude_modules, "exclude_modules")
        self.methods = ByPattern(request.method_pattern or {})
        self.trainable = {n.module for n in adaptable if any(p.requires_grad for p in n.module.parameters())}
        self.trainable |= {module for _, _, each in injections(model) for module, _ in each.frozen}
        matched(self.ranks.patterns, "rank_pattern")
        matched(self.alphas.patterns, "alpha_pattern")
        matched(self.methods.patterns, "method_pattern")
        # Every convolution is listed, so that the user sees which are skipped; linear layers only if they are targets.
        self.listed = [n for n in named if n.module in self.targets or _is_to_be_listed(n.module)]

    def layer(self, n: Named, rank: int) -> LayerPlan:
        """Plan one layer at the rank that its pattern or the request asks for."""
        rank = checked_rank(self.ranks.of(n, rank), f"rank_pattern for {n.name}")
        return self.at(n, rank)

    def at(self, n: Named, rank: int) -> LayerPlan:
        """Plan one layer at this rank."""
        asked = self.request
        alpha = self.alphas.of(n, asked.alpha_at(rank))
        check_alpha(alpha, f"alpha_pattern for {n.name}")
        change, options = self._method(n)
        note = self._reason_to_leave(n) or change.idle_in(n.module, **options)
        planned = LayerPlan(
            name=n.name,
            kind=original_class(n.module).__name__,
            weight_shape=weight_shape(n.module),
            rank=0,
            scaling=scaling_of(float(alpha), rank, asked.use_rslora) if change.has_alpha else 1.0,
            note=note,
            geometry=geometry(n.module),
            use_dora=asked.use_dora,
            method=change.method,
            options=options,
        )
        if note:
            return planned
        rank = rank if change.has_rank else 1
        largest = _largest_rank(planned, rank)
        fitting = change.rank_at(planned.weight_shape, largest, **options)
        if fitting < largest == rank:
            note = f"rank {rank}: {change.ranks}"
        elif fitting < rank:
            least = "even rank 1" if change.has_rank else f"method {change.method!r}"
            note = f"{f'rank {rank}' if fitting else least} would have more parameters than the layer"
            if self._is_taken_whole(n, fitting):
                # The whole difference has as many parameters as the layer and can represent any change.
                planned = replace(planned, method=Dense.method, options={}, scaling=1.0, use_dora=False)
                change, fitting = Dense, 1
        if fitting:
            check_swappable(n.name, n.module, AdaptedLayer)
            check_adaptable(n, asked.dropout)
            check_variant(n, change, asked.beginning, planned.use_dora)
        if fitting and change.trains_bias and not has_bias(n.module):
            note = "it has no bias to train"
        # A layer whose rank was capped keeps the scaling of the rank that was asked for, hence the size of its steps.
        return replace(planned, rank=fitting, note=note)

    def _is_taken_whole(self, n: Named, fitting: int) -> bool:
        """Return whether a layer too small for the method that was asked for trains its whole difference instead.

        It does not if a method was named for it or there is a budget. A layer that the user had frozen and for which
        even rank 1 is too large may be a constant, such as the integral of a detector, and is skipped.
        """
        if self.request.budget is not None or self.methods.of(n, ""):
            return False
        return fitting > 0 or n.module in self.trainable

    def _method(self, n: Named) -> tuple[type[Change], dict[str, Option]]:
        asked = self.request
        method = self.methods.of(n, asked.method)
        check_among(named_methods(), method, f"method_pattern for {n.name}")
        if method != asked.method:
            return METHODS[method], {}
        # With A frozen, (B − B0) A is the same as B A with B zero at the start: no anchor is needed.
        change = METHODS[method] if asked.freeze_A else method_for(method, asked.beginning)
        return change, dict(asked.method_options or {})

    def _reason_to_leave(self, n: Named) -> str:
        if is_packed(n.module):
            return "its weight is packed (quantized)"
        if n.module in self.inside_saved:
            return "trained in full"
        if n.module in self.excluded:
            return "excluded"
        if n.module not in self.targets:
            return "not a target"
        if is_counting(n.module):
            return "a constant: it holds 0, 1, 2, …"
        if not weight_shape(n.module):
            return "it has no weight, or one computed in a way that is not torch's"
        return ""


def has_bias(module: nn.Module) -> bool:
    """Return whether the module has a bias."""
    return module._parameters.get("bias") is not None


def _largest_rank(planned: LayerPlan, rank: int) -> int:
    """Return the largest rank up to this one at which the change has no more parameters than the weight, or 0.

    Raises:
        TargetError: the method has no change of such a weight.
    """
    ranks = range(1, min(rank, planned.base_parameters) + 1)
    try:
        return bisect_right(ranks, planned.base_parameters, key=planned.parameters_at)
    except TargetError as cause:
        raise TargetError(f"{planned.name}: {cause} Nothing was changed.") from cause


def _is_to_be_listed(module: nn.Module) -> bool:
    packed = hasattr(module, "kernel_size") and is_packed(module)
    return is_convolution(module) or packed


def geometry(module: nn.Module) -> dict[str, Any]:
    """Return a convolution's stride, padding, dilation, groups and padding_mode as JSON data; {} for other layers."""
    if not is_convolution(module):
        return {}
    names = ("stride", "padding", "output_padding", "dilation", "groups", "padding_mode", "transposed")
    values = {name: getattr(module, name) for name in names if hasattr(module, name)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
