"""Checks whether an adapter fits a model: its layers, its tensors, and the base's weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn

from .._layer.computed import weight_shape
from .._layer.places import BASE
from .._layer.swap import original_class
from .._model.choice import geometry
from .._model.keys import base_keys, own_keys, tensors_as
from .._model.norms import keeps_statistics
from .._model.targets import dotted
from .._plan import LayerPlan, Plan
from ..errors import warn
from .digests import differ, digest, is_other
from .files import plain, refusal
from .manifest import Form, Manifest, form_of
from .peft_format import factor_shapes


def check_fits(
    manifest: Manifest, model: nn.Module, check_base: bool, remembered: Callable[[Tensor], str] | None = None
) -> None:
    """Raise one CheckpointError that names the differences between the file and the model.

    Args:
        manifest: the adapter's manifest.
        model: the base, plain or with adapters.
        check_base: whether to compare the base's weights with the digests in the file.
        remembered: returns the digest of a tensor of the base; default: computes it.
    """
    faults, state = [*_layer_faults(manifest.plan, model)], tensors_as(model, BASE)
    faults = faults or [*_tensor_faults(manifest, model, state), *_structure_faults(manifest, model, state)]
    remedy = "Build the model as it was trained (same architecture, num_classes) and load again."
    heads = tuple(f"{name}." for name in manifest.plan.modules_to_save)
    if any(fault.startswith(heads) for fault in faults):
        remedy += " If only the head differs, load_adapter(..., head=False) trains the model's own head."
    here = {} if faults or not check_base else {key: (remembered or digest)(state[key]) for key in manifest.base}
    if here:
        faults = list(_number_faults(manifest, state, here))
        remedy = "Load the same pretrained weights first, or pass check_base=False to load it onto this base anyway."
    if faults:
        title = f"{manifest.file}: this adapter was made for another base model:"
        raise refusal(title, faults, f"{remedy} Nothing was changed.")
    near = [key for key, own in here.items() if differ(manifest.base[key], own)]
    if near:
        warn(
            f"{manifest.file}: {len(near)} tensors of the base differ from those at training by rounding alone (the "
            f"first: {plain(near[0])}). This happens when the base was saved from a weight average (EMA). The adapter "
            "predicts the same up to that rounding.",
        )


def _layer_faults(plan: Plan, model: nn.Module) -> Iterator[str]:
    modules = dict(model.named_modules(remove_duplicate=False))
    saved = {module for name in plan.modules_to_save if name in modules for module in modules[name].modules()}
    adapted: set[nn.Module] = set()
    for layer in plan.layers:
        module = modules.get(layer.name)
        shape = () if module is None else weight_shape(module)
        if module is None or not shape:
            yield f"{layer.name}: {layer.kind} in the file, no such layer in the model"
        elif module in saved:
            yield f"{layer.name}: adapted and trained in full at once in the file"
        elif module in adapted:
            yield f"{layer.name}: a layer that the file adapts under another name already"
        elif found := _differences(layer, module, shape):
            yield f"{layer.name}: {found}"
        elif layer.rank > highest_rank(shape):
            yield f"{layer.name}: rank {layer.rank} in the file, for a weight {shape} at most {highest_rank(shape)}"
        if module is not None:
            adapted.add(module)
    for name in (*plan.modules_to_save, *plan.norms):
        if name not in modules:
            yield f"{name}: no such module in the model"
    for name in plan.norms:
        if name in modules and not keeps_statistics(modules[name]):
            yield f"{name}: a norm with statistics in the file, a {type(modules[name]).__name__} in the model"
    for name in plan.biases:
        if name not in modules or modules[name]._parameters.get("bias") is None:
            yield f"{name}.bias: no such bias in the model"
    for key in plan.written:
        name, _, parameter = key.rpartition(".")
        if name not in modules or modules[name]._parameters.get(parameter) is None:
            yield f"{key}: no such parameter in the model"
        elif parameter == "weight" and modules[name] in adapted:
            yield f"{key}: adapted and written by forwards at once in the file"


def highest_rank(shape: tuple[int, ...]) -> int:
    """Return the largest rank that is read: above any useful rank, so that a false file cannot exhaust the memory."""
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
    """Yield the tensors of the file that its plan or the model does not have in this form, and those that it lacks."""
    plan = manifest.plan
    modules = model.named_modules(remove_duplicate=False)
    slots = {dotted(name, buffer): now for name, m in modules for buffer, now in m._buffers.items()}
    buffers = {key for key in manifest.buffers & slots.keys() if slots[key] is None or key in state}
    yield from (f"{key}: no such buffer in the model" for key in sorted(manifest.buffers - buffers))
    expected = {key: Form(shape, "float") for p in plan.layers for key, shape in factor_shapes(p).items()}
    for key in filter(manifest.takes, own_keys(model, plan, buffers)):
        tensor = state.get(key)  # a buffer that is None takes a tensor of any form
        expected[key] = manifest.forms.get(key, Form((), "float")) if tensor is None else form_of(tensor)
    for key in sorted({*expected, *manifest.forms}):
        there, here = manifest.forms.get(key, "nothing"), expected.get(key, "nothing")
        if there != here:
            yield f"{key}: {there} in the file, {here} in the model"


def _structure_faults(manifest: Manifest, model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[str]:
    here = dict.fromkeys(base_keys(model, state, own_keys(model, manifest.plan, manifest.buffers)))
    yield from (f"{key}: only in the model's base" for key in here if key not in manifest.base)
    yield from (f"{key}: only in the file's base" for key in manifest.base if key not in here)


def _number_faults(manifest: Manifest, state: Mapping[str, Tensor], here: Mapping[str, str]) -> Iterator[str]:
    for key, text in manifest.base.items():
        if is_other(text, manifest.sketches.get(key, ""), state[key], here[key]):
            form, own = (each.rpartition(":")[0] for each in (text, here[key]))
            yield f"{key}: the base's weights differ" + (f" ({form!r} in the file, {own!r} here)" * (form != own))
