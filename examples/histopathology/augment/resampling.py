"""Cutting, resizing, flipping and turning a batch, each patch by numbers of its own, on any device.

A cut, a resize and a flip together are linear in rows and in columns: two small matrices an image, whose weights are
those of ``torchvision``'s antialiased bilinear ``resize``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample


def resized_part(images: Tensor, size: int, begins: tuple[Tensor, Tensor], lengths: tuple[Tensor, Tensor]) -> Tensor:
    """A part of each image, resized: ``(n, c, H, W)`` to ``(n, c, size, size)``.

    Args:
        images: floating.
        size: side of the result.
        begins: first row and first column, each ``(n,)``.
        lengths: rows and columns of the part, each ``(n,)``; below 0, the part is flipped.
    """
    rows, columns = (
        _weights(side, size, begin, length).to(images)
        for side, begin, length in zip(images.shape[2:], begins, lengths, strict=True)
    )
    narrow = (images.flatten(1, 2) @ columns.mT).reshape(*images.shape[:3], size)  # a product an image
    return torch.matmul(rows[:, None], narrow)


def _weights(side: int, size: int, begin: Tensor, length: Tensor) -> Tensor:
    """``(n, size, side)``: how much each input row gives to each output row."""
    steps = torch.arange(size, device=begin.device) + 0.5
    begin, flipped, length = begin[:, None], length[:, None] < 0, length[:, None].abs().float()
    scale = length / size
    centre = begin + scale * torch.where(flipped, size - steps, steps)
    place = torch.arange(side, device=begin.device) + 0.5
    reach = scale.clamp(min=1)[..., None]  # what shrinks takes in more than two neighbours
    weights = (place - centre[..., None]).div_(reach).abs_().neg_().add_(1).clamp_(min=0)
    weights *= (place >= begin[..., None]) & (place < (begin + length)[..., None])
    return weights.div_(weights.sum(-1, keepdim=True))


def moved(images: Tensor, degrees: Tensor, scale: Tensor, shear: Tensor) -> Tensor:
    """Each image turned, enlarged and sheared along its rows about its centre, bilinear; outside it is black.

    Args:
        images: ``(n, c, H, W)``, square.
        degrees, scale, shear: ``(n,)``; angles in degrees, as of ``torchvision``'s ``affine``.
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
