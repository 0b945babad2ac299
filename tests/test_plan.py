"""The plan: caps, counts and the printed table."""

import fnmatch
import math
import re
import warnings

import pytest
import torch
from conftest import convolutions, need
from laws import given, st
from torch import nn

import convlora
from convlora import Plan


@given(geometry=convolutions(), rank=st.integers(1, 64))
def test_no_adapter_is_larger_than_its_layer(geometry, rank):
    conv, _ = geometry.build()
    model = nn.Sequential(conv, nn.Conv2d(32, 32, 3))
    taken = convlora.plan(model, rank, modules_to_save=None)
    assert not taken.skipped and all(layer.adapter_parameters <= layer.base_parameters for layer in taken.layers)
    plan = convlora.plan(model, rank, modules_to_save=None, method_pattern={"*": "lora"})
    assert len(plan.layers) + len(plan.skipped) == 2
    whole = {layer.name for layer in taken.layers if layer.method == "dense"}
    assert whole == {layer.name for layer in (*plan.layers, *plan.skipped) if layer.rank < rank}
    for layer in plan.layers:
        assert 1 <= layer.rank <= rank and layer.adapter_parameters <= layer.base_parameters
        columns = math.prod(layer.weight_shape[1:])
        one_more = (layer.rank + 1) * (layer.weight_shape[0] + columns)
        assert layer.rank == rank or one_more > layer.base_parameters  # not capped harder than needed
        assert layer.scaling == pytest.approx(2.0)  # the cap changes no step size
    for layer in plan.skipped:
        assert layer.note == "even rank 1 would have more parameters than the layer"


def test_plan_touches_nothing_and_counts_what_inject_then_does(net):
    before = {key: id(value) for key, value in net.state_dict(keep_vars=True).items()}
    plan = convlora.plan(net, 4)
    assert {key: id(value) for key, value in net.state_dict(keep_vars=True).items()} == before
    convlora.inject(net, 4)
    factors = sum(p.numel() for p in convlora.adapter_parameters(net))
    trainable = sum(p.numel() for p in convlora.trainable_parameters(net))
    everything = sum(p.numel() for p in net.parameters())
    assert (plan.adapter_parameters, plan.trainable_parameters) == (factors, trainable)
    assert plan.trainable_share == trainable / everything


def test_plan_survives_json(net):
    import json

    plan = convlora.plan(net, 4, use_rslora=True)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_table_says_layer_rank_sizes_reasons_and_totals(net):
    convlora.inject(net, exclude_modules="stem")
    assert str(convlora.summary(net)).splitlines() == [
        "SmallNet: adapter 'default', rank 8, alpha 16 (injected)",
        "layer    kind    weight      rank  base  adapter",
        "block.0  Conv2d  16×1×3×3   dense   144      144  rank 8 would have more parameters than the layer",
        "block.3  Conv2d  16×16×1×1      8   256      256",
        "stem     Conv2d  16×3×3×3       -   432        0  excluded",
        "adapted layers: 2, skipped: 1",
        "trained in full: fc (attribute 'fc'), 39 parameters",
        "norm layers with statistics: 2, frozen in eval behaviour",
        "also frozen: 2 BatchNorm2d (64), 1 Linear (204)",
        "trainable: 439 of 1,571 parameters (27.94%), 400 of them in factors",
    ]
    convlora.merge(net)
    assert "(merged)" in str(convlora.summary(net)).splitlines()[0]


