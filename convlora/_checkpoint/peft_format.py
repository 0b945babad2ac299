"""How an adapter is written in Hugging Face peft's names: tensor keys, shapes, and adapter_config.json."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from .._layer.computed import has_parameter
from .._layer.functional import alpha_of, scaling_of
from .._layer.swap import original_class
from .._model.state import Adapter
from .._model.targets import modules_of
from .._plan import LayerPlan

PREFIX = "base_model.model."
"""What peft puts before every key of the base."""
STOCK, REGISTERED, ALONE = "LORA", "CONVLORA", "CONVLORA_ALONE"
"""Types of file: read by stock peft; by peft with convlora's layers registered; by convlora alone."""


MAGNITUDE = "lora_magnitude_vector"
"""What DoRA's magnitudes are called after the layer's name."""

FAITHFUL = {"timm.layers.linear.Linear", "timm.layers.conv2d_same.Conv2dSame"}
"""Subclasses whose own forward treats the weight as torch's does, so that a branch of the same class is exact."""


def is_faithful(kind: type[nn.Module]) -> bool:
    """Whether W + ΔW in a layer of this class is the layer and a branch beside it: torch's own, and a few known."""
    return is_torchs_own(kind) or f"{kind.__module__}.{kind.__qualname__}" in FAITHFUL


def is_torchs_own(kind: type[nn.Module]) -> bool:
    """Whether it is torch's plain convolution or linear layer itself."""
    return kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def factor_shapes(layer: LayerPlan) -> dict[str, tuple[int, ...]]:
    """Key and shape in the file of a layer's tensors, and of DoRA's magnitudes, which peft keeps as of an output."""
    shapes = {dotted(layer.name, name): shape for name, shape in layer.stored_shapes.items()}
    if layer.use_dora:
        spatial, count = (1,) * len(layer.weight_shape[2:]), layer.magnitudes
        shapes[dotted(layer.name, MAGNITUDE)] = (1, count, *spatial) if spatial else (count,)
    return shapes


def has_factors(layer: LayerPlan) -> bool:
    """Whether a layer's change is in the file as LoRA's two factors."""
    return "lora_A.weight" in layer.stored_shapes


def dotted(*parts: str) -> str:
    """A key of its parts; the root's name is empty.

    >>> dotted("layer1.0", "weight"), dotted("", "weight")
    ('layer1.0.weight', 'weight')
    """
    return ".".join(part for part in parts if part)


def peft_config(model: nn.Module, adapter: Adapter) -> dict[str, Any]:
    """What adapter_config.json says, in the fields of peft's LoraConfig."""
    plan = adapter.plan
    stored = {p.name: p.stored_shapes["lora_A.weight"][0] for p in plan.layers if has_factors(p)}
    alphas = {p.name: alpha_of(p.scaling, stored[p.name], plan.use_rslora) for p in plan.layers if p.name in stored}
    # An anchored change has twice the rank that its factors have.
    rank = plan.rank * max(
        (stored[p.name] // p.rank for p in plan.layers if p.name in stored and p.change.has_rank), default=1
    )
    alpha = alpha_of(scaling_of(plan.alpha, plan.rank, plan.use_rslora), rank, plan.use_rslora)
    names = "|".join(re.escape(p.name) for p in plan.layers)
    tracked = plan.norms if plan.norm == "track" else ()
    return {
        "peft_type": peft_type(model, adapter),
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": plan.dropout,
        "use_rslora": plan.use_rslora,
        "use_dora": plan.use_dora,
        "bias": "none",
        "target_modules": f"^(?:{names})$",
        "rank_pattern": _unlike(stored, rank),
        "alpha_pattern": _unlike(alphas, alpha),
        "modules_to_save": [*plan.modules_to_save, *tracked] or None,
    }


def _unlike(values: Mapping[str, float], usual: float) -> dict[str, float]:
    """Those of layers that differ, as patterns: with both ends, for peft matches the ends of names."""
    return {f"^{re.escape(name)}$": value for name, value in values.items() if value != usual}


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
        if not has_factors(layer_plan):
            yield f"{layer_plan.name}: changed by method {layer_plan.method!r}, which is no LoRA"
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
