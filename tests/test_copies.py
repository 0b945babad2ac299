"""Copies, state dicts and averages of an injected and of a merged model predict what they should."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from conftest import SmallNet, need, randomise, through_torch_save
from injected import NORMS, STATES, injected, merged_if, real

import convlora

pytestmark = pytest.mark.usefixtures("one_thread")


@STATES
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch_save])
def test_copies_of_a_real_network_predict_the_same_bits(photos, state, duplicate):
    net = merged_if(state, real("resnet18", "track").eval())
    twin = duplicate(net)
    assert torch.equal(twin(photos), net(photos))
    assert [type(m) for m in twin.modules()] == [type(m) for m in net.modules()]
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in net.parameters()}


@STATES
def test_a_shallow_copy_shares_the_layers_as_of_any_module(images, state):
    net = merged_if(state, injected().eval())
    twin = copy.copy(net)
    assert torch.equal(twin(images), net(images)) and twin.stem is net.stem
    layer = copy.copy(net.stem)
    assert type(layer) is type(net.stem) and torch.equal(layer(images), net.stem(images))


@pytest.mark.parametrize("assign", [False, True])
def test_injected_state_loads_into_another_injected_model(images, assign):
    net, buffer = injected("track").train(), io.BytesIO()
    net(images)  # statistics move
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    other = convlora.inject(SmallNet(), 4, norm="track")
    other.load_state_dict(torch.load(buffer, weights_only=True), assign=assign)
    assert torch.equal(other.eval()(images), net.eval()(images))


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0"])
def test_base_checkpoint_of_a_real_network_loads_strictly_into_the_injected(photos, name):
    timm = need("timm")
    torch.manual_seed(1)
    base = timm.create_model(name, num_classes=3).eval()
    net = real(name).eval()
    net.load_state_dict(base.state_dict())
    with torch.no_grad():
        for factor in convlora.adapter_parameters(net):
            factor.zero_()
    assert torch.equal(net(photos), base(photos))


def test_merged_state_loads_into_a_plain_network(images):
    net = convlora.merge(injected().eval())
    plain = SmallNet().eval()
    plain.load_state_dict(net.state_dict())
    assert torch.equal(plain(images), net(images))


@NORMS
@pytest.mark.parametrize("kind", ["timm", "torch"])
def test_an_averaged_copy_averages_the_factors_and_is_an_injected_model(images, tmp_path, kind, norm):
    from torch.optim.swa_utils import AveragedModel

    net = injected(norm).train()
    before = [p.detach().clone() for p in convlora.adapter_parameters(net)]
    if kind == "timm":
        utils = need("timm.utils")
        average, update = utils.ModelEmaV3(net, decay=0.5), "update"
    else:
        average, update = AveragedModel(net), "update_parameters"
        average.update_parameters(net)  # its first update copies, its second makes the mean
    randomise(net, seed=2)
    getattr(average, update)(net)
    for old, new, mean in zip(
        before, convlora.adapter_parameters(net), convlora.adapter_parameters(average.module), strict=True
    ):
        torch.testing.assert_close(mean, (old + new) / 2, rtol=1e-6, atol=1e-7)  # lerp rounds otherwise
    convlora.save_adapter(average.module, tmp_path)
    expected = average.module.eval()(images)
    torch.manual_seed(0)
    assert torch.equal(convlora.load_adapter(SmallNet(), tmp_path).eval()(images), expected)
    assert torch.equal(convlora.merge(average.module)(images), expected)
    assert convlora.summary(net).state == "injected"
