"""Makes the plan and the manifest of an adapter that another library wrote, from its tensors and the model.

Files of other libraries do not describe the base. The plan therefore takes the layers' classes and geometry from the
model, and ranks and shapes from the tensors; ``check_fits`` then compares the two, as it does for convlora's files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .._layer.computed import weight_shape
from .._layer.places import BASE
from .._layer.swap import original_class
from .._methods.dense import Dense
from .._model.checks import check_adaptable, check_plan
from .._model.choice import geometry
from .._model.keys import base_keys, own_keys, tensors_as
from .._model.options import Request
from .._model.planner import make_plan
from .._model.targets import Named, dotted, is_adaptable, modules_of
from .._plan import LayerPlan, Plan
from ..errors import CheckpointError, TargetError, UnsupportedLayerError
from .contents import State
from .files import refusal
from .fitting import check_fits
from .manifest import Manifest, form_of
from .peft_methods import MAGNITUDE
from .stored import Stored, Taken


@dataclass(frozen=True)
class Found:
    """An adapter that another library wrote, converted to convlora's methods.

    Attributes:
        origin: the adapter's name in errors, such as its file.
        layers: each layer's change, by the layer's name.
        own: the adapter's other tensors, by state-dict key of the base.
        modules_to_save, biases: names of modules trained in full, and of modules of which only the bias is trained.
        rank, alpha: the adapter's settings; each layer has its own rank and scaling.
    """

    origin: str
    layers: Mapping[str, Taken]
    rank: int
    alpha: float
    own: Mapping[str, Tensor] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    use_rslora: bool = False
    dropout: float = 0.0

    @property
    def method(self) -> str:
        """The method of most layers."""
        methods = [taken.method for taken in self.layers.values()]
        return max(dict.fromkeys(methods), key=methods.count, default="lora")


def rebuild(found: Found, root: nn.Module, adapter_name: str) -> tuple[Manifest, State]:
    """Return the manifest and the tensors that :func:`convlora.save_adapter` would have written for this adapter.

    Raises:
        CheckpointError: the adapter does not fit the model; every difference is named.
    """
    state = tensors_as(root, BASE)
    found = _with_biases(found, state)
    try:
        plan = _plan(found, root, adapter_name)
        check_plan(plan)
    except (TargetError, UnsupportedLayerError) as cause:
        raise CheckpointError(f"{found.origin}: {cause}") from cause
    tensors = dict(found.own)
    for name, taken in found.layers.items():
        magnitudes = {} if taken.magnitudes is None else {MAGNITUDE: taken.magnitudes}
        for part, tensor in {**taken.tensors, **magnitudes}.items():
            # Factors stored in half precision are trained in fp32: steps of 1e-4 would be rounded away in bf16.
            is_half = tensor.dtype in (torch.float16, torch.bfloat16)
            tensors[dotted(name, part)] = tensor.float() if is_half else tensor
    keys = base_keys(root, state, own_keys(root, plan, ()))
    forms = {key: form_of(tensor) for key, tensor in tensors.items()}
    manifest = Manifest(Path(found.origin), plan, dict.fromkeys(keys, ""), {}, frozenset(), forms)
    check_fits(manifest, root, check_base=False)
    return manifest, tensors


def _with_biases(found: Found, state: State) -> Found:
    """Return the adapter with the biases that its layers compute from the base's, as tensors of the adapter."""
    makers = {name: its.bias for name, its in found.layers.items() if its.bias is not None}
    own, faults = dict(found.own), []
    for name, make in makers.items():
        base = state.get(dotted(name, "bias"))
        made = make(torch.empty(0) if base is None else base.detach())
        if base is None or form_of(made) != form_of(base):
            faults.append(f"{name}: the file changes a bias {form_of(made)}, which the layer does not have")
        else:
            own[dotted(name, "bias")] = made
    refuse(found.origin, faults)
    return replace(found, own=own, biases=(*found.biases, *makers))


def _plan(found: Found, root: nn.Module, adapter_name: str) -> Plan:
    """Return the plan of these layers, with the ranks of the tensors, however large."""
    named = {n.name: n for n in modules_of(root)}
    for name in found.layers:
        check_adaptable(named[name], found.dropout)
    saved = set(found.modules_to_save)
    plan = make_plan(
        root,
        Request(
            rank=found.rank,
            alpha=found.alpha,
            target_modules=(lambda name, _: name in found.layers) if found.layers else (),
            modules_to_save=(lambda name, _: name in saved) if saved else None,
            dropout=found.dropout,
            use_rslora=found.use_rslora,
            method=Dense.method,  # every layer can have it; the layers' own methods and ranks follow below
            adapter_name=adapter_name,
        ),
    )
    layers = [_layer(n, found.layers[n.name]) for n in named.values() if n.name in found.layers]
    skipped = [
        replace(p, note="not in the file" if p.note == "not a target" else p.note)
        for p in plan.skipped
        if p.name not in found.layers
    ]
    inside = {module for name in saved for module in root.get_submodule(name).modules()}
    biases = tuple(name for name in found.biases if named[name].module not in inside)
    return replace(
        plan,
        method=found.method,
        layers=tuple(layers),
        skipped=tuple(skipped),
        head_found_by="named in the file" if saved else "none in the file",
        biases=biases,
        saved_parameters=plan.saved_parameters + sum(found.own[dotted(name, "bias")].numel() for name in biases),
    )


