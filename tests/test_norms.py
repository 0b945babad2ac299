"""Norm layers: frozen in place, or tracked and then part of the adapter."""

import copy

import pytest
import torch
from conftest import randomise
from torch import nn
from torch.utils.checkpoint import checkpoint

import convlora


def statistics(model):
    return {key: value.clone() for key, value in model.state_dict().items() if "running" in key or "tracked" in key}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_frozen_norms_behave_as_in_eval_and_do_not_move(net, images, train):
    convlora.inject(net, norm="freeze")
    before = statistics(net)
    net.eval()
    expected = net(images)
    net.train()
    assert torch.equal(net(images), expected)
    train(net, images)
    assert equal(statistics(net), before)


def test_tracked_statistics_move_and_the_base_statistics_return(net, images, train):
    before = statistics(net)
    convlora.inject(net, norm="track")
    train(net, images)
    assert not equal(statistics(net), before)
    convlora.remove(net)
    assert equal(statistics(net), before)


def test_tracked_training_moves_statistics_as_the_base_would(net, images):
    base = copy.deepcopy(net)
    convlora.inject(net, norm="track")
    for model in (base, net):
        model.train()(images)
    assert equal(statistics(net), statistics(base))


@pytest.mark.parametrize(
    "norm, x",
    [
        (nn.BatchNorm1d(6), torch.randn(4, 6, 5)),
        (nn.BatchNorm2d(6), torch.randn(4, 6, 5, 5)),
        (nn.BatchNorm3d(6), torch.randn(4, 6, 3, 3, 3)),
        (nn.InstanceNorm2d(6, track_running_stats=True), torch.randn(4, 6, 5, 5)),
    ],
)
def test_every_norm_with_statistics_can_be_frozen(norm, x):
    model = nn.Sequential(nn.Conv2d(6, 6, 1), norm)
    convlora.inject(model, 2, modules_to_save=None)
    assert convlora.summary(model).norms == ("1",)
    assert isinstance(norm, type(copy.deepcopy(norm)).__mro__[2])
    before = statistics(model)
    model.train()
    norm(x)
    assert equal(statistics(model), before)


def test_norms_without_statistics_are_not_touched():
    model = nn.Sequential(nn.Conv2d(6, 6, 1), nn.GroupNorm(2, 6), nn.InstanceNorm2d(6))
    convlora.inject(model, 2, modules_to_save=None)
    assert convlora.summary(model).norms == ()
    assert type(model[1]) is nn.GroupNorm and type(model[2]) is nn.InstanceNorm2d


def test_children_of_a_frozen_norm_follow_the_mode():
    from timm.layers import BatchNormAct2d

    model = nn.Sequential(nn.Conv2d(6, 6, 1), BatchNormAct2d(6, drop_layer=nn.Dropout))
    convlora.inject(model, 2, modules_to_save=None)
    model.train()
    assert not model[1].training and model[1].drop.training
    model.eval()
    assert not model[1].drop.training


@pytest.mark.parametrize("reentrant", [False, True])
def test_statistics_move_once_under_gradient_checkpointing(net, images, reentrant):
    """The forward runs twice, the second time inside the backward."""
    convlora.inject(net, norm="track", modules_to_save=["fc", "block.1"])  # tracked, and trained in full
    randomise(net)
    plain = copy.deepcopy(net)
    forward = net.block.forward
    net.block.forward = lambda x: checkpoint(forward, x, use_reentrant=reentrant)
    for model in (net, plain):
        for _ in range(2):
            model.train()(images).square().sum().backward()
    assert net.bn1.num_batches_tracked == net.block[1].num_batches_tracked == 2
    assert equal(statistics(net), statistics(plain))
    for a, b in zip(convlora.trainable_parameters(net), convlora.trainable_parameters(plain), strict=True):
        assert torch.equal(a.grad, b.grad)
