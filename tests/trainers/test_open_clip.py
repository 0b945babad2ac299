"""open_clip's image tower: its head, locking, and half precision."""

from __future__ import annotations

import pytest
import torch

import convlora

open_clip = pytest.importorskip("open_clip")
pytestmark = pytest.mark.usefixtures("one_thread")


def clip():
    from open_clip.model import CLIP

    torch.manual_seed(0)
    image = {"image_size": 32, "layers": (1, 1, 1, 1), "width": 8, "head_width": 8, "patch_size": 8}
    return CLIP(16, image, {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1})


def moved(model):
    with torch.no_grad():
        for parameter in convlora.adapter_parameters(model):
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.filterwarnings("ignore:.*no head was found")
def test_no_layer_of_a_clip_is_taken_for_a_head():
    assert convlora.plan(clip(), 2).modules_to_save == ()


def test_a_tower_that_is_locked_after_injection_is_told_at_the_first_step():
    model = convlora.inject(clip(), 2, modules_to_save=None)
    optimizer = torch.optim.SGD(convlora.trainable_parameters(model), lr=0.1)
    model.lock_image_tower()
    with pytest.warns(
        UserWarning, match=r"has the factors of visual\.conv1 and 18 other layers, and they do not train"
    ):
        optimizer.step()


@pytest.mark.filterwarnings("error")
def test_a_tower_that_is_locked_before_injection_trains():
    model = clip()
    model.lock_image_tower()
    convlora.inject(model, 2, target_modules="visual.*conv*", modules_to_save=None)
    optimizer = torch.optim.SGD(convlora.trainable_parameters(model), lr=0.1)
    model.encode_image(torch.randn(2, 3, 32, 32)).square().mean().backward()
    optimizer.step()


@torch.no_grad()
def test_converting_an_injected_model_to_half_precision_converts_its_base():
    from open_clip.model import convert_weights_to_lp

    model = moved(convlora.inject(clip(), 2, modules_to_save=None)).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = model.encode_image(images)
    convert_weights_to_lp(model, torch.bfloat16)
    assert convlora.base_weight(model.visual.conv1).dtype == torch.bfloat16
    found = model.visual.conv1(images.bfloat16())
    assert found.dtype == torch.bfloat16
    convert_weights_to_lp(model, torch.float32)
    again = model.encode_image(images)  # its weights were rounded to 8 bits once
    assert (again - expected).abs().max() < 0.1 * expected.abs().max()
