"""Folding the adapter into plain weights, and back bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from ._layer import AdaptedLayer, base_weight
from ._state import Injection, Taken, injected
from ._swap import check_restorable, restore, swap
from .errors import StateError

M = TypeVar("M", bound=nn.Module)


def merge(model: M) -> M:
    """Fold the adapter into the weights: every layer is of its plain class again and costs nothing extra.

    >>> convlora.merge(model)        # predicts as before
    >>> convlora.unmerge(model)      # the base weights, bit for bit, and the adapter beside them

    The base weights are kept aside, so a merged model holds the adapted layers' weights twice;
    ``convlora.remove(model)`` then drops adapter and base and leaves the merged plain model.
    A merged model is for inference and export: to train on, unmerge first.

    Raises:
        StateError: no adapter, merged already, or another library has changed a layer's class since injection.
    """
    found = _in_state(model, merged=False)
    for injection in found:
        for layer in injection.layers:
            check_restorable(layer)
    # Outside inference mode: its tensors could never be trained or saved aside again.
    with torch.inference_mode(False), torch.no_grad():
        weights = [[cast(Tensor, layer.weight).clone() for layer in injection.layers] for injection in found]
    for injection, merged in zip(found, weights, strict=True):
        _merge_one(injection, merged)
    return model


def _merge_one(injection: Injection, weights: list[Tensor]) -> None:
    try:
        for layer, weight in zip(injection.layers, weights, strict=True):
            taken = Taken(layer, "weight", base_weight(layer))
            injection.merged.append(taken)
            restore(layer)
            taken.replace(nn.Parameter(weight, requires_grad=False))
        injection.is_merged = True
        injection.plan = replace(injection.plan, state="merged")
    except BaseException:
        _unmerge_one(injection)
        raise


def unmerge(model: M) -> M:
    """Take :func:`merge` back: the base weights return bit for bit, in every dtype, after any number of cycles.

    Raises:
        StateError: no adapter, or not merged.
    """
    for injection in _in_state(model, merged=True):
        _unmerge_one(injection)
    return model


def _unmerge_one(injection: Injection) -> None:
    for taken in injection.merged:
        taken.give_back()
        if not isinstance(taken.module, AdaptedLayer):
            swap(taken.module, AdaptedLayer)
    injection.merged.clear()
    injection.is_merged = False
    injection.plan = replace(injection.plan, state="injected")


def _in_state(model: nn.Module, merged: bool) -> list[Injection]:
    found = [injection for _, _, injection in injected(model)]
    if any(injection.is_merged is not merged for injection in found):
        raise StateError(
            "The adapter is merged already; convlora.unmerge(model) takes it back."
            if not merged
            else "The adapter is not merged; there is nothing to unmerge."
        )
    return found
