"""In which layers another library's forward computes what the base's own does with a changed weight.

Most compute the layer and beside it a branch with the change; what of the layer the branch leaves out is named here.
"""

from __future__ import annotations

from typing import cast

from torch import nn
from torch.nn.modules.conv import _ConvNd

from .._layer.computed import has_parameter
from .._layer.fast import is_plain
from .._layer.swap import original_class

FAITHFUL = {"timm.layers.linear.Linear", "timm.layers.conv2d_same.Conv2dSame"}
"""Subclasses whose own forward treats the weight as torch's does, so that a branch of the same class is exact."""


def is_faithful(kind: type[nn.Module]) -> bool:
    """Whether W + ΔW in a layer of this class is the layer and a branch beside it: torch's own, and a few known."""
    return is_torchs_own(kind) or f"{kind.__module__}.{kind.__qualname__}" in FAITHFUL


def is_torchs_own(kind: type[nn.Module]) -> bool:
    """Whether it is torch's plain convolution or linear layer itself."""
    return kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def unlike_branch(layer: nn.Module) -> str:
    """What differs with a branch that is torch's own function with ΔW; empty where nothing does."""
    kind = original_class(layer)
    if fault := unlike_class(layer, is_plain(layer, kind)):
        return fault
    return "" if isinstance(layer, nn.Linear) else _unlike_padding(layer)


def unlike_layer(layer: nn.Module) -> str:
    """What differs with a branch of two layers of the same class, the first of which has few output channels."""
    kind = original_class(layer)
    return unlike_class(layer, is_faithful(kind) or is_plain(layer, kind)) or unlike_geometry(layer)


def unlike_geometry(layer: nn.Module) -> str:
    """The same of the geometry alone: what of it such a branch drops."""
    if isinstance(layer, nn.Linear):
        return ""
    layer = cast(_ConvNd, layer)
    if layer.groups > 1:
        return f"groups {layer.groups}; there lora_A reads all channels, so that its change is no weight's"
    if any(d != 1 for d in layer.dilation):
        return f"dilation {tuple(layer.dilation)}, which the branch beside the layer drops"
    return _unlike_padding(layer)


def unlike_class(layer: nn.Module, is_known: bool) -> str:
    """What differs by the layer's class, which is known or not; empty where nothing does."""
    kind = original_class(layer)
    if not has_parameter(layer):
        return "its weight is computed from others, beside which a branch knows nothing"
    if is_known or kind.forward is nn.Linear.forward or (isinstance(layer, nn.Linear) and is_faithful(kind)):
        return ""
    return f"a {kind.__name__} with a forward of its own, in which a branch would be another one"


def _unlike_padding(layer: nn.Module) -> str:
    mode = cast(_ConvNd, layer).padding_mode
    return f"padding_mode {mode!r}, which the branch beside the layer drops" if mode != "zeros" else ""
