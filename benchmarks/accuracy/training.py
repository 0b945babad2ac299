"""The recipe of every method: AdamW, warm-up and cosine, the same augmentation, order and number of steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

import convlora

from .data import Images, varied


@dataclass(frozen=True)
class Recipe:
    """Learning rate, epochs, batch size and least number of steps."""

    lr: float
    epochs: int
    batch: int = 32
    least_steps: int = 60
    """The least number of steps; few images are seen several times."""
    weight_decay: float = 1e-4


def batches(images: Images, recipe: Recipe, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented batches in an order drawn by the seed, the same for every method and learning rate."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs_of(images, recipe)):
        order = torch.randperm(len(images), generator=generator)
        for index in torch.split(order, recipe.batch):
            if len(index) > 1 or len(images) == 1:  # batch norm in train mode needs two images
                yield varied(images.x[index], generator), images.y[index]


def epochs_of(images: Images, recipe: Recipe) -> int:
    """The number of epochs, or more if the images are few."""
    return max(recipe.epochs, math.ceil(recipe.least_steps / math.ceil(len(images) / recipe.batch)))


def fit(
    model: nn.Module,
    images: Images,
    recipe: Recipe,
    seed: int,
    mean: float,
    std: float,
    ready: Iterable[tuple[Tensor, Tensor]] | None = None,
    ratio: float = 1.0,
) -> float:
    """Train all parameters that require a gradient, in place; the caller sets the modes.

    Returns seconds of processor time, without data loading.

    ``ready`` replaces the batches that the seed would draw; ``ratio`` is B's learning rate over all others'.
    """
    parameters: Any = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if ratio != 1:
        parameters = convlora.parameter_groups(model, lr=recipe.lr, lr_B=ratio * recipe.lr)
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
    total = epochs_of(images, recipe) * math.ceil(len(images) / recipe.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_cosine(total))
    spent = 0.0
    for x, y in batches(images, recipe, seed) if ready is None else ready:
        began = time.process_time()
        loss = F.cross_entropy(logits(model, (x - mean) / std), y)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        spent += time.process_time() - began
    return spent


def _warm_cosine(total: int) -> Callable[[int], float]:
    warm = max(1, total // 20)
    return lambda step: min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / max(total, 1))))


def constant_statistics(model: nn.Module) -> None:
    """Put norms in eval mode and all else in train mode."""
    model.train()
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.eval()


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """The network's logits, ``(N, classes)``."""
    found = model(x)
    answer: Tensor = getattr(found, "logits", found)
    return answer


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, mean: float, std: float) -> Tensor:
    """The network's logits in eval mode, ``(N, classes)``."""
    model.eval()
    return torch.cat([logits(model, (part - mean) / std) for part in torch.split(x, 100)])


def accuracy(model: nn.Module, images: Images, mean: float, std: float) -> float:
    """The share of images whose label has the largest logit."""
    return float((predict(model, images.x, mean, std).argmax(1) == images.y).float().mean())
