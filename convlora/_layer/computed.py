"""Layers whose weight torch computes from other parameters, and how a merged weight replaces it.

torch computes a weight in two ways. ``torch.nn.utils.parametrize`` (the newer weight_norm, spectral_norm, orthogonal)
makes ``weight`` a property of a generated class. The older ``torch.nn.utils.weight_norm``, ``spectral_norm`` and
pruning write ``weight`` as an attribute, in a hook before each forward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from .functional import move_like


def has_parameter(layer: nn.Module) -> bool:
    """Return whether the weight is a Parameter, as in most layers."""
    return layer._parameters.get("weight") is not None


def is_computed(layer: nn.Module) -> bool:
    """Return whether torch computes the weight in one of these two ways, and no other tensor of the layer."""
    return not has_parameter(layer) and (_is_parametrized(layer) or bool(_hooks(layer)))


def _is_parametrized(layer: nn.Module) -> bool:
    return parametrize.is_parametrized(layer, "weight") and len(cast(nn.ModuleDict, layer.parametrizations)) == 1


def _hooks(layer: nn.Module) -> list[Any]:
    """Return the layer's forward pre-hooks that compute its weight."""
    return [hook for hook in layer._forward_pre_hooks.values() if _is_for_weight(hook)]


def _is_for_weight(hook: Any) -> bool:
    hook = getattr(hook, "hook", hook)
    hook = getattr(hook, "fn", hook)  # spectral_norm's state-dict hooks hold its forward pre-hook
    return type(hook).__module__.startswith("torch.nn.utils") and "weight" in (
        getattr(hook, "name", None),
        getattr(hook, "_tensor_name", None),
    )


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """Return the weight's shape as a stack of kernels ``(rows, ...)``, without computing it; () without a weight.

    Computing the weight could change the layer: in train mode spectral_norm then updates its vectors. timm's CondConv2d
    keeps the kernels of each expert in one row of its weight; its shape here has ``experts · C_out`` rows.
    """
    weight = layer._parameters.get("weight")
    if weight is None:
        return _declared_shape(layer) if is_computed(layer) else ()
    kernels = getattr(layer, "weight_shape", None)
    if weight.ndim == 2 and isinstance(kernels, tuple) and math.prod(kernels) == weight.shape[1]:
        return (weight.shape[0] * kernels[0], *kernels[1:])
    return tuple(weight.shape)


def _declared_shape(layer: nn.Module) -> tuple[int, ...]:
    if isinstance(layer, _ConvNd):
        outer, inner = layer.out_channels, layer.in_channels
        if layer.transposed:
            outer, inner = inner, outer
        return (outer, inner // layer.groups, *layer.kernel_size)
    return (cast(int, layer.out_features), cast(int, layer.in_features))


def compute(layer: nn.Module) -> Tensor:
    """Return a copy of the effective weight, computed in eval mode so that it changes nothing."""
    modes = {module: module.training for module in layer.modules()}
    try:
        for module in modes:
            module.training = False
        for hook in _hooks(layer):
            hook(layer, ())
        return cast(Tensor, layer.weight).detach().clone()
    finally:
        for module, mode in modes.items():
            module.training = mode


@dataclass
class Aside:
    """The base's class and the sources of its weight, kept while a merged weight replaces them."""

    cls: type[nn.Module]
    parts: dict[str, dict[Any, Any]]
    """Entries of the layer's own dictionaries (``_parameters``, ``_buffers``, ``_modules``, hooks)."""
    order: dict[str, list[Any]]
    """All keys of those dictionaries, in their original order."""
    attribute: Tensor | None
    """The plain attribute ``weight`` that torch's older hooks write."""
    adapters: nn.Module
    """The layer's adapters, which are not its child while it is merged."""
    dtype: torch.dtype
    """The dtype of the merged weight at the time of merging."""

    @classmethod
    def of(cls, layer: nn.Module, base_class: type[nn.Module], adapters: nn.Module, dtype: torch.dtype) -> Aside:
        """Return the record of a layer whose class before injection was ``base_class``; the layer is not changed."""
        parts = _parts(layer)
        order = {key: list(vars(layer)[key]) for key in parts}
        return cls(base_class, parts, order, vars(layer).get("weight"), adapters, dtype)

    @property
    def weight(self) -> nn.Parameter | None:
        """The base's weight Parameter; None if the weight is computed."""
        return cast("nn.Parameter | None", self.parts["_parameters"].get("weight"))

    @property
    def sources(self) -> list[nn.Module]:
        """The modules besides the layer from whose parameters the weight is computed."""
        return [module for entry in self.parts["_modules"].values() for module in entry.modules()]

    def put_merged(self, layer: nn.Module, merged: nn.Parameter) -> None:
        """Replace the sources of the weight by the merged weight, and the layer's class by the plain one."""
        vars(layer).pop("weight", None)
        for key, entries in self.parts.items():
            for name in entries:
                vars(layer)[key].pop(name, None)
        layer.__class__ = self.cls.__bases__[0] if "parametrizations" in self.parts["_modules"] else self.cls
        layer._parameters["weight"] = merged
        self._sort(layer)

    def put_base(self, layer: nn.Module) -> None:
        """Undo :meth:`put_merged`, even if it was interrupted. May be run again."""
        self._bring_adapters(layer._parameters.get("weight"))
        now = layer._parameters.pop("weight", None)
        for key, entries in self.parts.items():
            for name, entry in entries.items():
                _follow(entry, now)
                vars(layer)[key][name] = entry
        if self.attribute is not None:
            vars(layer)["weight"] = self.attribute
        layer.__class__ = self.cls
        self._sort(layer)

    def _bring_adapters(self, now: Tensor | None) -> None:
        """Move the adapters to the layer's device; and to its dtype if that has changed since merging."""
        if now is not None:
            for tensor in (*self.adapters.parameters(), *self.adapters.buffers()):
                move_like(tensor, now if now.dtype != self.dtype else now.new_empty(0, dtype=tensor.dtype))

    def _sort(self, layer: nn.Module) -> None:
        for key, names in self.order.items():
            entries = vars(layer)[key]
            for name in [n for n in names if n in entries] + [n for n in entries if n not in names]:
                entries[name] = entries.pop(name)


def _parts(layer: nn.Module) -> dict[str, dict[Any, Any]]:
    """Return the entries of the layer's dictionaries that are its weight, or from which it is computed."""
    parts: dict[str, dict[Any, Any]] = {"_parameters": {}, "_modules": {}}
    if has_parameter(layer):
        parts["_parameters"]["weight"] = layer._parameters["weight"]
    elif _is_parametrized(layer):
        parts["_modules"]["parametrizations"] = layer.parametrizations
    else:
        for key in ("_parameters", "_buffers"):
            parts[key] = {name: tensor for name, tensor in vars(layer)[key].items() if name.startswith("weight_")}
        for key in ("_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks"):
            parts[key] = {name: hook for name, hook in vars(layer)[key].items() if _is_for_weight(hook)}
    return parts


def _follow(entry: Any, now: Tensor | None) -> None:
    """Move tensors to the device and dtype of ``now``, the weight that replaced them."""
    tensors = (*entry.parameters(), *entry.buffers()) if isinstance(entry, nn.Module) else (entry,)
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            move_like(tensor, now)
