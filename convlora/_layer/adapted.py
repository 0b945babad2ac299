"""The adapted layer: a layer whose own forward reads the effective weight.

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
from .writes import is_watching, told

CHILD = "convlora"
"""The child of an adapted layer that holds its adapters by name, hence the key ``conv1.convlora.default.lora_A``."""

ASIDE = "_convlora_aside"
"""The attribute of a merged layer that holds its adapters and what the merged weight has replaced. It is not a child
module, so that ``modules()`` and ``state_dict()`` show a plain layer without factors."""


ASSIGNED = (
    "Assigning `weight` of an adapted layer would add the adapter to the new weight again. "
    "Call convlora.merge(model) first, or change convlora.base_weight(layer) in place."
)

GETATTR = nn.Module.__getattr__
"""torch's own function; torch.fx replaces it while it traces a network."""

WRITERS = {
    *("reset_parameters", "convert_conv2d_weight_memory_format", "convert_conv3d_weight_memory_format"),
    *("_convert_weights", "_convert_weights_to_fp16"),  # of open_clip and of OpenAI's CLIP: to half precision
}
"""Functions that read ``weight`` to write into it in place. They get the base's weight, where the write lasts."""
SHARDED = "_is_fsdp_managed_module"
"""The attribute that FSDP sets on each module whose parameters it replaces by views of its flat parameter."""
OFFLOADED = "_hf_hook"
"""The attribute of accelerate's hook, which loads a module's tensors to the device before its forward."""

FUSING = "fuse_projections"
"""The function of diffusers that copies the weights of an attention's projections into one new layer."""
COPIED = (
    "{} of diffusers copies the weights of adapted layers to {}, in which no adapter can be switched, trained or taken "
    "out. Call convlora.merge(model) first to have the adapter in the copy, or convlora.remove(model) to have the base "
    "alone; convlora.save_adapter and convlora.export_adapter write the adapter itself. Nothing was copied."
)

DAMAGED = "The adapter of this layer is damaged ({}); inject or load it again."


class LayerAdapters(nn.ModuleDict):
    """The changes of one layer by adapter name, and which adapter is active."""

    active: Owner | None = None
    """None if the layer computes with the base's weight."""

    live: Mix | None = None
    """The active change of a model that is prepared for hot swaps, held without its name, on which compilers guard."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = Kept()

    def activate(self, owner: Owner | None) -> None:
        """Make the layer compute with this owner's changes, or with the base's weight (None)."""
        there = () if owner is None else self._there(owner)
        self.active, self.live = owner, there[0][0].live(there[0][1]) if len(there) == 1 else None

    def current(self) -> Change | Mix | None:
        """Return the active change, as used outside of ``use_adapters`` blocks; None for the base's weight."""
        if self.live is not None:
            return self.live
        return None if self.active is None else self.of(self.active)

    def of(self, owner: Owner) -> Change | Mix | None:
        """Return the change that an owner computes with here; None if it has none."""
        if isinstance(owner, str):
            change = cast("Change | None", self._modules.get(owner))
            if change is None or change.strength == 1:
                return change
        parts = self.parts(owner)
        return Mix(parts) if parts else None

    def parts(self, owner: Owner) -> Weighted:
        """Return an owner's changes here, each with its weight times its strength, if that is not 0."""
        parts = ((change, weight * change.strength) for change, weight in self._there(owner))
        return tuple((change, weight) for change, weight in parts if weight)

    def _there(self, owner: Owner) -> Weighted:
        named = ((owner, 1.0),) if isinstance(owner, str) else owner
        there = ((cast("Change | None", self._modules.get(name)), weight) for name, weight in named)
        return tuple((change, weight) for change, weight in there if change is not None)

    def change_key(self, owner: Owner) -> Hashable:
        """Return a key that two owners share only if they compute with the same change here."""
        return tuple((id(change), weight) for change, weight in self.parts(owner))

    def _replicate_for_data_parallel(self) -> Any:
        replica = cast(Any, super())._replicate_for_data_parallel()
        replica.live = None  # that change belongs to the original; the replica looks up its own by name
        return replica

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.kept.clear()  # computed in another dtype or on another device
        return cast(Any, super())._apply(*args, **kwargs)


