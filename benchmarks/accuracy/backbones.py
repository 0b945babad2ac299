"""The networks that are adapted: with ImageNet weights, or trained here on other classes."""

from __future__ import annotations

import copy
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from examples.histopathology.training.backbones import load_backbone

from .data import Splits
from .training import Recipe, accuracy, fit

LITE0, SCRATCH = "lite0", "scratch"
SCRATCH_NETWORK = "resnet10t"
KNOWN, NEW = range(0, 5), range(5, 10)
"""The classes that the network from scratch learns first, and those that it is adapted to."""


def network(name: str, classes: int, seed: int, pretrained: nn.Module | None = None) -> tuple[nn.Module, float, float]:
    """A pretrained network with a fresh head drawn by the seed, and the mean and deviation of its input."""
    torch.manual_seed(seed)
    if pretrained is not None:
        model = copy.deepcopy(pretrained)
        model.reset_classifier(classes)  # type: ignore[operator]
        return model, 0.5, 0.5
    model, normal = load_backbone(name, num_classes=classes, dropout=0.0)
    return model, normal.mean[0], normal.std[0]


def from_scratch(splits: Splits, recipe: Recipe, keep: Path) -> tuple[nn.Module, float]:
    """A small ResNet trained on the classes :data:`KNOWN` of these splits alone, and its accuracy on their test images.

    It is saved to a file, so that all later runs start from the same weights.
    """
    known = splits.only(KNOWN)
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(SCRATCH_NETWORK, num_classes=len(KNOWN))
    if keep.is_file():
        model.load_state_dict(load_file(keep))
    else:
        model.train()
        fit(model, known.train, recipe, seed=0, mean=0.5, std=0.5)
        keep.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, keep)
    model.eval()
    return model, accuracy(model, known.test, 0.5, 0.5)
