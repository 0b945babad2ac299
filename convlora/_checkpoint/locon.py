"""Reading LoCon files: LoRA for convolutions as kohya's sd-scripts and LyCORIS (``algo="lora"``) write it.

A layer ``down.block.0.conv1`` has the tensors ``lora_unet_down_block_0_conv1.lora_down.weight`` (our lora_A),
``.lora_up.weight`` (our lora_B) and ``.alpha``. The names are flattened, so they are looked up among the model's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .._layer.computed import weight_shape
from .._model.targets import is_adaptable, modules_of
from .fitting import highest_rank
from .peft_reader import unlike_peft
from .rebuilt import Factors, Found, by_any_name, layer_fault, refuse

PREFIXES = ("lycoris_", "lora_unet_", "lora_te1_", "lora_te2_", "lora_te_", "lora_")
PARTS = ("lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha")
REASONS = {
    "dora_scale": "DoRA's magnitudes are not read",
    "diff": "a change in full, not of low rank",
    "hada": "LoHa, not LoRA",
    "lokr": "LoKr, not LoRA",
}
_KEY = re.compile(r"([^.]+)\.(.+)")


def is_locon(keys: Iterable[str]) -> bool:
    """Whether these are the keys of such a file."""
    return any(key.startswith(PREFIXES) and ".lora_down." in key for key in keys)


def from_locon_tensors(tensors: Mapping[str, Tensor], root: nn.Module, origin: str) -> Found:
    """The adapter in a LoCon file, for this model.

    Raises:
        CheckpointError: a layer is not in the model, could be several, or is none that predicts the same here.
    """
    flat, named = _flattened(root), by_any_name(root)
    groups: dict[str, dict[str, Tensor]] = {}
    faults = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or match[2] not in PARTS:
            faults.append(f"{key}: {_reason(key)}")
        else:
            groups.setdefault(match[1], {})[match[2]] = tensor
    factors: dict[str, Factors] = {}
    for name, parts in groups.items():
        layer, fault = _resolve(name, flat)
        unlike = _unlike_lycoris if name.startswith("lycoris_") else unlike_peft  # kohya's own is a branch like peft's
        fault = fault or layer_fault(layer, named, unlike, "what wrote the file")
        if not fault and not {"lora_down.weight", "lora_up.weight"} <= parts.keys():
            fault = f"{name}: one of lora_down and lora_up is missing"
        if not fault and not _core_fits(parts, weight_shape(named[layer].module)):
            fault = f"{name}: its Tucker core {tuple(parts['lora_mid.weight'].shape)} fits no factor beside it"
        alpha = parts.get("alpha")
        if not fault and alpha is not None and (alpha.numel() != 1 or alpha.is_complex()):
            fault = f"{name}: alpha of shape {tuple(alpha.shape)}, {alpha.dtype}; it must be one real number"
        if not fault and min(parts["lora_down.weight"].ndim, parts["lora_up.weight"].ndim) < 2:
            fault = f"{name}: lora_down and lora_up must be matrices or kernels"
        if not fault and layer in factors:
            fault = f"{name}: {layer} is in the file twice"
        if fault:
            faults.append(fault)
        else:
            factors[layer] = _factors(parts, weight_shape(named[layer].module))
    refuse(origin, faults)
    rank = max((f.lora_A.shape[0] for f in factors.values() if f.lora_A.ndim), default=1)
    return Found(origin, factors, rank, float(rank))


def _reason(key: str) -> str:
    return next((reason for part, reason in REASONS.items() if part in key), "no part of a LoRA adapter")


def _flattened(root: nn.Module) -> dict[str, list[str]]:
    """The names of the model's layers by how such files write them; some names may fall together."""
    flat: dict[str, list[str]] = {}
    for n in modules_of(root):
        if is_adaptable(n.module):
            for name in n.names:
                flat.setdefault(name.replace(".", "_"), []).append(name)
    return flat


def _resolve(written: str, flat: Mapping[str, list[str]]) -> tuple[str, str]:
    """A layer's name, or else what is wrong with the written one."""
    prefix = next((p for p in PREFIXES if written.startswith(p)), "")
    found = flat.get(written.removeprefix(prefix), [])
    if len(found) == 1:
        return found[0], ""
    if found:
        return "", f"{written}: could be {' or '.join(found)}"
    also = " (a file for several models has to be split by prefix)" if prefix.startswith("lora_") else ""
    return "", f"{written}: no such layer in the model{also}"


def _unlike_lycoris(layer: nn.Module) -> str:
    """What LyCORIS, which computes with W + ΔW, drops of a convolution."""
    mode = cast(_ConvNd, layer).padding_mode
    return f"padding_mode {mode!r}, which LyCORIS drops" if mode != "zeros" else ""


def _core_fits(parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> bool:
    """Whether core and lora_down are of the layer's shape, so that their product is no larger than a factor."""
    core, down = parts.get("lora_mid.weight"), parts["lora_down.weight"]
    if core is None:
        return True
    if core.ndim != len(shape) or down.ndim < 2 or down.flatten(1).shape != (core.shape[1], shape[1]):
        return False
    return core.shape[2:] == shape[2:] and max(core.shape[:2]) <= highest_rank(shape)


def _factors(parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Factors:
    """The factors in our shapes; a Tucker decomposition's core is multiplied into lora_A, which loses nothing."""
    down, up = parts["lora_down.weight"], parts["lora_up.weight"]
    core = parts.get("lora_mid.weight")
    if core is not None:
        wide = torch.promote_types(core.dtype, torch.float32)
        down = torch.einsum("rs...,si->ri...", core.to(wide), down.to(wide).flatten(1))
    rank = down.shape[0]
    alpha = float(parts["alpha"]) if "alpha" in parts and not parts["alpha"].is_meta else 0.0
    return Factors(_as(down, (rank, *shape[1:])), _as(up, (shape[0], rank, *[1] * len(shape[2:]))), alpha or rank)


def _as(factor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A 1×1 convolution's factors are also written as matrices, and the other way round."""
    same = [n for n in factor.shape if n != 1] == [n for n in shape if n != 1]
    return factor.reshape(shape) if same else factor
