"""What a file says of its adapter, and whether it fits a model: read and checked before a tensor is touched."""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ._layer import CHILD
from ._peft_format import PREFIX, factor_shapes
from ._plan import LayerPlan, Plan
from ._planner import geometry
from .errors import CheckpointError

TENSORS = "adapter_model.safetensors"
FORMAT = 1
SHOWN = 8
"""How many mismatches an error lists."""


@dataclass(frozen=True)
class Manifest:
    """What a file says of its adapter, read without its tensors."""

    file: Path
    plan: Plan
    base: Mapping[str, str]
    """Digest of every tensor of the base, by state-dict key."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shape of every tensor in the file, by key without peft's prefix."""


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a saved adapter.

    Raises:
        CheckpointError: missing, damaged, not written by convlora, or written by a newer one.
    """
    file = directory / TENSORS
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist; give the directory that convlora.save_adapter wrote.")
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            shapes = {key.removeprefix(PREFIX): tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as cause:
        raise CheckpointError(f"{file} is damaged or no safetensors file ({cause}).") from cause
    if "convlora" not in header:
        raise CheckpointError(f"{file} holds no convlora manifest; it was not written by convlora.save_adapter.")
    try:
        data = json.loads(header["convlora"])
        if data["format"] != FORMAT:
            raise CheckpointError(f"{file} is of format {data['format']}, this convlora reads {FORMAT}; update it.")
        return Manifest(file, Plan.from_json(data["plan"]), dict(data["base"]), shapes)
    except (ValueError, TypeError, KeyError, AttributeError) as cause:
        if isinstance(cause, CheckpointError):
            raise
        raise CheckpointError(f"{file}: its manifest cannot be read ({cause!r}).") from cause


def own_keys(model: nn.Module, plan: Plan) -> set[str]:
    """Keys of the model's state dict that belong to the adapter besides its factors: the head, tracked norms."""
    modules = dict(model.named_modules(remove_duplicate=False))
    names = (*plan.modules_to_save, *(plan.norms if plan.norm == "track" else ()))
    owned = {module for name in names for module in modules[name].modules()}
    return {key for key in model.state_dict() if modules.get(key.rpartition(".")[0]) in owned}


def base_keys(state: Mapping[str, Tensor], own: set[str]) -> list[str]:
    """Keys of the base: all but the adapter's."""
    return [key for key in state if key not in own and f".{CHILD}." not in f".{key}"]


def digest(tensor: Tensor) -> str:
    """Dtype and a 64-bit hash of a tensor's numbers, wherever it lies; a meta tensor holds none."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_meta:
        return f"{dtype}:"
    host = tensor.detach().cpu().contiguous()
    size = host.numel() * host.element_size()
    data = (ctypes.c_char * size).from_address(host.data_ptr()) if size else b""
    return f"{dtype}:{hashlib.blake2b(data, digest_size=8).hexdigest()}"


def check_fits(manifest: Manifest, model: nn.Module, check_base: bool) -> None:
    """Raise one error that names every difference between the file and the model."""
    faults = list(_layer_faults(manifest.plan, model)) or list(_tensor_faults(manifest, model))
    remedy = "Build the model as it was trained (same architecture, num_classes) and load again."
    if not faults and check_base:
        faults = list(_base_faults(manifest, model))
        remedy = "Load the same pretrained weights first, or pass check_base=False to use it on this base all the same."
    if faults:
        more = [f"  and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
        title = f"{manifest.file}: this adapter was made for another base model:"
        raise CheckpointError("\n".join([title, *faults[:SHOWN], *more, f"{remedy} Nothing was changed."]))


def _layer_faults(plan: Plan, model: nn.Module) -> Iterator[str]:
    modules = dict(model.named_modules(remove_duplicate=False))
    for layer in plan.layers:
        module = modules.get(layer.name)
        weight = None if module is None else module._parameters.get("weight")
        if module is None or weight is None:
            yield f"  {layer.name}: {layer.kind} in the file, no such layer in the model"
        elif found := _differences(layer, module, tuple(weight.shape)):
            yield f"  {layer.name}: {found}"
    for name in (*plan.modules_to_save, *plan.norms):
        if name not in modules:
            yield f"  {name}: no such module in the model"


def _differences(layer: LayerPlan, module: nn.Module, shape: tuple[int, ...]) -> str:
    here = {"kind": type(module).__name__, "weight": shape, **geometry(module)}
    file = {"kind": layer.kind, "weight": layer.weight_shape, **layer.geometry}
    return "; ".join(
        f"{key} {file.get(key)} in the file, {here.get(key)} in the model"
        for key in dict.fromkeys([*file, *here])
        if file.get(key) != here.get(key)
    )


def _tensor_faults(manifest: Manifest, model: nn.Module) -> Iterator[str]:
    """Differences between what the file holds and what its plan promises and the model has room for."""
    state = model.state_dict()
    expected = {key: shape for layer in manifest.plan.layers for key, shape in factor_shapes(layer).items()}
    expected |= {key: tuple(state[key].shape) for key in state if key in own_keys(model, manifest.plan)}
    for key in dict.fromkeys([*expected, *manifest.shapes]):
        there, here = manifest.shapes.get(key), expected.get(key)
        if there != here:
            there_or, here_or = ("nothing" if shape is None else shape for shape in (there, here))
            yield f"  {key}: {there_or} in the file, {here_or} in the model"


def _base_faults(manifest: Manifest, model: nn.Module) -> Iterator[str]:
    state = model.state_dict()
    here = base_keys(state, own_keys(model, manifest.plan))
    for key in dict.fromkeys([*manifest.base, *here]):
        if key not in here or key not in manifest.base:
            yield f"  {key}: only in the {'model' if key in here else 'file'}'s base"
            continue
        (dtype_there, _, there), (dtype_here, _, found) = (
            text.partition(":") for text in (manifest.base[key], digest(state[key]))
        )
        if dtype_there == dtype_here and there and found and there != found:
            yield f"  {key}: the base's numbers differ"
