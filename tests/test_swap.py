"""The traps of changing a layer's class in place, one test each; docs/design.md names them."""

import copy

import pytest
import torch
from conftest import SmallNet, dense_delta, randomise
from torch import nn

import convlora
from convlora import StateError


class Padded(nn.Conv2d):
    """A user's own convolution: other constructor, other forward, more arguments."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3)

    def forward(self, x, shift=0.0):
        return nn.functional.conv2d(nn.functional.pad(x, (1, 1, 1, 1), value=1.0), self.weight * 2, self.bias) + shift


def test_error_in_the_weight_does_not_fall_through_to_the_base_weight(net):
    """nn.Module.__getattr__ answers an AttributeError of a property with the base Parameter, without a word."""
    convlora.inject(net)
    del net.stem.convlora["default"]._parameters["lora_A"]
    with pytest.raises(StateError, match=r"damaged.*lora_A"):
        _ = net.stem.weight
    with torch.no_grad(), pytest.raises(StateError, match=r"damaged.*lora_A"):
        net.eval()(torch.randn(1, 3, 8, 8))


def test_assigning_the_weight_is_refused_while_unmerged(net):
    convlora.inject(net)
    weight = net.stem._parameters["weight"]
    for value in (nn.Parameter(torch.zeros(16, 3, 3, 3)), None):
        with pytest.raises(StateError, match=r"Call convlora\.merge\(model\) first"):
            net.stem.weight = value
    assert net.stem._parameters["weight"] is weight
    net.stem.bias = nn.Parameter(torch.zeros(16))  # all else is free


def test_fusing_conv_and_norm_is_refused_unmerged_and_right_merged(net, images):
    convlora.inject(net.eval())
    randomise(net)
    with pytest.raises(StateError):
        torch.nn.utils.fusion.fuse_conv_bn_eval(net.stem, net.bn1)
    expected = net.bn1(net.stem(images))
    convlora.merge(net)
    fused = torch.nn.utils.fusion.fuse_conv_bn_eval(net.stem, net.bn1)
    torch.testing.assert_close(fused(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_sets_the_base_weight(net, assign):
    convlora.inject(net)
    randomise(net)
    other = SmallNet()
    net.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(convlora.base_weight(net.stem), other.stem.weight)
    torch.testing.assert_close(net.stem.weight, other.stem.weight + dense_delta(net.stem))
    with pytest.raises(StateError):  # and the door is shut again
        net.stem.weight = other.stem.weight


def test_functional_call_passes_base_weight_and_factors(net, images):
    convlora.inject(net.eval())
    randomise(net)
    zeros = {name: torch.zeros_like(p) for name, p in net.named_parameters() if name.endswith(("lora_B", "diff"))}
    base = copy.deepcopy(net)
    convlora.remove(base)
    with torch.no_grad():
        base.fc.load_state_dict(net.fc.state_dict())
    assert torch.equal(torch.func.functional_call(net, zeros, (images,)), base(images))
    other = {"stem.weight": torch.zeros_like(convlora.base_weight(net.stem)), **zeros}
    assert not torch.equal(torch.func.functional_call(net, other, (images,)), base(images))


def test_merged_layers_are_of_their_plain_class_with_the_keys_of_the_base(net):
    keys, base = list(net.state_dict()), net.stem.weight
    convlora.inject(net)
    randomise(net)
    effective = net.stem.weight
    convlora.merge(net)
    assert type(net.stem) is nn.Conv2d
    assert list(net.state_dict()) == keys
    assert torch.equal(net.stem.weight, effective)
    assert convlora.base_weight(net.stem) is base
    convlora.unmerge(net)
    assert "stem.convlora.default.lora_A" in net.state_dict() and convlora.base_weight(net.stem) is base


def test_writes_to_the_computed_weight_are_lost_and_to_the_base_weight_last(net):
    convlora.inject(net)
    with torch.no_grad():
        net.stem.weight.zero_()
        assert net.stem.weight.abs().sum() > 0
        convlora.base_weight(net.stem).zero_()
        assert net.stem.weight.abs().sum() == 0
    with pytest.raises(StateError, match="ReLU has no weight"):
        convlora.base_weight(nn.ReLU())


def test_pruning_is_refused_unmerged_and_changes_nothing(net, images):
    from torch.nn.utils import prune

    convlora.inject(net.eval())
    expected, keys = net(images), list(net.state_dict())
    with pytest.raises((TypeError, StateError)):
        prune.l1_unstructured(net.stem, "weight", amount=0.5)
    assert torch.equal(net(images), expected) and list(net.state_dict()) == keys
    convlora.merge(net)
    prune.l1_unstructured(net.stem, "weight", amount=0.5)


def test_class_that_another_library_put_on_top_is_named_and_left(net):
    convlora.inject(net)
    ours = type(net.stem)
    net.stem.__class__ = type("Sharded", (ours,), {})
    for call in (convlora.merge, convlora.remove):
        with pytest.raises(StateError, match=r"is now .*Sharded"):
            call(net)
    assert isinstance(net.block[0], type(net.block[0])) and type(net.block[0]) is not nn.Conv2d
    net.stem.__class__ = ours
    convlora.remove(net)
    assert type(net.stem) is nn.Conv2d


def test_own_subclass_with_its_own_constructor_and_forward(images):
    torch.manual_seed(0)
    layer, x = Padded(4), torch.randn(1, 4, 6, 6)
    oracle = copy.deepcopy(layer)
    convlora.inject(layer, 2, modules_to_save=None)
    assert torch.equal(layer(x, shift=1.0), oracle(x, shift=1.0))
    randomise(layer)
    assert isinstance(layer, Padded)
    with torch.no_grad():
        oracle.weight += dense_delta(layer)
    torch.testing.assert_close(layer(x), oracle(x))
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    with pytest.raises(convlora.UnsupportedLayerError, match="Padded"):
        convlora.inject(Padded(4), 2, dropout=0.1, modules_to_save=None)
    convlora.remove(layer)
    assert type(layer) is Padded


def test_one_class_per_base_class():
    first, second = convlora.inject(SmallNet()), convlora.inject(SmallNet())
    assert type(first.stem) is type(second.stem) is not nn.Conv2d


def test_fx_sees_an_adapted_convolution_as_a_leaf(net, images):
    convlora.inject(net.eval())
    randomise(net)
    traced = torch.fx.symbolic_trace(net)
    assert any(node.op == "call_module" and node.target == "stem" for node in traced.graph.nodes)
    assert torch.equal(traced(images), net(images))
