"""An adapter in Hugging Face peft's format: tensor keys, shapes, and adapter_config.json."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .._layer.computed import has_parameter
from .._layer.places import BASE
from .._layer.swap import original_class
from .._model.state import RECORD, Adapter
from .._model.targets import dotted, modules_of
from .._plan import LayerPlan
from .likeness import is_faithful, is_torchs_own
from .multiplied import scaled_bias
from .peft_methods import ALONE, MAGNITUDE, PEFT_METHODS, REGISTERED, STOCK, type_of

PREFIX = "base_model.model."
"""The prefix that peft puts before every key of the base."""


def factor_shapes(layer: LayerPlan) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a layer's tensors in the file, by key; DoRA's magnitudes have ``(1, C_out, 1, …)``."""
    shapes = {dotted(layer.name, name): shape for name, shape in layer.stored_shapes.items()}
    if layer.use_dora:
        spatial, count = (1,) * len(layer.weight_shape[2:]), layer.magnitudes
        shapes[dotted(layer.name, MAGNITUDE)] = (1, count, *spatial) if spatial else (count,)
    return shapes


def peft_config(model: nn.Module, adapter: Adapter) -> dict[str, Any]:
    """Return the content of adapter_config.json: the fields of peft's configuration for the method."""
    plan = adapter.plan
    names = "|".join(re.escape(p.name) for p in plan.layers)
    tracked = plan.norms if plan.norm == "track" else ()
    return {
        "peft_type": peft_type(model, adapter),
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
        **PEFT_METHODS[type_of(plan) or STOCK].fields(plan),
        "target_modules": f"^(?:{names})$",
        "modules_to_save": [*plan.modules_to_save, *tracked] or None,
    }


def peft_type(model: nn.Module, adapter: Adapter) -> str:
    """Return the ``peft_type``: peft's own if stock peft predicts the same, or else a type that stock peft refuses.

    So peft raises an error and never predicts something else. After ``convlora.peft.register`` peft also reads
    ``REGISTERED``; it never reads ``ALONE``.
    """
    if any(faults_for_any_peft(model, adapter)):
        return ALONE
    kind = type_of(adapter.plan)
    if not any(faults_for_stock_peft(adapter)):
        return kind
    return REGISTERED if kind == STOCK else ALONE


def faults_for_any_peft(model: nn.Module, adapter: Adapter) -> Iterator[str]:
    """Yield why peft's files cannot hold an adapter, even with convlora's layers registered."""
    plan = adapter.plan
    names = {n.module: n.names for n in modules_of(model)}
    trained = [*plan.modules_to_save, *(plan.norms if plan.norm == "track" else ())]
    wanted = set(trained)
    if not adapter.layers:
        yield "no layer is adapted, and peft needs one"
    yield from _bias_faults(model, adapter)
    for name in plan.written:
        yield f"{name}: it changes without a gradient, and peft saves no such parameter"
    for name in (*(p.name for p in plan.layers), *trained):
        others = set(names[adapter.modules[name]]) - {name}
        if others:
            yield f"{name}: the same module as {', '.join(sorted(others))}; peft replaces only one of the two"
    if not type_of(plan):
        methods = ", ".join(sorted({p.method for p in plan.layers}))
        yield f"changed by {methods}: peft has no such method, or does not combine these in one adapter"
    others_hit: dict[str, str] = {}
    for name, end in with_end((name for each in names.values() for name in each), trained):
        if name not in wanted:
            others_hit.setdefault(end, name)
    for end, name in others_hit.items():
        yield f"{end}: peft matches the ends of names, and would also train {name}"
    for layer_plan, layer in zip(plan.layers, adapter.layers, strict=True):
        kind = original_class(layer)
        if not (is_faithful(kind) or issubclass(kind, _ConvNd)):
            yield f"{layer_plan.name}: a {layer_plan.kind}, which peft does not support"
        elif not has_parameter(layer):
            yield f"{layer_plan.name}: its weight is computed from other parameters"
        elif layer_plan.use_dora and layer_plan.strength != 1:
            yield f"{layer_plan.name}: DoRA at strength {layer_plan.strength:g}; in peft only strength 1 is possible"
        elif layer_plan.use_dora and issubclass(kind, nn.Linear) and not is_torchs_own(kind):
            yield f"{layer_plan.name}: DoRA in a {layer_plan.kind}, whose own forward peft's DoRA does not call"


def _bias_faults(model: nn.Module, adapter: Adapter) -> Iterator[str]:
    """Yield the biases that peft cannot hold: it has only the base's, which its (IA)³ scales like the weight."""
    layers = zip(adapter.plan.layers, adapter.changes, strict=True)
    scales = {p.name: c.ia3_l for p, c in layers if p.method == "ia3" and not p.options.get("on_input")}
    places = {place.module: place for place in vars(model)[RECORD].places if place.name == "bias"}
    for name in dict.fromkeys((*adapter.plan.biases, *scales)):
        module = adapter.modules[name]
        own = base = module._parameters.get("bias")
        if module in places:
            own, base = places[module].of(adapter.plan.adapter_name), places[module].of(BASE)
        if name in scales and base is not None:
            if own is None or not torch.equal(own, scaled_bias(base, cast(Tensor, scales[name]))):
                yield f"{name}: its bias is not scaled like its weight, and peft scales both"
        elif name not in scales:
            yield f"{name}: its bias is trained"


def with_end(names: Iterable[str], ends: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the names that end with one of ``ends``, each with that end; peft matches ``modules_to_save`` this way."""
    wanted = set(ends)
    lengths = sorted({len(end) for end in wanted})
    for name in names:
        for length in lengths:
            if length > len(name):
                break
            if (end := name[len(name) - length :]) in wanted:
                yield name, end


def faults_for_stock_peft(adapter: Adapter) -> Iterator[str]:
    """Yield the layers for which stock peft would predict something else, and why."""
    kind = type_of(adapter.plan)
    peft = PEFT_METHODS[kind or STOCK]
    fields = peft.fields(adapter.plan)
    for plan, layer in zip(adapter.plan.layers, adapter.layers, strict=True):
        if kind and (fault := peft.fault(plan, layer, fields) or peft.differs(layer)):
            yield f"{plan.name}: {fault}"
        if plan.use_dora and kind != STOCK:
            yield f"{plan.name}: DoRA with method {plan.method!r}, which peft does not have"
