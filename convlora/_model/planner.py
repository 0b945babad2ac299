"""Making a plan: which layers, which ranks, which head, which norms. Reads the model and changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from .._layer.paths import Path
from .._layer.swap import check_swappable, original_class
from .._plan import Init, LayerPlan, NormPolicy, Part, Plan
from ..errors import TargetError
from .budget import Budget, allotted, numbers_in
from .checks import check_any_left, check_init, check_model, check_values
from .choice import Choice, Options, Pattern, default_alpha
from .norms import POLICIES, keeps_statistics
from .state import check_plain
from .targets import Named, Targets, find_head, modules_of, select

if TYPE_CHECKING:
    from typing_extensions import Unpack

DEFAULT_RANK = 8
MORE_THAN_ANY = 2**31


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
    check_model(model)
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


def make_plan(model: nn.Module, rank: int | None, adapter_name: str, **options: Unpack[Options]) -> Plan:
    """As :func:`plan`, also for a base that carries adapters already."""
    alpha, norm = options.get("alpha"), options.get("norm", "freeze")
    dropout, use_rslora = options.get("dropout", 0.0), options.get("use_rslora", False)
    path, init, budget = options.get("path", "auto"), options.get("init", "kaiming"), options.get("budget")
    if rank is None:
        rank = DEFAULT_RANK if budget is None else MORE_THAN_ANY
    rank = check_values(rank, alpha, norm, dropout, path, adapter_name)
    check_init(init)
    check_model(model)
    named = modules_of(model)
    saved, found_by = _modules_to_save(model, named, options.get("modules_to_save", "auto"))
    bases = {n.module for n in named}  # without what other adapters have put beside
    inside_saved = {module for s in saved for module in s.module.modules() if module in bases}
    choice = Choice(model, named, inside_saved, options)
    base_parameters = _size(p for n in named for p in n.module._parameters.values())
    if budget is None:
        if options.get("importance") is not None:
            raise TargetError("importance shares out a budget; give budget='1%', say. Nothing was changed.")
        layers = [choice.layer(n, rank) for n in choice.listed]
    else:
        numbers = numbers_in(budget, base_parameters)
        layers = _within(numbers, choice, rank, options.get("importance"))
        rank = max((layer.rank for layer in layers), default=0) or DEFAULT_RANK
    check_any_left(layers, choice.targets, saved, model)
    norms = [n for n in named if keeps_statistics(n.module) and n.module not in inside_saved]
    for n in norms:
        check_swappable(n.name, n.module, POLICIES[norm])
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


def _within(numbers: int, choice: Choice, rank: int, importance: Mapping[str, float] | None) -> list[LayerPlan]:
    """Every layer with the rank that the budget leaves it; ``rank`` and ``rank_pattern`` are the largest."""
    largest = [choice.layer(n, rank) for n in choice.listed]
    ranks = allotted([layer for layer in largest if layer.rank], numbers, importance)
    layers = []
    for n, most in zip(choice.listed, largest, strict=True):
        if most.rank:
            most = choice.at(n, max(ranks[n.name], 1))
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


def _modules_to_save(model: nn.Module, named: list[Named], wanted: Targets) -> tuple[list[Named], str]:
    if isinstance(wanted, str) and wanted == "auto":
        return find_head(model, named)
    with_tensors = [n for n in named if n.name and any(True for _ in n.module.parameters())]
    found = select(with_tensors, wanted, "modules_to_save", model)
    inner = {child for n in found for child in n.module.modules() if child is not n.module}
    return [n for n in found if n.module not in inner], "modules_to_save"
