"""Plan and manifest of an adapter that comes without them: made from its tensors and from the model that it is for.

What other libraries write says nothing of the base. The layers' kinds and geometry are therefore the model's own, and
ranks and shapes are the tensors'; whether the two go together is checked as for convlora's files, by ``check_fits``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .._layer.computed import has_parameter, weight_shape
from .._layer.fast import is_plain
from .._layer.functional import scaling_of
from .._layer.places import BASE
from .._layer.swap import original_class
from .._model.checks import check_adaptable, check_plan
from .._model.choice import geometry
from .._model.options import Request, check_alpha
from .._model.planner import make_plan
from .._model.targets import Named, is_adaptable, modules_of
from .._plan import LayerPlan, Plan
from ..errors import CheckpointError, TargetError, UnsupportedLayerError
from .contents import State
from .files import few, plain
from .fitting import check_fits
from .keys import base_keys, own_keys, tensors_as
from .manifest import Manifest, form_of
from .peft_format import dotted, factor_shapes, is_faithful


@dataclass(frozen=True)
class Factors:
    """One layer's factors as they were found, their alpha, and with DoRA the magnitudes."""

    lora_A: Tensor
    lora_B: Tensor
    alpha: float
    magnitudes: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """In the order of a file's keys."""
        return (self.lora_A, self.lora_B, *(() if self.magnitudes is None else (self.magnitudes,)))


@dataclass(frozen=True)
class Found:
    """An adapter as another library wrote it, in convlora's words.

    Attributes:
        origin: what an error calls it, such as its file.
        factors: by the layer's name.
        own: the adapter's other tensors, by state-dict key of the base.
        modules_to_save, biases: names of modules trained in full, and of those whose bias alone is.
        rank, alpha: as asked for; each layer has its own.
    """

    origin: str
    factors: Mapping[str, Factors]
    rank: int
    alpha: float
    own: Mapping[str, Tensor] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    use_rslora: bool = False
    dropout: float = 0.0


def rebuild(found: Found, root: nn.Module, adapter_name: str) -> tuple[Manifest, State]:
    """The manifest and the tensors that :func:`convlora.save_adapter` would have written for it.

    Raises:
        CheckpointError: it does not fit the model; what differs is named.
    """
    try:
        plan = _plan(found, root, adapter_name)
        check_plan(plan)
    except (TargetError, UnsupportedLayerError) as cause:
        raise CheckpointError(f"{found.origin}: {cause}") from cause
    tensors = dict(found.own)
    for layer in plan.layers:
        for key, tensor in zip(factor_shapes(layer), found.factors[layer.name].tensors, strict=True):
            # Half-precision factors are a way of storing them; steps of 1e-4 would vanish in bf16.
            tensors[key] = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
    state = tensors_as(root, BASE)
    keys = base_keys(root, state, own_keys(root, plan, ()))
    forms = {key: form_of(tensor) for key, tensor in tensors.items()}
    manifest = Manifest(Path(found.origin), plan, dict.fromkeys(keys, ""), {}, frozenset(), forms)
    check_fits(manifest, root, check_base=False)
    return manifest, tensors


def _plan(found: Found, root: nn.Module, adapter_name: str) -> Plan:
    """The plan that names these layers, with the ranks that the tensors have, however large."""
    named = {n.name: n for n in modules_of(root)}
    for name in found.factors:
        check_adaptable(named[name], found.dropout)
    saved = set(found.modules_to_save)
    plan = make_plan(
        root,
        Request(
            rank=found.rank,
            alpha=found.alpha,
            target_modules=(lambda name, _: name in found.factors) if found.factors else (),
            modules_to_save=(lambda name, _: name in saved) if saved else None,
            dropout=found.dropout,
            use_rslora=found.use_rslora,
            adapter_name=adapter_name,
        ),
    )
    layers = [_layer(n, found.factors[n.name], found.use_rslora) for n in named.values() if n.name in found.factors]
    skipped = [
        replace(p, note="not in the file" if p.note == "not a target" else p.note)
        for p in plan.skipped
        if p.name not in found.factors
    ]
    inside = {module for name in saved for module in root.get_submodule(name).modules()}
    biases = tuple(name for name in found.biases if named[name].module not in inside)
    return replace(
        plan,
        layers=tuple(layers),
        skipped=tuple(skipped),
        head_found_by="named in the file" if saved else "none in the file",
        biases=biases,
        saved_parameters=plan.saved_parameters + sum(found.own[dotted(name, "bias")].numel() for name in biases),
    )


def _layer(n: Named, factors: Factors, use_rslora: bool) -> LayerPlan:
    rank = factors.lora_A.shape[0] if factors.lora_A.ndim else 0
    kind, use_dora = original_class(n.module).__name__, factors.magnitudes is not None
    check_alpha(factors.alpha, f"alpha of {n.name}")
    scaling = scaling_of(float(factors.alpha), max(rank, 1), use_rslora)
    return LayerPlan(n.name, kind, weight_shape(n.module), rank, scaling, "", geometry(n.module), use_dora)


def layer_fault(name: str, named: Mapping[str, Named], differs: Callable[[nn.Module], str] | None, whose: str) -> str:
    """Why a layer of this name cannot take the factors; empty where it can.

    Args:
        name: as the file has it.
        named: the model's modules by each of their names.
        differs: says what a convolution has that the other library's does not know; None where it knows all.
        whose: the other library's name.
    """
    n = named.get(name)
    if n is None:
        return f"{name}: no such layer in the model"
    kind = original_class(n.module)
    if not is_adaptable(n.module) or not weight_shape(n.module):
        return f"{name}: a {kind.__name__}; only convolutions and linear layers are adapted"
    if len(n.names) > 1:
        return f"{name}: the same layer as {', '.join(set(n.names) - {name})}; {whose} adapts one of the two alone"
    if differs is None and not isinstance(n.module, nn.Linear):
        return ""
    if not has_parameter(n.module):
        return f"{name}: its weight is computed from others, which {whose} does not know"
    if not (is_faithful(kind) or is_plain(n.module, kind) or kind.forward is nn.Linear.forward):
        return f"{name}: a {kind.__name__} with a forward of its own, in which {whose} would predict another thing"
    differences = "" if differs is None or isinstance(n.module, nn.Linear) else differs(n.module)
    return f"{name}: {differences}" if differences else ""


def refuse(origin: object, faults: Iterable[str]) -> None:
    """Raise one error that lists the faults, where there are any."""
    listed = list(dict.fromkeys(faults))
    if listed:
        lines = few([f"  {plain(fault)}" for fault in listed])
        title = f"{origin}: this adapter cannot be had exactly here:"
        raise CheckpointError("\n".join([title, *lines, "Nothing was changed."]))


def by_any_name(root: nn.Module) -> dict[str, Named]:
    """The model's modules by each of their names."""
    return {name: n for n in modules_of(root) for name in n.names}
