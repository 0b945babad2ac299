"""Layers for which another library's forward equals the base's own forward with W + ΔW.

Most libraries add a branch with the change to the layer's output. The functions here return why such a branch would
differ from the layer, and an empty string if it would not.
"""

from __future__ import annotations

from typing import cast

from torch import nn
from torch.nn.modules.conv import _ConvNd

from .._layer.computed import has_parameter
from .._layer.fast import is_plain
from .._layer.swap import original_class

FAITHFUL = {"timm.layers.linear.Linear", "timm.layers.conv2d_same.Conv2dSame"}
"""Subclasses whose own forward is linear in the weight like torch's, so that a branch of the same class is exact."""


def is_faithful(kind: type[nn.Module]) -> bool:
    """Return whether a layer of this class with W + ΔW equals the layer plus a branch of the same class."""
    return is_torchs_own(kind) or f"{kind.__module__}.{kind.__qualname__}" in FAITHFUL


def is_torchs_own(kind: type[nn.Module]) -> bool:
    """Return whether this is the class of torch's convolution or linear layer, and not a subclass."""
    return kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def unlike_branch(layer: nn.Module) -> str:
    """Return why a branch that calls torch's function with ΔW would differ from the layer."""
    kind = original_class(layer)
    if fault := unlike_class(layer, is_plain(layer, kind)):
        return fault
    return "" if isinstance(layer, nn.Linear) else _unlike_padding(layer)


def unlike_layer(layer: nn.Module) -> str:
    """Return why a branch of two layers of the same class, for lora_A and lora_B, would differ from the layer."""
    kind = original_class(layer)
    return unlike_class(layer, is_faithful(kind) or is_plain(layer, kind)) or unlike_geometry(layer)


def unlike_geometry(layer: nn.Module) -> str:
    """Return the part of the layer's geometry that a branch of two layers drops."""
    if isinstance(layer, nn.Linear):
        return ""
    layer = cast(_ConvNd, layer)
    if layer.groups > 1:
        return f"groups {layer.groups}; the other library's lora_A reads all channels, which no grouped weight does"
    if any(d != 1 for d in layer.dilation):
        return f"dilation {tuple(layer.dilation)}, which the branch beside the layer drops"
    return _unlike_padding(layer)


def unlike_class(layer: nn.Module, is_known: bool) -> str:
    """Return why a branch differs because of the layer's class; ``is_known`` says that the class itself is exact."""
    kind = original_class(layer)
    if not has_parameter(layer):
        return "its weight is computed from other parameters (weight_norm, say), which a branch does not follow"
    if is_known or kind.forward is nn.Linear.forward or (isinstance(layer, nn.Linear) and is_faithful(kind)):
        return ""
    return f"a {kind.__name__} with its own forward, from which a branch would differ"


def unlike_kind(layer: nn.Module, kinds: tuple[type[nn.Module], ...]) -> str:
    """Return the layer's class if peft has a method for these classes alone; empty if the layer is of one of them."""
    return "" if isinstance(layer, kinds) else f"a {original_class(layer).__name__}, for which peft lacks the method"


def _unlike_padding(layer: nn.Module) -> str:
    mode = cast(_ConvNd, layer).padding_mode
    return f"padding_mode {mode!r}, which the branch beside the layer drops" if mode != "zeros" else ""
