"""How an adapter is written in Hugging Face peft's names: tensor keys, shapes, and adapter_config.json."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from torch import nn

from ._computed import has_parameter
from ._functional import scaling_of
from ._plan import LayerPlan, Plan
from ._state import Adapter
from ._swap import original_class
from ._targets import modules_of

PREFIX = "base_model.model."
"""What peft puts before every key of the base."""


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
    ranks = {_pattern_key(p.name, plan): p.rank for p in layers if p.rank != top.rank}
    alphas = {_pattern_key(p.name, plan): p.alpha for p in layers if p.alpha != top.alpha}
    names = "|".join(re.escape(p.name) for p in plan.layers)
    tracked = plan.norms if plan.norm == "track" else ()
    return {
        # Stock peft refuses a type that it does not know: an error there, never a wrong prediction.
        "peft_type": "LORA" if _peft_predicts_the_same(model, adapter) else "CONVLORA",
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


def _pattern_key(name: str, plan: Plan) -> str:
    """The name itself, or anchored where peft, which matches the ends of names, would also hit other layers."""
    others = (p.name for p in plan.layers if p.name != name)
    return f"^{re.escape(name)}$" if any(re.match(rf"(.*\.)?({name})$", other) for other in others) else name


def _peft_predicts_the_same(model: nn.Module, adapter: Adapter) -> bool:
    """Whether stock peft rebuilds these layers faithfully: its conv branch drops groups, dilation, padding mode."""
    shared = {n.module for n in modules_of(model) if len(n.names) > 1}
    return (
        bool(adapter.layers)
        and not adapter.plan.biases
        and all(
            layer not in shared and has_parameter(layer) and _peft_knows(plan, original_class(layer))
            for plan, layer in zip(adapter.plan.layers, adapter.layers, strict=True)
        )
    )


def _peft_knows(plan: LayerPlan, kind: type[nn.Module]) -> bool:
    if kind is nn.Linear:
        return True
    g = plan.geometry
    plain = {"dilation": [1, 1], "groups": 1, "padding_mode": "zeros"}
    return kind is nn.Conv2d and isinstance(g["padding"], list) and all(g[key] == value for key, value in plain.items())
