"""What a file says of its adapter, and whether it fits a model: read and checked before a tensor is touched."""

from __future__ import annotations

import ctypes
import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ._checks import check_plan
from ._computed import weight_shape
from ._files import SHOWN, TensorFile, plain, strict_json
from ._layer import CHILD, Adapters, LoRA
from ._norms import keeps_statistics
from ._peft_format import PREFIX, dotted, factor_shapes
from ._places import BASE, Place
from ._plan import LayerPlan, Plan
from ._planner import geometry
from ._state import RECORD, Injection
from ._swap import original_class
from .errors import CheckpointError, TargetError

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
FORMAT = 1


@dataclass(frozen=True)
class Form:
    """What a tensor must have to take another's numbers: its shape, and whether it holds floats, integers, ..."""

    shape: tuple[int, ...]
    kind: str

    def __str__(self) -> str:
        return str(self.shape) if self.kind == "float" else f"{self.shape} {self.kind}"


@dataclass(frozen=True)
class Manifest:
    """What a file says of its adapter, read without its tensors."""

    file: Path
    plan: Plan
    base: Mapping[str, str]
    """Digest of every tensor of the base, by state-dict key."""
    adapter: Mapping[str, str]
    """Digest of every tensor in the file, by key without peft's prefix."""
    buffers: frozenset[str]
    """Keys of buffers that training moved, besides those of the modules that the plan names."""
    forms: Mapping[str, Form]
    """Every tensor in the file, by key without peft's prefix."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """How good it is, as whoever saved it said."""


def is_own(file: TensorFile) -> bool:
    """Whether convlora wrote it."""
    return "convlora" in file.metadata


def read_manifest(file: TensorFile) -> Manifest:
    """The manifest of a saved adapter.

    Raises:
        CheckpointError: damaged, not written by convlora, or written by a newer one.
    """
    if not is_own(file):
        raise CheckpointError(f"{file.path} holds no convlora manifest; it was not written by convlora.save_adapter.")
    strange = [key for key in file.entries if not key.startswith(PREFIX)]
    if strange:
        raise CheckpointError(
            f"{file.path}: tensor '{plain(strange[0])}' belongs to no adapter (its name lacks {PREFIX!r})."
        )
    forms = {key.removeprefix(PREFIX): Form(e.shape, _kind(e.dtype)) for key, e in file.entries.items()}
    return _parse(file.path, file.metadata["convlora"], forms)


def _parse(file: Path, text: str, forms: Mapping[str, Form]) -> Manifest:
    try:
        data = strict_json(text)
        version = data["format"]
        if type(version) is int and version == FORMAT:
            plan = Plan.from_json(data["plan"])
            check_plan(plan)
            base, adapter = (
                {str(key): str(value) for key, value in data[name].items()} for name in ("base", "adapter")
            )
            metrics = {str(name): float(value) for name, value in data.get("metrics", {}).items()}
            return Manifest(file, plan, base, adapter, frozenset(map(str, data["buffers"])), forms, metrics)
    except TargetError as cause:
        raise CheckpointError(f"{file}: its manifest is damaged: {plain(str(cause))}") from cause
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as cause:
        raise CheckpointError(f"{file}: its manifest cannot be read ({plain(repr(cause))}).") from cause
    raise CheckpointError(f"{file} is of format {plain(str(version))}, this convlora reads {FORMAT}; update it.")


def tensors_of(model: nn.Module, *, keep_vars: bool = False) -> dict[str, Tensor]:
    """The state dict without what is no tensor (``get_extra_state`` may return anything)."""
    state = model.state_dict(keep_vars=keep_vars)
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def tensors_as(model: nn.Module, owner: str) -> dict[str, Tensor]:
    """The state dict as it is while this owner, an adapter or ``BASE``, has its tensors in place; no copies."""
    state: dict[str, Tensor | None] = dict(tensors_of(model, keep_vars=True))
    places = places_of(model)
    # By their tensors those that a hook on the state dict has given other keys.
    unnamed = {id(place.now): place for place in places.values() if place.now is not None}
    for key, tensor in state.items():
        place = places.get(key, unnamed.get(id(tensor)))
        state[key] = tensor if place is None else place.of(owner)
    # A buffer that is None here is in no state dict, and may be a tensor for another owner.
    state |= {key: place.of(owner) for key, place in places.items() if place.now is None and place.is_saved}
    return {key: tensor for key, tensor in state.items() if tensor is not None}


def places_of(model: nn.Module) -> dict[str, Place]:
    """The model's places, if it has any, by state-dict key; those of shared modules under each name."""
    record = vars(model).get(RECORD)
    inside: dict[nn.Module, list[Place]] = {}
    for place in record.places if isinstance(record, Injection) else ():
        inside.setdefault(place.module, []).append(place)
    modules = model.named_modules(remove_duplicate=False)
    return {dotted(name, place.name): place for name, module in modules for place in inside.get(module, ())}


