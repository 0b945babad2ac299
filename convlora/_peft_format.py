"""How an adapter is written in Hugging Face peft's names: tensor keys, shapes, and adapter_config.json."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from ._computed import has_parameter
from ._plan import LayerPlan, Plan
from ._state import Adapter
from ._swap import original_class
from ._targets import modules_of

PREFIX = "base_model.model."
"""What peft puts before every key of the base."""
STOCK, REGISTERED, ALONE = "LORA", "CONVLORA", "CONVLORA_ALONE"
"""Types of file: read by stock peft; by peft with convlora's layers registered; by convlora alone."""


FAITHFUL = {"timm.layers.linear.Linear", "timm.layers.conv2d_same.Conv2dSame"}
"""Subclasses whose own forward treats the weight as torch's does, so that a branch of the same class is exact."""


def is_faithful(kind: type[nn.Module]) -> bool:
    """Whether W + ΔW in a layer of this class is the layer and a branch beside it: torch's own, and a few known."""
    plain = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return kind in plain or f"{kind.__module__}.{kind.__qualname__}" in FAITHFUL


def factor_shapes(layer: LayerPlan) -> dict[str, tuple[int, ...]]:
    """Key and shape in the file of a layer's two factors: peft keeps a convolution's lora_B as a 1×1 convolution."""
    spatial = (1,) * len(layer.weight_shape[2:])
    return {
        dotted(layer.name, "lora_A.weight"): (layer.rank, *layer.weight_shape[1:]),
        dotted(layer.name, "lora_B.weight"): (layer.weight_shape[0], layer.rank, *spatial),
    }


def dotted(*parts: str) -> str:
    """A key of its parts; the root's name is empty.

    >>> dotted("layer1.0", "weight"), dotted("", "weight")
    ('layer1.0.weight', 'weight')
    """
    return ".".join(part for part in parts if part)


def peft_config(model: nn.Module, adapter: Adapter) -> dict[str, Any]:
    """What adapter_config.json says, in the fields of peft's LoraConfig."""
    plan = adapter.plan
    ranks = {_pattern_key(p.name, plan): p.rank for p in plan.layers if p.rank != plan.rank}
    alphas = {_pattern_key(p.name, plan): p.alpha for p in plan.layers if p.alpha != plan.alpha}
    names = "|".join(re.escape(p.name) for p in plan.layers)
    tracked = plan.norms if plan.norm == "track" else ()
    return {
        "peft_type": peft_type(model, adapter),
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
        "r": plan.rank,
        "lora_alpha": plan.alpha,
        "lora_dropout": plan.dropout,
        "use_rslora": plan.use_rslora,
        "bias": "none",
        "target_modules": f"^(?:{names})$",
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "modules_to_save": [*plan.modules_to_save, *tracked] or None,
    }


def _pattern_key(name: str, plan: Plan) -> str:
    """The name itself, or anchored where peft, which matches the ends of names, would also hit other layers."""
    others = (p.name for p in plan.layers if p.name != name)
    return f"^{re.escape(name)}$" if any(re.match(rf"(.*\.)?({name})$", other) for other in others) else name


def peft_type(model: nn.Module, adapter: Adapter) -> str:
    """What peft is told that the file is: one that stock peft reads, or a type that it refuses.

    An error there, never a wrong prediction. ``REGISTERED`` is read by peft once ``convlora.peft.register`` has taught
    it convlora's layers; ``ALONE`` never is.
    """
    if any(faults_for_any_peft(model, adapter)):
        return ALONE
    return REGISTERED if any(faults_for_stock_peft(adapter)) else STOCK


def faults_for_any_peft(model: nn.Module, adapter: Adapter) -> Iterator[str]:
    """What of an adapter has no place in peft's files, whoever builds the layers."""
    plan = adapter.plan
    names = {n.module: n.names for n in modules_of(model)}
    trained = [*plan.modules_to_save, *(plan.norms if plan.norm == "track" else ())]
    if not adapter.layers:
        yield "no layer is adapted, and peft needs one"
    for name in plan.biases:
        yield f"{name}: its bias is trained by itself"
    for name in (*(p.name for p in plan.layers), *trained):
        others = set(names[adapter.modules[name]]) - {name}
        if others:
            yield f"{name}: the same module as {', '.join(sorted(others))}; peft replaces one of the two alone"
    for end in trained:
        hit = [n for all_names in names.values() for n in all_names if n.endswith(end) and n not in trained]
        if hit:
            yield f"{end}: peft, which matches the ends of names, would train {hit[0]}, too"
    for layer_plan, layer in zip(plan.layers, adapter.layers, strict=True):
        kind = original_class(layer)
        if not (is_faithful(kind) or issubclass(kind, _ConvNd)):
            yield f"{layer_plan.name}: a {layer_plan.kind}, which peft does not know"
        elif not has_parameter(layer):
            yield f"{layer_plan.name}: its weight is computed from others"


def faults_for_stock_peft(adapter: Adapter) -> Iterator[str]:
    """The layers that stock peft would not rebuild faithfully: its branch drops groups, dilation and padding mode."""
    for plan, layer in zip(adapter.plan.layers, adapter.layers, strict=True):
        kind = original_class(layer)
        if not is_faithful(kind):
            yield f"{plan.name}: a {plan.kind}; peft's branch would be another one"
        if not is_faithful(kind) or issubclass(kind, nn.Linear):
            continue
        g, ones = plan.geometry, [1] * len(plan.weight_shape[2:])
        plain = {"groups": 1, "dilation": ones, "padding_mode": "zeros"}
        for key, value in plain.items():
            if g[key] != value:
                yield f"{plan.name}: {key} {g[key]!r}, which peft's branch drops"
