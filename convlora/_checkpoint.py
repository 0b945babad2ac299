"""Adapters on disk: safetensors and JSON, never pickle.

``adapter_model.safetensors`` is whole in itself: factors, modules trained in full, moved norm statistics, and in its
header the manifest (the plan, and a digest of every tensor of the base). One file means one atomic rename: a save that
is cut short leaves the old adapter readable. ``adapter_config.json`` beside it is for people and for Hugging Face
peft, whose key and field names both files use.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ._inject import apply, remove, the_injection
from ._layer import adapters
from ._manifest import FORMAT, TENSORS, Manifest, base_keys, check_fits, digest, own_keys, read_manifest
from ._peft_format import PREFIX, factor_shapes, peft_config
from ._state import Injection, check_plain
from .errors import CheckpointError

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
        StateError: the model holds no adapter, or several injected parts.
    """
    root, injection = the_injection(model)
    tensors = {PREFIX + key: _for_disk(tensor) for key, tensor in _adapter_state(root, injection).items()}
    manifest = {"format": FORMAT, "plan": injection.plan.to_json(), "base": _base_digests(root, injection)}
    header = {"format": "pt", "convlora": json.dumps(manifest)}
    config = json.dumps(peft_config(root, injection), indent=2) + "\n"
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    _write_atomically(path / TENSORS, lambda file: save_file(tensors, file, metadata=header))
    _write_atomically(path / CONFIG, lambda file: Path(file).write_text(config, encoding="utf-8"))
    return path


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
            another dtype than then are not compared. False loads onto any base of the same shapes.

    Returns:
        The same object; factors and head are trainable as after :func:`convlora.inject`.

    Raises:
        CheckpointError: no adapter there, a damaged file, or another base; every mismatch is named.
        StateError: the model carries an adapter already.

    Whatever is raised, the model is as it was.
    """
    check_plain(model)
    manifest = read_manifest(Path(directory))
    plan = manifest.plan if adapter_name is None else replace(manifest.plan, adapter_name=adapter_name)
    check_fits(manifest, model, check_base)
    tensors = _read_tensors(manifest)
    apply(plan, model)
    try:
        _copy_tensors(tensors, model)
    except BaseException:
        remove(model)
        raise
    return model


def _adapter_state(model: nn.Module, injection: Injection) -> State:
    """Every tensor of the adapter by its key in the file: the model's own tensors, not copies."""
    state, own = model.state_dict(), own_keys(model, injection.plan)
    return dict(_factors(injection)) | {key: state[key] for key in state if key in own}


def _factors(injection: Injection) -> Iterator[tuple[str, Tensor]]:
    for plan, layer in zip(injection.plan.layers, injection.layers, strict=True):
        lora = next(adapters(layer))
        for (key, shape), factor in zip(factor_shapes(plan).items(), (lora.lora_A, lora.lora_B), strict=True):
            yield key, factor.view(shape)


def _base_digests(model: nn.Module, injection: Injection) -> dict[str, str]:
    merged = {id(t.module._parameters[t.name]): t.tensor for t in injection.merged}
    state = model.state_dict(keep_vars=True)
    keys = base_keys(state, own_keys(model, injection.plan))
    return {key: digest(merged.get(id(state[key]), state[key])) for key in keys}


def _for_disk(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()


def _write_atomically(path: Path, write: Callable[[str], object]) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:  # noqa: PTH123
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _read_tensors(manifest: Manifest) -> State:
    try:
        with safe_open(manifest.file, framework="pt") as opened:
            return {key.removeprefix(PREFIX): opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as cause:
        raise CheckpointError(f"{manifest.file} is damaged ({cause}).") from cause


@torch.no_grad()
def _copy_tensors(tensors: State, model: nn.Module) -> None:
    _, injection = the_injection(model)
    for key, place in _adapter_state(model, injection).items():
        place.copy_(tensors[key])