class AdaptedLayer(Swapped):
    """The mixin that turns a convolution or linear layer into an adapted one."""

    _convlora_prefix: ClassVar[str] = "Adapted"
    # torch.fx treats classes from torch.nn as leaves. It could not trace through the property.
    _convlora_module: ClassVar[str | None] = "torch.nn.modules.conv"

    @property
    def weight(self) -> Tensor:
        """The effective weight W + ΔW. To change the base weight, use :func:`convlora.base_weight`."""
        layer = cast(nn.Module, self)
        if not torch.compiler.is_compiling() and (SHARDED in vars(layer) or OFFLOADED in vars(layer)):
            asker = sys._getframe(1).f_globals.get("__name__", "")
            if asker.startswith(("torch.distributed.fsdp.", "accelerate.")):
                # They read the tensor that they move by getattr; given W + ΔW, FSDP would shard that.
                return vars(layer)["weight"] if "weight" in vars(layer) else cast(Tensor, GETATTR(layer, "weight"))
        try:
            if not torch.compiler.is_compiling():
                if nn.Module.__getattr__ is not GETATTR and (traced := _traced_weight(layer)) is not None:
                    return traced
                reader = sys._getframe(1).f_code
                base = layer._parameters.get("weight")
                if base is not None and reader.co_name in WRITERS:
                    return base
                if reader.co_name == FUSING:
                    raise StateError(COPIED.format("fuse_qkv_projections", "another layer"))
                if layer.training:
                    _check_dropout(layer, self._convlora_base, reader)
            weight = layer_weight(layer)
            return told(layer, weight) if not torch.compiler.is_compiling() and is_watching() else weight
        except AttributeError as cause:
            # Python answers an AttributeError in a property with nn.Module.__getattr__, which would silently return
            # the base's weight.
            raise StateError(DAMAGED.format(cause)) from cause

    @weight.setter
    def weight(self, value: Tensor) -> None:
        if "weight" not in vars(self) and SHARDED not in vars(self):
            raise StateError(ASSIGNED)
        vars(self)["weight"] = (
            value  # the hook of torch's older weight_norm writes the base's weight here before each forward
        )

    @weight.deleter
    def weight(self) -> None:
        if SHARDED not in vars(self):
            raise AttributeError(f"weight of {type(self).__name__} is computed and cannot be deleted")
        del vars(self)["weight"]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the base's own forward with the effective weight; with dropout in training, base plus branch."""
        layer = cast(nn.Module, self)
        if not isinstance(self, AdaptedLayer):
            # A wrapper of another library has kept this bound method, and the layer has been merged or restored since.
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
            cast(nn.Module, self)._parameters[name] = param  # FSDP restores the parameter that it had replaced
            return
        super().register_parameter(name, param)  # type: ignore[misc]

    def _save_to_state_dict(self, *args: Any) -> None:
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_globals.get("__name__") == "torch.nn.modules.module":
            frame = frame.f_back
        if frame.f_globals.get("__name__", "").startswith("diffusers."):
            raise StateError(COPIED.format(frame.f_code.co_name, "a plain network"))
        super()._save_to_state_dict(*args)  # type: ignore[misc]

    def _load_from_state_dict(self, *args: Any) -> None:
        # load_state_dict(assign=True) assigns the *base* weight, which is what a checkpoint's `weight` means here.
        vars(self)["_convlora_loading"] = True
        try:
            super()._load_from_state_dict(*args)  # type: ignore[misc]
        finally:
            del vars(self)["_convlora_loading"]


