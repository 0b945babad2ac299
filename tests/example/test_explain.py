import copy

from conftest import need_extra

need_extra("histopathology")

import pytest
import timm
import torch
from torch import nn
from torch.nn.functional import interpolate

import convlora
from examples.histopathology.report.explain import cam_layer, grad_cam, occlusion

# fp32 rounding through a dozen layers, of maps between 0 and 1
CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def injected():
    """A CNN whose head is linear behind a global mean, with factors that are not zero; nothing of it trains."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet.r160_in1k", num_classes=1)
    convlora.inject(model, rank=2)
    with torch.no_grad():
        for factor in convlora.adapter_parameters(model):
            factor.add_(0.1 * torch.randn_like(factor))
    return model.requires_grad_(False).train()


def class_activation_map(plain, images, sign):
    """Zhou et al., CVPR 2016: where the head is linear behind a mean, its weights are Grad-CAM's, up to a factor."""
    with torch.no_grad():
        features = plain.eval().forward_features(images)
        maps = (sign * torch.einsum("bchw,c->bhw", features, plain.get_classifier().weight[0])).relu()
    maps = interpolate(maps[:, None], images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    return maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-30)


@pytest.mark.parametrize("label", [0, 1])
def test_grad_cam_of_an_adapted_network_is_the_class_activation_map_of_the_merged_one(injected, images, label):
    layer = next(m for n, m in injected.named_modules() if n == last_stage(injected))
    found = grad_cam(injected, images, layer, torch.full((2,), label))
    plain = convlora.remove(convlora.merge(copy.deepcopy(injected)))
    torch.testing.assert_close(found, class_activation_map(plain, images, 2 * label - 1), **CLOSE)
    assert found.max() > 0


def last_stage(model):
    return next(name for name in reversed([n for n, _ in model.named_children()]) if name.startswith("layer"))


def test_it_changes_nothing_of_the_model(injected, images):
    bits = {key: value.clone() for key, value in injected.state_dict().items()}
    modes = [module.training for module in injected.modules()]
    grad_cam(injected, images, cam_layer(injected, images))
    occlusion(injected, images, 32, 32)
    assert all(torch.equal(value, bits[key]) for key, value in injected.state_dict().items())
    assert [module.training for module in injected.modules()] == modes
    assert all(p.grad is None and not p.requires_grad for p in injected.parameters())
    assert not any(module._forward_hooks for module in injected.modules())


def test_maps_are_between_0_and_1_and_of_the_images_size(injected, images):
    maps = grad_cam(injected, images, cam_layer(injected, images))
    assert maps.shape == (2, 64, 64)
    assert maps.min() >= 0 and maps.max() <= 1


def test_the_layer_is_the_last_that_still_says_where(images):
    model = timm.create_model("resnet18", num_classes=1)
    at_64, at_128 = cam_layer(model, images), cam_layer(model, torch.randn(1, 3, 128, 128))
    assert (at_64, at_128) == (model.layer3, model.layer4)  # 64 / 16 and 128 / 32 are four positions


def test_a_vision_transformers_tokens_become_a_map(images):
    torch.manual_seed(0)
    model = timm.create_model("test_vit.r160_in1k", num_classes=1, img_size=64)
    layer = cam_layer(model, images)
    assert layer is model.blocks[-1].norm1
    maps = grad_cam(model, images, layer, torch.tensor([0, 1]))
    assert maps.shape == (2, 64, 64)
    assert maps.amax((1, 2)).tolist() == pytest.approx([1.0, 1.0])


def test_networks_with_channels_last_have_no_known_layer(images):
    class Last(nn.Module):
        output_fmt = "NHWC"

    assert cam_layer(Last(), images) is None


class Corner(nn.Module):
    """Sees the mean of the upper left quarter, and nothing else."""

    def forward(self, images):
        return images[:, :, :16, :16].mean((1, 2, 3))[:, None]


def test_occlusion_finds_what_the_network_looks_at():
    images = torch.ones(1, 3, 32, 32)
    fall = occlusion(Corner(), images, 8, 8)[0]
    # a quarter of what it sees, each
    torch.testing.assert_close(fall[:16, :16], torch.full((16, 16), 0.25))
    assert fall[16:].max() == fall[:, 16:].max() == 0
    # for label 0 a lower logit is no fall
    assert occlusion(Corner(), images, 8, 8, torch.zeros(1)).max() == 0


@pytest.mark.parametrize(("side", "stride"), [(5, 3), (32, 1), (7, 7)])
def test_occlusion_covers_every_pixel(side, stride):
    assert occlusion(Corner(), torch.ones(1, 3, 32, 32), side, stride).isfinite().all()


def test_occlusion_is_0_between_squares_that_leave_gaps():
    fall = occlusion(Corner(), torch.ones(1, 3, 32, 32), 4, 8)[0]
    assert fall[:4, :4].min() > 0 and fall[4:8].max() == fall[:, 4:8].max() == 0
