"""Adapters on disk: safetensors and JSON, never pickle.

``adapter_model.safetensors`` is whole in itself: factors, modules trained in full, buffers that moved, and in its
header the manifest (the plan, and a digest of every tensor of the base and of the adapter). One file means one
atomic rename: a save that is cut short leaves the old adapter readable. ``adapter_config.json`` beside it is for
people and for Hugging Face peft, whose key and field names both files use.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ._checks import check_model, check_values
from ._inject import apply, remove
from ._layer import adapters, base_weight
from ._manifest import (
    FORMAT,
    TENSORS,
    Manifest,
    base_keys,
    check_fits,
    digest,
    own_keys,
    read_manifest,
    tensors_of,
)
from ._peft_format import PREFIX, dotted, factor_shapes, peft_config
from ._state import Injection, check_intact, check_plain, injections, the_injection
from .errors import CheckpointError, StateError

CONFIG = "adapter_config.json"

M = TypeVar("M", bound=nn.Module)
State = dict[str, Tensor]


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Write everything that training changed: factors, head, and norm statistics that moved; a few MB.

    >>> convlora.save_adapter(model, "tumour/")

    The directory is made where missing; an adapter already in it is replaced atomically. Works merged, too.

    Returns:
        The directory.

    Raises:
        StateError: the model holds no adapter, or several injected parts; a module was replaced since injection; or
            a parameter of the base requires a gradient, so that training it would be lost.
        CheckpointError: the directory cannot be written; what was there before is still there.

    Warns:
        UserWarning: every lora_B is zero, as when the optimizer was made before the injection.
    """
    root, injection = the_injection(model)
    check_intact(root, injection)
    buffers = _moved_buffers(root, injection)
    own = own_keys(root, injection.plan, buffers)
    _check_nothing_lost(root, injection, own)
    tensors = {key: _for_disk(tensor) for key, tensor in _adapter_state(root, injection, own).items()}
    manifest = {
        "format": FORMAT,
        "plan": injection.plan.to_json(),
        "base": _base_digests(root, injection, own),
        "adapter": {key: digest(tensor) for key, tensor in tensors.items()},
        "buffers": sorted(buffers),
    }
    _warn_if_untrained(injection)
    path = Path(directory)
    try:
        _write(path, tensors, manifest, peft_config(root, injection))
    except (OSError, SafetensorError) as cause:  # safetensors wraps a full disk in its own
        raise CheckpointError(f"{path} cannot be written ({cause}). What was there before is still there.") from cause
    return path


def _write(path: Path, tensors: State, manifest: dict[str, Any], config: dict[str, Any]) -> None:
    header = {"format": "pt", "convlora": json.dumps(manifest)}
    path.mkdir(parents=True, exist_ok=True)
    with _replacing(path / TENSORS) as first, _replacing(path / CONFIG) as second:
        save_file({PREFIX + key: tensor for key, tensor in tensors.items()}, first, metadata=header)
        second.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        first.chmod(second.stat().st_mode)  # safetensors makes files for their owner alone


def _warn_if_untrained(injection: Injection) -> None:
    factors = [lora.lora_B for layer in injection.layers for lora in adapters(layer)]
    if factors and not any(factor.any() for factor in factors):
        warnings.warn(
            "every lora_B is zero: nothing was trained. Was the optimizer made before convlora.inject? Make it after, "
            "from convlora.trainable_parameters(model).",
            stacklevel=3,
        )