def own_weight(layer: nn.Module) -> Tensor:
    """Return the base's weight of an adapted, unmerged layer: its Parameter, or the value computed for it."""
    weight = layer._parameters.get("weight")
    if weight is None:
        weight = vars(layer).get("weight")
    return super(AdaptedLayer, layer).weight if weight is None else weight  # type: ignore[misc]


def _is_offloaded(change: Change | Mix) -> bool:
    return any(OFFLOADED in vars(each) and each.tensors()[0].is_meta for each, _ in change.parts)


def _forward_offloaded(layer: AdaptedLayer, change: Change | Mix, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute the forward with the factors loaded by accelerate's hooks, which nothing else runs."""
    hooked = [(vars(each)[OFFLOADED], each) for each, _ in change.parts if OFFLOADED in vars(each)]
    for hook, each in hooked:
        hook.pre_forward(each)
    try:
        return AdaptedLayer.forward(layer, *args, **kwargs)
    finally:
        for hook, each in hooked:
            hook.post_forward(each, None)
        held(cast(nn.Module, layer)).kept.clear()  # a kept weight would hold on to the offloaded tensors


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
    return any(
        each._modules for each, _ in change.parts
    )  # parametrized: the tensors that it is computed from may be trained


def _traced_weight(layer: nn.Module) -> Tensor | None:
    """Return the proxy that makes ``torch.fx`` record a read of the layer's ``weight``; None if fx is not tracing it.

    torch.fx returns proxies only for Parameters that are read through ``__getattr__``.
    """
    proxy = nn.Module.__getattr__(layer, "weight") if has_parameter(layer) else None
    if not isinstance(proxy, Proxy):
        return None
    proxy.node.target = proxy.node.target.removesuffix(
        ".weight"
    )  # the layer itself; fx returns the same proxy each time
    return cast(Tensor, proxy.weight)


def _check_dropout(layer: nn.Module, cls: type[nn.Module], reader: object) -> None:
    """Raise StateError if the base's forward reads the weight in training and the adapter has dropout."""
    change = active_adapter(layer)
    if change is not None and change.dropout and reader is getattr(cls.forward, "__code__", None):
        raise StateError(
            f"A {cls.__name__} has a forward on the instance that calls {cls.__name__}.forward and not the adapted "
            f"layer's, so that dropout={change.dropout:g} would not be applied. Wrap the layer's forward while it is "
            "injected and unmerged, or inject with dropout=0."
        )


def layer_weight(layer: nn.Module) -> Tensor:
    """Return W + ΔW of an adapted layer, or the base's own tensor if no adapter is active.

    In the layer's own forward without gradients it is computed once and kept until one of its sources changes.
    """
    base, change = own_weight(layer), active_adapter(layer)
    if change is None:
        return cast(Tensor, as_read(layer, "weight", base))
    if torch.compiler.is_compiling() or is_tracing() or held(layer).kept.serves != get_ident():
        return change.effective_weight(base)
    return held(layer).kept.weight(base, change.sources(), change.numbers, change.effective_weight)


def _forward_in_training(layer: nn.Module, cls: type[nn.Module], change: Change | Mix, x: Tensor) -> Tensor | None:
    """Compute a plain layer's forward with gradients; None where the base's forward must do it."""
    if layer.training and change.dropout:  # in this order: compilers guard on every value that is read
        return _forward_with_dropout(layer, own_weight(layer), change, x)
    base = layer._parameters.get("weight")
    if base is None or not torch.is_grad_enabled() or is_tracing():
        return None  # the property computes it once per forward, since spectral_norm updates its vectors each time
    forward = convolution if is_plain(layer, cls) else linear if cls.forward is nn.Linear.forward else None
    if forward is None:
        return None
    factors = change.factors_at(base)
    if factors is None:
        bias = cast("Tensor | None", layer.bias)
        return change.output(x, bias, partial(_plain_output, layer, base, bias))
    y = forward(layer, x, base, *factors, change.scaling, change.training_path)
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
    """Compute a plain layer's forward with this weight and bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    return cast("Callable[..., Tensor]", layer._conv_forward)(x, weight, bias)


def supports_dropout(layer: nn.Module) -> bool:
    """Return whether the layer has the plain forward of torch, so that the adapter can be a branch beside it."""
    cls = original_class(layer)
    return cls.forward is nn.Linear.forward or is_plain(layer, cls)


def attach(layer: nn.Module, adapter_name: str, change: Change) -> None:
    """Add an adapter's change to a layer without activating it; the first one swaps the layer's class."""
    if CHILD not in layer._modules:
        layer.add_module(CHILD, LayerAdapters())
        swap(layer, AdaptedLayer)
    held(layer).add_module(adapter_name, change)


def detach(layer: nn.Module, adapter_name: str) -> None:
    """Undo :func:`attach`, also an interrupted one, and also on a merged layer."""
    if carries(layer):
        held(layer)._modules.pop(adapter_name, None)
        if held(layer)._modules:
            return
    if isinstance(layer, AdaptedLayer):
        restore(layer)
    layer._modules.pop(CHILD, None)
    vars(layer).pop(ASIDE, None)


def merge_layer(layer: nn.Module, merged: nn.Parameter) -> None:
    """Replace the base's weight by the merged one and restore the layer's plain class. May be run again."""
    adapters = held(layer)
    aside = aside_of(layer) or Aside.of(layer, class_below(layer), adapters, merged.dtype)
    vars(layer)[ASIDE] = aside
    adapters.kept.clear()
    layer._modules.pop(CHILD, None)
    aside.put_merged(layer, merged)


def unmerge_layer(layer: nn.Module) -> None:
    """Undo :func:`merge_layer`, also an interrupted one. May be run again."""
    aside = aside_of(layer)
    if aside is not None:
        layer._modules[CHILD] = aside.adapters
        aside.put_base(layer)
        swap(layer, AdaptedLayer)
        vars(layer).pop(ASIDE)


def carries(layer: nn.Module) -> bool:
    """Return whether a module holds adapters, merged or not."""
    return CHILD in layer._modules or ASIDE in vars(layer)


def aside_of(layer: nn.Module) -> Aside | None:
    """Return what a merged layer's weight has replaced; None if the layer is not merged."""
    return cast("Aside | None", vars(layer).get(ASIDE))


def held(layer: nn.Module) -> LayerAdapters:
    """Return the adapters of an adapted layer, merged or not."""
    aside = vars(layer).get(ASIDE)
    return cast(LayerAdapters, layer._modules[CHILD] if aside is None else aside.adapters)


def change_of(layer: nn.Module, adapter_name: str) -> Change | None:
    """Return this adapter's change of the layer; None if there is none or other code has deleted tensors of it."""
    change = cast("Change | None", held(layer)._modules.get(adapter_name) if carries(layer) else None)
    return change if change is not None and change.is_whole() else None


def active_adapter(layer: nn.Module) -> Change | Mix | None:
    """Return the change that the layer computes with now; None for the base's weight."""
    adapters, route = held(layer), route_of(layer)
    if route is not None:
        owner = route.single_owner(
            layer, "weight", lambda owner: (adapters.change_key(owner), *route.tensors_key(layer, owner))
        )
        return adapters.of(owner)
    return adapters.current()


def base_weight(layer: nn.Module) -> nn.Parameter:
    """Return the base's own weight Parameter of a layer, whether adapted, merged or plain.

    In-place changes to ``layer.weight`` of an adapted layer are lost, since it is computed; changes to this one last.

    Raises:
        StateError: the layer has no weight Parameter, or its weight is computed from others (weight_norm, say).
    """
    aside = aside_of(layer)
    weight = layer._parameters.get("weight") if aside is None else aside.weight
    if weight is None:
        raise StateError(f"{type(layer).__name__} has no weight Parameter of its own.")
    return weight
