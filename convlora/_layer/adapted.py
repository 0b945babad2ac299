"""The adapted layer: the effective weight that the base's own forward reads, and how a layer comes to have it.

A layer is adapted by a class swap (``swap.py``) that turns ``weight`` into a property, W + ΔW. The base Parameter stays
in ``_parameters["weight"]``, so the layer keeps its forward, geometry, hooks and state-dict keys.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable
from functools import partial
from threading import get_ident
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from ..errors import StateError
from .change import Change
from .computed import Aside, has_parameter
from .fast import convolution, is_plain, linear
from .functional import is_tracing
from .kept import Kept
from .masters import as_read
from .mix import Mix, Weighted
from .routed import layer_forward
from .routing import Owner, route_of
from .swap import Swapped, class_below, original_class, restore, swap

CHILD = "convlora"
"""The child of an adapted layer that holds its adapters by name, hence the key ``conv1.convlora.default.lora_A``."""

ASIDE = "_convlora_aside"
"""The attribute of a merged layer that holds its adapters and what the merged weight has taken the place of. As no
child, so that who walks through the modules finds the plain layer, and no factors beside a weight that has them."""


ASSIGNED = (
    "Assigning `weight` of an adapted layer would add the adapter to the new weight again. "
    "Call convlora.merge(model) first, or change convlora.base_weight(layer) in place."
)

GETATTR = nn.Module.__getattr__
"""torch's own: torch.fx puts another in its place while it follows a network's code."""

WRITERS = {"reset_parameters", "convert_conv2d_weight_memory_format", "convert_conv3d_weight_memory_format"}
"""Functions that read ``weight`` to write into it in place: they are given the base's, where the write lasts."""
SHARDED = "_is_fsdp_managed_module"
"""What FSDP puts on each module that it manages. It takes parameters out, and puts views of its flat one in."""
OFFLOADED = "_hf_hook"
"""What accelerate puts on each module with tensors of its own: a hook that brings them before the module's forward."""

DAMAGED = "The adapter of this layer is damaged ({}); inject or load it again."


class LayerAdapters(nn.ModuleDict):
    """A layer's adapters by name, and which of them is active."""

    active: Owner | None = None
    """None where the layer computes with the base's weight alone."""

    live: Mix | None = None
    """What is active in a model that is prepared for hot swaps: found without a name, which compilers would guard."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = Kept()

    def activate(self, owner: Owner | None) -> None:
        """Let the layer compute with this owner's changes."""
        there = () if owner is None else self._there(owner)
        self.active, self.live = owner, there[0][0].live(there[0][1]) if len(there) == 1 else None

    def current(self) -> Change | Mix | None:
        """What the layer computes with outside of ``use_adapters`` blocks; None for the base alone."""
        if self.live is not None:
            return self.live
        return None if self.active is None else self.of(self.active)

    def of(self, owner: Owner) -> Change | Mix | None:
        """What the layer computes with for an owner; None where it has nothing of it."""
        if isinstance(owner, str):
            change = cast("Change | None", self._modules.get(owner))
            if change is None or change.strength == 1:
                return change
        parts = self.parts(owner)
        return Mix(parts) if parts else None

    def parts(self, owner: Owner) -> Weighted:
        """The changes of an owner in this layer, each with the weight that it has in all, where that is not 0."""
        parts = ((change, weight * change.strength) for change, weight in self._there(owner))
        return tuple((change, weight) for change, weight in parts if weight)

    def _there(self, owner: Owner) -> Weighted:
        named = ((owner, 1.0),) if isinstance(owner, str) else owner
        there = ((cast("Change | None", self._modules.get(name)), weight) for name, weight in named)
        return tuple((change, weight) for change, weight in there if change is not None)

    def change_key(self, owner: Owner) -> Hashable:
        """What tells an owner's change of this layer from others'."""
        return tuple((id(change), weight) for change, weight in self.parts(owner))

    def _replicate_for_data_parallel(self) -> Any:
        replica = cast(Any, super())._replicate_for_data_parallel()
        replica.live = None  # it is of the model that was replicated: by its name a replica finds its own
        return replica

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.kept.clear()  # of another dtype or on another device
        return cast(Any, super())._apply(*args, **kwargs)


