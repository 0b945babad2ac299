"""Augmentation by the batch: the same as torchvision's image by image, and the same for each patch in any company."""

from conftest import need_extra

need_extra("histopathology")

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode, functional

from examples.histopathology.augment import colour, resampling
from examples.histopathology.augment.draws import Draws
from examples.histopathology.augment.transforms import (
    VIEWS,
    EvalTransform,
    Normalisation,
    Normalise,
    TrainTransform,
    dihedral,
)
from examples.histopathology.methods.method import Augment

PLAIN = Normalise(Normalisation("none", "", (0.5, 0.4, 0.6), (0.2, 0.3, 0.25)))
POLICIES = ("none", "dihedral", "crop", "affine")


@pytest.fixture(scope="module")
def images():
    return torch.rand(5, 3, 96, 96, generator=torch.Generator().manual_seed(0))


def test_draws_are_even_and_of_seed_epoch_patch_and_place_alone():
    draws = Draws(3, 1, range(2000))
    rows = np.stack([draws.uniform() for _ in range(50)])
    assert rows.min() >= 0 and rows.max() < 1
    # 100,000 numbers: a mean is off by 0.0009 at one standard deviation, a tenth's share by 0.001
    assert abs(rows.mean() - 0.5) < 0.005
    assert np.abs(np.histogram(rows, 10, (0, 1))[0] / rows.size - 0.1).max() < 0.006
    assert np.abs(np.corrcoef(rows[:10]) - np.eye(10)).max() < 0.1
    assert np.abs(np.corrcoef(rows[:, :10].T) - np.eye(10)).max() < 0.6  # of 50 numbers each
    few = Draws(3, 1, [17, 5])
    assert np.array_equal(few.uniform(), rows[0, [17, 5]])
    assert np.array_equal(few.uniform(), rows[1, [17, 5]])
    assert not np.isin(Draws(3, 2, [17, 5]).uniform(), rows).any()
    assert not np.isin(Draws(4, 1, [17, 5]).uniform(), rows).any()
    assert set(draws.below(3).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_each_change_of_colour_is_torchvisions(images, name):
    ours = {
        "brightness": colour.brighter,
        "contrast": colour.more_contrast,
        "saturation": colour.more_saturated,
        "hue": colour.turned,
    }[name]
    grey = images.clone()
    grey[0] = 0.3  # without a hue
    amounts = torch.tensor([0.3, -0.1, 0.5, 0.0, -0.45]) if name == "hue" else torch.tensor([0.0, 0.5, 1.0, 1.3, 2.0])
    theirs = getattr(functional, f"adjust_{name}")
    wanted = torch.stack([theirs(image, float(amount)) for image, amount in zip(grey, amounts, strict=True)])
    # sums in another order; a hue goes through six sectors of HSV there
    torch.testing.assert_close(ours(grey, amounts[:, None, None, None]), wanted, atol=5e-6, rtol=0)


@pytest.mark.parametrize("size", [32, 64, 96, 224])
def test_a_part_resized_and_flipped_is_torchvisions(images, size):
    top, left = torch.tensor([0, 3, 10, 20, 0]), torch.tensor([5, 0, 1, 30, 0])
    height, width = torch.tensor([64, 93, 70, 66, 96]), torch.tensor([90, -64, 80, 66, -96])
    found = resampling.resized_part(images, size, (top, left), (height, width))
    for i, image in enumerate(images):
        box = (int(top[i]), int(left[i]), int(height[i]), abs(int(width[i])))
        wanted = functional.resized_crop(image, *box, [size, size], antialias=True)
        wanted = functional.horizontal_flip(wanted) if width[i] < 0 else wanted
        torch.testing.assert_close(found[i], wanted, atol=2e-5, rtol=0)  # its weights are computed in fp32


def test_a_turn_a_scale_and_a_shear_are_torchvisions(images):
    degrees = torch.tensor([0.0, 30.0, -170.0, 90.0, 12.5])
    scale, shear = torch.tensor([1.0, 0.9, 1.1, 1.0, 0.95]), torch.tensor([0.0, 5.0, -5.0, 2.0, 0.0])
    found = resampling.moved(images, degrees, scale, shear)
    for i, image in enumerate(images):
        wanted = functional.affine(
            image, float(degrees[i]), [0, 0], float(scale[i]), [float(shear[i]), 0.0], InterpolationMode.BILINEAR
        )
        torch.testing.assert_close(found[i], wanted, atol=1e-4, rtol=0)  # places of pixels up to 48 off, in fp32


@pytest.mark.parametrize("stain", [0.0, 0.05])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_patch_is_augmented_alike_in_any_batch(images, policy, stain):
    transform = TrainTransform(64, PLAIN, Augment(policy, stain))
    together = transform(images, Draws(0, 2, range(5)))
    for part in ([0, 1, 2], [4, 3], [2]):
        found = transform(images[part], Draws(0, 2, part))
        # to the bit but for stains, whose matrix product sums in an order that the batch decides
        torch.testing.assert_close(found, together[part], atol=1e-5 if stain else 0, rtol=0)
    assert torch.equal(transform(images, Draws(0, 2, range(5))), together)
    if policy != "none" or stain:
        assert not torch.equal(transform(images, Draws(0, 3, range(5))), together)


def test_the_crop_is_drawn_as_torchvision_draws_it():
    from torchvision.transforms import v2

    from examples.histopathology.augment.transforms import _box

    height, width = _box(Draws(0, 0, range(4000)), 96)
    torch.manual_seed(0)
    crop = v2.RandomResizedCrop(96, scale=(0.6, 1.0))
    theirs = [crop.make_params([torch.empty(3, 96, 96)]) for _ in range(4000)]
    for ours, name in ((height, "height"), (width, "width")):
        oracle = np.array([each[name] for each in theirs])
        assert ours.min() >= 64 and ours.max() <= 96
        # quantiles of 4,000 draws each: a pixel or so
        assert (
            np.abs(np.quantile(ours, [0.1, 0.3, 0.5, 0.7, 0.9]) - np.quantile(oracle, [0.1, 0.3, 0.5, 0.7, 0.9])).max()
            <= 2
        )


def test_colour_changes_come_in_every_order(images):
    # without clipping only the order of contrast and brightness around a grey mean can differ: seen by its result
    image = images[:1] * 0.5 + 0.25
    seen = {round(float(colour.jittered(image, Draws(0, 0, [i]), 0.2, 0.2, 0.2, 0.1).sum()), 3) for i in range(20)}
    assert len(seen) == 20


def test_all_views_are_one_after_another(images):
    every = EvalTransform(64, PLAIN, tuple(range(VIEWS)))(images, Draws(0, 0, range(5)))
    each = [EvalTransform(64, PLAIN)(dihedral(images, view), Draws(0, 0, range(5))) for view in range(VIEWS)]
    assert torch.equal(every, torch.cat(each))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("policy", POLICIES)
def test_a_gpu_augments_as_the_cpu_does(images, policy):
    transform = TrainTransform(64, PLAIN, Augment(policy, 0.05))
    found = transform(images.cuda(), Draws(0, 2, range(5))).cpu()
    torch.testing.assert_close(found, transform(images, Draws(0, 2, range(5))), atol=1e-3, rtol=0)
