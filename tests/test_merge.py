"""``merge(check=True)``: a result that is not finite is refused, named, and nothing is merged."""

import copy
import math

import pytest
import torch
from conftest import SmallNet, randomise, snapshot
from torch import nn

import convlora
from convlora import StateError
from convlora._methods.registry import named_methods

METHODS = named_methods()


def injected(**options):
    torch.manual_seed(0)
    net = convlora.inject(SmallNet(), 4, adapter_name="mine", **options)
    randomise(net)
    return net


def refused(net, *names):
    """That the merge is refused by these tensors' names, and that the model is as it was."""
    before = snapshot(net)
    listed = r", ".join(name.replace(".", r"\.") for name in names)
    with pytest.raises(StateError, match=f"^{listed}: NaN or Inf with adapter 'mine', and finite in the base"):
        convlora.merge(net)
    assert snapshot(net) == before and convlora.summary(net).state == "injected"


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", METHODS)
def test_a_factor_that_is_not_finite_is_refused_by_layer_and_adapter_in_every_method(method, value):
    names = list(dict(injected(method=method).block[3].convlora["mine"].named_parameters()))
    for name in names:
        net = injected(method=method)
        with torch.no_grad():
            net.block[3].convlora["mine"].get_parameter(name).flatten()[-1] = value
        refused(net, "block.3.weight")


def test_with_dora_a_magnitude_that_is_not_finite_is_refused():
    net = injected(use_dora=True)
    with torch.no_grad():
        net.stem.convlora["mine"].lora_magnitude[3] = math.nan
    refused(net, "stem.weight")


@pytest.mark.parametrize(
    "options, name",
    [
        ({}, "fc.weight"),
        ({}, "fc.bias"),
        ({"norm": "track"}, "bn1.running_var"),
        ({"modules_to_save": ["fc", "bn1"]}, "bn1.weight"),
        ({"method": "ssf"}, "block.3.bias"),
    ],
)
def test_what_is_trained_or_moved_beside_the_factors_is_checked_too(options, name):
    net = injected(**options)
    with torch.no_grad():
        net.state_dict(keep_vars=True)[name][0] = math.nan
    refused(net, name)


def test_all_that_is_not_finite_is_one_error_and_a_long_list_is_cut_short():
    net = injected()
    with torch.no_grad():
        for tensor in (net.stem.convlora["mine"].lora_B, net.block[0].convlora["mine"].lora_B, net.fc.weight):
            tensor.fill_(math.nan)
    refused(net, "stem.weight", "block.0.weight", "fc.weight")
    many = convlora.inject(torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(12))), 2, target_modules="*")
    randomise(many, math.inf)
    with pytest.raises(StateError, match=r"^0\.weight, .*, 7\.weight, and 3 more: NaN or Inf"):
        convlora.merge(many)


def test_a_sum_that_the_bases_dtype_cannot_hold_is_refused():
    net = convlora.inject(SmallNet().half(), 4, adapter_name="mine")
    randomise(net, 400.0)  # factors are fp32 and finite; the sum is beyond 65,504
    refused(net, "stem.weight", "block.0.weight", "block.3.weight")


def test_of_two_parts_neither_is_merged_where_one_is_not_finite():
    pair = torch.nn.ModuleDict({"a": injected(), "b": injected()})
    with torch.no_grad():
        pair["b"].stem.convlora["mine"].lora_A[0] = math.inf
    before = snapshot(pair)
    with pytest.raises(StateError, match=r"^stem\.weight: NaN or Inf"):
        convlora.merge(pair)
    assert snapshot(pair) == before


def test_of_several_adapters_at_once_all_are_named():
    net = injected(norm="track")
    convlora.add_adapter(net, "other", 2, norm="track")
    with torch.no_grad():
        net.block[3].convlora["other"].lora_B.fill_(math.inf)
    convlora.set_adapter(net, "other")
    with torch.no_grad():
        net.bn1.running_mean[0] = math.nan  # a mixture has it, too
    convlora.set_adapter(net, {"mine": 0.5, "other": 0.5})
    before = snapshot(net)
    with pytest.raises(
        StateError, match=r"^block\.3\.weight, bn1\.running_mean.*: NaN or Inf with adapter {'mine': 0.5, 'other': 0.5}"
    ):
        convlora.merge(net)
    assert snapshot(net) == before
    convlora.merge(convlora.set_adapter(net, "mine"))


def test_a_strength_beyond_what_the_dtype_holds_is_refused():
    net = convlora.inject(SmallNet().half(), 4, adapter_name="mine")
    randomise(net)
    convlora.set_scale(net, "mine", 1e8)
    refused(net, "stem.weight", "block.0.weight", "block.3.weight")
    convlora.merge(convlora.set_scale(net, "mine", 1))


def test_what_is_not_finite_in_the_base_either_is_the_bases_affair():
    net = SmallNet()
    net.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    with torch.no_grad():
        net.stem.weight[0] = math.nan
    convlora.inject(net, 4)
    randomise(net)
    assert convlora.merge(net).stem.weight[0].isnan().all()


def test_without_the_check_it_is_merged_as_it_is_and_comes_back(images):
    net = injected()
    with torch.no_grad():
        net.stem.convlora["mine"].lora_B[3] = math.inf
    before, whole = snapshot(net), copy.deepcopy(net).eval()(images)
    convlora.merge(net, check=False)
    assert type(net.stem) is torch.nn.Conv2d and not net.stem.weight[3].isfinite().any()
    assert torch.equal(net.eval()(images).isnan(), whole.isnan())
    assert snapshot(convlora.unmerge(net.train())) == before


def test_a_base_s_bias_that_is_not_finite_hides_no_weight():
    net = nn.Sequential(nn.Conv2d(8, 8, 3))
    with torch.no_grad():
        net[0].bias[0] = float("inf")
    convlora.inject(net, 2, modules_to_save=None)
    with torch.no_grad():
        for factor in convlora.trainable_parameters(net):
            factor.fill_(float("nan"))
    with pytest.raises(StateError, match=r"0\.weight: NaN or Inf"):
        convlora.merge(net)
