"""Reads and writes diffusers' files: one ``.safetensors`` file with peft's keys and, in its header, configuration.

``unet.save_lora_adapter`` writes one model's adapter. A pipeline's ``save_lora_weights`` writes several models'
adapters; each key and each field of the configuration then begins with the model's name, ``unet.`` or
``text_encoder.``.
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
"""The metadata entry that holds peft's configuration."""
MODELS = tuple(
    f"{each}." for each in ("unet", "transformer", "controlnet", *("text_encoder" + n for n in ("", "_2", "_3")))
)
"""The names that pipelines give their models."""
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_OTHERS = {
    ".lora.down.weight": _DOWN,
    ".lora.up.weight": _UP,
    ".lora_linear_layer.down.weight": _DOWN,
    ".lora_linear_layer.up.weight": _UP,
}
"""Key endings of older releases of diffusers, and what newer releases write."""


def is_diffusers(file: TensorFile) -> bool:
    """Return whether a file is diffusers', from its metadata or from its keys, which lack peft's prefix."""
    if METADATA in file.metadata:
        return True
    return any(key.endswith((_DOWN, *_OTHERS)) and not key.startswith(PREFIX) for key in file.entries)


def from_diffusers_tensors(
    metadata: Mapping[str, str], tensors: Mapping[str, Tensor], root: nn.Module, origin: str, prefix: str | None
) -> Found:
    """Return the adapter in such a file, or the one with this prefix if the file holds several.

    Raises:
        CheckpointError: the adapter does not fit this model or would predict something else here; every reason is
            named.
    """
    known = [each for each in MODELS if each[:-1] not in root._modules] or MODELS
    names, chosen = of_model(tensors, known, prefix, origin)
    found = {_renamed(name): tensors[key] for key, name in names.items()}
    return from_peft_tensors(_config(metadata, found, chosen, origin), found, root, origin)


def to_diffusers_tensors(
    model: nn.Module, adapter: Adapter, tensors: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """Return the tensors of a diffusers file by key, its metadata, and why the file cannot hold the adapter.

    lora_B is written with the scaling multiplied in, and alpha equals the rank. Then the file is right both with its
    configuration and without: ``load_lora_adapter`` reads the configuration only with ``use_safetensors=True``, and
    else takes alpha = rank.

    Args:
        model: the injected model.
        adapter: one of its adapters.
        tensors: the adapter's tensors, by their keys in convlora's file.
        prefix: the pipeline's name for the model; empty for a file of one model.
    """
    faults = [*faults_for_any_peft(model, adapter), *faults_for_stock_peft(adapter)]
    if type_of(adapter.plan) != STOCK:
        faults.append(f"changed by {adapter.plan.method}; diffusers reads only LoRA")
    elif adapter.plan.use_dora:
        faults.append("DoRA, whose magnitudes diffusers' load_lora_adapter ignores")
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
    """Return peft's configuration for the model; if the file has none, alpha is the rank, as in diffusers."""
    try:
        fields = strict_json(metadata.get(METADATA, "{}"))
        if not isinstance(fields, dict):
            raise ValueError("it is not a JSON object")
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
