"""Colour jitter of a batch, each patch by numbers and in an order of its own.

What ``torchvision.transforms.v2.ColorJitter`` does to one image, for many at once and on any device.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .draws import Draws, Floats

_GREY = (0.2989, 0.587, 0.114)
_SIDES = (5.0, 3.0, 1.0)  # where R, G and B stand on the wheel of six colours, counted down


def jittered(images: Tensor, draws: Draws, brightness: float, contrast: float, saturation: float, hue: float) -> Tensor:
    """``(n, 3, H, W)`` in [0, 1] to the same: four changes in a random order.

    Args:
        images: RGB.
        draws: of these patches.
        brightness, contrast, saturation: factors lie in 1 ± these.
        hue: shift in ± this, of the whole circle.
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
    """A number for each image, ``(n, 1, 1, 1)``, of the images' type and device."""
    return torch.from_numpy(numbers).to(images)[:, None, None, None]


def brighter(images: Tensor, factor: Tensor) -> Tensor:
    """Every number times the factor."""
    return (images * factor).clamp_(0, 1)


def more_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Away from each image's mean grey."""
    return _blend(images, _grey(images).mean((1, 2, 3), keepdim=True), factor)


def more_saturated(images: Tensor, factor: Tensor) -> Tensor:
    """Away from each pixel's grey."""
    return _blend(images, _grey(images), factor)


def turned(images: Tensor, shift: Tensor) -> Tensor:
    """The hue of each pixel turned, at the same value and saturation in HSV."""
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
