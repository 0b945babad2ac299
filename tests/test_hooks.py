"""Hooks, and what goes over all modules or parameters: flags, vectors, clipping, groups, FLOPs."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import SmallNet, randomise
from injected import ROUNDING, STATES, gradients, injected, loss_of, merged_if, trainable
from torch import nn

import convlora

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("state", ["injected", "merged", "removed"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_fire_once_each_whenever_they_were_set(images, state, when):
    torch.manual_seed(0)
    net, fired = SmallNet(), []

    def register() -> None:
        net.stem.register_forward_pre_hook(lambda *_: fired.append("pre"))
        net.stem.register_forward_hook(lambda *_: fired.append("forward"))
        net.stem.register_full_backward_pre_hook(lambda *_: fired.append("backward pre"))
        net.stem.register_full_backward_hook(lambda *_: fired.append("backward"))

    if when == "before":
        register()
    convlora.inject(net, 4)
    randomise(net)
    if when == "after":
        register()
    if state != "injected":
        convlora.merge(net)
    if state == "removed":
        convlora.remove(net)
    loss_of(net, images.requires_grad_()).backward()
    assert fired == ["pre", "forward", "backward pre", "backward"]


def test_a_forward_hook_may_change_the_output_and_a_tensor_hook_the_gradient(images):
    net = injected().eval()
    plain = net(images)
    loss_of(net, images).backward()
    gradient = net.stem.convlora.default.lora_A.grad.clone()
    net.zero_grad()
    net.stem.convlora.default.lora_A.register_hook(lambda g: 2 * g)
    loss_of(net, images).backward()
    assert torch.equal(net.stem.convlora.default.lora_A.grad, 2 * gradient)
    net.fc.register_forward_hook(lambda module, inputs, output: output + 1)
    assert torch.equal(net(images), plain + 1)


@STATES
def test_apply_visits_every_module_of_the_base_in_its_order(state):
    visited, expected = [], []
    SmallNet().apply(lambda m: expected.append(type(m)))
    merged_if(state, injected()).apply(visited.append)
    of_the_base = [m for m in visited if not type(m).__module__.startswith("convlora")]
    assert all(isinstance(m, kind) for m, kind in zip(of_the_base, expected, strict=True))


def test_requires_grad_can_be_toggled_and_zero_grad_reaches_the_factors(images):
    net = injected().train()
    loss_of(net, images).backward()
    assert gradients(net).keys() == trainable(net).keys()
    net.zero_grad()
    assert not gradients(net)
    wanted = trainable(net).keys()
    net.requires_grad_(False)
    assert not net(images).requires_grad
    for factor in convlora.adapter_parameters(net):
        factor.requires_grad_(True)
    loss_of(net, images).backward()
    assert gradients(net).keys() == {name for name in wanted if "lora_" in name}


def test_factors_as_one_vector_and_back(images):
    net = injected().eval()
    expected, factors = net(images), list(convlora.adapter_parameters(net))
    vector = torch.nn.utils.parameters_to_vector(factors)
    assert vector.numel() == convlora.summary(net).adapter_parameters
    torch.nn.utils.vector_to_parameters(0 * vector, factors)
    assert not torch.equal(net(images), expected)
    torch.nn.utils.vector_to_parameters(vector, factors)
    assert torch.equal(net(images), expected)


def test_clipping_scaling_and_parameter_groups_train_as_by_hand(images):
    net = injected().train()
    twin = copy.deepcopy(net)
    groups = [{"params": convlora.adapter_parameters(net), "lr": 0.1}, {"params": net.fc.parameters(), "lr": 0.01}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # a power of two: the bits of the gradient stay
    scaler.scale(loss_of(net, images)).backward()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(list(convlora.trainable_parameters(net)), 0.01)
    scaler.step(optimizer)
    scaler.update()
    loss_of(twin, images).backward()
    grads = gradients(twin)
    total = torch.stack([g.norm() for g in grads.values()]).norm()
    torch.testing.assert_close(norm, total, rtol=1e-5, atol=0)  # fp32 sums in another order
    assert total > 0.01
    stepped = dict(net.named_parameters())
    for name, parameter in twin.named_parameters():
        if name in grads:
            step = (0.1 if "lora_" in name else 0.01) * grads[name] * 0.01 / total
            torch.testing.assert_close(stepped[name], parameter - step, **ROUNDING)
        else:
            assert torch.equal(stepped[name], parameter)


@STATES
def test_the_flop_counter_sees_the_base_and_unmerged_the_product_of_the_factors(state):
    from torch.utils.flop_counter import FlopCounterMode

    def count(model: nn.Module) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.randn(4, 3, 16, 16))
        return int(counter.get_total_flops())

    products = sum(2 * p.rank * p.base_parameters for p in convlora.summary(injected()).layers)
    extra = products if state == "injected" else 0
    assert count(merged_if(state, injected().eval())) == count(SmallNet().eval()) + extra
