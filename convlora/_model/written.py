"""Parameters of the base that change without a gradient: a codebook that is averaged, a weight computed for evaluation.

The first forward in train mode and the first in eval mode are watched. A parameter that they write to becomes a place:
the base keeps its old values, and each adapter has and saves its own. Writes that these forwards did not show (later
ones, or in parts that were called alone or compiled) are found when the adapter is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from .._layer.adapted import LayerAdapters, carries
from .._layer.functional import is_transformed
from .._layer.places import BASE, COPY, MIXTURE, SWAPPING, Place
from .._layer.swap import Swapped, set_below
from .._layer.writes import Slot, Writes, is_watching
from .._plan import Plan
from .state import RECORD, Adapter, Blend, Injection, has_factors, remove_hooks, weights_in
from .targets import dotted, names_of

PROBED = 64
"""The number of values, spread evenly over a parameter, that are remembered to detect a write."""
ROUNDING = 2e-4
"""The largest relative difference, by norm, that counts as rounding. A weight average (EMA) rounds the frozen base at
each step; after thousands of fp32 steps the difference is 1e-4."""


class Watched(Swapped):
    """The mixin of an injected model's root until a forward in each mode has been watched."""

    _convlora_prefix: ClassVar[str] = ""  # the class keeps its name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model, and watch for writes unless it is being compiled, traced or recorded."""
        root = cast(nn.Module, self)
        # Not super(): whoever compiled the model keeps this method, and calls it when the class has been given back.
        call = getattr(type(root), "_convlora_original", type(root)).__call__
        if torch.compiler.is_compiling() or "_is_replica" in vars(root) or is_transformed():
            return call(root, *args, **kwargs)
        injection = vars(root).get(RECORD)
        is_busy = is_watching() or torch._C._len_torch_dispatch_stack() or not isinstance(root, Watched)
        if not isinstance(injection, Injection) or injection.routed or is_busy or root.training in injection.watched:
            return call(root, *args, **kwargs)
        return _watched(root, injection, call, args, kwargs)


