"""Another adapter's numbers in the place of one's; everything is checked before any number is written."""

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
from ..errors import CheckpointError, few
from .contents import State
from .digests import Remembered
from .files import plain
from .hub import local_directory
from .loading import read_adapter
from .manifest import Manifest

M = TypeVar("M", bound=nn.Module)
_REMEMBERED: WeakKeyDictionary[nn.Module, Remembered] = WeakKeyDictionary()
"""Digests of the bases of models whose adapters are swapped: to read a base takes longer than all else."""


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
    """Put a saved adapter's numbers in the place of those of an adapter that the model carries.

    >>> convlora.prepare_for_hotswap(model, max_rank=16)
    >>> compiled = torch.compile(model)
    >>> convlora.hotswap_adapter(compiled, "stain/")

    Factors, strengths, head, biases and norm statistics are written in place, so that what was compiled, exported or
    captured in a CUDA graph computes with the new ones, and no forward of another thread sees some of either (see
    :func:`prepare_for_hotswap`). Layers that the file has nothing for, and a head and statistics that it has not,
    become the base's. The adapter keeps its name in the model; all else that is saved of it is the file's. Which
    parameters are trainable stays as it is.

    Args:
        model: a model that :func:`prepare_for_hotswap` has made ready, or what ``torch.compile`` made of it.
        directory: as for :func:`convlora.load_adapter`, whose files are read where they are LoRA or whole differences.
        adapter_name: the adapter whose numbers are replaced; default the active one.
        prefix: as for :func:`convlora.load_adapter`; so are ``check_finite``, ``revision`` and ``token``.
        check_base: as for :func:`convlora.load_adapter`. The base's tensors are read at the first swap, and again where
            torch has counted a write to one.

    Returns:
        The same object.

    Raises:
        CheckpointError: as from :func:`convlora.load_adapter`; or the file has a layer, a rank, a trained module or
            another method for which the model has no room: each is named, with the remedy.
        StateError: the model is not prepared, is merged, or its adapters are disabled; there is no adapter of this
            name; several are active and none is named; or a ``use_adapters`` block is open.

    Whatever is raised, the model is as it was.
    """
    needs = (check_unmerged, check_enabled, check_unrouted)
    root, injection = ready_alone(model, *needs)
    adapter = the_adapter(injection, adapter_name)
    check_prepared(root, adapter)

    def named(plan: Plan) -> Plan:
        was = adapter.plan  # how activations keep what they need is the model's affair
        return replace(plan, adapter_name=was.adapter_name, mask_activations=was.mask_activations)

    path, remembered = local_directory(directory, revision, token), _REMEMBERED.setdefault(root, Remembered())
    asked = adapter.plan.adapter_name, named, check_base, check_finite, remembered.digest
    plan, tensors, manifest = read_adapter(path, root, *asked, prefix=prefix)
    with SWAPPING:
        for check in needs:  # another thread may have changed it meanwhile
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
            yield f"  {planned.name}: {'DoRA' if planned.use_dora else planned.method} in the file"
        elif not isinstance(change, PaddedLoRA):
            yield f"  {planned.name}: no adapter of the model has this layer"
        elif rank > len(change.lora_A):
            yield f"  {planned.name}: rank {rank} in the file, room for {len(change.lora_A)}"


def _own_tensors(
    root: nn.Module, plan: Plan, tensors: State, manifest: Manifest
) -> tuple[list[tuple[Tensor, Tensor]], list[str]]:
    """What besides factors is written where, as (the model's, the file's or the base's), and what has no room."""
    places = places_of(root)
    of_file = {id(place): tensors[key] for key, place in places.items() if key in tensors}
    pairs, faults = [], []
    for key, place in places.items():
        own, base = place.own(plan.adapter_name), place.of(BASE)
        new = of_file.get(id(place), base)
        if own is not None and new is not None and own.shape == new.shape:
            pairs.append((own, new))
        elif new is not None and (base is None or not torch.equal(new.to(base.device, base.dtype), base)):
            faults.append(f"  {key}: trained in the file, and the model's adapter has no tensor of its own there")
        elif own is not None and new is None:
            faults.append(f"  {key}: the model's adapter has a tensor there, and neither the file nor the base has one")
    missing = own_keys(root, plan, manifest.buffers) & tensors.keys() - places.keys()
    faults += [f"  {key}: trained in the file, and the base's alone in the model" for key in sorted(missing)]
    return pairs, faults


def _refused(manifest: Manifest, plan: Plan, faults: list[str]) -> CheckpointError:
    rank = max((rank_in_file(planned) for planned in plan.layers), default=1)
    lines = few([plain(fault) for fault in faults])
    return CheckpointError(
        "\n".join(
            [
                f"{manifest.file}: the model is not prepared for this adapter:",
                *lines,
                "A model has room for what its adapters have: before convlora.prepare_for_hotswap and torch.compile, "
                "convlora.load_adapter this one beside the others, or inject with these layers and modules; "
                f"max_rank={rank} has room for every rank of the file. Methods other than LoRA, and DoRA, are switched "
                "by convlora.set_adapter. Nothing was changed.",
            ]
        )
    )


def _write(
    root: nn.Module,
    injection: Injection,
    adapter: Adapter,
    plan: Plan,
    tensors: State,
    own: list[tuple[Tensor, Tensor]],
) -> None:
    """May be run again after an interrupt."""
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
