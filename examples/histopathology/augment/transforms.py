"""Augmentation and evaluation transforms, a batch at a time, on the patches' device.

The challenge report's order is crop, flips, jitter. Here the jitter comes first, because on 96×96 pixels it costs a
fifth of what it costs after enlarging to 224. It changes each pixel by itself, so the two orders differ only by
interpolation.

Every patch is augmented by its own `Draws`, so its batch does not matter.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.v2 import functional  # type: ignore[import-untyped]

from ..methods.method import Augment
from .colour import jittered
from .draws import Draws, Floats
from .hed import stain_jittered
from .resampling import moved, resized_part

Transform: TypeAlias = Callable[[Tensor, Draws], Tensor]
"""Augments a batch ``(n, 3, 96, 96)`` of floats in [0, 1] by its patches' random numbers."""

# The label describes the central 32×32 of a 96×96 patch. A crop of 0.6 of the area with a side ratio of 3:4 is at least
# 64 pixels wide, so it holds that centre wherever it lies.
CROP_SCALE = (0.6, 1.0)
_RATIO = (3 / 4, 4 / 3)
_ATTEMPTS = 10
VIEWS = 8
# Half the difference between a square's diagonal and its side: a rotation shows mirrored tissue there, not black.
_MARGIN = 20


@dataclass(frozen=True)
class Normalisation:
    """The pixel mean and deviation that a backbone was pretrained with, and where its weights are from.

    ``mean`` and ``std`` are per RGB channel for pixels in [0, 1].
    """

    name: str
    source: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


def dihedral(images: Tensor, view: int) -> Tensor:
    """Apply one of the 8 rotations and flips of a square to ``(..., H, H)``, exactly; view 0 changes nothing."""
    images = images.flip(-1) if view >= 4 else images
    return torch.rot90(images, view % 4, (-2, -1))


class Normalise:
    """Normalise by one mean and deviation, or by those of each patch's centre.

    Args:
        by: one normalisation for all patches, or one for each centre.
        centres: ``(N,)``, the centre of every patch of the split.
    """

    def __init__(self, by: Normalisation | Mapping[int, Normalisation], centres: Tensor | None = None) -> None:
        each = {0: by} if isinstance(by, Normalisation) else by
        self.mean, self.std = (torch.tensor([getattr(n, name) for n in each.values()]) for name in ("mean", "std"))
        numbers = {centre: number for number, centre in enumerate(each)}
        self._of = None if centres is None else np.array([numbers[c] for c in torch.as_tensor(centres).tolist()])

    def __call__(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        """Normalise ``(n, 3, H, W)``; only normalising by centre needs ``draws``, for the patches' indices."""
        rows = np.zeros(1, np.int64) if self._of is None or draws is None else self._of[draws.indices]
        mean, std = (numbers[rows, :, None, None].to(images) for numbers in (self.mean, self.std))
        return images.sub(mean).div_(std)


class TrainTransform:
    """Augment by a policy of `method.Augment` and normalise; the result is ``(n, 3, size, size)``."""

    def __init__(self, size: int, normalise: Normalise, augment: Augment = Augment()) -> None:  # noqa: B008
        self.size, self.normalise, self.augment = size, normalise, augment

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Augment a batch."""
        if self.augment.stain_jitter:
            images = stain_jittered(images, draws, self.augment.stain_jitter)
        return self.normalise(_POLICIES[self.augment.policy](images, draws, self.size), draws)


class EvalTransform:
    """Crop the centre at the challenge report's 256 : 224 and normalise; the result is ``(views·n, 3, size, size)``.

    Args:
        size: side of the result.
        normalise: the normalisation.
        views: which of the 8 rotations and flips to apply first; the result holds the batch once for each, in order.
    """

    def __init__(self, size: int, normalise: Normalise, views: Sequence[int] = (0,)) -> None:
        self.size, self.normalise, self.views = size, normalise, views

    def __call__(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        """Every view of a batch."""
        return torch.cat([self.normalise(_centre(dihedral(images, view), self.size), draws) for view in self.views])


def _crop(images: Tensor, draws: Draws, size: int) -> Tensor:
    """Colour jitter, random resized crop, flips."""
    images = jittered(images, draws, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1)
    height, width = _box(draws, images.shape[-1])
    top, left = (draws.below(images.shape[-1] - length + 1) for length in (height, width))
    signs = (np.where(draws.below(2), -1, 1) for _ in range(2))
    lengths = [length * sign for length, sign in zip((height, width), signs, strict=True)]
    parts = [torch.from_numpy(each).to(images.device) for each in (top, left, *lengths)]
    return resized_part(images, size, (parts[0], parts[1]), (parts[2], parts[3]))


def _box(draws: Draws, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Height and width of a random crop: the first of ten tries that fits inside, else the whole image."""
    height = np.full(len(draws), side)
    width, open_ = height.copy(), np.ones(len(draws), bool)
    for _ in range(_ATTEMPTS):
        area = side**2 * draws.uniform(*CROP_SCALE)
        ratio = np.exp(draws.uniform(*np.log(_RATIO)))
        tall, wide = np.rint(np.sqrt(area / ratio)).astype(int), np.rint(np.sqrt(area * ratio)).astype(int)
        fits = open_ & (tall <= side) & (wide <= side)
        height[fits], width[fits], open_ = tall[fits], wide[fits], open_ & ~fits
    return height, width


def _affine(images: Tensor, draws: Draws, size: int) -> Tensor:
    """Flips, rotation, scale and shear."""
    for axis in (-1, -2):
        rows = torch.from_numpy(np.flatnonzero(draws.below(2))).to(images.device)
        images = images.index_copy(0, rows, images[rows].flip(axis))
    images = pad(images, [_MARGIN] * 4, mode="reflect")
    degrees, scale, shear = (_on(draws.uniform(*ends), images) for ends in ((-180, 180), (0.9, 1.1), (-5, 5)))
    images = moved(images, degrees, scale, shear)
    return _centre(images[..., _MARGIN:-_MARGIN, _MARGIN:-_MARGIN], size)


def _dihedral(images: Tensor, draws: Draws, size: int) -> Tensor:
    """One of the 8 rotations and flips, drawn for each patch."""
    views, images = draw_views(draws), images.clone()
    for view in range(1, VIEWS):
        rows = torch.from_numpy(np.flatnonzero(views == view)).to(images.device)
        images[rows] = dihedral(images[rows], view)
    return _centre(images, size)


def draw_views(draws: Draws) -> np.ndarray:
    """Draw one of the 8 rotations and flips for each patch."""
    return draws.below(VIEWS)


def _plain(images: Tensor, draws: Draws, size: int) -> Tensor:
    return _centre(images, size)


_POLICIES: Mapping[str, Callable[[Tensor, Draws, int], Tensor]] = {
    "crop": _crop,
    "affine": _affine,
    "dihedral": _dihedral,
    "none": _plain,
}


def _on(numbers: Floats, images: Tensor) -> Tensor:
    return torch.from_numpy(numbers).to(images)


def _centre(images: Tensor, size: int) -> Tensor:
    larger = functional.resize(images, [round(size * 256 / 224)] * 2, antialias=True)
    cut: Tensor = functional.center_crop(larger, [size, size])
    return cut
