"""Merging the adapter into plain weights, and unmerging bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from .._layer.adapted import CHILD, merge_layer, unmerge_layer
from .._layer.computed import compute
from .._layer.functional import is_finite
from .._layer.places import BASE, SWAPPING
from .._layer.swap import check_restorable
from ..errors import StateError, TargetError, few
from .integrity import refuse_changed
from .state import (
    InjectedPart,
    Injection,
    activate,
    check_enabled,
    check_intact,
    check_unrouted,
    checked,
    injected,
    to_the_end,
)
from .targets import dotted, names_of
from .written import show_watch

M = TypeVar("M", bound=nn.Module)


def merge(model: M, check: bool = True) -> M:
    """Merge the adapter into the weights: every layer gets its plain class back and costs nothing extra.

    >>> convlora.merge(model)        # predicts as before
    >>> convlora.unmerge(model)      # the base weights, bit for bit, and the adapter beside them

    The base weights are kept aside, so a merged model holds the adapted layers' weights twice;
    ``convlora.remove(model)`` then drops adapter and base and leaves the merged plain model.
    A merged model is for inference and export, and its state dict has the base's keys alone. To train on, unmerge.

    Args:
        model: an injected model.
        check: whether a result that is not finite is refused: a weight, or a number of the adapter's head, biases and
            buffers, that is NaN or Inf where the base's tensor is not.

    Raises:
        TargetError: ``check`` is neither true nor false.
        StateError: no adapter; merged already; a module was replaced, or its class changed, since injection;
            or the result is not finite.

    Whatever is raised, the model is as it was.
    """
    if not isinstance(check, bool):
        raise TargetError(
            f"check={check!r}; it must be true or false. The active adapter is merged; convlora.set_adapter(model, "
            "name) chooses another. Nothing was changed."
        )
    # Outside inference mode: its tensors could never be trained or saved.
    with SWAPPING, torch.inference_mode(False), torch.no_grad():
        parts = checked(_parts(model, merged=False), check_enabled, check_unrouted)
        for root, injection in parts:
            refuse_changed(root, injection)
            for module in (*injection.layers, *injection.activations):
                check_restorable(module)
        weights = [
            [nn.Parameter(compute(layer), requires_grad=False) for layer in injection.layers] for _, injection in parts
        ]
        for part, merged in zip(parts, weights, strict=True):
            if check:
                _check_finite(*part, merged)
        _merge(parts, weights)
    return model


def _check_finite(root: nn.Module, injection: Injection, weights: list[nn.Parameter]) -> None:
    """Raise StateError if a merged tensor has NaN or Inf and the base's tensor does not."""
    names = names_of(root)
    merged = zip(injection.layers, weights, strict=True)
    spoilt = [
        dotted(names[layer], "weight") for layer, weight in merged if _is_spoilt(weight, *_base_parameters(layer))
    ]
    there = (place for place in injection.places if place.module in names)
    spoilt += [dotted(names[place.module], place.name) for place in there if _is_spoilt(place.now, place.of(BASE))]
    if spoilt:
        raise StateError(
            f"{', '.join(few(spoilt, 'and {} more'))}: NaN or Inf with adapter {injection.label!r}, and finite in the "
            "base. The training "
            "has diverged, or the strength is too large for the dtype. Load an adapter that is whole, and merge again; "
            "convlora.merge(model, check=False) merges it as it is. Nothing was changed."
        )


def _is_spoilt(tensor: Tensor | None, *base: Tensor | None) -> bool:
    return not is_finite(tensor) and all(map(is_finite, base))


def _base_parameters(layer: nn.Module) -> Iterator[nn.Parameter]:
    return (p for name, p in layer.named_parameters() if not name.startswith((f"{CHILD}.", "bias")))


def _merge(parts: list[InjectedPart], weights: list[list[nn.Parameter]]) -> None:
    try:
        for (root, injection), merged in zip(parts, weights, strict=True):
            for layer, weight in zip(injection.layers, merged, strict=True):
                merge_layer(layer, weight)
            injection.merged = True
            injection.mask()
            show_watch(root, injection)
    except BaseException:
        _unmerge(parts)
        raise


def unmerge(model: M) -> M:
    """Take :func:`merge` back: the base weights return bit for bit, in every dtype, after any number of cycles.

    What was written to the merged weights meanwhile is dropped.

    Raises:
        StateError: no adapter; not merged; a module was replaced or its weight taken away (pruned, say) since.
    """
    with SWAPPING:
        parts = _parts(model, merged=True)
        for root, injection in parts:
            check_intact(root, injection)
            layers = set(injection.layers)
            for name, module in ((n, m) for each in injection.adapters.values() for n, m in each.modules.items()):
                if module in layers and module._parameters.get("weight") is None:
                    raise StateError(
                        f"{name}: its merged weight is no plain parameter any more (pruned or parametrized since?). "
                        "Undo that, or call convlora.remove(model) to keep the merged model. Nothing was changed."
                    )

        def back() -> None:
            _unmerge(parts)
            for root, injection in parts:  # a ``scaled`` block may have been left since
                activate(root, injection, injection.now, injection.disabled)

        to_the_end(back)
    return model


def _unmerge(parts: list[InjectedPart]) -> None:
    for root, injection in parts:
        for layer in injection.layers:
            unmerge_layer(layer)
        injection.merged = False
        injection.mask()
        show_watch(root, injection)


@contextmanager
def unmerged(root: nn.Module, injection: Injection) -> Iterator[None]:
    """Unmerge the model inside the block; afterwards the same merged Parameters are restored."""
    parts = [(root, injection)] if injection.merged else []
    weights = [[cast(nn.Parameter, layer._parameters["weight"]) for layer in i.layers] for _, i in parts]
    try:
        _unmerge(parts)
        yield
    finally:
        to_the_end(lambda: _merge(parts, weights))


def _parts(model: nn.Module, merged: bool) -> list[InjectedPart]:
    """Return the injected parts that are merged, or that are not; at least one."""
    parts = [(root, injection) for _, root, injection in injected(model) if injection.merged is merged]
    if not parts:
        raise StateError(
            "The adapter is not merged; there is nothing to unmerge."
            if merged
            else "The adapter is merged already; convlora.unmerge(model) takes it back."
        )
    return parts
