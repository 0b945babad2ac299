"""Augmentation and evaluation transforms, per image, by ``torchvision.transforms.v2``.

The report's order is crop, flips, jitter. Here the jitter comes first: on the patch's own 96×96 pixels it costs
a fifth of what it costs after enlarging to 224, and since it changes each pixel by itself, only interpolation
lies between the two orders.
"""

from torchvision.transforms import v2  # type: ignore[import-untyped]

from .backbones import Normalisation

# The label speaks of the central 32×32 of a 96×96 patch. A crop of 0.6 of the area with a side ratio of 3:4 is
# 64 pixels at its narrowest, so that wherever it lies it still holds that centre.
CROP_SCALE = (0.6, 1.0)


def train_transform(size: int, normalisation: Normalisation) -> v2.Compose:
    """``(3, H, W)`` float in [0, 1] -> normalised ``(3, size, size)``: jitter, random resized crop, flips."""
    return v2.Compose(
        [
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1),
            v2.RandomResizedCrop(size, scale=CROP_SCALE, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
            v2.Normalize(list(normalisation.mean), list(normalisation.std)),
        ]
    )


def eval_transform(size: int, normalisation: Normalisation) -> v2.Compose:
    """``(3, H, W)`` float in [0, 1] -> normalised ``(3, size, size)``: the centre at the report's 256 : 224."""
    return v2.Compose(
        [
            v2.Resize(round(size * 256 / 224), antialias=True),
            v2.CenterCrop(size),
            v2.Normalize(list(normalisation.mean), list(normalisation.std)),
        ]
    )