def test_a_layer_too_small_to_factor_is_taken_whole_and_a_frozen_one_stays_a_constant():
    """As a detector's fixed integral and a network's new head of one channel, which would stay random."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 1, 1, bias=False), nn.Conv2d(1, 1, 1, bias=False))
    model[2].requires_grad_(False)
    for options, methods in (
        ({}, {"0": "lora", "1": "dense"}),
        ({"method_pattern": {"1": "lora"}}, {"0": "lora"}),
        ({"budget": 300}, {"0": "lora"}),
        ({"use_dora": True}, {"0": "lora", "1": "dense"}),
    ):
        plan = convlora.plan(model, 2, modules_to_save=None, **options)
        assert {layer.name: layer.method for layer in plan.layers} == methods
        assert {layer.name for layer in plan.layers if layer.use_dora} <= {"0"}
        assert "even rank 1 would have more parameters than the layer" in {layer.note for layer in plan.skipped}
    convlora.inject(model, 2, modules_to_save=None)
    x = torch.randn(2, 3, 6, 6)
    model(x).square().sum().backward()
    assert model[1].convlora["default"].diff.grad.any() and model[2].weight.grad is None
    convlora.add_adapter(model, "second", rank=2, modules_to_save=None)  # the base is frozen by now, and not a constant
    assert [layer.method for layer in convlora.summary(model, "second").layers] == ["lora", "dense"]


def test_weight_that_something_else_computes_is_left_alone_and_said():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    weight = model[0].weight.detach()
    del model[0].weight
    model[0].weight = weight
    plan = convlora.plan(model, 2, modules_to_save=None)
    note = "it has no weight, or one computed in a way that is not torch's"
    assert [(layer.name, layer.note) for layer in plan.skipped] == [("0", note)]


def test_every_parameter_is_accounted_for(net):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.scale = net, nn.Parameter(torch.ones(3, 2))
            self.tied = net.hidden

    model = Block()
    plan = convlora.plan(model, exclude_modules="net.stem")
    assert [(part.name, part.kind, part.parameters) for part in plan.others] == [
        ("", "Block", 6),
        ("net.bn1", "BatchNorm2d", 32),
        ("net.block.1", "BatchNorm2d", 32),
        ("net.hidden", "Linear", 16 * 12 + 12),
    ]
    assert plan.modules_to_save == ("net.fc",)
    listed = {layer.name for layer in (*plan.layers, *plan.skipped)} | {part.name for part in plan.others}
    listed |= {"net.fc"}
    for name, _ in model.named_parameters():
        assert name.rpartition(".")[0] in listed


def test_convolutions_of_every_kind_are_adapted_and_listed_where_others_are_asked_for():
    kinds = nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
    model = nn.Sequential(*(kind(8, 8, 3) for kind in kinds), nn.Linear(8, 2))
    assert [layer.name for layer in convlora.plan(model, 2).layers] == list("012345")
    plan = convlora.plan(model, 2, target_modules=nn.Conv2d)
    assert [(layer.name, layer.note) for layer in plan.skipped] == [(name, "not a target") for name in "02345"]


def test_quantized_layers_are_listed_with_the_reason():
    quantized = need("torch.ao.nn.quantized")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.Conv2d(3, 4, 3), quantized.Conv2d(4, 4, 3))
    plan = convlora.plan(model, 2, modules_to_save=None)
    assert [(layer.name, layer.note) for layer in plan.skipped] == [("1", "its weight is packed (quantized)")]
    assert "packed" in str(plan) and plan.skipped[0].base_parameters == 0


@pytest.mark.parametrize(
    "patterns",
    [
        {"block.0": 1, "block.*": 2, "*": 3},
        {"*": 3, "block.0": 1},
        {re.compile(r"block\.\d"): 2, "block.3": 1, "stem": 3},
        {"block.3": 2, lambda name, _: name == "block.3": 1, nn.Conv2d: 3},
        {"bloc[k].0": 2, "block.0": 1},
    ],
    ids=["names first", "a glob first", "an expression first", "a name before a predicate and a type", "brackets"],
)
def test_the_first_pattern_that_names_a_layer_holds_whether_name_glob_or_expression(net, patterns):
    def names(pattern, name):  # one by one, as the docs say
        if isinstance(pattern, str):
            return fnmatch.fnmatchcase(name, pattern)
        return pattern.fullmatch(name) if isinstance(pattern, re.Pattern) else pattern is nn.Conv2d or pattern(name, 0)

    plan = convlora.plan(net, 1, alpha_pattern=patterns, alpha=9)
    assert {"stem", "block.3"} <= {layer.name for layer in plan.layers}
    for layer in plan.layers:
        alpha = next((value for pattern, value in patterns.items() if names(pattern, layer.name)), 9)
        assert layer.scaling == alpha / layer.rank
