"""How an adapter is written in Hugging Face peft's names: tensor keys, shapes, and adapter_config.json."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from .._layer.computed import has_parameter
from .._layer.functional import scaling_of
from .._layer.swap import original_class
from .._model.state import Adapter
from .._model.targets import modules_of
from .._plan import LayerPlan, Plan

PREFIX = "base_model.model."
"""What peft puts before every key of the base."""
STOCK, REGISTERED, ALONE = "LORA", "CONVLORA", "CONVLORA_ALONE"
"""Types of file: read by stock peft; by peft with convlora's layers registered; by convlora alone."""


FAITHFUL = {"timm.layers.linear.Linear", "timm.layers.conv2d_same.Conv2dSame"}
"""Subclasses whose own forward treats the weight as torch's does, so that a branch of the same class is exact."""


def is_faithful(kind: type[nn.Module]) -> bool:
    """Whether W + ΔW in a layer of this class is the layer and a branch beside it: torch's own, and a few known."""
    return is_torchs_own(kind) or f"{kind.__module__}.{kind.__qualname__}" in FAITHFUL


def is_torchs_own(kind: type[nn.Module]) -> bool:
    """Whether it is torch's plain convolution or linear layer itself."""
    return kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def factor_shapes(layer: LayerPlan) -> dict[str, tuple[int, ...]]:
    """Key and shape in the file of a layer's two factors, and of DoRA's magnitudes.

    peft keeps a convolution's lora_B as a 1×1 convolution, and its magnitudes as what multiplies an output. Anchored
    factors are written as the change that they are, of twice the rank: [A; A0] and [B, −B0].
    """
    spatial = (1,) * len(layer.weight_shape[2:])
    shapes: dict[str, tuple[int, ...]] = {
        dotted(layer.name, "lora_A.weight"): (layer.stored_rank, *layer.weight_shape[1:]),
        dotted(layer.name, "lora_B.weight"): (layer.weight_shape[0], layer.stored_rank, *spatial),
    }
    if layer.use_dora:
        count = layer.magnitudes
        shapes[dotted(layer.name, "lora_magnitude_vector")] = (1, count, *spatial) if spatial else (count,)
    return shapes


def dotted(*parts: str) -> str:
    """A key of its parts; the root's name is empty.

    >>> dotted("layer1.0", "weight"), dotted("", "weight")
    ('layer1.0.weight', 'weight')
    """
    return ".".join(part for part in parts if part)


def peft_config(model: nn.Module, adapter: Adapter) -> dict[str, Any]:
    """What adapter_config.json says, in the fields of peft's LoraConfig."""
    plan = adapter.plan
    layers = [_stored(p, plan) for p in plan.layers]
    top = _stored(LayerPlan("", "", (), plan.rank, plan.alpha, anchored=any(p.anchored for p in plan.layers)), plan)
    # Anchored: peft matches the ends of names, and would also hit other layers.
    ranks = {f"^{re.escape(p.name)}$": p.rank for p in layers if p.rank != top.rank}
    alphas = {f"^{re.escape(p.name)}$": p.alpha for p in layers if p.alpha != top.alpha}
    names = "|".join(re.escape(p.name) for p in plan.layers)
    tracked = plan.norms if plan.norm == "track" else ()
    return {
        "peft_type": peft_type(model, adapter),
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
        "r": top.rank,
        "lora_alpha": top.alpha,
        "lora_dropout": plan.dropout,
        "use_rslora": plan.use_rslora,
        "use_dora": plan.use_dora,
        "bias": "none",
        "target_modules": f"^(?:{names})$",
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "modules_to_save": [*plan.modules_to_save, *tracked] or None,
    }


def _stored(layer: LayerPlan, plan: Plan) -> LayerPlan:
    """The layer with the rank that its change has in the file, and the alpha that gives the same scaling there."""
    if not layer.anchored:
        return layer
    alpha = plan.scaling(layer) / scaling_of(1.0, layer.stored_rank, plan.use_rslora)
    return replace(layer, rank=layer.stored_rank, alpha=alpha, anchored=False)


def peft_type(model: nn.Module, adapter: Adapter) -> str:
    """What peft is told that the file is: one that stock peft reads, or a type that it refuses.

    An error there, never a wrong prediction. ``REGISTERED`` is read by peft once ``convlora.peft.register`` has taught
    it convlora's layers; ``ALONE`` never is.
    """
    if any(faults_for_any_peft(model, adapter)):
        return ALONE
    if not any(faults_for_stock_peft(adapter)):
        return STOCK
    return ALONE if adapter.plan.use_dora else REGISTERED  # the registered layers know no magnitudes


def faults_for_any_peft(model: nn.Module, adapter: Adapter) -> Iterator[str]:
    """What of an adapter has no place in peft's files, whoever builds the layers."""
    plan = adapter.plan
    names = {n.module: n.names for n in modules_of(model)}
    trained = [*plan.modules_to_save, *(plan.norms if plan.norm == "track" else ())]
    wanted = set(trained)
    if not adapter.layers:
        yield "no layer is adapted, and peft needs one"
    for name in plan.biases:
        yield f"{name}: its bias is trained by itself"
    for name in (*(p.name for p in plan.layers), *trained):
        others = set(names[adapter.modules[name]]) - {name}
        if others:
            yield f"{name}: the same module as {', '.join(sorted(others))}; peft replaces one of the two alone"
    others_hit: dict[str, str] = {}
    for name, end in with_end((name for each in names.values() for name in each), trained):
        if name not in wanted:
            others_hit.setdefault(end, name)
    for end, name in others_hit.items():
        yield f"{end}: peft, which matches the ends of names, would train {name}, too"
    for layer_plan, layer in zip(plan.layers, adapter.layers, strict=True):
        kind = original_class(layer)
        if not (is_faithful(kind) or issubclass(kind, _ConvNd)):
            yield f"{layer_plan.name}: a {layer_plan.kind}, which peft does not know"
        elif not has_parameter(layer):
            yield f"{layer_plan.name}: its weight is computed from others"


def with_end(names: Iterable[str], ends: Collection[str]) -> Iterator[tuple[str, str]]:
    """The names that end with one of these, each with it: so peft finds what is in ``modules_to_save``."""
    wanted = set(ends)
    lengths = sorted({len(end) for end in wanted})
    for name in names:
        for length in lengths:
            if length > len(name):
                break
            if (end := name[len(name) - length :]) in wanted:
                yield name, end


def faults_for_stock_peft(adapter: Adapter) -> Iterator[str]:
    """The layers that stock peft would not rebuild faithfully: its branch drops groups, dilation and padding mode."""
    for plan, layer in zip(adapter.plan.layers, adapter.layers, strict=True):
        kind = original_class(layer)
        if not is_faithful(kind):
            yield f"{plan.name}: a {plan.kind}; peft's branch would be another one"
        if plan.use_dora and not is_torchs_own(kind):
            yield f"{plan.name}: DoRA in a {plan.kind}, whose own forward peft's leaves out"
        if not is_faithful(kind) or issubclass(kind, nn.Linear):
            continue
        g, ones = plan.geometry, [1] * len(plan.weight_shape[2:])
        plain = {"groups": 1, "dilation": ones, "padding_mode": "zeros"}
        for key, value in plain.items():
            if g[key] != value:
                yield f"{plan.name}: {key} {g[key]!r}, which peft's branch drops"
