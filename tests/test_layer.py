"""Laws of the adapted layer over every geometry: invariants 1 to 4 and the gradients."""

import copy
import tempfile

import pytest
import torch
from conftest import Geometry, convolutions, dense_delta, randomise
from laws import assume, given, st
from torch import nn

import convlora

DTYPES = [torch.float32, torch.float64]


def adapted(geometry: Geometry, dtype: torch.dtype, rank: int = 2) -> tuple[nn.Conv2d, nn.Conv2d, torch.Tensor]:
    """A plain convolution, its adapted twin, and an input; geometries too small for any rank are passed over."""
    conv, x = geometry.build(dtype)
    columns = conv.weight[0].numel()
    assume(conv.out_channels * columns >= conv.out_channels + columns)
    twin = copy.deepcopy(conv)
    convlora.inject(twin, rank, modules_to_save=None, method_pattern={"*": "lora"})
    return conv, twin, x


@pytest.mark.parametrize("dtype", DTYPES)
@given(geometry=convolutions())
def test_fresh_adapter_changes_no_bit_of_the_output(dtype, geometry):
    conv, twin, x = adapted(geometry, dtype)
    for mode in (True, False):
        assert torch.equal(twin.train(mode)(x), conv.train(mode)(x))


@given(geometry=convolutions())
def test_adapted_forward_is_base_forward_with_changed_weight(geometry):
    conv, twin, x = adapted(geometry, torch.float64)
    randomise(twin)
    with torch.no_grad():
        conv.weight += dense_delta(twin)
    torch.testing.assert_close(twin(x), conv(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@given(geometry=convolutions())
def test_merged_equals_unmerged(dtype, geometry):
    _, twin, x = adapted(geometry, dtype)
    randomise(twin)
    unmerged = twin(x)
    merged = convlora.merge(twin)(x)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert (merged - unmerged).abs().max() <= tolerance * unmerged.abs().max()
    assert type(twin) is nn.Conv2d


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16, torch.float16])
@given(geometry=convolutions(), cycles=st.integers(1, 4))
def test_unmerge_restores_every_bit(dtype, geometry, cycles):
    conv, twin, _ = adapted(geometry, dtype)
    randomise(twin, size=3.0)
    for _ in range(cycles):
        convlora.merge(twin)
        assert not torch.equal(twin.weight, conv.weight)
        convlora.unmerge(twin)
        assert torch.equal(convlora.base_weight(twin), conv.weight)


@pytest.mark.parametrize("dtype", DTYPES)
@given(geometry=convolutions())
def test_saved_and_loaded_into_a_fresh_base_predicts_the_same_bits(dtype, geometry):
    conv, twin, x = adapted(geometry, dtype)
    randomise(twin)
    with tempfile.TemporaryDirectory() as directory:
        convlora.save_adapter(twin, directory)
        convlora.load_adapter(conv, directory)
    assert torch.equal(conv(x), twin(x))


@given(geometry=convolutions())
def test_removed_leaves_the_plain_layer(geometry):
    conv, twin, x = adapted(geometry, torch.float32)
    randomise(twin)
    convlora.remove(twin)
    assert type(twin) is nn.Conv2d
    assert list(vars(twin)) == list(vars(conv))
    assert torch.equal(twin(x), conv(x))


