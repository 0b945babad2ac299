"""Parameters of the base that move by other ways than gradients: a codebook's average, a weight made for evaluation.

The first forward in train mode and the first in eval mode are watched. What they write to is from then on a place: the
base has what it was before, and each adapter its own, saved with it. What was written later, or in parts of the model
that were called by themselves, or compiled, is found when the adapter is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from .._layer.adapted import CHILD, LayerAdapters, carries
from .._layer.functional import is_transformed
from .._layer.places import BASE, COPY, MIXTURE, SWAPPING, Place
from .._layer.swap import Swapped, set_below
from .._layer.writes import Slot, Writes, is_watching
from .._plan import Plan
from .state import RECORD, Adapter, Blend, Injection, weights_in

PROBED = 64
"""As many numbers of a parameter, spread evenly over it, are remembered."""
ROUNDING = 2e-4
"""What an average of the model rounds anew differs by less, against its size."""


class Watched(Swapped):
    """The root of an injected model until a forward of each mode has been seen."""

    _convlora_prefix: ClassVar[str] = ""  # who asks for a model's class is told the same name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own, watched where it may be: not inside of what is compiled, traced or recorded."""
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
    names = {module: name for name, module in root.named_modules()}
    writes = Writes(slots(root, injection), names)
    try:
        with writes:
            output = call(root, *args, **kwargs)
        writes.check_computed()
    finally:
        own(root, injection, writes.found())
    injection.watched.add(mode)
    if len(injection.watched) == 2:
        set_below(root, Watched, is_there=False)
    return output


def slots(root: nn.Module, injection: Injection | None = None) -> Iterator[Slot]:
    """The base's parameters that no adapter has of its own, without the weights of adapted layers."""
    owned = {(p.module, p.name) for p in (injection.places if injection else ()) if p.is_parameter}
    ours = {inner for module in root.modules() if isinstance(module, LayerAdapters) for inner in module.modules()}
    for module in root.modules():
        for name, parameter in {} if module in ours else module._parameters.items():
            is_plain = type(parameter) is nn.Parameter and not parameter.is_meta and parameter.layout == torch.strided
            if is_plain and (module, name) not in owned and not (name == "weight" and carries(module)):
                yield Slot(module, name, cast(nn.Parameter, parameter))


def own(root: nn.Module, injection: Injection, found: Iterable[tuple[Slot, Tensor]]) -> list[str]:
    """Give the base what it had before, and each adapter that is not at work; names what was found.

    The tensor that is in the module stays, for whose turn it is: an optimizer or a graph may have it.
    """
    copies: dict[tuple[str, int], nn.Parameter] = {}
    names = {module: f"{name}." if name else "" for name, module in root.named_modules()}
    keys = []
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
            keys.append(names[slot.module] + slot.name)
        if keys:
            for adapter in injection.adapters.values():
                follow(root, injection, adapter)
    return keys


def follow(root: nn.Module, injection: Injection, adapter: Adapter) -> None:
    """Take into the adapter's plan which parameters forwards write to."""
    names = {module: f"{name}." if name else "" for name, module in root.named_modules()}
    places = (place for place in injection.places if place.is_written and place.module in names)
    adapter.plan = replace(adapter.plan, written=tuple(names[place.module] + place.name for place in places))


def written_in(plan: Plan, model: nn.Module) -> set[tuple[nn.Module, str]]:
    """The parameters that a plan says forwards write to, as (module, name)."""
    parts = [key.rpartition(".") for key in plan.written]
    return {(model.get_submodule(name), key) for name, _, key in parts}


def watch_writes(root: nn.Module, injection: Injection) -> None:
    """Watch the next forwards, and remember the base as it is; may be run again."""
    set_below(root, Watched, is_there=True)
    _remember(root, injection)
    _unhook(root)
    cast(Any, root).register_load_state_dict_pre_hook(_before_loading)
    cast(Any, root).register_load_state_dict_post_hook(_after_loading)


def show_watch(root: nn.Module, injection: Injection) -> None:
    """Give a merged model its own class back, and watch it again once it is unmerged, if a mode was not yet seen."""
    if len(injection.watched) < 2:
        set_below(root, Watched, is_there=not injection.merged)


def unwatch(root: nn.Module) -> None:
    """Undo :func:`watch_writes`; may be run again."""
    if isinstance(root, Watched):
        set_below(root, Watched, is_there=False)
    _unhook(root)


def _unhook(root: nn.Module) -> None:
    for hooks in (root._load_state_dict_pre_hooks, root._load_state_dict_post_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "hook", hook) in (_before_loading, _after_loading):
                hooks.pop(key, None)


def _remember(root: nn.Module, injection: Injection) -> None:
    injection.remembered = [(*slot, _probe(slot.parameter)) for slot in slots(root, injection)]


def _probe(parameter: Tensor) -> Tensor:
    return parameter.detach().flatten()[:: max(1, parameter.numel() // PROBED)].to("cpu", copy=True)


def _differ(now: Tensor, before: Tensor) -> bool:
    if now.shape != before.shape or now.dtype != before.dtype or now.is_meta:
        return False
    return bool((now.double() - before.double()).norm() > ROUNDING * before.double().norm())


def _before_loading(root: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Of a state dict of an injected model, what is not the base's is the adapter's: it goes on where it was."""
    injection = vars(root).get(RECORD)
    if not isinstance(injection, Injection):
        return
    if not any(f".{CHILD}." in f".{key[len(prefix) :]}" for key in state if key.startswith(prefix)):
        injection.remembered = []  # a base's checkpoint
        return
    names = {module: f"{prefix}{name}." if name else prefix for name, module in root.named_modules()}
    found = []
    for slot in slots(root, injection):
        new = state.get(names[slot.module] + slot.name)
        if isinstance(new, Tensor) and _differ(new.detach().to(slot.parameter.device), slot.parameter.detach()):
            found.append((slot, slot.parameter.detach().clone()))
    own(root, injection, found)


def _after_loading(root: nn.Module, _: Any) -> None:
    injection = vars(root).get(RECORD)
    if isinstance(injection, Injection) and not injection.remembered:
        _remember(root, injection)


def own_changed(root: nn.Module, injection: Injection) -> list[str]:
    """Own what has changed since injection and was not seen being written; what a lost base held is what is there now.

    Returns:
        The names.
    """
    there = {(slot.module, slot.name): slot.parameter for slot in slots(root, injection)}
    found = []
    for module, name, parameter, probe in injection.remembered:
        now = there.get((module, name))
        if now is not None and not now.requires_grad and _differ(_probe(now), probe):
            is_replaced = now is not parameter and parameter.shape == now.shape
            found.append((Slot(module, name, parameter if is_replaced else now), parameter if is_replaced else now))
    return own(root, injection, [(slot, tensor.detach()) for slot, tensor in found])