def _watched(root: nn.Module, injection: Injection, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    mode = root.training
    writes = Writes(slots(root, injection), names_of(root))
    try:
        with writes:
            output = call(root, *args, **kwargs)
        writes.check_computed()
    finally:
        make_places(root, injection, writes.found())
    injection.watched.add(mode)
    if len(injection.watched) == 2:
        set_below(root, Watched, is_there=False)
    return output


def slots(root: nn.Module, injection: Injection | None = None) -> Iterator[Slot]:
    """Yield the base's parameters that are no places, without the weights of adapted layers."""
    owned = {(p.module, p.name) for p in (injection.places if injection else ()) if p.is_parameter}
    ours = {inner for module in root.modules() if isinstance(module, LayerAdapters) for inner in module.modules()}
    for module in root.modules():
        for name, parameter in {} if module in ours else module._parameters.items():
            is_plain = type(parameter) is nn.Parameter and not parameter.is_meta and parameter.layout == torch.strided
            if is_plain and (module, name) not in owned and not (name == "weight" and carries(module)):
                yield Slot(module, name, cast(nn.Parameter, parameter))


def make_places(root: nn.Module, injection: Injection, found: Iterable[tuple[Slot, Tensor]]) -> list[str]:
    """Make places of parameters that were written to; the base and inactive adapters get the values before the write.

    The written tensor stays in the module, for the active adapter: an optimizer or a graph may refer to it.

    Args:
        root: the injected module.
        injection: its record.
        found: the parameters, each with its values before the write.

    Returns:
        The parameters' state-dict keys.
    """
    copies: dict[tuple[str, int], nn.Parameter] = {}
    names, keys = names_of(root), []
    with SWAPPING, torch.inference_mode(False), torch.no_grad():
        for slot, before in found:
            if slot.module._parameters.get(slot.name) is None:
                continue
            place = Place(slot.module, slot.name, is_parameter=True, is_written=True, original=slot.parameter)
            for owner in (BASE, *injection.adapters):
                new = copies.setdefault((owner, id(slot.parameter)), nn.Parameter(before.clone(), requires_grad=False))
                place.kept[owner] = new
            weights = weights_in(place, injection, Blend.of(injection.now))
            place.owner = next(iter(weights)) if list(weights.values()) == [1.0] else MIXTURE
            place.owner = COPY if injection.disabled else place.owner
            place.kept.pop(place.owner, None)
            injection.places.append(place)
            keys.append(dotted(names[slot.module], slot.name))
        if keys:
            follow(root, injection, injection.adapters.values())
    return keys


def follow(root: nn.Module, injection: Injection, adapters: Iterable[Adapter]) -> None:
    """List the parameters that changed without a gradient in these adapters' plans."""
    names = names_of(root)
    places = (place for place in injection.places if place.is_written and place.module in names)
    written = tuple(dotted(names[place.module], place.name) for place in places)
    for adapter in adapters:
        adapter.plan = replace(adapter.plan, written=written)


def written_in(plan: Plan, model: nn.Module) -> set[tuple[nn.Module, str]]:
    """Return the parameters that a plan lists as changed without a gradient, as (module, name)."""
    parts = [key.rpartition(".") for key in plan.written]
    return {(model.get_submodule(name), key) for name, _, key in parts}


def watch_writes(root: nn.Module, injection: Injection) -> None:
    """Watch the first forward in each mode, and remember values of the base. May be run again."""
    set_below(root, Watched, is_there=True)
    _remember(root, injection)
    _unhook(root)
    cast(Any, root).register_load_state_dict_pre_hook(_before_loading)
    cast(Any, root).register_load_state_dict_post_hook(_after_loading)


def show_watch(root: nn.Module, injection: Injection) -> None:
    """Stop watching a merged model, and watch it again when it is unmerged, until both modes have been watched."""
    if len(injection.watched) < 2:
        set_below(root, Watched, is_there=not injection.merged)


def unwatch(root: nn.Module) -> None:
    """Undo :func:`watch_writes`. May be run again."""
    if isinstance(root, Watched):
        set_below(root, Watched, is_there=False)
    _unhook(root)


def _unhook(root: nn.Module) -> None:
    hooks = (root._load_state_dict_pre_hooks, root._load_state_dict_post_hooks)
    remove_hooks(hooks, (_before_loading, _after_loading))


def _remember(root: nn.Module, injection: Injection) -> None:
    injection.remembered = [(*slot, _probe(slot.parameter)) for slot in slots(root, injection)]


def _probe(parameter: Tensor) -> Tensor:
    return parameter.detach().flatten()[:: max(1, parameter.numel() // PROBED)].to("cpu", copy=True)


def _differ(now: Tensor, before: Tensor) -> bool:
    if now.shape != before.shape or now.dtype != before.dtype or now.is_meta:
        return False
    return bool((now.double() - before.double()).norm() > ROUNDING * before.double().norm())


def _before_loading(root: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a state dict of an injected model is loaded, make places of base parameters whose values differ in it."""
    injection = vars(root).get(RECORD)
    if not isinstance(injection, Injection):
        return
    if not has_factors(state, prefix):
        injection.remembered = []  # the checkpoint of a base; _after_loading remembers its values
        return
    names, found = names_of(root), []
    for slot in slots(root, injection):
        new = state.get(prefix + dotted(names[slot.module], slot.name))
        if isinstance(new, Tensor) and _differ(new.detach().to(slot.parameter.device), slot.parameter.detach()):
            found.append((slot, slot.parameter.detach().clone()))
    make_places(root, injection, found)


def _after_loading(root: nn.Module, _: Any) -> None:
    injection = vars(root).get(RECORD)
    if isinstance(injection, Injection) and not injection.remembered:
        _remember(root, injection)


def make_places_of_changed(root: nn.Module, injection: Injection) -> list[str]:
    """Make places of parameters that have changed since injection without a watched write.

    Their old values are lost, so the base gets the new ones too.

    Returns:
        The parameters' state-dict keys.
    """
    there = {(slot.module, slot.name): slot.parameter for slot in slots(root, injection)}
    found = []
    for module, name, parameter, probe in injection.remembered:
        now = there.get((module, name))
        if now is not None and not now.requires_grad and _differ(_probe(now), probe):
            is_replaced = now is not parameter and parameter.shape == now.shape
            found.append((Slot(module, name, parameter if is_replaced else now), parameter if is_replaced else now))
    return make_places(root, injection, [(slot, tensor.detach()) for slot, tensor in found])
