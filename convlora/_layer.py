"""The adapted layer: its factors, and the effective weight that the base's own forward reads.

A layer is adapted by a class swap (``_swap``) that turns ``weight`` into a property, W + ΔW. The base Parameter stays
in ``_parameters["weight"]``, so the layer keeps its forward, geometry, hooks and state-dict keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._functional import add_delta, delta_weight, move_like
from ._swap import Swapped, restore, swap
from .errors import StateError

CHILD = "convlora"
"""The child of an adapted layer that holds its adapters by name, hence the key ``conv1.convlora.default.lora_A``."""


class LoRA(nn.Module):
    """All that one layer knows of one adapter.

    Attributes:
        lora_A: ``(rank, C_in / groups, kH, kW)``; in general ``(rank, *weight.shape[1:])``, so ``(rank, in_features)``
            for a linear layer and ``(rank, C_out / groups, kH, kW)`` for a transposed convolution.
        lora_B: ``(C_out, rank)``, in general ``(weight.shape[0], rank)``; zero at the start, so that a fresh adapter
            changes nothing.
        scaling: what multiplies B @ A.
        dropout: probability with which the branch's inputs are zeroed in training.
    """

    def __init__(self, weight: Tensor, rank: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__()
        # fp32 factors also on half-precision bases: steps of 1e-4 vanish in bf16.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(torch.empty(rank, *weight.shape[1:], dtype=dtype, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(weight.shape[0], rank, dtype=dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scaling = scaling
        self.dropout = dropout

    def delta_weight(self) -> Tensor:
        """ΔW, shaped like the layer's weight, in the factors' dtype."""
        return delta_weight(self.lora_A, self.lora_B, self.scaling)

    def extra_repr(self) -> str:
        """The line that ``print(model)`` shows."""
        dropout = f", dropout={self.dropout:g}" if self.dropout else ""
        return f"rank={self.lora_A.shape[0]}, scaling={self.scaling:g}{dropout}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A checkpoint of the base holds no factors at all: it loads, strictly too, and leaves them as they are.
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *args)


class Adapters(nn.ModuleDict):
    """A layer's adapters by name; while merged also the base's weight, kept aside and out of the state dict."""

    @property
    def aside(self) -> nn.Parameter | None:
        """The base's weight while the merged one is in its place."""
        return cast("nn.Parameter | None", vars(self).get("_aside"))

    def set_aside(self, weight: nn.Parameter | None) -> None:
        """Keep the base's weight, or None once it is back."""
        vars(self)["_aside"] = weight  # past nn.Module.__setattr__, which would register it as a parameter

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Nothing while merged: factors beside merged weights would be added to them again where they are loaded."""
        if self.aside is None:
            return super().state_dict(*args, **kwargs)
        return kwargs.get("destination", {})


class AdaptedLayer(Swapped):
    """What the swap adds to a convolution or linear layer."""

    _convlora_prefix: ClassVar[str] = "Adapted"

    @property
    def weight(self) -> Tensor:
        """The effective weight W + ΔW. To change the base weight, use :func:`convlora.base_weight`."""
        try:
            return effective_weight(cast(nn.Module, self))
        except AttributeError as cause:
            # As an AttributeError of a property it would fall through to nn.Module.__getattr__, which would hand
            # back the base weight without a word.
            raise StateError(f"The adapter of this layer is damaged ({cause}); inject or load it again.") from cause

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's own forward with the effective weight; with dropout in training, base plus branch."""
        layer = cast(nn.Module, self)
        lora = next(adapters(layer))
        if lora.dropout and layer.training:
            return _forward_with_dropout(layer, lora, *args, **kwargs)
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse a new ``weight``: the property would add ΔW to it once more.

        Here and not in ``__setattr__``: nn.Module's own leads here, and FSDP2 takes its direct way only while
        ``__setattr__`` is nn.Module's.
        """
        if name == "weight" and "_convlora_loading" not in vars(self):
            raise StateError(
                "Assigning `weight` of an adapted layer would add the adapter to the new weight again. "
                "Call convlora.merge(model) first, or change convlora.base_weight(layer) in place."
            )
        super().register_parameter(name, param)  # type: ignore[misc]

    def _load_from_state_dict(self, *args: Any) -> None:
        # load_state_dict(assign=True) assigns the *base* weight, which is what a checkpoint's `weight` means here.
        vars(self)["_convlora_loading"] = True
        try:
            super()._load_from_state_dict(*args)  # type: ignore[misc]
        finally:
            del vars(self)["_convlora_loading"]


def effective_weight(layer: nn.Module) -> Tensor:
    """W + ΔW of an adapted layer, in the base's dtype."""
    weight = cast(Tensor, layer._parameters["weight"])
    for lora in adapters(layer):
        weight = add_delta(weight, lora.delta_weight())
    return weight


def _forward_with_dropout(layer: nn.Module, lora: LoRA, x: Tensor) -> Tensor:
    base, delta, dropped = base_weight(layer), lora.delta_weight(), F.dropout(x, lora.dropout)
    delta = delta.to(base.dtype)
    if isinstance(layer, nn.Linear):
        return F.linear(x, base, layer.bias) + F.linear(dropped, delta)
    forward = cast("Callable[..., Tensor]", layer._conv_forward)
    return forward(x, base, layer.bias) + forward(dropped, delta, None)


def supports_dropout(layer: nn.Module) -> bool:
    """Whether the layer's forward is linear in its weight as known here, so that the adapter can be a branch."""
    plain = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return type(layer).forward in [kind.forward for kind in plain]


def attach(layer: nn.Module, adapter_name: str, lora: LoRA) -> None:
    """Swap the layer's class and put the factors beside its weight."""
    layer.add_module(CHILD, Adapters({adapter_name: lora}))
    swap(layer, AdaptedLayer)


def detach(layer: nn.Module) -> None:
    """Undo :func:`attach`, also one that was interrupted halfway, and also where the layer is merged."""
    if isinstance(layer, AdaptedLayer):
        restore(layer)
    layer._modules.pop(CHILD, None)


def fold(layer: nn.Module, merged: Tensor) -> None:
    """Put the merged weight in the base's place and give the layer its plain class back."""
    _adapters(layer).set_aside(layer._parameters["weight"])
    restore(layer)
    layer._parameters["weight"] = nn.Parameter(merged, requires_grad=False)


def unfold(layer: nn.Module) -> None:
    """Undo :func:`fold`, also one that was interrupted halfway, and also twice."""
    base = _adapters(layer).aside
    if base is not None:
        layer._parameters["weight"] = cast(nn.Parameter, move_like(base, layer._parameters.get("weight")))
        if not isinstance(layer, AdaptedLayer):
            swap(layer, AdaptedLayer)
        _adapters(layer).set_aside(None)


def _adapters(layer: nn.Module) -> Adapters:
    return cast(Adapters, layer._modules[CHILD])


def adapters(layer: nn.Module) -> Iterator[LoRA]:
    """The adapters of an adapted layer."""
    for lora in _adapters(layer)._modules.values():
        yield cast(LoRA, lora)


def base_weight(layer: nn.Module) -> nn.Parameter:
    """The base's own weight Parameter of a layer, adapted, merged or plain: what ``layer.weight`` was at first.

    In-place changes to ``layer.weight`` of an adapted layer are lost, since that is computed; changes to this last.

    Raises:
        StateError: the layer has no weight Parameter.
    """
    aside = _adapters(layer).aside if CHILD in layer._modules else None
    weight = layer._parameters.get("weight") if aside is None else aside
    if weight is None:
        raise StateError(f"{type(layer).__name__} has no weight Parameter of its own.")
    return weight