def _layer(n: Named, taken: Taken) -> LayerPlan:
    return LayerPlan(
        name=n.name,
        kind=original_class(n.module).__name__,
        weight_shape=weight_shape(n.module),
        rank=taken.rank,
        scaling=taken.scaling,
        geometry=geometry(n.module),
        use_dora=taken.magnitudes is not None,
        method=taken.method,
        options=dict(taken.options),
    )


def layer_fault(name: str, named: Mapping[str, Named], differs: Callable[[nn.Module], str], whose: str) -> str:
    """Return why the model's layer of this name cannot take the file's change; empty if it can.

    Args:
        name: the layer's name in the file.
        named: the model's modules by each of their names.
        differs: returns why the other library would predict something else for a layer.
        whose: the other library's name.
    """
    n = named.get(name)
    if n is None:
        return f"{name}: no such layer in the model"
    if not is_adaptable(n.module) or not weight_shape(n.module):
        return f"{name}: a {original_class(n.module).__name__}; only convolutions and linear layers are adapted"
    if len(n.names) > 1:
        return f"{name}: the same layer as {', '.join(set(n.names) - {name})}; {whose} adapts only one of the two"
    differences = differs(n.module)
    return f"{name}: {differences}" if differences else ""


def take(n: Named, read: Callable[[Stored], Taken], stored: Stored, taken: dict[str, Taken]) -> str:
    """Convert a layer's change and add it to ``taken``; return why it cannot be read, or an empty string."""
    for part, tensor in stored.parts.items():
        if form_of(tensor).kind == "float8":
            return f"{n.name}: {part} is of {tensor.dtype}, with which torch does not compute"
    try:
        its = read(stored)
        planned = _layer(n, its)
        wanted = replace(planned, rank=max(planned.rank, 1)).stored_shapes
    except TargetError as cause:
        return f"{n.name}: {cause}"
    if missing := wanted.keys() - its.tensors.keys():
        return f"{n.name}: {min(missing)} is missing"
    if beside := its.tensors.keys() - wanted.keys():
        return f"{n.name}: {min(beside)} does not belong to the layer's other tensors"
    taken[n.name] = its
    return ""


def refuse(origin: object, faults: Iterable[str]) -> None:
    """Raise one CheckpointError that lists the faults, if there are any."""
    if listed := list(faults):
        raise refusal(f"{origin}: convlora cannot reproduce this adapter exactly:", listed, "Nothing was changed.")


def of_model(names: Iterable[str], known: Sequence[str], prefix: str | None, origin: str) -> tuple[dict[str, str], str]:
    """Return the file's names that belong to one model, each with the name without prefix; and the prefix.

    Args:
        names: the names in the file.
        known: the prefixes that name a model, each with the dot or underscore that ends it.
        prefix: the prefix that the user chose, without that last character; None if the file should hold one model.
        origin: the file's name in errors.

    Raises:
        CheckpointError: the file holds several models and none was chosen, or the chosen one is not in the file.
    """
    names, end = list(names), known[0][-1]
    there = {name: next((each for each in known if name.startswith(each)), "") for name in names}
    listed = " or ".join(repr(each[:-1]) for each in sorted({*there.values()} - {""}))
    if prefix is None:
        if " or " in listed:
            refuse(origin, [f"its layers are of several models; prefix={listed} chooses the one to load"])
        return {name: name.removeprefix(each) for name, each in there.items()}, max(there.values(), default="")
    chosen = prefix.rstrip("._") + end
    inside = {name: name.removeprefix(chosen) for name in names if name.startswith(chosen)}
    if not inside:
        begins = f"; they begin with {listed}" * bool(listed)
        refuse(origin, [f"prefix={prefix!r}: no layer's name begins with it{begins}"])
    return inside, chosen


def by_any_name(root: nn.Module) -> dict[str, Named]:
    """Return the model's modules by each of their names."""
    return {name: n for n in modules_of(root) for name in n.names}
