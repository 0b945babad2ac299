"""Planning: which layers, ranks, head and norms an injection would adapt. The model is read, never changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from .._layer.change import Option
from .._layer.masked import Masks, mixin_for
from .._layer.paths import TrainingPath
from .._layer.swap import check_swappable, original_class
from .._plan import FrozenModule, Init, LayerPlan, NormPolicy, Plan
from .budget import allotted
from .checks import check_any_left, check_model
from .choice import Choice, has_bias
from .heads import LAST, NONE, find_heads, new_parts, warn_of_frozen, warn_of_linear
from .norms import POLICIES, keeps_statistics
from .options import DEFAULT_RANK, Budget, Pattern, Request, in_our_words, numbers_in
from .state import check_plain
from .targets import Named, Targets, modules_of, select


@in_our_words
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
    freeze_A: bool = False,
    method: str = "lora",
    method_pattern: Mapping[Pattern, str] | None = None,
    method_options: Mapping[str, Option] | None = None,
    init: Init | None = None,
    init_data: Iterable[Any] | None = None,
    budget: Budget | None = None,
    importance: Mapping[str, float] | None = None,
    example: Any = None,
    training_path: TrainingPath = "auto",
    mask_activations: Masks = False,
    adapter_name: str = "default",
) -> Plan:
    """Return what :func:`convlora.inject` would do with the same arguments, without changing the model.

    >>> print(convlora.plan(model, rank=8))
    >>> convlora.plan(model).trainable_share

    Arguments and errors are those of :func:`convlora.inject`; ``init_data`` is not read.
    """
    request = Request.of(locals())
    check_model(model)
    check_plain(model)
    return make_plan(model, request)


def make_plan(model: nn.Module, request: Request) -> Plan:
    """As :func:`plan`, also for a base that carries adapters already."""
    check_model(model)
    named = modules_of(model)
    saved, found_by = _modules_to_save(model, named, request)
    bases = {n.module for n in named}  # without the modules of other adapters
    inside_saved = {module for s in saved for module in s.module.modules() if module in bases}
    choice = Choice(model, named, inside_saved, request)
    asked_for = choice.targets <= inside_saved if choice.targets else False
    if found_by == LAST and (asked_for or choice.excluded & inside_saved):
        # What the user names takes precedence: that layer is to be adapted, or skipped.
        saved, found_by, inside_saved = [], "no head beside what was asked for", set()
    new = [n for n in _new_parts(model, named, request) if not choice.excluded & set(n.module.modules())]
    inside_new = {module for n in new for module in n.module.modules() if module in bases}
    if new and not (choice.targets and choice.targets <= inside_new | inside_saved):
        inside_saved |= inside_new
        saved, found_by = _outermost([*saved, *new], named), f"{found_by}; norm layers as they were made"
    choice.inside_saved = inside_saved
    base_parameters = _size(p for n in named for p in n.module._parameters.values())
    rank = request.largest_rank
    if request.budget is None:
        layers = [choice.layer(n, rank) for n in choice.listed]
    else:
        numbers = numbers_in(request.budget, base_parameters)
        layers = _within(numbers, choice, rank, request.importance)
        rank = max((layer.rank for layer in layers), default=0) or DEFAULT_RANK
    check_any_left(layers, choice.targets, saved, model)
    if found_by.startswith(NONE) and request.example is None:
        adapted = {n.module for n, layer in zip(choice.listed, layers, strict=True) if layer.rank}
        warn_of_frozen(model, named, adapted | choice.excluded | inside_saved)
    if request.target_modules is None:
        warn_of_linear(model, layers, [n.module for n in named if n.module not in inside_saved | choice.excluded])
    norms = [n for n in named if keeps_statistics(n.module) and n.module not in inside_saved]
    for n in norms:
        check_swappable(n.name, n.module, POLICIES[request.norm])
    for n in named:
        mixin = mixin_for(n.module, request.mask_activations)
        if mixin is not None:
            check_swappable(n.name, n.module, mixin)
    modules = {n.name: n.module for n in choice.listed}
    biases = [p.name for p in layers if p.rank and p.change.trains_bias and has_bias(modules[p.name])]
    shifts = _size(modules[name]._parameters["bias"] for name in biases)
    return Plan(
        model=original_class(model).__name__,
        adapter_name=request.adapter_name,
        rank=rank,
        alpha=request.alpha_at(rank),
        use_rslora=request.use_rslora,
        dropout=request.dropout,
        norm=request.norm,
        layers=tuple(layer for layer in layers if layer.rank),
        skipped=tuple(layer for layer in layers if not layer.rank),
        modules_to_save=tuple(s.name for s in saved),
        head_found_by=found_by,
        norms=tuple(n.name for n in norms),
        base_parameters=base_parameters,
        saved_parameters=_size(p for module in inside_saved for p in module._parameters.values()) + shifts,
        others=tuple(_others(named, inside_saved, choice.listed)),
        training_path=request.training_path,
        mask_activations=request.mask_activations,
        init=request.beginning,
        freeze_A=request.freeze_A,
        biases=tuple(biases),
        method=request.method,
        notes=tuple(choice.notes),
    )


def _within(numbers: int, choice: Choice, rank: int, importance: Mapping[str, float] | None) -> list[LayerPlan]:
    """Plan every layer at the rank that the budget allows; ``rank`` and ``rank_pattern`` are upper bounds."""
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
    """Return the number of elements of these parameters; a shared parameter counts once."""
    return sum(p.numel() for p in {p for p in parameters if p is not None})


def _others(named: list[Named], inside_saved: set[nn.Module], listed: list[Named]) -> Iterator[FrozenModule]:
    inside_listed = {module for n in listed for module in n.module.modules()}
    for n in named:
        size = _size(n.module._parameters.values())
        if size and n.module not in inside_saved | inside_listed:
            yield FrozenModule(n.name, original_class(n.module).__name__, size)


def _modules_to_save(model: nn.Module, named: list[Named], request: Request) -> tuple[list[Named], str]:
    wanted = request.modules_to_save
    if isinstance(wanted, str) and wanted == "auto":
        return find_heads(model, named, request.example)
    with_tensors = [n for n in named if n.name and any(True for _ in n.module.parameters())]
    found = select(with_tensors, wanted, "modules_to_save", model, lambda: find_heads(model, named, request.example)[0])
    return _outermost(found, named), "modules_to_save"


def _new_parts(model: nn.Module, named: list[Named], request: Request) -> list[Named]:
    is_auto = isinstance(request.modules_to_save, str) and request.modules_to_save == "auto"
    return new_parts(model, named) if is_auto else []


def _outermost(found: list[Named], named: list[Named]) -> list[Named]:
    """Those that are inside no other, in the model's order."""
    inner = {child for n in found for child in n.module.modules() if child is not n.module}
    chosen = {n.module for n in found} - inner
    return [n for n in named if n.module in chosen]
