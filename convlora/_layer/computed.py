"""Where a layer's weight comes from: a Parameter, or a computation from other parameters that torch put in its place.

torch computes a weight in two ways: ``torch.nn.utils.parametrize`` (the newer weight_norm, spectral_norm, orthogonal)
makes ``weight`` a property of a class of its own; the older ``torch.nn.utils.weight_norm``, ``spectral_norm`` and
pruning write it as an attribute in a hook before each forward.
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
    """Whether the weight is a Parameter, as it is in most layers."""
    return layer._parameters.get("weight") is not None


def is_computed(layer: nn.Module) -> bool:
    """Whether the weight is computed in one of torch's two ways (and is the only tensor of the layer that is)."""
    return not has_parameter(layer) and (_is_parametrized(layer) or bool(_hooks(layer)))


def _is_parametrized(layer: nn.Module) -> bool:
    return parametrize.is_parametrized(layer, "weight") and len(cast(nn.ModuleDict, layer.parametrizations)) == 1


def _hooks(layer: nn.Module) -> list[Any]:
    """torch's older hooks that compute the weight."""
    return [hook for hook in layer._forward_pre_hooks.values() if _is_for_weight(hook)]


def _is_for_weight(hook: Any) -> bool:
    hook = getattr(hook, "hook", hook)
    hook = getattr(hook, "fn", hook)  # spectral_norm's hooks on the state dict wrap the one before the forward
    return type(hook).__module__.startswith("torch.nn.utils") and "weight" in (
        getattr(hook, "name", None),
        getattr(hook, "_tensor_name", None),
    )


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """The weight's shape as a stack of kernels ``(rows, ...)``, asked without computing the weight.

    Computing could change it: spectral_norm moves its vectors whenever it computes in train mode. timm's CondConv2d
    keeps each expert's kernels in one flat row: they count as ``experts · C_out`` rows. () where there is no weight.
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
    """The effective weight, computed afresh as in eval mode and with nothing moved by it; a copy."""
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
    """The base's class, and what its weight is or is computed from, while a merged weight is in the place."""

    cls: type[nn.Module]
    parts: dict[str, dict[Any, Any]]
    """Entries of the layer's own dictionaries (``_parameters``, ``_buffers``, ``_modules``, hooks)."""
    order: dict[str, list[Any]]
    """All keys of those dictionaries, in the order in which they were."""
    attribute: Tensor | None
    """The plain attribute ``weight`` that torch's older hooks write."""
    adapters: nn.Module
    """The layer's adapters: not its child meanwhile."""
    dtype: torch.dtype
    """Of the merged weight at first."""

    @classmethod
    def of(cls, layer: nn.Module, base_class: type[nn.Module], adapters: nn.Module, dtype: torch.dtype) -> Aside:
        """Of a layer whose class was ``base_class`` without an adapter; changes nothing."""
        parts = _parts(layer)
        order = {key: list(vars(layer)[key]) for key in parts}
        return cls(base_class, parts, order, vars(layer).get("weight"), adapters, dtype)

    @property
    def weight(self) -> nn.Parameter | None:
        """The base's weight Parameter; None where it is computed."""
        return cast("nn.Parameter | None", self.parts["_parameters"].get("weight"))

    @property
    def sources(self) -> list[nn.Module]:
        """Modules besides the layer whose parameters the weight is computed from."""
        return [module for entry in self.parts["_modules"].values() for module in entry.modules()]

    def put_merged(self, layer: nn.Module, merged: nn.Parameter) -> None:
        """Put the merged weight in the place of what the weight was computed from; the layer's class is plain then."""
        vars(layer).pop("weight", None)
        for key, entries in self.parts.items():
            for name in entries:
                vars(layer)[key].pop(name, None)
        layer.__class__ = self.cls.__bases__[0] if "parametrizations" in self.parts["_modules"] else self.cls
        layer._parameters["weight"] = merged
        self._sort(layer)

    def put_base(self, layer: nn.Module) -> None:
        """Undo :meth:`put_merged`, also half of it, and also twice."""
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
        """To where the layer is; into its dtype only where that was changed: half-precision bases have fp32 factors."""
        if now is not None:
            for tensor in (*self.adapters.parameters(), *self.adapters.buffers()):
                move_like(tensor, now if now.dtype != self.dtype else now.new_empty(0, dtype=tensor.dtype))

    def _sort(self, layer: nn.Module) -> None:
        for key, names in self.order.items():
            place = vars(layer)[key]
            for name in [n for n in names if n in place] + [n for n in place if n not in names]:
                place[name] = place.pop(name)


def _parts(layer: nn.Module) -> dict[str, dict[Any, Any]]:
    """What the weight is, or is computed from."""
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
    """Tensors follow to where the layer has gone meanwhile."""
    tensors = (*entry.parameters(), *entry.buffers()) if isinstance(entry, nn.Module) else (entry,)
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            move_like(tensor, now)
