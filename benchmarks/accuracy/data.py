"""Images and labels: scikit-learn's digits, or a folder of images; and shifts of the test images.

The digits are 1,797 scans of 8 × 8 grey values (Alpaydin and Kaynak, 1998). The three splits are drawn once with a
fixed seed, so that every method, learning rate and seed has the same validation and test images.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

SPLIT_SEED = 1998
VALIDATION, TEST = 200, 997
"""Sizes of the digits' validation and test sets; the rest is for training."""


@dataclass(frozen=True)
class Images:
    """A split: images ``(N, 3, size, size)`` in [0, 1], and labels ``(N,)``."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def take(self, index: Tensor) -> Images:
        """The images at these positions."""
        return Images(self.x[index], self.y[index])

    def only(self, classes: range) -> Images:
        """The images of these classes, whose labels are counted from 0 again."""
        index = ((self.y >= classes.start) & (self.y < classes.stop)).nonzero().flatten()
        return replace(self.take(index), y=self.y[index] - classes.start)


@dataclass(frozen=True)
class Splits:
    """The splits for training, for choosing the learning rate, and for the reported accuracy."""

    train: Images
    validation: Images
    test: Images
    classes: int

    def only(self, classes: range) -> Splits:
        """Every split with these classes only."""
        train, validation, test = (split.only(classes) for split in (self.train, self.validation, self.test))
        return Splits(train, validation, test, len(classes))


def digits(size: int) -> Splits:
    """scikit-learn's digits, upsampled to ``size`` pixels, on three channels."""
    try:
        load_digits = importlib.import_module("sklearn.datasets").load_digits
    except ImportError as cause:
        raise SystemExit('The digits come with scikit-learn: pip install -e ".[benchmarks]"') from cause
    found = load_digits()
    grey = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    x = F.interpolate(grey, size=(size, size), mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    return _split(Images(x, torch.tensor(found.target)), VALIDATION, TEST)


def folder(path: Path, size: int) -> Splits:
    """The splits of an ImageFolder, one directory per class: three fifths train, one validation, one test."""
    datasets, v2 = (importlib.import_module(f"torchvision.{name}") for name in ("datasets", "transforms.v2"))

    steps = [v2.ToImage(), v2.Resize(size, antialias=True), v2.CenterCrop(size), v2.ToDtype(torch.float32, scale=True)]
    try:
        pairs = [(image, label) for image, label in datasets.ImageFolder(str(path), v2.Compose(steps))]
    except FileNotFoundError as cause:
        raise SystemExit(f"{path}: {cause}. Give a folder with one folder of images for each class.") from cause
    images = Images(torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs]))
    return _split(images, len(images) // 5, len(images) // 5)


def _split(images: Images, validation: int, test: int) -> Splits:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held = validation + test
    parts = (order[held:], order[:validation], order[validation:held])
    train, validate, tests = (images.take(part) for part in parts)
    return Splits(train, validate, tests, int(images.y.max()) + 1)


def few(images: Images, per_class: int, seed: int) -> Images:
    """A subset of this many images of each class, drawn by the seed."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    labels = sorted(set(images.y.tolist()))
    chosen = [order[images.y[order] == label][:per_class] for label in labels]
    return images.take(torch.cat(chosen))


def varied(x: Tensor, generator: torch.Generator) -> Tensor:
    """The augmentation of every method: images are rotated by up to 10°, moved by up to 8 %, scaled by up to 10 %."""
    count = len(x)

    def within(limit: float) -> Tensor:
        return (2 * torch.rand(count, generator=generator) - 1) * limit

    angle, scale = within(torch.pi / 18), 1 + within(0.1)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = torch.stack([cos, -sin, within(0.16), sin, cos, within(0.16)], 1)
    grid = F.affine_grid(rows.view(count, 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def inverted(x: Tensor) -> Tensor:
    """Invert the grey values: dark on light."""
    return 1 - x


def coloured(x: Tensor) -> Tensor:
    """Give each image its own colour."""
    colours = 0.25 + 0.75 * torch.rand(len(x), 3, 1, 1, generator=torch.Generator().manual_seed(1))
    return x * colours


def noisy(x: Tensor) -> Tensor:
    """Add soft blots of noise behind the digit."""
    coarse = torch.rand(len(x), 3, 8, 8, generator=torch.Generator().manual_seed(2))
    blots = F.interpolate(coarse, size=x.shape[2:], mode="bilinear")
    return torch.maximum(x, 0.6 * blots)


SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {"inverted": inverted, "coloured": coloured, "noisy": noisy}
"""Shifts of the test images, which no training image has."""
