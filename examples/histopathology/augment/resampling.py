"""Crop, resize, flip and rotate a batch on any device, each patch with its own numbers.

Crop, resize and flip together are linear in rows and in columns, so each image takes two small matrices. Their weights
are those of ``torchvision``'s antialiased bilinear ``resize``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample


def resized_part(images: Tensor, size: int, begins: tuple[Tensor, Tensor], lengths: tuple[Tensor, Tensor]) -> Tensor:
    """Crop a part of each image and resize it: ``(n, c, H, W)`` to ``(n, c, size, size)``.

    Args:
        images: floating-point images.
        size: side of the result.
        begins: first row and first column of each part, each ``(n,)``.
        lengths: rows and columns of each part, each ``(n,)``; a negative number flips the part.
    """
    rows, columns = (
        _weights(side, size, begin, length).to(images)
        for side, begin, length in zip(images.shape[2:], begins, lengths, strict=True)
    )
    narrow = (images.flatten(1, 2) @ columns.mT).reshape(*images.shape[:3], size)  # a product an image
    return torch.matmul(rows[:, None], narrow)


def _weights(side: int, size: int, begin: Tensor, length: Tensor) -> Tensor:
    """How much each input row contributes to each output row, ``(n, size, side)``."""
    steps = torch.arange(size, device=begin.device) + 0.5
    begin, flipped, length = begin[:, None], length[:, None] < 0, length[:, None].abs().float()
    scale = length / size
    centre = begin + scale * torch.where(flipped, size - steps, steps)
    place = torch.arange(side, device=begin.device) + 0.5
    reach = scale.clamp(min=1)[..., None]  # shrinking averages more than two neighbours
    weights = (place - centre[..., None]).div_(reach).abs_().neg_().add_(1).clamp_(min=0)
    weights *= (place >= begin[..., None]) & (place < (begin + length)[..., None])
    return weights.div_(weights.sum(-1, keepdim=True))


def moved(images: Tensor, degrees: Tensor, scale: Tensor, shear: Tensor) -> Tensor:
    """Rotate, scale and shear each image about its centre with bilinear interpolation; outside is black.

    Args:
        images: ``(n, c, H, W)``, square.
        degrees, scale, shear: ``(n,)``; angles in degrees, defined as in ``torchvision``'s ``affine``.
    """
    turn, slant = torch.deg2rad(degrees), torch.tan(torch.deg2rad(shear))
    cosine, sine, nothing = turn.cos(), turn.sin(), torch.zeros_like(turn)
    inverse = torch.stack(
        [
            torch.stack([cosine - sine * slant, cosine * slant + sine, nothing], 1),
            torch.stack([-sine, cosine, nothing], 1),
        ],
        1,
    )
    grid = affine_grid((inverse / scale[:, None, None]).to(images), list(images.shape), align_corners=False)
    return grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
