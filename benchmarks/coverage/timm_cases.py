"""timm: the smallest network with convolutions of each of its model modules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import timm
from torch import nn

from .cases import Case, images

FEWER: dict[str, dict[str, Any]] = {"deepseek_vit_412m": {"depth": 2}}
"""Modules whose smallest network needs too much memory, with options for the same layers in fewer blocks."""
BESIDES = ("tf_efficientnet_cc_b0_4e",)
"""Further networks for layers that no module's smallest has: conditional convolutions."""
OWN_SIZE = (64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 512)


def names() -> list[str]:
    """Every architecture name."""
    return list(timm.list_models())


def module_of(name: str) -> str:
    """The model module of a name, such as ``resnet``."""
    return str(timm.models.model_entrypoint(name).__module__).rsplit(".", 1)[-1]


def smallest(planned: Iterable[dict[str, Any]]) -> list[str]:
    """The name with the fewest parameters of each module, among networks with convolutions."""
    best: dict[str, dict[str, Any]] = {}
    for row in planned:
        module = module_of(row["name"].split("/")[1])
        if row["convolutions"] and row["parameters"] < best.get(module, {"parameters": float("inf")})["parameters"]:
            best[module] = row
    return sorted(row["name"].split("/")[1] for row in best.values())


def case(name: str) -> Case:
    """A timm network at its own input size or the smallest that it accepts."""
    config = timm.get_pretrained_cfg(name)
    channels, *_, default = config.input_size if config else (3, 224, 224)
    sizes = sorted({*(size for size in OWN_SIZE if size < default), default})
    return Case(f"timm/{name}", lambda size: build(name, size, default), images(channels), tuple(sizes))


def build(name: str, size: int, default: int) -> nn.Module:
    """Build the network; it is given the input size if that is not its default and it has such an option."""
    if size != default:
        try:
            return timm.create_model(name, img_size=size, **FEWER.get(name, {}))
        except (TypeError, AssertionError, ValueError, RuntimeError):
            pass  # most networks have no such option, and some do not accept every size
    return timm.create_model(name, **FEWER.get(name, {}))