class AdaptedLayer(Swapped):
    """What the swap adds to a convolution or linear layer."""

    _convlora_prefix: ClassVar[str] = "Adapted"
    # torch.fx takes a module for a leaf when its class is from torch.nn; traced into, it could not follow the property.
    _convlora_module: ClassVar[str | None] = "torch.nn.modules.conv"

    @property
    def weight(self) -> Tensor:
        """The effective weight W + ΔW. To change the base weight, use :func:`convlora.base_weight`."""
        layer = cast(nn.Module, self)
        if not torch.compiler.is_compiling() and (SHARDED in vars(layer) or OFFLOADED in vars(layer)):
            asker = sys._getframe(1).f_globals.get("__name__", "")
            if asker.startswith(("torch.distributed.fsdp.", "accelerate.")):
                # They ask by getattr for the tensor that they move, and FSDP would shard W + ΔW in its place.
                return vars(layer)["weight"] if "weight" in vars(layer) else cast(Tensor, GETATTR(layer, "weight"))
        try:
            if not torch.compiler.is_compiling():
                if nn.Module.__getattr__ is not GETATTR and (traced := _traced_weight(layer)) is not None:
                    return traced
                reader = sys._getframe(1).f_code
                base = layer._parameters.get("weight")
                if base is not None and reader.co_name in WRITERS:
                    return base
                if layer.training:
                    _check_dropout(layer, self._convlora_base, reader)
            return layer_weight(layer)
        except AttributeError as cause:
            # As an AttributeError of a property it would fall through to nn.Module.__getattr__, which would hand
            # back the base weight without a word.
            raise StateError(DAMAGED.format(cause)) from cause

    @weight.setter
    def weight(self, value: Tensor) -> None:
        if "weight" not in vars(self) and SHARDED not in vars(self):
            raise StateError(ASSIGNED)
        vars(self)["weight"] = value  # torch's older weight_norm: its hook writes the base's weight here each time

    @weight.deleter
    def weight(self) -> None:
        if SHARDED not in vars(self):
            raise AttributeError(f"weight of {type(self).__name__} is computed and cannot be deleted")
        del vars(self)["weight"]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's own forward with the effective weight; with dropout in training, base plus branch."""
        layer = cast(nn.Module, self)
        if not isinstance(self, AdaptedLayer):
            # Another library kept this method bound, as its wrapper's inner forward, and the layer is merged or plain.
            return type(layer).forward(layer, *args, **kwargs)
        route, adapters = route_of(layer), held(layer)
        if route is not None:
            return layer_forward(layer, self._convlora_base, adapters, route, args, kwargs)
        change = adapters.current()
        if change is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        is_eager = not torch.compiler.is_compiling() and not is_tracing()
        if is_eager and (OFFLOADED in vars(change) or isinstance(change, Mix)) and _is_offloaded(change):
            return _forward_offloaded(self, change, args, kwargs)
        if layer.training or torch.is_grad_enabled():
            if is_eager and torch.is_grad_enabled() and _is_trained(layer, change):
                adapters.kept.train()
            if len(args) + len(kwargs) == 1 and (args or "input" in kwargs):
                y = _forward_in_training(layer, self._convlora_base, change, args[0] if args else kwargs["input"])
                if y is not None:
                    return y
        if is_eager:
            return _forward_with_kept_weight(layer, self._convlora_base, change, super().forward, args, kwargs)  # type: ignore[misc]
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse a new ``weight``: the property would add ΔW to it once more.

        Here and not in ``__setattr__``: nn.Module's own leads here, and FSDP2 takes its direct way only while
        ``__setattr__`` is nn.Module's.
        """
        if name == "weight" and "_convlora_loading" not in vars(self):
            if SHARDED not in vars(self) or name in cast(nn.Module, self)._parameters:
                raise StateError(ASSIGNED)
            cast(nn.Module, self)._parameters[name] = param  # FSDP puts back what it took out
            return
        super().register_parameter(name, param)  # type: ignore[misc]

    def _load_from_state_dict(self, *args: Any) -> None:
        # load_state_dict(assign=True) assigns the *base* weight, which is what a checkpoint's `weight` means here.
        vars(self)["_convlora_loading"] = True
        try:
            super()._load_from_state_dict(*args)  # type: ignore[misc]
        finally:
            del vars(self)["_convlora_loading"]


def own_weight(layer: nn.Module) -> Tensor:
    """The base's weight of an adapted, unmerged layer: its Parameter, or what it is computed to be."""
    weight = layer._parameters.get("weight")
    if weight is None:
        weight = vars(layer).get("weight")
    return super(AdaptedLayer, layer).weight if weight is None else weight  # type: ignore[misc]


def _is_offloaded(change: Change | Mix) -> bool:
    return any(OFFLOADED in vars(each) and each.tensors()[0].is_meta for each, _ in change.parts)


