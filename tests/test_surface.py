"""The base's own surface while it is injected or merged: names, classes, attributes, hooks, text."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import need, snapshot
from injected import NORMS, STATES, injected, merged_if

import convlora

pytestmark = pytest.mark.usefixtures("one_thread")


@STATES
def test_get_parameter_names_every_parameter_but_an_effective_weight(state):
    net = merged_if(state, injected())
    for name, parameter in net.named_parameters():
        layer = net.get_submodule(name.rpartition(".")[0])
        if state == "injected" and name.endswith("weight") and hasattr(layer, "convlora"):
            with pytest.raises(AttributeError, match=r"`weight` is not an nn\.Parameter"):
                net.get_parameter(name)
            assert convlora.base_weight(layer) is parameter
        else:
            assert net.get_parameter(name) is parameter


def test_nothing_of_the_bases_surface_changes_while_injected_or_merged():
    timm = need("timm")
    torch.manual_seed(0)
    net = timm.create_model("resnet18", num_classes=3)
    net.conv1.register_forward_hook(lambda *_: None)
    before, attributes = snapshot(net), {name: set(vars(m)) for name, m in net.named_modules()}
    kinds = {name: type(m) for name, m in net.named_modules()}
    lines = repr(net).splitlines()
    convlora.inject(net, 4)
    for step in (lambda: None, lambda: convlora.merge(net), lambda: convlora.unmerge(net)):
        step()
        now = snapshot(net)
        names = [name for name, _ in now["objects"] if "convlora" not in name]
        assert names == [name for name, _ in before["objects"]]
        assert [pair for pair in now["objects"] if "convlora" not in pair[0]] == before["objects"]
        assert [pair for pair in now["hooks"] if "convlora" not in pair[0]] == before["hooks"]
        assert [key for key in now["keys"] if "convlora" not in key] == before["keys"]
        assert all(isinstance(net.get_submodule(name), kind) for name, kind in kinds.items())
        assert all(attributes[name] <= set(vars(net.get_submodule(name))) for name in kinds)
        text = [line.replace("Adapted", "").replace("Frozen", "") for line in repr(net).splitlines()]
        assert [line for line in lines if line not in text and not line.endswith(")")] == []
        assert "Conv2d(" in repr(net.conv1) and "3, 64, kernel_size=(7, 7), stride=(2, 2)" in repr(net.conv1)
    assert "AdaptedConv2d(" in repr(net.conv1) and "rank=4" in repr(net.conv1)
    convlora.remove(net)
    assert snapshot(net) == before and repr(net).splitlines() == lines


@NORMS
def test_after_any_sequence_a_real_network_is_the_base_again(photos, train, norm):
    timm = need("timm")
    torch.manual_seed(0)
    net = timm.create_model("tf_efficientnet_lite0", num_classes=3)
    before = snapshot(net)
    for _ in range(2):
        convlora.inject(net, 4, norm=norm)
        train(net, photos, steps=1)
        convlora.merge(net.eval())(photos)
        convlora.unmerge(net)
        copy.deepcopy(net)
        train(net, photos, steps=1)
        convlora.merge(net)
        convlora.unmerge(net.train())
        assert snapshot(net) != before
        convlora.remove(net)
        assert snapshot(net) == before
