"""``prepare_for_hotswap``: prepares a model so that adapters can be exchanged without recompilation.

In every layer that any adapter adapts, each adapter gets a change of the same form (``_methods/padded.py``): factors of
one rank, and a tensor for the strength. All adapters then look the same to a compiler.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import nn

from .._layer.adapted import attach, change_of, held
from .._layer.change import Change, Shape
from .._layer.gate import Gated, add_gate, alone
from .._layer.places import SWAPPING
from .._layer.swap import check_swappable, set_below
from .._methods.dense import Dense
from .._methods.lora import AnchoredLoRA, LoRA
from .._methods.padded import PaddedLoRA
from .._plan import LayerPlan
from ..errors import StateError, UnsupportedLayerError, few
from .checks import check_model
from .options import checked_rank
from .state import (
    Adapter,
    Injection,
    activate,
    check_enabled,
    check_unmerged,
    check_unrouted,
    ready_alone,
    to_the_end,
)
from .written import Watched

M = TypeVar("M", bound=nn.Module)
SWAPPABLE = {kind.method for kind in (LoRA, AnchoredLoRA, Dense)}
"""Methods that a file stores as two factors and nothing else."""

Forms = dict[nn.Module, tuple[Shape, dict[str, Any]]]


class Padded(NamedTuple):
    """The padded change of one layer."""

    layer: nn.Module
    change: PaddedLoRA
    flags: tuple[bool, bool]
    """Whether A and B are trainable while the adapter is active."""


def prepare_for_hotswap(model: M, max_rank: int = 16) -> M:
    """Make an injected model ready for :func:`hotswap_adapter`, and for ``set_adapter`` under ``torch.compile``.

    >>> convlora.prepare_for_hotswap(model, max_rank=16)
    >>> compiled = torch.compile(model)
    >>> convlora.hotswap_adapter(compiled, "stain/")          # no second compilation

    Factors are padded with zeros up to ``max_rank``, how strong each layer's change is becomes a tensor, and every
    adapter gets zeros in the layers that only others adapt. So a compiled model needs no second compilation for another
    adapter, one that has come by ``hotswap_adapter`` or, among all that the model carries now, by ``set_adapter``.
    After adding another adapter call it again, with the same ``max_rank``. What the model predicts is as before up to
    rounding, and what is saved has no zeros. Make optimizers anew: padded factors are other Parameters, and ``summary``
    counts their zeros among what requires a gradient.

    Call it before ``torch.compile``, ``torch.export`` and the first forward of a CUDA graph.

    From then on forwards of the model may run in other threads while numbers are swapped: each sees all of the old
    adapter or all of the new one. This holds for calls of the model itself, compiled or not; where it is a part of a
    larger model, for the calls of that part, if the larger one is not compiled; and not for what runs without the
    model's own call (an exported program, a replayed CUDA graph, a copy that a feature extractor has made).

    Args:
        model: an injected model.
        max_rank: the largest rank that a layer's change may have. Where a layer's weight has a rank below twice that,
            there is room for its whole difference.

    Returns:
        The same object.

    Raises:
        StateError: the model carries no adapter, is merged, or its adapters are disabled; or a ``use_adapters`` block
            is open.
        UnsupportedLayerError: the model is wrapped or compiled; a layer's rank is larger; or it is changed in another
            way than LoRA's, or by DoRA.
        TargetError: ``max_rank`` is no rank.

    Whatever is raised, the model is as it was.
    """
    max_rank = checked_rank(max_rank, "max_rank")
    check_model(model)
    root, injection = ready_alone(model, check_unmerged, check_enabled, check_unrouted)
    check_swappable(type(root).__name__, root, Gated)
    with SWAPPING, torch.inference_mode(False):
        if faults := list(_faults(injection, max_rank)):
            listed = "\n  ".join(["Hot swaps need LoRA of one width:", *few(faults, "and {} more")])
            raise UnsupportedLayerError(f"{listed}\nNothing was changed.")
        forms = _forms(injection)
        made = {name: list(_padded(forms, each, max_rank)) for name, each in injection.adapters.items()}
        to_the_end(lambda: _put(root, injection, made))
    return model


def width_of(weight: Shape, max_rank: int) -> int:
    """Return the number of rows of A: ``max_rank``, or a small layer's full rank."""
    full = min(weight[0], math.prod(weight[1:]))
    return max(max_rank, full) if full < 2 * max_rank else max_rank