def _forward_offloaded(layer: AdaptedLayer, change: Change | Mix, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The forward with the factors brought by accelerate's hook on them, which comes before their own forward only."""
    hooked = [(vars(each)[OFFLOADED], each) for each, _ in change.parts if OFFLOADED in vars(each)]
    for hook, each in hooked:
        hook.pre_forward(each)
    try:
        return AdaptedLayer.forward(layer, *args, **kwargs)
    finally:
        for hook, each in hooked:
            hook.post_forward(each, None)
        held(cast(nn.Module, layer)).kept.clear()  # it would hold what was offloaded


def _forward_with_kept_weight(
    layer: nn.Module, cls: type[nn.Module], change: Change | Mix, forward: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """Compute the base's forward with the effective weight, which is kept between calls that need no gradient."""
    kept, base = held(layer).kept, layer._parameters.get("weight")
    if base is not None and len(args) == 1 and not kwargs and is_plain(layer, cls):  # as its forward, in fewer calls
        try:
            weight = kept.weight(base, change.sources(), change.numbers, change.effective_weight)
        except AttributeError as cause:
            raise StateError(DAMAGED.format(cause)) from cause
        return cast("Callable[..., Tensor]", layer._conv_forward)(args[0], weight, layer.bias)
    kept.serves = get_ident()
    try:
        return forward(*args, **kwargs)
    finally:
        kept.serves = None


def _is_trained(layer: nn.Module, change: Change | Mix) -> bool:
    base = layer._parameters.get("weight")
    if base is not None and base.requires_grad:
        return True
    for tensor in change.tensors():
        if tensor.requires_grad:
            return True
    return any(each._modules for each, _ in change.parts)  # parametrized: what it is computed from may be


def _traced_weight(layer: nn.Module) -> Tensor | None:
    """What ``torch.fx`` records where the code that it follows reads ``weight``: the layer's attribute, read anew.

    None where it follows other code than a network of which this layer is a part. torch.fx gives a proxy only where a
    Parameter is read through ``__getattr__``.
    """
    proxy = nn.Module.__getattr__(layer, "weight") if has_parameter(layer) else None
    if not isinstance(proxy, Proxy):
        return None
    proxy.node.target = proxy.node.target.removesuffix(".weight")  # the layer itself; the same proxy comes each time
    return cast(Tensor, proxy.weight)


def _check_dropout(layer: nn.Module, cls: type[nn.Module], reader: object) -> None:
    """Raise where the base's forward reads the weight in training and the adapter has dropout: ours was passed by."""
    change = active_adapter(layer)
    if change is not None and change.dropout and reader is getattr(cls.forward, "__code__", None):
        raise StateError(
            f"A {cls.__name__} has a forward on the instance that calls {cls.__name__}.forward and not the adapted "
            f"layer's, so that dropout={change.dropout:g} would not be applied. Wrap the layer's forward while it is "
            "injected and unmerged, or inject with dropout=0."
        )


def layer_weight(layer: nn.Module) -> Tensor:
    """W + ΔW of an adapted layer; the base's own tensor where no adapter is active.

    In the layer's own forward, where no gradient is asked for, it is computed once and kept until a tensor that it came
    from has changed.
    """
    base, change = own_weight(layer), active_adapter(layer)
    if change is None:
        return cast(Tensor, as_read(layer, "weight", base))
    if torch.compiler.is_compiling() or is_tracing() or held(layer).kept.serves != get_ident():
        return change.effective_weight(base)
    return held(layer).kept.weight(base, change.sources(), change.numbers, change.effective_weight)


def _forward_in_training(layer: nn.Module, cls: type[nn.Module], change: Change | Mix, x: Tensor) -> Tensor | None:
    """What a layer with a plain forward computes where gradients are asked for; None where the base's forward does."""
    if layer.training and change.dropout:  # compilers guard what is read
        return _forward_with_dropout(layer, own_weight(layer), change, x)
    base = layer._parameters.get("weight")
    if base is None or not torch.is_grad_enabled() or is_tracing():
        return None  # a computed weight is computed once a forward, by the property: spectral_norm moves each time
    forward = convolution if is_plain(layer, cls) else linear if cls.forward is nn.Linear.forward else None
    if forward is None:
        return None
    factors = change.factors_at(base)
    if factors is None:
        bias = cast("Tensor | None", layer.bias)
        return change.output(x, bias, partial(_plain_output, layer, base, bias))
    y = forward(layer, x, base, *factors, change.scaling, change.path)
    is_scaled = isinstance(change, Change) and change.use_dora
    return cast(Change, change).scaled_output(layer, y, base) if is_scaled and y is not None else y


def _forward_with_dropout(layer: nn.Module, base: Tensor, change: Change | Mix, x: Tensor) -> Tensor:
    start = _plain_output(layer, base, cast("Tensor | None", layer.bias), x)
    total = start
    for each, weight in change.parts:
        delta, dropped = each.delta(base).to(base.dtype), F.dropout(x, each.dropout)
        y = start + _plain_output(layer, delta, None, dropped)
        y = each.scaled_output(layer, y, base) if each.use_dora else y
        total = y if each is change else total + weight * (y - start)
    return total


def _plain_output(layer: nn.Module, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """What a layer with a plain forward computes with this weight and bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    return cast("Callable[..., Tensor]", layer._conv_forward)(x, weight, bias)


def supports_dropout(layer: nn.Module) -> bool:
    """Whether the layer's forward is linear in its weight as known here, so that the adapter can be a branch."""
    cls = original_class(layer)
    return cls.forward is nn.Linear.forward or is_plain(layer, cls)


def attach(layer: nn.Module, adapter_name: str, change: Change) -> None:
    """Put an adapter's change beside the layer's weight, at rest; swap the class where it is the first."""
    if CHILD not in layer._modules:
        layer.add_module(CHILD, LayerAdapters())
        swap(layer, AdaptedLayer)
    held(layer).add_module(adapter_name, change)


def detach(layer: nn.Module, adapter_name: str) -> None:
    """Undo :func:`attach`, also one that was interrupted halfway, and also where the layer is merged."""
    if carries(layer):
        held(layer)._modules.pop(adapter_name, None)
        if held(layer)._modules:
            return
    if isinstance(layer, AdaptedLayer):
        restore(layer)
    layer._modules.pop(CHILD, None)
    vars(layer).pop(ASIDE, None)


def merge_layer(layer: nn.Module, merged: nn.Parameter) -> None:
    """Put the merged weight in the base's place and give the layer its plain class back; may be run twice."""
    adapters = held(layer)
    aside = aside_of(layer) or Aside.of(layer, class_below(layer), adapters, merged.dtype)
    vars(layer)[ASIDE] = aside
    adapters.kept.clear()
    layer._modules.pop(CHILD, None)
    aside.put_merged(layer, merged)


def unmerge_layer(layer: nn.Module) -> None:
    """Undo :func:`merge_layer`, also one that was interrupted halfway, and also twice."""
    aside = aside_of(layer)
    if aside is not None:
        layer._modules[CHILD] = aside.adapters
        aside.put_base(layer)
        swap(layer, AdaptedLayer)
        vars(layer).pop(ASIDE)


def carries(layer: nn.Module) -> bool:
    """Whether a module holds adapters, merged or not."""
    return CHILD in layer._modules or ASIDE in vars(layer)


def aside_of(layer: nn.Module) -> Aside | None:
    """What a merged layer's weight has taken the place of; None where it is not merged."""
    return cast("Aside | None", vars(layer).get(ASIDE))


def held(layer: nn.Module) -> LayerAdapters:
    """What an adapted layer holds of its adapters."""
    aside = vars(layer).get(ASIDE)
    return cast(LayerAdapters, layer._modules[CHILD] if aside is None else aside.adapters)


def change_of(layer: nn.Module, adapter_name: str) -> Change | None:
    """What the layer has of this adapter; None where it has nothing, or other code took of it."""
    change = cast("Change | None", held(layer)._modules.get(adapter_name) if carries(layer) else None)
    return change if change is not None and change.is_whole() else None


def active_adapter(layer: nn.Module) -> Change | Mix | None:
    """What the layer computes with; None for the base alone."""
    adapters, route = held(layer), route_of(layer)
    if route is not None:
        owner = route.single_owner(
            layer, "weight", lambda owner: (adapters.change_key(owner), *route.tensors_key(layer, owner))
        )
        return adapters.of(owner)
    return adapters.current()


def base_weight(layer: nn.Module) -> nn.Parameter:
    """The base's own weight Parameter of a layer, adapted, merged or plain: what ``layer.weight`` was at first.

    In-place changes to ``layer.weight`` of an adapted layer are lost, since that is computed; changes to this last.

    Raises:
        StateError: the layer has no weight Parameter, or its weight is computed from others (weight_norm, say).
    """
    aside = aside_of(layer)
    weight = layer._parameters.get("weight") if aside is None else aside.weight
    if weight is None:
        raise StateError(f"{type(layer).__name__} has no weight Parameter of its own.")
    return weight
