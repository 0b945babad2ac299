"""Files of diffusers, both ways: one ``.safetensors`` file with peft's names, and peft's configuration in its header.

``unet.save_lora_adapter`` writes the names of one model. ``save_lora_weights`` of a pipeline writes those of several,
every key and every field of the configuration behind the name of its model: ``unet.``, ``text_encoder.``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from .._model.state import Adapter
from .._model.targets import dotted
from ..errors import CheckpointError
from .files import TensorFile, brief, strict_json
from .peft_format import PREFIX, faults_for_any_peft, faults_for_stock_peft, peft_config
from .peft_methods import MAGNITUDE, STOCK, type_of
from .peft_reader import from_peft_tensors
from .rebuilt import Found, of_model

METADATA = "lora_adapter_metadata"
"""The header's text that holds the configuration."""
MODELS = tuple(
    f"{each}." for each in ("unet", "transformer", "controlnet", *("text_encoder" + n for n in ("", "_2", "_3")))
)
"""What a pipeline calls its models."""
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_OTHERS = {
    ".lora.down.weight": _DOWN,
    ".lora.up.weight": _UP,
    ".lora_linear_layer.down.weight": _DOWN,
    ".lora_linear_layer.up.weight": _UP,
}
"""Endings that older releases, and scripts that are written for them, use."""


def is_diffusers(file: TensorFile) -> bool:
    """Whether it is such a file: by its header, or by its names, which are not those of peft's own files."""
    if METADATA in file.metadata:
        return True
    return any(key.endswith((_DOWN, *_OTHERS)) and not key.startswith(PREFIX) for key in file.entries)


def from_diffusers_tensors(
    metadata: Mapping[str, str], tensors: Mapping[str, Tensor], root: nn.Module, origin: str, prefix: str | None
) -> Found:
    """The adapter in such a file, for this model, of several the one with this prefix.

    Raises:
        CheckpointError: it is not for this model, or none that predicts the same here; every reason is named.
    """
    known = [each for each in MODELS if each[:-1] not in root._modules] or MODELS
    names, chosen = of_model(tensors, known, prefix, origin)
    found = {_renamed(name): tensors[key] for key, name in names.items()}
    return from_peft_tensors(_config(metadata, found, chosen, origin), found, root, origin)


def to_diffusers_tensors(
    model: nn.Module, adapter: Adapter, tensors: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """The tensors of such a file for an adapter's factors, the header's texts, and why some have no place there.

    lora_B has the scaling in it, and alpha is the rank: ``load_lora_adapter`` reads the configuration of a file only
    where it is told that it is safetensors, and takes alpha for the rank where it has none.

    Args:
        model: the injected model.
        adapter: one of its adapters.
        tensors: its tensors, by their keys in convlora's file.
        prefix: what a pipeline calls the model; empty for a file of the model alone.
    """
    faults = [*faults_for_any_peft(model, adapter), *faults_for_stock_peft(adapter)]
    if type_of(adapter.plan) != STOCK:
        faults.append(f"changed by {adapter.plan.method}; diffusers reads LoRA")
    elif adapter.plan.use_dora:
        faults.append("DoRA, whose magnitudes load_lora_adapter of diffusers leaves out")
    if faults:
        return {}, {}, faults
    plan, found = adapter.plan, dict(tensors)
    for layer in plan.layers:
        found[dotted(layer.name, _UP[1:])] = found[dotted(layer.name, _UP[1:])] * layer.whole_scaling
    layers = tuple(replace(layer, scaling=1.0, strength=1.0) for layer in plan.layers)
    plain = replace(adapter, plan=replace(plan, alpha=float(plan.rank), use_rslora=False, layers=layers))
    config = {dotted(prefix, field): value for field, value in peft_config(model, plain).items()}
    return {dotted(prefix, key): tensor for key, tensor in found.items()}, {METADATA: json.dumps(config)}, []


def _renamed(key: str) -> str:
    end = next((end for end in _OTHERS if key.endswith(end)), "")
    return key.removesuffix(end) + _OTHERS[end] if end else key


def _config(metadata: Mapping[str, str], tensors: Mapping[str, Tensor], prefix: str, origin: str) -> dict[str, Any]:
    """peft's fields for a model; where the file has none for it, alpha is the rank, as diffusers takes it."""
    try:
        fields = strict_json(metadata.get(METADATA, "{}"))
        if not isinstance(fields, dict):
            raise ValueError("it is no JSON object")
    except (ValueError, RecursionError) as cause:
        raise CheckpointError(f"{origin}: {METADATA} cannot be read ({brief(cause)}). Nothing was changed.") from cause
    own = {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}
    if own:
        return {"peft_type": STOCK, **own}
    ranks = {
        key.removesuffix(_DOWN): len(tensor) for key, tensor in tensors.items() if key.endswith(_DOWN) and tensor.ndim
    }
    return {
        "peft_type": STOCK,
        "lora_alpha": max(ranks.values(), default=1) or 1,
        "alpha_pattern": {f"^{re.escape(name)}$": max(rank, 1) for name, rank in ranks.items()},
        "use_dora": any(key.endswith(MAGNITUDE) for key in tensors),
    }
