"""A new adapter out of several on the same base: their weighted sum, or a merge of what they agree on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from .._layer.adapted import change_of
from .._methods.lora import LoRA
from .._model.inject import applied
from .._model.mixing import mixed
from .._model.options import Request, check_among, checked_rank
from .._model.planner import make_plan
from .._model.state import Adapter, check_enabled, check_new, check_unmerged, check_unrouted, ready_alone, the_adapter
from .._model.targets import exactly
from .._plan import LayerPlan, Plan
from ..errors import StateError, TargetError
from .approximation import Approximation, LayerError, check_factors, check_products
from .methods import DENSITIES, METHODS, Combined, Method, WeightedLoRA


def combine_adapters(
    model: nn.Module,
    weights: Mapping[str, float],
    adapter_name: str,
    *,
    method: Method = "exact",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> Approximation:
    """Add an adapter that is made of others: ΔW = Σ weight · ΔW of each. It waits for ``set_adapter``.

    >>> convlora.combine_adapters(model, {"tumour": 0.7, "stain": 0.3}, "both")
    >>> print(convlora.combine_adapters(model, {"tumour": 1, "stain": 1}, "ties", method="ties", rank=16, density=0.2))

    What they have besides factors is combined, too, in the same way by every method:

    - modules trained in full: base + Σ weight · (each − base), so an average where the weights sum to 1;
    - running mean and variance: those of the adapters' data mixed in proportion to the weights' sizes, the spread
      between the means included; other floating buffers: their average; counters: those of the largest weight.

    A module that one adapter trains in full and another gives factors cannot be combined. To train the combination on,
    it has the adapters' ``dropout`` where all have the same, else none.

    Args:
        model: an injected model.
        weights: names of adapters, each with its weight; any finite number but 0.
        adapter_name: names the new one.
        method: ``"exact"`` puts the factors side by side, so the ranks add up, beyond what a layer's plan would allow
            if need be. ``"svd"`` takes the nearest of a lower rank. ``"ties"`` keeps each adapter's largest entries,
            elects a sign for each entry and averages those that have it (Yadav et al. 2023, arXiv:2306.01708).
            ``"dare"`` drops entries at random and scales up the rest (Yu et al. 2023, arXiv:2311.03099). The last two
            work on the dense change and then take the nearest of a lower rank.
        rank: for all but ``"exact"``; default the largest that the layer has in any of the adapters.
        density: for ``"ties"`` and ``"dare"``, the share of entries that each adapter keeps, above 0 to 1; default 0.2
            and 0.5.
        seed: of what ``"dare"`` draws.

    Returns:
        Each layer's rank, and how far its factors are from the change that the method asks for.

    Raises:
        TargetError: an argument is out of range, or belongs to another method.
        StateError: no such adapter, or one of the new name; the adapters do not go together, or hold NaN or Inf; the
            model is merged, its adapters are disabled, or a ``use_adapters`` block is open.

    Whatever is raised, the model is as it was.
    """
    density = _checked(method, rank, density)
    root, injection = ready_alone(model, check_unmerged, check_enabled, check_unrouted)
    check_new(injection, adapter_name)
    adapters = {name: the_adapter(injection, name) for name in _checked_weights(weights)}
    for each in adapters.values():
        check_factors(each)
    shares = {name: float(weights[name]) for name in adapters}
    plan = _planned(root, adapters, adapter_name)
    parts = {layer.name: _weighted(root.get_submodule(layer.name), adapters, shares) for layer in plan.layers}
    with torch.inference_mode(False), torch.no_grad():
        combined = METHODS[method](parts, rank, density, seed)
        layers = [
            replace(p, rank=len(A), scaling=1.0, note="", method=LoRA.method) for p, (A, _) in _with(plan, combined)
        ]
        top = max((layer.rank for layer in layers), default=1)
        plan = replace(plan, layers=tuple(layers), rank=top, alpha=float(top))
        means = {place.module: place for place in injection.places if place.name == "running_mean"}
        others = {
            id(place): tensor
            for place in injection.places
            if (tensor := mixed(place, means.get(place.module), shares)) is not None
        }
        with applied(plan, root):
            for layer, (A, B) in _with(plan, combined):
                cast(LoRA, change_of(root.get_submodule(layer.name), adapter_name)).set_factors(A, B)
            for place in injection.places:
                own = place.own(adapter_name)
                if own is not None and id(place) in others:
                    own.copy_(others[id(place)])
    return Approximation(tuple(LayerError(p.name, p.rank, *combined[p.name][2:]) for p in layers))


def _with(plan: Plan, combined: Combined) -> Iterator[tuple[LayerPlan, tuple[Tensor, Tensor]]]:
    return ((layer, combined[layer.name][:2]) for layer in plan.layers)


def _checked(method: str, rank: int | None, density: float | None) -> float:
    """The density; everything that does not belong together is refused."""
    check_among(tuple(METHODS), method, "method")
    if rank is not None:
        checked_rank(rank, "rank")
        if method == "exact":
            raise TargetError(f"rank={rank} belongs to the methods that approximate; method='exact' adds the ranks up.")
    if density is not None and method not in DENSITIES:
        raise TargetError(f"density={density} belongs to method='ties' and 'dare', not to {method!r}.")
    density = DENSITIES.get(method, 1.0) if density is None else density
    if not 0.0 < density <= 1.0:
        raise TargetError(f"density={density}; it is a share of entries, above 0 to 1.")
    return density


def _checked_weights(weights: Mapping[str, float]) -> Mapping[str, float]:
    if not isinstance(weights, Mapping):
        raise TargetError(f"weights={weights!r}; it must be a dict of names and weights. Nothing was changed.")
    if not weights:
        raise TargetError("weights names no adapter. Nothing was changed.")
    for name, weight in weights.items():
        if not math.isfinite(weight) or weight == 0:
            raise TargetError(f"weights[{name!r}]={weight}; it must be a finite number other than 0.")
    return weights


def _planned(root: nn.Module, adapters: Mapping[str, Adapter], adapter_name: str) -> Plan:
    """All layers and modules of any of the adapters; ranks are not decided yet.

    Raises:
        StateError: a module is trained in full in one and adapted in another.
    """
    adapted = {layer: name for name, each in adapters.items() for layer in each.layers}
    saved: dict[str, nn.Module] = {}
    for name, each in adapters.items():
        for key in each.plan.modules_to_save:
            saved[key] = root.get_submodule(key)
            for inner in saved[key].modules():
                if inner in adapted:
                    raise StateError(
                        f"{key} is trained in full in {name!r} and has factors in {adapted[inner]!r}; such adapters "
                        "cannot be combined. Nothing was changed."
                    )
    for name, each in adapters.items():
        check_products(name, each.plan)
        if each.plan.use_dora:
            raise StateError(
                f"{name}: DoRA's magnitudes make a change that is no product of factors; such adapters cannot be "
                "combined. Nothing was changed."
            )
    tracked = any(each.plan.norm == "track" for each in adapters.values())
    first = next(iter(adapters.values())).plan
    dropouts = {each.plan.dropout for each in adapters.values()}
    plan = make_plan(
        root,
        Request(
            rank=1,
            target_modules=exactly(dict.fromkeys(p.name for each in adapters.values() for p in each.plan.layers)) or (),
            modules_to_save=exactly(saved),
            norm="track" if tracked else "freeze",
            training_path=first.training_path,
            dropout=first.dropout if len(dropouts) == 1 else 0.0,
            adapter_name=adapter_name,
        ),
    )
    in_full = {module for each in saved.values() for module in each.modules()}
    trained = dict.fromkeys(name for each in adapters.values() for name in each.plan.biases)
    biases = tuple(name for name in trained if root.get_submodule(name) not in in_full)
    numbers = sum(root.get_submodule(name).get_parameter("bias").numel() for name in biases)
    plan = replace(plan, head_found_by=first.head_found_by, use_rslora=False, biases=biases)
    return replace(plan, saved_parameters=plan.saved_parameters + numbers)


def _weighted(layer: nn.Module, adapters: Mapping[str, Adapter], shares: Mapping[str, float]) -> WeightedLoRA:
    there = ((name, change_of(layer, name)) for name in adapters)
    return {name: (cast(LoRA, change), shares[name] * change.strength) for name, change in there if change is not None}