def rank_in_file(planned: LayerPlan) -> int:
    """Return the rank of a change that is a product of two factors and nothing else; otherwise 0."""
    is_product = planned.method in SWAPPABLE and not planned.use_dora
    return planned.stored_shapes["lora_A.weight"][0] if is_product else 0


def check_prepared(root: nn.Module, adapter: Adapter) -> None:
    """Raise StateError unless the adapter is prepared for hot swaps."""
    if not isinstance(root, Gated) or not all(isinstance(change, PaddedLoRA) for change in adapter.all_changes):
        raise StateError(
            f"Adapter {adapter.plan.adapter_name!r} of {type(root).__name__} is not prepared: call "
            "convlora.prepare_for_hotswap(model, max_rank) first, before torch.compile. Nothing was changed."
        )


def _faults(injection: Injection, max_rank: int) -> Iterator[str]:
    for adapter in injection.adapters.values():
        for planned, change in zip(adapter.plan.layers, adapter.changes, strict=True):
            rank, width = rank_in_file(planned), width_of(planned.weight_shape, max_rank)
            where = f"{planned.name} in adapter {adapter.plan.adapter_name!r}"
            if not rank or type(change) not in (LoRA, AnchoredLoRA, Dense, PaddedLoRA):
                what = "DoRA" if planned.use_dora else planned.method
                yield f"{where}: {what}. Give that adapter a model of its own, or inject it as LoRA."
            elif change.sources() is None:
                yield f"{where}: its factors are pruned or parametrized; make them plain first."
            elif rank > width:
                yield f"{where}: rank {rank}, and max_rank={max_rank} has room for {width}; max_rank={rank} has."


def _forms(injection: Injection) -> Forms:
    """Return each layer's weight shape, as its changes see it, and the layout of its channels."""
    changes = ((layer, cast(Change, next(iter(held(layer).values())))) for layer in injection.layers)
    return {layer: (c.weight_shape, {"groups": c.groups or 1, "transposed": c.groups > 0}) for layer, c in changes}


def _padded(forms: Forms, adapter: Adapter, max_rank: int) -> Iterator[Padded]:
    """Yield the padded change of each layer; changes that are padded already stay the same objects."""
    name, frozen_factors = adapter.plan.adapter_name, set(adapter.frozen_factors)
    saved = {inner for part in adapter.plan.modules_to_save for inner in adapter.modules[part].modules()}
    for layer, (weight, channels) in forms.items():
        change = change_of(layer, name)
        if change is None and layer in saved:
            continue
        width = width_of(weight, max_rank)
        asked = [change is None or _asks(change, each, frozen_factors) for each in ("lora_A", "lora_B")]
        if isinstance(change, PaddedLoRA) and len(change.lora_A) == width:
            padded = change
        else:
            like = next(p for p in layer.parameters() if p.is_floating_point())
            padded = PaddedLoRA.of(weight, like, width, channels, change)
        yield Padded(layer, padded.train(layer.training), (asked[0], asked[1]))


def _asks(change: Change, name: str, frozen_factors: set[tuple[nn.Module, str]]) -> bool:
    """Return whether a factor is trained while its adapter is active."""
    name = name if name in change._parameters else next(iter(change._parameters))
    return cast(nn.Parameter, change._parameters[name]).requires_grad or (change, name) in frozen_factors


def _put(root: nn.Module, injection: Injection, made: dict[str, list[Padded]]) -> None:
    set_below(root, Watched, is_there=False)  # the class would change after a compilation that depends on it
    injection.watched.update((True, False))
    add_gate(root)
    with alone(root):
        for name, each in made.items():
            adapter = injection.adapters[name]
            own = set(adapter.layers)
            adapter.idle = [padded.layer for padded in each if padded.layer not in own]
            adapter.frozen_factors.clear()
            for layer, change, (with_A, with_B) in each:
                attach(layer, name, change)
                change.lora_A.requires_grad_(with_A)
                change.lora_B.requires_grad_(with_B)
        activate(root, injection, injection.now, injection.disabled)
