"""The one recipe of every arm: AdamW, a warm-up and a cosine, the same augmentation, order and number of steps."""

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
    """How long and how fast; the learning rate is what is swept."""

    lr: float
    epochs: int
    batch: int = 32
    least_steps: int = 60
    """Few images are seen again until so many steps are done."""
    weight_decay: float = 1e-4


def batches(images: Images, recipe: Recipe, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented batches in an order that the seed draws: the same ones for every arm and learning rate."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs_of(images, recipe)):
        order = torch.randperm(len(images), generator=generator)
        for index in torch.split(order, recipe.batch):
            if len(index) > 1 or len(images) == 1:  # batch norm in train mode needs two
                yield varied(images.x[index], generator), images.y[index]


def epochs_of(images: Images, recipe: Recipe) -> int:
    """As asked for, or more where the images are few."""
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
    """Train what requires a gradient, in place; the modes are the caller's.

    Returns seconds of processor time, without data's.

    ``ready`` takes the place of the batches that the seed would draw; ``ratio`` is B's learning rate by all others'.
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
    """Norms in eval behaviour, the rest in train mode."""
    model.train()
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.eval()


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """What the network says: ``(N, classes)``."""
    found = model(x)
    answer: Tensor = getattr(found, "logits", found)
    return answer


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, mean: float, std: float) -> Tensor:
    """Logits in eval mode, ``(N, classes)``."""
    model.eval()
    return torch.cat([logits(model, (part - mean) / std) for part in torch.split(x, 100)])


def accuracy(model: nn.Module, images: Images, mean: float, std: float) -> float:
    """Share of images whose label is the largest logit."""
    return float((predict(model, images.x, mean, std).argmax(1) == images.y).float().mean())
