"""Making a plan: which layers, which ranks, which head, which norms. Reads the model and changes nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from . import _checks, _norms, _targets
from ._functional import largest_rank, scaling_of
from ._layer import AdaptedLayer
from ._plan import LayerPlan, NormPolicy, Plan
from ._state import check_plain
from ._swap import check_swappable
from ._targets import Named, Targets

Pattern = str | re.Pattern[str]


def plan(
    model: nn.Module,
    rank: int = 8,
    *,
    alpha: float | None = None,
    target_modules: Targets = None,
    exclude_modules: Targets = None,
    rank_pattern: Mapping[Pattern, int] | None = None,
    alpha_pattern: Mapping[Pattern, float] | None = None,
    modules_to_save: Targets = "auto",
    norm: NormPolicy = "freeze",
    dropout: float = 0.0,
    use_rslora: bool = False,
    adapter_name: str = "default",
) -> Plan:
    """What :func:`convlora.inject` would do with the same arguments, without touching the model.

    >>> print(convlora.plan(model, rank=8))
    >>> convlora.plan(model).trainable_share

    Arguments and errors are those of :func:`convlora.inject`.
    """
    rank = _checks.check_values(rank, alpha, norm, dropout, adapter_name)
    _checks.check_model(model)
    check_plain(model)
    named = _targets.modules_of(model)
    saved, found_by = _modules_to_save(model, named, modules_to_save)
    inside_saved = {module for s in saved for module in s.module.modules()}
    choice = _Choice(model, named, target_modules, exclude_modules, rank_pattern, alpha_pattern, inside_saved)
    layers = [choice.layer(n, rank, alpha, use_rslora, dropout) for n in choice.listed]
    _checks.check_any_left(layers, choice.targets, saved, model)
    norms = [n for n in named if _norms.keeps_statistics(n.module) and n.module not in inside_saved]
    for n in norms:
        check_swappable(n.name, n.module, _norms.FrozenNorm)
    return Plan(
        model=type(model).__name__,
        adapter_name=adapter_name,
        rank=rank,
        alpha=default_alpha(rank) if alpha is None else float(alpha),
        use_rslora=use_rslora,
        dropout=dropout,
        norm=norm,
        layers=tuple(layer for layer in layers if layer.rank),
        skipped=tuple(layer for layer in layers if not layer.rank),
        modules_to_save=tuple(s.name for s in saved),
        head_found_by=found_by,
        norms=tuple(n.name for n in norms),
        base_parameters=sum(p.numel() for p in model.parameters()),
        saved_parameters=sum(p.numel() for p in {p for s in saved for p in s.module.parameters()}),
    )


def default_alpha(rank: int) -> float:
    """Twice the rank: a scaling of 2 at every rank, so that a learning rate carries over from rank to rank."""
    return 2.0 * rank


class _Choice:
    """The user's patterns, matched once against the model's adaptable layers."""

    def __init__(
        self,
        model: nn.Module,
        named: list[Named],
        target_modules: Targets,
        exclude_modules: Targets,
        rank_pattern: Mapping[Pattern, int] | None,
        alpha_pattern: Mapping[Pattern, float] | None,
        inside_saved: set[nn.Module],
    ) -> None:
        adaptable = [n for n in named if isinstance(n.module, _targets.ADAPTABLE)]

        def select(targets: Targets, argument: str) -> set[nn.Module]:
            return {n.module for n in _targets.select(adaptable, targets, argument, model)}

        if target_modules is None:
            target_modules = nn.Conv2d
            _checks.check_any_conv(adaptable, model)
        self.ranks, self.alphas = dict(rank_pattern or {}), dict(alpha_pattern or {})
        self.inside_saved = inside_saved
        self.excluded = select(exclude_modules, "exclude_modules")
        self.targets = select(target_modules, "target_modules")
        select(tuple(self.ranks), "rank_pattern")
        select(tuple(self.alphas), "alpha_pattern")
        # Every convolution is listed, so that none is missed in silence; linear layers where they were asked for.
        self.listed = [n for n in adaptable if n.module in self.targets or isinstance(n.module, _ConvNd)]

    def layer(self, n: Named, rank: int, alpha: float | None, use_rslora: bool, dropout: float) -> LayerPlan:
        """What one layer gets."""
        rank = _checks.checked_rank(_targets.first_match(self.ranks, n, rank), f"rank_pattern for {n.name}")
        alpha = _targets.first_match(self.alphas, n, default_alpha(rank) if alpha is None else alpha)
        _checks.check_alpha(alpha, f"alpha_pattern for {n.name}")
        weight = n.module._parameters.get("weight")
        shape = tuple(weight.shape) if weight is not None else ()
        note = self._reason_to_leave(n)
        fitting = 0 if note else min(rank, largest_rank(shape))
        if fitting:
            check_swappable(n.name, n.module, AdaptedLayer)
            _checks.check_adaptable(n, dropout)
        if not note and fitting < rank:
            note = f"rank {rank} would outweigh the layer" if fitting else "even rank 1 would outweigh the layer"
            # A capped layer keeps the scaling that was asked for: the cap is ours, not a wish for a larger step.
            alpha *= scaling_of(1.0, rank, use_rslora) / scaling_of(1.0, max(fitting, 1), use_rslora)
        return LayerPlan(n.name, type(n.module).__name__, shape, fitting, float(alpha), note, geometry(n.module))

    def _reason_to_leave(self, n: Named) -> str:
        if n.module in self.inside_saved:
            return "trained in full"
        if n.module in self.excluded:
            return "excluded"
        if n.module not in self.targets:
            return "not a target"
        if n.module._parameters.get("weight") is None:
            return "its weight is computed from other parameters"
        return ""


def geometry(module: nn.Module) -> dict[str, Any]:
    """A convolution's stride, padding, dilation, groups and padding_mode as JSON data; empty for others."""
    if not isinstance(module, _ConvNd):
        return {}
    names = ("stride", "padding", "output_padding", "dilation", "groups", "padding_mode", "transposed")
    values = {name: getattr(module, name) for name in names}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _modules_to_save(model: nn.Module, named: list[Named], wanted: Targets) -> tuple[list[Named], str]:
    if isinstance(wanted, str) and wanted == "auto":
        return _targets.find_head(model, named)
    with_tensors = [n for n in named if n.name and any(True for _ in n.module.parameters())]
    found = _targets.select(with_tensors, wanted, "modules_to_save", model)
    inner = {child for n in found for child in n.module.modules() if child is not n.module}
    return [n for n in found if n.module not in inner], "modules_to_save"
