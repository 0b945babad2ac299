"""Removal: restores the base as it was, or leaves the merged model as a plain one."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from .._layer.adapted import aside_of, detach
from .._layer.gate import remove_gate
from .._layer.masked import set_masked
from .._layer.masters import restore_dtypes
from .._layer.places import SWAPPING
from .._layer.swap import check_restorable
from .norms import set_policy
from .state import RECORD, Injection, check_unrouted, check_whole, holders_of, injected, to_the_end, unhook_state_dicts
from .written import unwatch

M = TypeVar("M", bound=nn.Module)


def remove(model: M) -> M:
    """Remove the adapter: the base is as before :func:`inject`; a merged model stays, as a plain model.

    >>> model = convlora.remove(model)                    # the base: same objects, keys, classes, bits, flags
    >>> model = convlora.remove(convlora.merge(model))    # a plain model that predicts like the adapted one

    Unmerged, everything that training changed is lost with the adapter, the trained head and norm statistics too:
    :func:`convlora.save_adapter` first.

    Raises:
        StateError: there is no adapter, or another library has changed the class of an adapted layer since.
    """
    found = injected(model)

    def take_out() -> None:
        for _, root, injection in reversed(found):  # the inner parts were injected last
            undo(injection, root)

    with SWAPPING:
        for _, root, injection in found:
            check_unrouted(injection)
            check_whole(root)
            for module in (*injection.norms, *injection.layers, *injection.activations):
                check_restorable(module)
        to_the_end(take_out)
    return model


def undo(injection: Injection, root: nn.Module) -> None:
    """Undo an injection, also one that was interrupted. May be run again."""
    holders = holders_of(root)
    for norm in injection.norms:
        set_policy(norm, None, holders.get(norm))
    for module in injection.activations:
        set_masked(module, False)
    for place in [] if injection.merged else injection.places:
        place.put_base()
    _give_flags_back(injection)
    for adapter in injection.adapters.values():
        for layer in (*adapter.layers, *adapter.idle):
            detach(layer, adapter.plan.adapter_name)
    rounded: dict[int, nn.Parameter] = {}
    for place in injection.places:
        restore_dtypes(place.module, rounded)
    remove_gate(root)
    unwatch(root)
    unhook_state_dicts(root)
    injection.adapters.clear()  # a shallow copy of the root has the same record: it is plain, too
    vars(root).pop(RECORD, None)


def delete(injection: Injection, adapter_name: str) -> None:
    """Delete one adapter that is not active. May be run again."""
    adapter = injection.adapters.get(adapter_name)
    if adapter is not None:
        for layer in (*adapter.layers, *adapter.idle):
            detach(layer, adapter_name)
        for place in injection.places:
            place.discard(adapter_name)
        injection.adapters.pop(adapter_name)


def _give_flags_back(injection: Injection) -> None:
    """Restore the base's requires_grad flags, also on trained parameters that a merged model keeps."""
    was_trainable = set(injection.frozen)
    for place in injection.places:
        if place.is_parameter and (place.module, place.name) not in was_trainable:
            set_flag(place.module, place.name, False)
    for module, key in injection.frozen:
        set_flag(module, key, True)
    trained = {module for module, _ in injection.frozen}
    for layer in injection.layers if injection.merged else ():
        aside = aside_of(layer)
        if aside is not None and aside.weight is None and trained & {layer, *aside.sources}:
            set_flag(layer, "weight", True)  # it was computed from trainable parameters


def set_flag(module: nn.Module, key: str, requires_grad: bool) -> None:
    """Set a parameter's requires_grad, if the module still has the parameter."""
    parameter = module._parameters.get(key)
    if parameter is not None:  # the user may have pruned or dropped it since
        parameter.requires_grad_(requires_grad)
