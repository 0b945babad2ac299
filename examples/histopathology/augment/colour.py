"""Colour jitter of a batch: ``torchvision.transforms.v2.ColorJitter`` for many patches at once, on any device.

Factors and order are drawn for each patch.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .draws import Draws, Floats

_GREY = (0.2989, 0.587, 0.114)
_SIDES = (5.0, 3.0, 1.0)  # positions of R, G and B on a colour wheel of six, counted down


def jittered(images: Tensor, draws: Draws, brightness: float, contrast: float, saturation: float, hue: float) -> Tensor:
    """Jitter brightness, contrast, saturation and hue in a random order; ``(n, 3, H, W)`` in [0, 1].

    Args:
        images: RGB images.
        draws: random numbers of these patches.
        brightness, contrast, saturation: factors are drawn from 1 ± these.
        hue: the shift is drawn from ± this, as a share of the whole circle.
    """
    strengths = (brightness, contrast, saturation)
    factors = [draws.uniform(1 - strength, 1 + strength) for strength in strengths] + [draws.uniform(-hue, hue)]
    order = np.argsort([draws.uniform() for _ in _CHANGES], axis=0)
    images = images.clone()
    for step in order:
        for number, change in enumerate(_CHANGES):
            rows = np.flatnonzero(step == number)
            if rows.size:
                where = torch.from_numpy(rows).to(images.device)
                changed = change(images.index_select(0, where), column(factors[number][rows], images))
                images.index_copy_(0, where, changed)
    return images


def column(numbers: Floats, images: Tensor) -> Tensor:
    """One number for each image, as ``(n, 1, 1, 1)`` on the images' device and in their dtype."""
    return torch.from_numpy(numbers).to(images)[:, None, None, None]


def brighter(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply every pixel by the factor."""
    return (images * factor).clamp_(0, 1)


def more_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend each image with its mean grey."""
    return _blend(images, _grey(images).mean((1, 2, 3), keepdim=True), factor)


def more_saturated(images: Tensor, factor: Tensor) -> Tensor:
    """Blend each pixel with its grey."""
    return _blend(images, _grey(images), factor)


def turned(images: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue of each pixel in HSV; value and saturation stay."""
    high, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    spread = high - low
    red, green, blue = images[:, :1], images[:, 1:2], images[:, 2:]
    safe = torch.where(spread > 0, spread, 1)
    place = torch.where(
        high == red,
        (green - blue) / safe,
        torch.where(high == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    sides = torch.tensor(_SIDES, dtype=images.dtype, device=images.device)[:, None, None]
    wheel = torch.remainder(sides + place + 6 * shift, 6)
    return high - spread * torch.minimum(wheel, 4 - wheel).clamp_(0, 1)


_CHANGES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (brighter, more_contrast, more_saturated, turned)


def _grey(images: Tensor) -> Tensor:
    weights = torch.tensor(_GREY, dtype=images.dtype, device=images.device)[:, None, None]
    return (images * weights).sum(1, keepdim=True)


def _blend(images: Tensor, others: Tensor, factor: Tensor) -> Tensor:
    return (others + (images - others) * factor).clamp_(0, 1)
