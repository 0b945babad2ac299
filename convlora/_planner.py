"""Making a plan: which layers, which ranks, which head, which norms. Reads the model and changes nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypedDict

from torch import nn

from . import _budget, _checks, _norms, _targets
from ._budget import Budget
from ._computed import weight_shape
from ._functional import largest_rank, scaling_of
from ._layer import AdaptedLayer
from ._paths import Path
from ._plan import ANCHORED, Init, LayerPlan, NormPolicy, Part, Plan
from ._state import check_plain
from ._swap import check_swappable, original_class
from ._targets import Named, Targets
from .errors import TargetError

if TYPE_CHECKING:
    from typing_extensions import Unpack

Pattern = str | re.Pattern[str]


def plan(
    model: nn.Module,
    rank: int | None = None,
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
    use_dora: bool = False,
    init: Init = "kaiming",
    init_data: Iterable[Any] | None = None,
    budget: Budget | None = None,
    importance: Mapping[str, float] | None = None,
    path: Path = "auto",
    adapter_name: str = "default",
) -> Plan:
    """What :func:`convlora.inject` would do with the same arguments, without touching the model.

    >>> print(convlora.plan(model, rank=8))
    >>> convlora.plan(model).trainable_share

    Arguments and errors are those of :func:`convlora.inject`; ``init_data`` is not read.
    """
    _checks.check_model(model)
    check_plain(model)
    return make_plan(
        model,
        rank,
        alpha=alpha,
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        modules_to_save=modules_to_save,
        norm=norm,
        dropout=dropout,
        use_rslora=use_rslora,
        use_dora=use_dora,
        init=init,
        init_data=init_data,
        budget=budget,
        importance=importance,
        path=path,
        adapter_name=adapter_name,
    )


class Options(TypedDict, total=False):
    """The optional arguments of :func:`convlora.inject`, which explains them."""

    alpha: float | None
    target_modules: Targets
    exclude_modules: Targets
    rank_pattern: Mapping[Pattern, int] | None
    alpha_pattern: Mapping[Pattern, float] | None
    modules_to_save: Targets
    norm: NormPolicy
    dropout: float
    use_rslora: bool
    use_dora: bool
    init: Init
    init_data: Iterable[Any] | None
    budget: Budget | None
    importance: Mapping[str, float] | None
    path: Path


DEFAULT_RANK = 8
MORE_THAN_ANY = 2**31


def make_plan(model: nn.Module, rank: int | None, adapter_name: str, **options: Unpack[Options]) -> Plan:
    """As :func:`plan`, also for a base that carries adapters already."""
    alpha, norm = options.get("alpha"), options.get("norm", "freeze")
    dropout, use_rslora = options.get("dropout", 0.0), options.get("use_rslora", False)
    path, init, budget = options.get("path", "auto"), options.get("init", "kaiming"), options.get("budget")
    if rank is None:
        rank = DEFAULT_RANK if budget is None else MORE_THAN_ANY
    rank = _checks.check_values(rank, alpha, norm, dropout, path, adapter_name)
    _checks.check_init(init)
    _checks.check_model(model)
    named = _targets.modules_of(model)
    saved, found_by = _modules_to_save(model, named, options.get("modules_to_save", "auto"))
    bases = {n.module for n in named}  # without what other adapters have put beside
    inside_saved = {module for s in saved for module in s.module.modules() if module in bases}
    choice = _Choice(model, named, inside_saved, options)
    base_parameters = _size(p for n in named for p in n.module._parameters.values())
    if budget is None:
        if options.get("importance") is not None:
            raise TargetError("importance shares out a budget; give budget='1%', say. Nothing was changed.")
        layers = [choice.layer(n, rank, alpha, use_rslora, dropout) for n in choice.listed]
    else:
        numbers = _budget.numbers_in(budget, base_parameters)
        layers = _within(numbers, choice, rank, alpha, use_rslora, dropout, options.get("importance"))
        rank = max((layer.rank for layer in layers), default=0) or DEFAULT_RANK
    _checks.check_any_left(layers, choice.targets, saved, model)
    norms = [n for n in named if _norms.keeps_statistics(n.module) and n.module not in inside_saved]
    for n in norms:
        check_swappable(n.name, n.module, _norms.POLICIES[norm])
    return Plan(
        model=original_class(model).__name__,
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
        base_parameters=base_parameters,
        saved_parameters=_size(p for module in inside_saved for p in module._parameters.values()),
        others=tuple(_others(named, inside_saved, choice.listed)),
        path=path,
        init=init,
    )


def _within(
    numbers: int,
    choice: _Choice,
    rank: int,
    alpha: float | None,
    use_rslora: bool,
    dropout: float,
    importance: Mapping[str, float] | None,
) -> list[LayerPlan]:
    """Every layer with the rank that the budget leaves it; ``rank`` and ``rank_pattern`` are the largest."""
    largest = [choice.layer(n, rank, alpha, use_rslora, dropout) for n in choice.listed]
    ranks = _budget.allotted([layer for layer in largest if layer.rank], numbers, importance)
    layers = []
    for n, most in zip(choice.listed, largest, strict=True):
        if most.rank:
            most = choice.at(n, max(ranks[n.name], 1), alpha, use_rslora, dropout)
            if not ranks[n.name]:
                most = replace(most, rank=0, note="the budget leaves it no rank")
        layers.append(most)
    return layers


def _size(parameters: Iterable[nn.Parameter | None]) -> int:
    """Numbers in the parameters together, a shared one counted once."""
    return sum(p.numel() for p in {p for p in parameters if p is not None})


def _others(named: list[Named], inside_saved: set[nn.Module], listed: list[Named]) -> Iterator[Part]:
    inside_listed = {module for n in listed for module in n.module.modules()}
    for n in named:
        size = _size(n.module._parameters.values())
        if size and n.module not in inside_saved | inside_listed:
            yield Part(n.name, original_class(n.module).__name__, size)


def default_alpha(rank: int) -> float:
    """Twice the rank: a scaling of 2 at every rank, so that a learning rate carries over from rank to rank."""
    return 2.0 * rank


class _Choice:
    """The user's patterns, matched once against the model's adaptable layers."""

    def __init__(self, model: nn.Module, named: list[Named], inside_saved: set[nn.Module], options: Options) -> None:
        adaptable = [n for n in named if _targets.is_adaptable(n.module)]

        def select(targets: Targets, argument: str) -> set[nn.Module]:
            return {n.module for n in _targets.select(adaptable, targets, argument, model)}

        targets = options.get("target_modules")
        if targets is None:
            _checks.check_any_conv(adaptable, model)
            self.targets = {n.module for n in adaptable if _targets.is_conv2d(n.module)}
        else:
            self.targets = select(targets, "target_modules")
        self.ranks, self.alphas = dict(options.get("rank_pattern") or {}), dict(options.get("alpha_pattern") or {})
        self.init, self.use_dora = options.get("init", "kaiming"), options.get("use_dora", False)
        self.inside_saved = inside_saved
        self.excluded = select(options.get("exclude_modules"), "exclude_modules")
        select(tuple(self.ranks), "rank_pattern")
        select(tuple(self.alphas), "alpha_pattern")
        # Every convolution is listed, so that none is missed in silence; linear layers where they were asked for.
        self.listed = [n for n in named if n.module in self.targets or _is_to_be_listed(n.module)]

    def layer(self, n: Named, rank: int, alpha: float | None, use_rslora: bool, dropout: float) -> LayerPlan:
        """What one layer gets."""
        rank = _checks.checked_rank(_targets.first_match(self.ranks, n, rank), f"rank_pattern for {n.name}")
        return self.at(n, rank, alpha, use_rslora, dropout)

    def at(self, n: Named, rank: int, alpha: float | None, use_rslora: bool, dropout: float) -> LayerPlan:
        """What one layer gets where this rank is asked for."""
        alpha = _targets.first_match(self.alphas, n, default_alpha(rank) if alpha is None else alpha)
        _checks.check_alpha(alpha, f"alpha_pattern for {n.name}")
        shape = weight_shape(n.module)
        note = self._reason_to_leave(n)
        kind = original_class(n.module).__name__
        planned = LayerPlan(n.name, kind, shape, 1, 1.0, geometry=geometry(n.module), use_dora=self.use_dora)
        fitting = 0 if note else min(rank, largest_rank(shape, planned.magnitudes))
        if fitting:
            check_swappable(n.name, n.module, AdaptedLayer)
            _checks.check_adaptable(n, dropout)
            _checks.check_variant(n, self.init, self.use_dora)
        if not note and fitting < rank:
            note = f"rank {rank} would outweigh the layer" if fitting else "even rank 1 would outweigh the layer"
            # A capped layer keeps the scaling that was asked for: the cap is ours, not a wish for a larger step.
            alpha *= scaling_of(1.0, rank, use_rslora) / scaling_of(1.0, max(fitting, 1), use_rslora)
        anchored = bool(fitting) and self.init in ANCHORED
        return replace(planned, rank=fitting, alpha=float(alpha), note=note, anchored=anchored)

    def _reason_to_leave(self, n: Named) -> str:
        if _targets.is_packed(n.module):
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
    packed = hasattr(module, "kernel_size") and _targets.is_packed(module)
    return _targets.is_convolution(module) or packed


def geometry(module: nn.Module) -> dict[str, Any]:
    """A convolution's stride, padding, dilation, groups and padding_mode as JSON data; empty for others."""
    if not _targets.is_convolution(module):
        return {}
    names = ("stride", "padding", "output_padding", "dilation", "groups", "padding_mode", "transposed")
    values = {name: getattr(module, name) for name in names if hasattr(module, name)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _modules_to_save(model: nn.Module, named: list[Named], wanted: Targets) -> tuple[list[Named], str]:
    if isinstance(wanted, str) and wanted == "auto":
        return _targets.find_head(model, named)
    with_tensors = [n for n in named if n.name and any(True for _ in n.module.parameters())]
    found = _targets.select(with_tensors, wanted, "modules_to_save", model)
    inner = {child for n in found for child in n.module.modules() if child is not n.module}
    return [n for n in found if n.module not in inner], "modules_to_save"
