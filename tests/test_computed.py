"""Convolutions whose weight torch computes from other parameters, or that keep their kernels in another form."""

import copy

import pytest
import torch
from conftest import dense_delta, need, randomise, snapshot
from torch import nn
from torch.nn.utils import parametrizations, prune

import convlora
from convlora import StateError

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")


def pruned(layer):
    prune.l1_unstructured(layer, "weight", amount=0.5)
    return layer


COMPUTED = {
    "parametrized weight_norm": parametrizations.weight_norm,
    "parametrized spectral_norm": parametrizations.spectral_norm,
    "parametrized orthogonal": parametrizations.orthogonal,
    "hooked weight_norm": torch.nn.utils.weight_norm,
    "hooked spectral_norm": torch.nn.utils.spectral_norm,
    "hooked pruning": pruned,
}
LAYERS = {
    "conv": lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
    "grouped": lambda: nn.Conv2d(6, 8, 3, groups=2, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(6, 8, 3, stride=2, groups=2),
}


@pytest.fixture(params=COMPUTED)
def how(request):
    return COMPUTED[request.param]


@pytest.fixture(params=LAYERS)
def model(request, how):
    torch.manual_seed(0)
    model = nn.Sequential(how(LAYERS[request.param]()), nn.BatchNorm2d(8))
    with torch.no_grad():  # torch's older hooks write `weight` at each forward, and with its graph it has no deepcopy
        model(torch.randn(2, 6, 9, 9))
    return model


@pytest.fixture
def x():
    return torch.randn(2, 6, 9, 9, generator=torch.Generator().manual_seed(3))


def adapted(model):
    return convlora.inject(model, 2, target_modules="0", modules_to_save=None, norm="track")


@pytest.mark.parametrize("training", [False, True])
def test_fresh_adapter_changes_no_bit(model, x, training):
    base = copy.deepcopy(model).train(training)
    adapted(model.train(training))
    for _ in range(3):  # spectral_norm moves its vectors at each forward in train mode
        assert torch.equal(model(x), base(x))
        assert torch.equal(model[0](x[0]), base[0](x[0]))  # an input without a batch takes another way


def test_effective_weight_is_the_computed_weight_plus_delta(model, x):
    adapted(model.eval())
    with convlora.disable_adapter(model):
        base = model[0].weight.detach().clone()
    randomise(model)
    expected = copy.deepcopy(convlora.remove(convlora.merge(copy.deepcopy(model))))
    with torch.no_grad():
        expected[0].weight.copy_(base + dense_delta(model[0]))
    torch.testing.assert_close(model(x), expected(x), rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_the_dense_weight(model, x):
    adapted(model.double().eval())
    randomise(model)
    plain = convlora.remove(convlora.merge(copy.deepcopy(model)))
    plain[0].weight.requires_grad_(True)
    for each in (model, plain):
        each(x.double()).square().sum().backward()
    lora = model[0].convlora["default"]
    dense = plain[0].weight.grad.flatten(1) * lora.scaling
    torch.testing.assert_close(lora.lora_B.grad, dense @ lora.lora_A.flatten(1).T)
    torch.testing.assert_close(lora.lora_A.grad.flatten(1), lora.lora_B.T @ dense)


def test_merge_unmerge_remove(model, x):
    before = snapshot(model.eval())
    base_output = model(x)
    classes = type(model[0]).__mro__
    adapted(model)
    randomise(model)
    keys, expected = list(model.state_dict()), model(x)
    for _ in range(2):
        convlora.merge(model)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
        assert type(model[0]) in classes and type(model[0]).__module__ == "torch.nn.modules.conv"
        assert {key for key in model.state_dict() if key[0] == "0"} <= {"0.weight", "0.bias"}
        convlora.unmerge(model)
        assert torch.equal(model(x), expected) and list(model.state_dict()) == keys
    convlora.remove(model)
    assert torch.equal(model(x), base_output)
    assert snapshot(model) == before


def test_removed_after_merge_is_a_plain_layer(model, x):
    adapted(model.eval())
    randomise(model)
    expected = model(x)
    convlora.remove(convlora.merge(model))
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    assert isinstance(model[0]._parameters["weight"], nn.Parameter) and model[0].weight.requires_grad
    model[0].weight.data.zero_()
    assert not model[0](x - x).sub(0 if model[0].bias is None else model[0].bias[:, None, None]).any()


@pytest.mark.parametrize("merged", [False, True])
def test_reload_is_bit_equal_after_training(model, x, merged, tmp_path, train):
    base = copy.deepcopy(model)
    adapted(model)
    train(model, x)
    expected = model.eval()(x)
    if merged:
        convlora.merge(model)
    convlora.save_adapter(model, tmp_path)
    assert model[0].__class__.__name__.startswith("Adapted") is not merged
    convlora.load_adapter(base, tmp_path)
    assert torch.equal(base.eval()(x), expected)


def test_planning_and_merging_move_nothing(model):
    """spectral_norm moves its vectors whenever its weight is computed in train mode."""
    model.train()
    adapted(model)
    randomise(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    convlora.merge(model)
    convlora.unmerge(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_the_base_weight_is_named_where_there_is_none(model):
    adapted(model)
    with pytest.raises(StateError, match="no weight Parameter of its own"):
        convlora.base_weight(model[0])
    with pytest.raises(StateError, match=r"Call convlora\.merge\(model\) first"):
        model[0].weight = nn.Parameter(torch.zeros(1))


def test_copies_compute_the_same(model, x):
    adapted(model.eval())
    randomise(model)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    convlora.merge(model)
    twin = copy.deepcopy(model)
    convlora.unmerge(model), convlora.unmerge(twin)
    assert torch.equal(twin(x), model(x))


def test_the_experts_of_a_conditional_convolution_are_adapted(tmp_path):
    layers = need("timm.layers")
    torch.manual_seed(0)
    layer, x = layers.CondConv2d(6, 8, 3, num_experts=4).eval(), torch.randn(3, 6, 9, 9)
    routing, model = torch.rand(3, 4), nn.Sequential(layer)
    base = copy.deepcopy(model)
    convlora.inject(model, 2, modules_to_save=None)
    (planned,) = convlora.summary(model).layers
    assert (planned.name, planned.kind, planned.weight_shape) == ("0", "CondConv2d", (4 * 8, 6, 3, 3))
    assert torch.equal(layer(x, routing), base[0](x, routing))
    randomise(model)
    oracle = copy.deepcopy(base)
    with torch.no_grad():
        oracle[0].weight += dense_delta(layer).view(4, -1)
    expected = layer(x, routing)
    torch.testing.assert_close(expected, oracle[0](x, routing))
    expected.sum().backward()
    assert all(factor.grad.abs().sum() > 0 for factor in convlora.adapter_parameters(model))
    convlora.save_adapter(model, tmp_path)
    convlora.load_adapter(base, tmp_path)
    assert torch.equal(base[0](x, routing), expected)
    convlora.merge(model)
    assert type(layer) is layers.CondConv2d and torch.equal(layer(x, routing), expected)


def test_a_deformable_convolution_is_adapted():
    ops = need("torchvision.ops")
    torch.manual_seed(0)
    layer, x = ops.DeformConv2d(4, 6, 3, padding=1), torch.randn(1, 4, 7, 7)
    offset = torch.randn(1, 2 * 9, 7, 7)
    oracle = copy.deepcopy(layer)
    convlora.inject(nn.Sequential(layer), 2, modules_to_save=None)
    assert torch.equal(layer(x, offset), oracle(x, offset))
    with torch.no_grad():
        layer.convlora["default"].lora_B.normal_()
        oracle.weight += dense_delta(layer)
    torch.testing.assert_close(layer(x, offset), oracle(x, offset))