def own_keys(model: nn.Module, plan: Plan, buffers: Iterable[str]) -> set[str]:
    """Keys of the state dict that belong to the adapter besides its factors.

    All of the modules trained in full, tracked norm layers, the biases and the buffers named.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = {module for name in plan.modules_to_save for module in modules[name].modules()}
    owners |= {modules[name] for name in plan.norms if plan.norm == "track"}
    owners = {module for module in owners if not isinstance(module, (Adapters, LoRA))}  # another adapter's factors
    inside = {key for key in tensors_of(model) if modules.get(key.rpartition(".")[0]) in owners}
    with_bias = {modules[name] for name in plan.biases}
    return inside | {dotted(n, "bias") for n, m in modules.items() if m in with_bias} | set(buffers)


def base_keys(state: Mapping[str, Tensor], own: set[str]) -> list[str]:
    """Keys of the base: all but the adapter's and any adapter's factors."""
    return [key for key in state if key not in own and not _FACTOR.fullmatch(key)]


_FACTOR = re.compile(rf"(.*\.)?{CHILD}\.[^.]+\.lora_(A|B|A0|B0|magnitude)")


def digest(tensor: Tensor) -> str:
    """Dtype and a 64-bit hash of a tensor's numbers, wherever it lies."""
    if is_traceable_wrapper_subclass(tensor):  # a quantized weight is several tensors
        inner = "|".join(digest(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        return f"{type(tensor).__name__}:{hashlib.blake2b(inner.encode(), digest_size=8).hexdigest()}"
    host = tensor.detach().cpu().contiguous()
    size = host.numel() * host.element_size()
    data = (ctypes.c_char * size).from_address(host.data_ptr()) if size else b""
    return f"{str(tensor.dtype).removeprefix('torch.')}:{hashlib.blake2b(data, digest_size=8).hexdigest()}"


def fingerprint(base: Mapping[str, str]) -> str:
    """One short digest of a base, 16 hex digits, over the digests of its tensors by key; their order is no matter."""
    text = "\n".join(f"{key} {each}" for key, each in sorted(base.items()))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def check_fits(manifest: Manifest, model: nn.Module, check_base: bool) -> None:
    """Raise one error that names the differences between the file and the model."""
    faults, state = [*_layer_faults(manifest.plan, model)], tensors_as(model, BASE)
    faults = faults or [*_tensor_faults(manifest, model, state), *_structure_faults(manifest, model, state)]
    remedy = "Build the model as it was trained (same architecture, num_classes) and load again."
    if not faults and check_base:
        faults = list(_number_faults(manifest, state))
        remedy = "Load the same pretrained weights first, or pass check_base=False to use it on this base all the same."
    if faults:
        more = [f"  and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
        title = f"{manifest.file}: this adapter was made for another base model:"
        shown = map(plain, faults[:SHOWN])
        raise CheckpointError("\n".join([title, *shown, *more, f"{remedy} Nothing was changed."]))


def _layer_faults(plan: Plan, model: nn.Module) -> Iterator[str]:
    modules = dict(model.named_modules(remove_duplicate=False))
    saved = {module for name in plan.modules_to_save if name in modules for module in modules[name].modules()}
    adapted: set[nn.Module] = set()
    for layer in plan.layers:
        module = modules.get(layer.name)
        shape = () if module is None else weight_shape(module)
        if module is None or not shape:
            yield f"  {layer.name}: {layer.kind} in the file, no such layer in the model"
        elif module in saved:
            yield f"  {layer.name}: adapted and trained in full at once in the file"
        elif module in adapted:
            yield f"  {layer.name}: a layer that the file adapts under another name already"
        elif found := _differences(layer, module, shape):
            yield f"  {layer.name}: {found}"
        elif layer.rank > highest_rank(shape):
            yield f"  {layer.name}: rank {layer.rank} in the file, for a weight {shape} at most {highest_rank(shape)}"
        if module is not None:
            adapted.add(module)
    for name in (*plan.modules_to_save, *plan.norms):
        if name not in modules:
            yield f"  {name}: no such module in the model"
    for name in plan.norms:
        if name in modules and not keeps_statistics(modules[name]):
            yield f"  {name}: a norm with statistics in the file, a {type(modules[name]).__name__} in the model"
    for name in plan.biases:
        if name not in modules or modules[name]._parameters.get("bias") is None:
            yield f"  {name}.bias: no such bias in the model"


def highest_rank(shape: tuple[int, ...]) -> int:
    """The largest rank that is read: more than anyone trains, and no more memory than some layers of the kind."""
    return max(1024, shape[0], math.prod(shape[1:]))


def _differences(layer: LayerPlan, module: nn.Module, shape: tuple[int, ...]) -> str:
    here = {"kind": original_class(module).__name__, "weight": shape, **geometry(module)}
    file = {"kind": layer.kind, "weight": layer.weight_shape, **layer.geometry}
    return "; ".join(
        f"{key} {file.get(key)} in the file, {here.get(key)} in the model"
        for key in dict.fromkeys([*file, *here])
        if file.get(key) != here.get(key)
    )


def _tensor_faults(manifest: Manifest, model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[str]:
    """Differences between what the file holds and what its plan promises and the model has room for."""
    plan = manifest.plan
    modules = model.named_modules(remove_duplicate=False)
    slots = {dotted(name, buffer): now for name, m in modules for buffer, now in m._buffers.items()}
    buffers = {key for key in manifest.buffers & slots.keys() if slots[key] is None or key in state}
    yield from (f"  {key}: no such buffer in the model" for key in sorted(manifest.buffers - buffers))
    expected = {key: Form(shape, "float") for p in plan.layers for key, shape in factor_shapes(p).items()}
    for key in own_keys(model, plan, buffers):
        tensor = state.get(key)  # a buffer that is None takes what there is
        expected[key] = manifest.forms.get(key, Form((), "float")) if tensor is None else form_of(tensor)
    for key in sorted({*expected, *manifest.forms}):
        there, here = manifest.forms.get(key, "nothing"), expected.get(key, "nothing")
        if there != here:
            yield f"  {key}: {there} in the file, {here} in the model"


def _structure_faults(manifest: Manifest, model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[str]:
    here = base_keys(state, own_keys(model, manifest.plan, manifest.buffers))
    yield from (f"  {key}: only in the model's base" for key in here if key not in manifest.base)
    yield from (f"  {key}: only in the file's base" for key in manifest.base if key not in here)


def _number_faults(manifest: Manifest, state: Mapping[str, Tensor]) -> Iterator[str]:
    for key, text in manifest.base.items():
        there, here = text.split(":"), digest(state[key]).split(":")
        if there[0] == here[0] and there != here:
            yield f"  {key}: the base's numbers differ"


def form_of(tensor: Tensor) -> Form:
    """The form that a tensor has."""
    return Form(tuple(tensor.shape), _kind(tensor.dtype))


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "float" if dtype.itemsize > 1 else "float8"  # in which nothing is computed
    return "complex" if dtype.is_complex else "bool" if dtype == torch.bool else "integer"