@given(geometry=convolutions())
def test_gradients_of_the_factors_and_the_input_agree_with_finite_differences(geometry):
    _, twin, x = adapted(geometry, torch.float64)
    randomise(twin)
    lora = twin.convlora["default"]
    x = x[:1, :, :5, :6].requires_grad_()
    assume(geometry.padding_mode == "zeros" or geometry.padding == "valid" or max(geometry.dilation) == 1)
    try:
        twin(x)
    except RuntimeError:  # the cropped input is smaller than the kernel's reach
        assume(False)

    def forward(x: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
        values = {"convlora.default.lora_A": lora_A, "convlora.default.lora_B": lora_B}
        return torch.func.functional_call(twin, values, (x,))

    assert torch.autograd.gradcheck(forward, (x, lora.lora_A, lora.lora_B))


@given(geometry=convolutions())
def test_gradients_agree_with_those_of_the_dense_weight(geometry):
    """By the chain rule: with G the gradient of W, dB = s·G·Aᵀ and dA = s·Bᵀ·G, and the input's is the same."""
    conv, twin, x = adapted(geometry, torch.float64)
    randomise(twin)
    with torch.no_grad():
        conv.weight += dense_delta(twin)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    twin(ours).sin().sum().backward()
    conv(theirs).sin().sum().backward()
    lora, G = twin.convlora["default"], conv.weight.grad.flatten(1)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(lora.lora_B.grad, lora.scaling * G @ lora.lora_A.flatten(1).T, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(lora.lora_A.grad.flatten(1), lora.scaling * lora.lora_B.T @ G, rtol=1e-10, atol=1e-12)
    assert twin._parameters["weight"].grad is None


def test_linear_layer_is_adapted_when_asked():
    torch.manual_seed(0)
    layer = nn.Linear(20, 30, dtype=torch.float64)
    x, oracle = torch.randn(5, 20, dtype=torch.float64), copy.deepcopy(layer)
    convlora.inject(layer, 4, target_modules=nn.Linear, modules_to_save=None)
    randomise(layer)
    with torch.no_grad():
        oracle.weight += dense_delta(layer)
    torch.testing.assert_close(layer(x), oracle(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("use_rslora, expected", [(False, 16 / 4), (True, 16 / 4**0.5)])
def test_scaling_is_alpha_over_rank_or_over_its_root(use_rslora, expected):
    conv = nn.Conv2d(16, 16, 3)
    convlora.inject(conv, 4, alpha=16, use_rslora=use_rslora, modules_to_save=None)
    assert conv.convlora["default"].scaling == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_keeps_fp32_factors_and_rounds_once(dtype):
    conv = nn.Conv2d(8, 8, 3, dtype=dtype)
    base = conv.weight.detach().clone()
    convlora.inject(conv, 2, modules_to_save=None)
    randomise(conv)
    assert {p.dtype for p in convlora.adapter_parameters(conv)} == {torch.float32}
    assert torch.equal(conv.weight, (base.float() + dense_delta(conv)).to(dtype))


def test_autocast_does_not_coarsen_the_weight():
    conv = nn.Conv2d(8, 8, 3)
    convlora.inject(conv, 2, modules_to_save=None)
    randomise(conv)
    outside = conv.weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv.weight, outside)
        y = conv(torch.randn(1, 8, 5, 5))
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "layer, x",
    [
        (nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), torch.randn(2, 6, 7, 7)),
        (nn.Conv2d(6, 6, 3, groups=2, stride=2), torch.randn(2, 6, 7, 7)),
        (nn.Linear(6, 8), torch.randn(5, 6)),
    ],
)
def test_dropout_drops_inputs_of_the_branch_in_training_only(layer, x):
    oracle = copy.deepcopy(layer)
    convlora.inject(layer, 2, dropout=0.5, target_modules=type(layer), modules_to_save=None)
    assert torch.equal(layer.train()(x), oracle(x))  # a fresh branch is zero whatever it drops
    randomise(layer)
    delta_only = copy.deepcopy(oracle)
    with torch.no_grad():
        delta_only.weight.copy_(dense_delta(layer))
        delta_only.bias.zero_()
    torch.manual_seed(3)
    y = layer.train()(x)
    torch.manual_seed(3)
    torch.testing.assert_close(y, oracle(x) + delta_only(torch.dropout(x, 0.5, True)))
    torch.testing.assert_close(layer.eval()(x), oracle(x) + delta_only(x))


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
@given(
    groups=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.integers(0, 1),
    mode=st.sampled_from(["zeros", "circular"]),
)
def test_other_convolutions_by_the_same_mechanism(kind, groups, kernel, stride, dilation, padding, mode):
    torch.manual_seed(0)
    mode = "zeros" if "Transpose" in kind.__name__ else mode
    options = {"stride": stride, "dilation": dilation, "padding": padding, "groups": groups, "padding_mode": mode}
    layer = kind(4 * groups, 5 * groups, kernel, dtype=torch.float64, **options)
    x = torch.randn(2, 4 * groups, *[7] * int(kind.__name__[-2]), dtype=torch.float64)
    base, changed = copy.deepcopy(layer), copy.deepcopy(layer)
    convlora.inject(layer, 2, target_modules=kind, modules_to_save=None)
    assert torch.equal(layer(x), base(x))
    randomise(layer)
    lora = layer.convlora["default"]
    with torch.no_grad():
        changed.weight += lora.scaling * torch.einsum("or,r...->o...", lora.lora_B, lora.lora_A)
    torch.testing.assert_close(layer(x), changed(x), rtol=1e-12, atol=1e-12)
    with tempfile.TemporaryDirectory() as directory:
        convlora.save_adapter(layer, directory)
        convlora.load_adapter(base, directory)
    assert torch.equal(base(x), layer(x))
    with torch.no_grad():
        merged = convlora.merge(layer)(x)
        assert torch.equal(merged, base(x)) and type(layer) is kind
    convlora.unmerge(layer)
    assert torch.equal(layer(x), base(x))
    convlora.remove(layer)
    assert type(layer) is kind