def load_adapter(
    model: M, directory: str | os.PathLike[str], adapter_name: str | None = None, *, check_base: bool = True
) -> M:
    """Inject a saved adapter into a plain base model, in place; it then predicts bit for bit as when saved.

    >>> model = timm.create_model("resnet50", pretrained=True, num_classes=1)
    >>> convlora.load_adapter(model, "tumour/")

    Args:
        model: the base as it was built for training, without an adapter.
        directory: what :func:`save_adapter` wrote.
        adapter_name: another name for the adapter; default the saved one.
        check_base: refuse a base whose tensors differ from those that the adapter was trained on. Tensors in
            another dtype than then are not compared. False loads onto any base of the same architecture.

    Returns:
        The same object; factors and head are trainable as after :func:`convlora.inject`.

    Raises:
        CheckpointError: no adapter there, a damaged file, or another base; what differs is named.
        StateError: the model carries an adapter already.

    Whatever is raised, the model is as it was.
    """
    check_model(model)
    check_plain(model)
    manifest = read_manifest(Path(directory))
    plan = manifest.plan if adapter_name is None else replace(manifest.plan, adapter_name=adapter_name)
    check_values(plan.rank, plan.alpha, plan.norm, plan.dropout, plan.adapter_name)
    check_fits(manifest, model, check_base)
    tensors = _read_tensors(manifest)
    try:
        apply(plan, model)
        _copy_tensors(tensors, manifest, model)
    except BaseException:
        if list(injections(model)):
            remove(model)
        raise
    return model


def _moved_buffers(root: nn.Module, injection: Injection) -> set[str]:
    """Keys of the base's persistent buffers whose numbers are no longer the base's."""
    names = {module: name for name, module in root.named_modules()}
    moved = set()
    for taken in injection.taken:
        now = taken.place.get(taken.name)
        saved = not taken.is_parameter and taken.name not in taken.module._non_persistent_buffers_set
        if now is None or not saved or taken.module not in names:
            continue
        if not torch.equal(now, taken.tensor.to(now.device, now.dtype)):
            moved.add(dotted(names[taken.module], taken.name))
    return moved


def _check_nothing_lost(root: nn.Module, injection: Injection, own: set[str]) -> None:
    factors = {id(p) for layer in injection.layers for lora in adapters(layer) for p in lora.parameters()}
    for name, parameter in root.named_parameters():
        if parameter.requires_grad and name not in own and id(parameter) not in factors:
            raise StateError(
                f"{name} requires a gradient but belongs to the base, which is not saved. Name its module in "
                "modules_to_save when you inject, or freeze it with requires_grad_(False). Nothing was written."
            )


def _adapter_state(model: nn.Module, injection: Injection, own: set[str]) -> State:
    """Every tensor of the adapter by its key in the file: the model's own tensors, not copies."""
    state = tensors_of(model)
    return dict(_factors(injection)) | {key: state[key] for key in state if key in own}


def _factors(injection: Injection) -> Iterator[tuple[str, Tensor]]:
    for plan, layer in zip(injection.plan.layers, injection.layers, strict=True):
        lora = next(adapters(layer))
        for (key, shape), factor in zip(factor_shapes(plan).items(), (lora.lora_A, lora.lora_B), strict=True):
            yield key, factor.view(shape)


def _base_digests(root: nn.Module, injection: Injection, own: set[str]) -> dict[str, str]:
    base = {id(taken.place.get(taken.name)): taken.tensor for taken in injection.taken}
    base |= {id(layer._parameters["weight"]): base_weight(layer) for layer in injection.layers}
    state = tensors_of(root, keep_vars=True)
    return {key: digest(base.get(id(state[key]), state[key])) for key in base_keys(state, own)}


def _for_disk(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of ``path`` when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_tensors(manifest: Manifest) -> State:
    try:
        with safe_open(manifest.file, framework="pt") as opened:
            tensors = {key.removeprefix(PREFIX): opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as cause:
        raise CheckpointError(f"{manifest.file} is damaged ({cause}); get it again.") from cause
    damaged = [key for key, tensor in tensors.items() if digest(tensor) != manifest.adapter.get(key)]
    if damaged:
        raise CheckpointError(f"{manifest.file} is damaged: {damaged[0]} is not what was saved; get the file again.")
    return tensors


def _copy_tensors(tensors: State, manifest: Manifest, model: nn.Module) -> None:
    _, injection = the_injection(model)
    own = own_keys(model, manifest.plan, manifest.buffers)
    with torch.inference_mode(False), torch.no_grad():
        for plan, layer in zip(manifest.plan.layers, injection.layers, strict=True):
            key = next(iter(factor_shapes(plan)))
            next(adapters(layer)).to(tensors[key].dtype)  # as trained: another dtype would predict other bits
        for key, place in _adapter_state(model, injection, own).items():
            place.copy_(tensors[key])
