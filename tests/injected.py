"""Injected models, a small one and real ones, and what several test files compare of them."""

from __future__ import annotations

import pytest
import torch
from conftest import SmallNet, need, randomise
from torch import Tensor, nn

import convlora

ROUNDING = {"rtol": 1e-5, "atol": 1e-6}  # fp32, the same sums in another order
STATES = pytest.mark.parametrize("state", ["injected", "merged"])
NORMS = pytest.mark.parametrize("norm", ["freeze", "track"])


def injected(norm: str = "freeze", **arguments) -> SmallNet:
    torch.manual_seed(0)
    net = SmallNet()
    convlora.inject(net, 4, norm=norm, **arguments)
    randomise(net)
    return net


def real(name: str, norm: str = "freeze", **arguments) -> nn.Module:
    timm = need("timm")
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=3)
    with torch.no_grad():
        for key, buffer in net.named_buffers():  # as if trained: a norm that does nothing hides mistakes
            if key.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif key.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    convlora.inject(net, 4, norm=norm, **arguments)
    randomise(net, 0.02)
    return net


def merged_if(state: str, model: nn.Module) -> nn.Module:
    return convlora.merge(model) if state == "merged" else model


def loss_of(model: nn.Module, images: Tensor) -> Tensor:
    return model(images).float().square().mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}
