"""Plan a network on the meta device, and check that the plan accounts for every parameter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import timm
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

import convlora

from . import timm_cases, torchvision_cases


class MetaParameters(TorchFunctionMode):
    """Puts only ``torch.empty`` on the meta device, for constructors that read small tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Redirect ``torch.empty``, with which every layer makes its weights."""
        kwargs = kwargs or {}
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def names() -> list[str]:
    """Every architecture name of both libraries, ``timm/…`` and ``torchvision/…``."""
    return [f"timm/{name}" for name in timm_cases.names()] + [f"torchvision/{n}" for n in torchvision_cases.names()]


def build(name: str) -> tuple[nn.Module, str]:
    """The network on the meta device, and how it was built."""
    library, architecture = name.split("/")
    make = _timm if library == "timm" else torchvision_cases.build
    try:
        with torch.device("meta"):
            return make(architecture), "meta device"
    except NotImplementedError:
        with MetaParameters():
            return make(architecture), "parameters on the meta device"


def _timm(name: str) -> nn.Module:
    return timm.create_model(name)


def check_plan(name: str) -> dict[str, Any]:
    """One row: the plan's counts, and ``problems``, which is empty if all is accounted for."""
    model, means = build(name)
    convolutions = {n: m for n, m in model.named_modules() if looks_like_convolution(m)}
    row: dict[str, Any] = {
        "means": means,
        "parameters": sum(p.numel() for p in model.parameters()),
        "convolutions": len(convolutions),
        "targets": ", ".join(sorted({type(m).__name__ for m in convolutions.values()})),
        "problems": [],
    }
    if not convolutions:
        row["problems"] += _refusal_of_default(model)
        return row
    plan = convlora.plan(model)
    row["adapted"] = len(plan.layers)
    row["capped"] = sum(bool(layer.note) for layer in plan.layers)
    row["skipped"] = dict(Counter(layer.note for layer in plan.skipped))
    row["problems"] += list(problems_of(plan, model, convolutions))
    return row


def looks_like_convolution(module: nn.Module) -> bool:
    """Whether a module is a convolution of torch, or has a kernel size and a weight."""
    return isinstance(module, _ConvNd) or (
        hasattr(module, "kernel_size") and isinstance(getattr(module, "weight", None), torch.Tensor)
    )


def _refusal_of_default(model: nn.Module) -> list[str]:
    try:
        convlora.plan(model)
    except convlora.TargetError as refusal:
        return [] if "has no convolution" in str(refusal) else [f"unclear refusal: {refusal}"]
    return ["planned with the default targets without any convolution"]


def problems_of(plan: convlora.Plan, model: nn.Module, convolutions: dict[str, nn.Module]) -> Iterator[str]:
    """The plan's problems: missing convolutions and parameters, wrong counts, adapters larger than their layer."""
    listed = {layer.name for layer in (*plan.layers, *plan.skipped)}
    saved = {m for name in plan.modules_to_save for m in model.get_submodule(name).modules()}
    for name in convolutions:
        if name not in listed:
            yield f"convolution neither adapted nor skipped: {name} ({type(convolutions[name]).__name__})"
    for layer in plan.layers:
        if layer.adapter_parameters > layer.base_parameters:
            yield f"adapter larger than its layer: {layer.name}"
    yield from _unaccounted(model, listed, saved, {part.name: part.parameters for part in plan.others})


def _unaccounted(model: nn.Module, listed: set[str], saved: set[nn.Module], others: dict[str, int]) -> Iterator[str]:
    inside = {m for name in listed for m in model.get_submodule(name).modules()}
    for name, module in model.named_modules():
        owned = sum(p.numel() for p in module._parameters.values() if p is not None)
        if not owned:
            continue
        if module not in inside and module not in saved and name not in others:
            yield f"unaccounted: {name or 'the model itself'} ({type(module).__name__})"
        if name in others and others[name] != owned:
            yield f"others says {others[name]} parameters of {name}, it owns {owned}"
