"""Augmentation and evaluation transforms, per image, by ``torchvision.transforms.v2``.

The report's order is crop, flips, jitter. Here the jitter comes first: on the patch's own 96×96 pixels it costs
a fifth of what it costs after enlarging to 224, and since it changes each pixel by itself, only interpolation
lies between the two orders.
"""

import torch
from torch import Tensor
from torchvision.transforms import v2  # type: ignore[import-untyped]

from .backbones import Normalisation
from .hed import StainJitter
from .method import Augment

# The label speaks of the central 32×32 of a 96×96 patch. A crop of 0.6 of the area with a side ratio of 3:4 is
# 64 pixels at its narrowest, so that wherever it lies it still holds that centre.
CROP_SCALE = (0.6, 1.0)
VIEWS = 8
# Half of what a square's diagonal is longer than its side: a rotation shows mirrored tissue there, and no black.
_MARGIN = 20


def dihedral(images: Tensor, view: int) -> Tensor:
    """One of the 8 turns and flips of a square, exact: ``(..., H, H)`` to the same; view 0 changes nothing."""
    images = images.flip(-1) if view >= 4 else images
    return torch.rot90(images, view % 4, (-2, -1))


def draw_view() -> int:
    """One of the 8, from torch's generator."""
    return int(torch.randint(VIEWS, ()))


class RandomDihedral(v2.Transform):  # type: ignore[misc]
    """One of the 8 turns and flips at random."""

    def forward(self, images: Tensor) -> Tensor:
        """``(..., H, H)`` to the same."""
        return dihedral(images, draw_view())


class _Turn(v2.Transform):  # type: ignore[misc]
    """One of the 8, always the same; a class and no lambda, so that loader processes can be sent it."""

    def __init__(self, view: int) -> None:
        super().__init__()
        self.view = view

    def forward(self, images: Tensor) -> Tensor:
        return dihedral(images, self.view)


def train_transform(size: int, normalisation: Normalisation, augment: Augment = Augment()) -> v2.Compose:  # noqa: B008
    """``(3, H, W)`` float in [0, 1] -> normalised ``(3, size, size)``, by a policy of `method.Augment`."""
    stain = [StainJitter(augment.stain_jitter)] if augment.stain_jitter else []
    if augment.policy == "crop":
        steps = [
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1),
            v2.RandomResizedCrop(size, scale=CROP_SCALE, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
        ]
    elif augment.policy == "affine":
        steps = [
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
            v2.Pad(_MARGIN, padding_mode="reflect"),
            v2.RandomAffine(180, scale=(0.9, 1.1), shear=5, interpolation=v2.InterpolationMode.BILINEAR),
            v2.CenterCrop(96),
            *_centre(size),
        ]
    else:
        steps = [*([RandomDihedral()] if augment.policy == "dihedral" else []), *_centre(size)]
    return v2.Compose([*stain, *steps, _normalise(normalisation)])


def eval_transform(size: int, normalisation: Normalisation, view: int = 0) -> v2.Compose:
    """``(3, H, W)`` float in [0, 1] -> normalised ``(3, size, size)``: the centre at the report's 256 : 224.

    Args:
        size: side of the result.
        normalisation: mean and deviation.
        view: one of the 8 turns and flips, applied first.
    """
    turn = [_Turn(view)] if view else []
    return v2.Compose([*turn, *_centre(size), _normalise(normalisation)])


def _centre(size: int) -> list[v2.Transform]:
    return [v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size)]


def _normalise(normalisation: Normalisation) -> v2.Transform:
    return v2.Normalize(list(normalisation.mean), list(normalisation.std))
