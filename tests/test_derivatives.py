"""Gradients by other ways than ``backward``: checkpointed, per sample, forward mode, second derivatives."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import randomise
from injected import buffers, equal, gradients, injected, loss_of, real, trainable
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import convlora

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(images, reentrant):
    net = injected().train()
    twin = copy.deepcopy(net)
    loss_of(net, images).backward()
    again = checkpoint(twin, images.clone().requires_grad_(), use_reentrant=reentrant)
    again.square().mean().backward()
    assert gradients(net).keys() == trainable(net).keys() and equal(gradients(net), gradients(twin))


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint:UserWarning")
@pytest.mark.parametrize("name, late", [("resnet18", "layer4.*"), ("tf_efficientnet_lite0", "blocks.6.*")])
@pytest.mark.parametrize("everywhere", [True, False])
def test_timm_gradient_checkpointing_gives_the_same_gradients(photos, name, late, everywhere):
    net = real(name, target_modules=nn.Conv2d if everywhere else late).train()
    twin = copy.deepcopy(net)
    photos.requires_grad_(not everywhere)  # older timm checkpoints reentrantly: what enters must need a gradient
    twin.set_grad_checkpointing()
    for model in (net, twin):
        torch.manual_seed(2)  # dropout in the head
        loss_of(model, photos).backward()
    assert gradients(net).keys() == trainable(net).keys()
    for name, found in gradients(twin).items():  # reentrant: the first forward rounds otherwise
        expected = gradients(net)[name]
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-7, name


@pytest.mark.parametrize("reentrant", [True, False])
def test_tracked_statistics_move_once_a_step_under_gradient_checkpointing(images, reentrant):
    net = injected("track").train()
    twin = copy.deepcopy(net)
    loss_of(net, images).backward()
    checkpoint(twin, images.clone().requires_grad_(), use_reentrant=reentrant).square().mean().backward()
    assert equal(gradients(net), gradients(twin))
    assert int(net.bn1.num_batches_tracked) == 1
    assert equal(buffers(net), buffers(twin))


def test_per_sample_gradients_of_the_factors(images):
    from torch.func import functional_call, grad, vmap

    net = injected().eval()
    parameters = {name: p.detach() for name, p in trainable(net).items()}

    def loss(values: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(net, values, (image[None],)).square().mean()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, images)
    for index in range(len(images)):
        net.zero_grad()
        loss_of(net, images[index : index + 1]).backward()
        one = {name: g[index] for name, g in found.items()}
        torch.testing.assert_close(one, gradients(net), rtol=1e-4, atol=1e-6)  # batched kernels, fp32


def test_forward_and_reverse_derivatives_agree(images):
    from torch.func import functional_call, jacrev, jvp

    net, key = injected().double().eval(), "stem.convlora.default.lora_A"
    value = net.get_parameter(key).detach()

    def outputs(value: Tensor) -> Tensor:
        return functional_call(net, {key: value}, (images.double(),))

    direction = torch.randn_like(value)
    _, forward = jvp(outputs, (value,), (direction,))
    reverse = torch.einsum("ncriyx,riyx->nc", jacrev(outputs)(value), direction)
    torch.testing.assert_close(forward, reverse, rtol=1e-9, atol=1e-12)  # double


def test_second_derivatives_agree_with_finite_differences():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(2, 3, 2, dtype=torch.double))
    convlora.inject(layer, 1, modules_to_save=None)
    randomise(layer)
    keys = ["0.convlora.default.lora_A", "0.convlora.default.lora_B"]
    x = torch.randn(1, 2, 3, 3, dtype=torch.double, requires_grad=True)

    def outputs(x: Tensor, *factors: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(keys, factors, strict=True)), (x,)).pow(3)

    assert torch.autograd.gradgradcheck(outputs, (x, *convlora.adapter_parameters(layer)))
