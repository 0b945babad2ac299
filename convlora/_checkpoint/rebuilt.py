"""Plan and manifest of an adapter that comes without them: made from its tensors and from the model that it is for.

What other libraries write says nothing of the base. The layers' kinds and geometry are therefore the model's own, and
ranks and shapes are the tensors'; whether the two go together is checked as for convlora's files, by ``check_fits``.
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
from ..errors import CheckpointError, TargetError, UnsupportedLayerError, few
from .contents import State
from .files import plain
from .fitting import check_fits
from .manifest import Manifest, form_of
from .peft_methods import MAGNITUDE
from .stored import Stored, Taken


@dataclass(frozen=True)
class Found:
    """An adapter as another library wrote it, in convlora's words.

    Attributes:
        origin: what an error calls it, such as its file.
        layers: what each has, by the layer's name.
        own: the adapter's other tensors, by state-dict key of the base.
        modules_to_save, biases: names of modules trained in full, and of those whose bias alone is.
        rank, alpha: as asked for; each layer has its own.
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
        """That of most layers."""
        methods = [taken.method for taken in self.layers.values()]
        return max(dict.fromkeys(methods), key=methods.count, default="lora")


def rebuild(found: Found, root: nn.Module, adapter_name: str) -> tuple[Manifest, State]:
    """The manifest and the tensors that :func:`convlora.save_adapter` would have written for it.

    Raises:
        CheckpointError: it does not fit the model; what differs is named.
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
            # Half-precision factors are a way of storing them; steps of 1e-4 would vanish in bf16.
            is_half = tensor.dtype in (torch.float16, torch.bfloat16)
            tensors[dotted(name, part)] = tensor.float() if is_half else tensor
    keys = base_keys(root, state, own_keys(root, plan, ()))
    forms = {key: form_of(tensor) for key, tensor in tensors.items()}
    manifest = Manifest(Path(found.origin), plan, dict.fromkeys(keys, ""), {}, frozenset(), forms)
    check_fits(manifest, root, check_base=False)
    return manifest, tensors


def _with_biases(found: Found, state: State) -> Found:
    """With the layers' own biases, made of the base's, as tensors of the adapter's own."""
    makers = {name: its.bias for name, its in found.layers.items() if its.bias is not None}
    own, faults = dict(found.own), []
    for name, make in makers.items():
        base = state.get(dotted(name, "bias"))
        made = make(torch.empty(0) if base is None else base.detach())
        if base is None or form_of(made) != form_of(base):
            faults.append(f"{name}: {form_of(made)} is for a bias that the layer does not have")
        else:
            own[dotted(name, "bias")] = made
    refuse(found.origin, faults)
    return replace(found, own=own, biases=(*found.biases, *makers))


def _plan(found: Found, root: nn.Module, adapter_name: str) -> Plan:
    """The plan that names these layers, with the ranks that the tensors have, however large."""
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
            method=Dense.method,  # which every layer can have, whatever ranks another allows it
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
    """Why a layer of this name cannot take what is found for it; empty where it can.

    Args:
        name: as the file has it.
        named: the model's modules by each of their names.
        differs: says what of a layer the other library does not compute as here.
        whose: the other library's name.
    """
    n = named.get(name)
    if n is None:
        return f"{name}: no such layer in the model"
    if not is_adaptable(n.module) or not weight_shape(n.module):
        return f"{name}: a {original_class(n.module).__name__}; only convolutions and linear layers are adapted"
    if len(n.names) > 1:
        return f"{name}: the same layer as {', '.join(set(n.names) - {name})}; {whose} adapts one of the two alone"
    differences = differs(n.module)
    return f"{name}: {differences}" if differences else ""


def take(n: Named, read: Callable[[Stored], Taken], stored: Stored, taken: dict[str, Taken]) -> str:
    """Put what a layer has among what is taken; else why it cannot be had."""
    for part, tensor in stored.parts.items():
        if form_of(tensor).kind == "float8":
            return f"{n.name}: {part} is of {tensor.dtype}, in which torch computes nothing"
    try:
        its = read(stored)
        planned = _layer(n, its)
        wanted = replace(planned, rank=max(planned.rank, 1)).stored_shapes
    except TargetError as cause:
        return f"{n.name}: {cause}"
    if missing := wanted.keys() - its.tensors.keys():
        return f"{n.name}: {min(missing)} is missing"
    if beside := its.tensors.keys() - wanted.keys():
        return f"{n.name}: {min(beside)} has no place beside the others"
    taken[n.name] = its
    return ""


def refuse(origin: object, faults: Iterable[str]) -> None:
    """Raise one error that lists the faults, where there are any."""
    listed = list(dict.fromkeys(faults))
    if listed:
        lines = few([f"  {plain(fault)}" for fault in listed])
        title = f"{origin}: this adapter cannot be had exactly here:"
        raise CheckpointError("\n".join([title, *lines, "Nothing was changed."]))


def of_model(names: Iterable[str], known: Sequence[str], prefix: str | None, origin: str) -> tuple[dict[str, str], str]:
    """The names in a file that are of this model, each with what it is without the prefix; and that prefix.

    Args:
        names: as the file has them.
        known: prefixes that say which of several models a name is of, with the dot or underscore that ends them.
        prefix: the one that the user chose, without its end; None where the file is to have no more than one.
        origin: what an error calls the file.

    Raises:
        CheckpointError: there are several and none was chosen, or the chosen one is not there.
    """
    names, end = list(names), known[0][-1]
    there = {name: next((each for each in known if name.startswith(each)), "") for name in names}
    listed = " or ".join(repr(each[:-1]) for each in sorted({*there.values()} - {""}))
    if prefix is None:
        if " or " in listed:
            refuse(origin, [f"its layers are of several models; prefix={listed} chooses the one that is loaded"])
        return {name: name.removeprefix(each) for name, each in there.items()}, max(there.values(), default="")
    chosen = prefix.rstrip("._") + end
    inside = {name: name.removeprefix(chosen) for name in names if name.startswith(chosen)}
    if not inside:
        refuse(origin, [f"prefix={prefix!r}: no layer's name begins so" + f"; they begin with {listed}" * bool(listed)])
    return inside, chosen


def by_any_name(root: nn.Module) -> dict[str, Named]:
    """The model's modules by each of their names."""
    return {name: n for n in modules_of(root) for name in n.names}
