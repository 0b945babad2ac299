"""``hotswap_adapter``: writes a saved adapter's values over those of an adapter in a model; all checks come first."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .._layer.adapted import change_of
from .._layer.gate import alone
from .._layer.places import BASE, SWAPPING
from .._methods.dense import Dense
from .._methods.padded import PaddedLoRA
from .._model.hotswap import check_prepared, rank_in_file
from .._model.inject import recorded
from .._model.keys import own_keys, places_of
from .._model.options import in_our_words
from .._model.state import (
    Adapter,
    Injection,
    activate,
    check_enabled,
    check_unmerged,
    check_unrouted,
    ready_alone,
    the_adapter,
    to_the_end,
)
from .._model.targets import dotted
from .._plan import Plan
from ..errors import CheckpointError
from .contents import State
from .digests import Remembered
from .files import refusal
from .hub import local_directory
from .loading import read_adapter
from .manifest import Manifest

M = TypeVar("M", bound=nn.Module)
_REMEMBERED: WeakKeyDictionary[nn.Module, Remembered] = WeakKeyDictionary()
"""Cached digests of the bases of models whose adapters are swapped: to hash a base takes longer than all else."""


@in_our_words
def hotswap_adapter(
    model: M,
    directory: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    prefix: str | None = None,
    check_base: bool = True,
    check_finite: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
) -> M:
    """Overwrite the values of an adapter that the model carries with those of a saved adapter.

    >>> convlora.prepare_for_hotswap(model, max_rank=16)
    >>> compiled = torch.compile(model)
    >>> convlora.hotswap_adapter(compiled, "stain/")

    Factors, strengths, head, biases and norm statistics are written in place. So a compiled or exported model or a CUDA
    graph computes with the new values, and no forward of another thread sees a part of the old and a part of the new
    ones (see :func:`prepare_for_hotswap`). Layers, head and statistics that the file does not have become the base's.
    The adapter keeps its name in the model and takes everything else from the file. The same parameters stay trainable.

    Args:
        model: a model that :func:`prepare_for_hotswap` has prepared, or its ``torch.compile`` wrapper.
        directory: as for :func:`convlora.load_adapter`; the file must hold LoRA or dense differences.
        adapter_name: the adapter whose values are replaced; default the active one.
        prefix: as for :func:`convlora.load_adapter`; so are ``check_finite``, ``revision`` and ``token``.
        check_base: as for :func:`convlora.load_adapter`. The base's tensors are hashed at the first swap, and again if
            a tensor's version counter has changed.

    Returns:
        The same object.

    Raises:
        CheckpointError: as from :func:`convlora.load_adapter`; or the model has no room for a layer, a rank, a trained
            module or a method of the file: each is named, with the remedy.
        StateError: the model is not prepared, is merged, or its adapters are disabled; there is no adapter of this
            name; several are active and none is named; or a ``use_adapters`` block is open.

    Whatever is raised, the model is as it was.
    """
    needs = (check_unmerged, check_enabled, check_unrouted)
    root, injection = ready_alone(model, *needs)
    adapter = the_adapter(injection, adapter_name)
    check_prepared(root, adapter)

    def named(plan: Plan) -> Plan:
        was = adapter.plan  # mask_activations is a setting of the model, not of the file
        return replace(plan, adapter_name=was.adapter_name, mask_activations=was.mask_activations)

    path, remembered = local_directory(directory, revision, token), _REMEMBERED.setdefault(root, Remembered())
    asked = adapter.plan.adapter_name, named, check_base, check_finite, remembered.digest
    plan, tensors, manifest = read_adapter(path, root, *asked, prefix=prefix)
    with SWAPPING:
        for check in needs:  # another thread may have changed the model meanwhile
            check(injection)
        check_prepared(root, adapter)
        own, faults = _own_tensors(root, plan, tensors, manifest)
        faults = [*_layer_faults(plan, root), *faults]
        if faults:
            raise _refused(manifest, plan, faults)
        with alone(root):
            to_the_end(lambda: _write(root, injection, adapter, plan, tensors, own))
    return model


def _layer_faults(plan: Plan, root: nn.Module) -> Iterator[str]:
    for planned in plan.layers:
        change, rank = change_of(root.get_submodule(planned.name), plan.adapter_name), rank_in_file(planned)
        if not rank:
            yield f"{planned.name}: {'DoRA' if planned.use_dora else planned.method} in the file"
        elif not isinstance(change, PaddedLoRA):
            yield f"{planned.name}: no adapter of the model has this layer"
        elif rank > len(change.lora_A):
            yield f"{planned.name}: rank {rank} in the file, room for {len(change.lora_A)}"


def _own_tensors(
    root: nn.Module, plan: Plan, tensors: State, manifest: Manifest
) -> tuple[list[tuple[Tensor, Tensor]], list[str]]:
    """Return the tensors besides factors to write, as (target, new values), and those for which there is no room."""
    places = places_of(root)
    of_file = {id(place): tensors[key] for key, place in places.items() if key in tensors}
    pairs, faults = [], []
    for key, place in places.items():
        own, base = place.own(plan.adapter_name), place.of(BASE)
        new = of_file.get(id(place), base)
        if own is not None and new is not None and own.shape == new.shape:
            pairs.append((own, new))
        elif new is not None and (base is None or not torch.equal(new.to(base.device, base.dtype), base)):
            faults.append(f"{key}: trained in the file, and the model's adapter has no such tensor")
        elif own is not None and new is None:
            faults.append(f"{key}: the model's adapter has this tensor, and neither the file nor the base has it")
    missing = own_keys(root, plan, manifest.buffers) & tensors.keys() - places.keys()
    faults += [f"{key}: trained in the file, and only the base has this tensor" for key in sorted(missing)]
    return pairs, faults


def _refused(manifest: Manifest, plan: Plan, faults: list[str]) -> CheckpointError:
    rank = max((rank_in_file(planned) for planned in plan.layers), default=1)
    return refusal(
        f"{manifest.file}: the model is not prepared for this adapter:",
        faults,
        "A model has room for the layers and modules of its adapters: load this adapter too, with "
        "convlora.load_adapter, or inject these layers and modules, before convlora.prepare_for_hotswap and "
        f"torch.compile; max_rank={rank} has room for every rank of the file. To switch to DoRA or to a method other "
        "than LoRA, use convlora.set_adapter. Nothing was changed.",
    )


def _write(
    root: nn.Module,
    injection: Injection,
    adapter: Adapter,
    plan: Plan,
    tensors: State,
    own: list[tuple[Tensor, Tensor]],
) -> None:
    """Write the new values and the new plan. May be run again after an interrupt."""
    new = recorded(plan, root)
    named = set(new.layers)
    idle = [layer for layer in (*adapter.layers, *adapter.idle) if layer not in named]
    with torch.inference_mode(False), torch.no_grad():
        for planned, layer in zip(plan.layers, new.layers, strict=True):
            change = cast(PaddedLoRA, change_of(layer, plan.adapter_name))
            change.dropout = plan.dropout
            stored = {name: tensors[dotted(planned.name, name)] for name in planned.stored_shapes}
            change.load_stored(stored, planned.scaling, planned.strength, planned.method == Dense.method)
        for layer in idle:
            cast(PaddedLoRA, change_of(layer, plan.adapter_name)).clear()
        for tensor, numbers in own:
            tensor.copy_(numbers)
    adapter.plan, adapter.modules, adapter.layers, adapter.norms = plan, new.modules, new.layers, new.norms
    adapter.idle = idle
    activate(root, injection, injection.now, injection.disabled)
