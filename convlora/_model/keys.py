"""Divides a state dict into the base's tensors and an adapter's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from .._layer.adapted import CHILD, LayerAdapters
from .._layer.change import Change
from .._layer.places import Place
from .._plan import Plan
from .state import RECORD, Injection
from .targets import dotted
from .written import written_in


def tensors_of(model: nn.Module, *, keep_vars: bool = False) -> dict[str, Tensor]:
    """Return the tensors of the state dict (``get_extra_state`` may add other objects)."""
    state = model.state_dict(keep_vars=keep_vars)
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def tensors_as(model: nn.Module, owner: str) -> dict[str, Tensor]:
    """Return the state dict as it is when this owner, an adapter or ``BASE``, is active; no tensor is copied."""
    state: dict[str, Tensor | None] = dict(tensors_of(model, keep_vars=True))
    places = places_of(model)
    # A state-dict hook may rename keys; such places are found by their tensors.
    unnamed = {id(place.now): place for place in places.values() if place.now is not None}
    for key, tensor in state.items():
        place = places.get(key, unnamed.get(id(tensor)))
        state[key] = tensor if place is None else place.of(owner)
    # A buffer that is None is not in the state dict, and may be a tensor for another owner.
    state |= {key: place.of(owner) for key, place in places.items() if place.now is None and place.is_saved}
    return {key: tensor for key, tensor in state.items() if tensor is not None}


def places_of(model: nn.Module) -> dict[str, Place]:
    """Return the model's places by state-dict key; places of a shared module are listed under each of its names."""
    record = vars(model).get(RECORD)
    inside: dict[nn.Module, list[Place]] = {}
    for place in record.places if isinstance(record, Injection) else ():
        inside.setdefault(place.module, []).append(place)
    modules = model.named_modules(remove_duplicate=False)
    return {dotted(name, place.name): place for name, module in modules for place in inside.get(module, ())}


def own_keys(model: nn.Module, plan: Plan, buffers: Iterable[str]) -> set[str]:
    """Return the state-dict keys that belong to the adapter besides its factors.

    They are the keys of modules trained in full, tracked norm layers, trained biases, parameters that change without a
    gradient, and the given buffers.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = {module for name in plan.modules_to_save for module in modules[name].modules()}
    owners |= {modules[name] for name in plan.norms if plan.norm == "track"}
    owners -= {module for module in owners if isinstance(module, (LayerAdapters, Change))}  # other adapters' factors
    inside = {key for key in tensors_of(model) if modules.get(key.rpartition(".")[0]) in owners}
    with_bias = {modules[name] for name in plan.biases}
    single = {(module, "bias") for module in with_bias} | written_in(plan, model)
    inside |= {dotted(n, key) for n, m in modules.items() for key in m._parameters if (m, key) in single}
    return inside | set(buffers)


def base_keys(model: nn.Module, state: Mapping[str, Tensor], own: set[str]) -> list[str]:
    """Return the base's keys: all keys without those in ``own`` and those of adapters' changes."""
    there = (module for module in model.modules() if isinstance(module, LayerAdapters))
    ends = {f"{CHILD}.{key}" for adapters in there for key in adapters.state_dict(keep_vars=True)}
    return [key for key in state if key not in own and ".".join(key.rsplit(".", 3)[-3:]) not in ends]
