"""Norm layers: frozen in place, or tracked and then part of the adapter."""

import copy

import pytest
import torch
from torch import nn

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
