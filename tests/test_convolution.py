"""The adapted convolution's own autograd: whichever path it takes, output and gradients are the dense weight's."""

import copy
import ctypes
import random

import pytest
import torch
from conftest import SmallNet, convolutions, dense_delta, randomise
from laws import assume, given, st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import convlora
from convlora._layer import adapted, convolution, depthwise
from convlora._layer.convolution import convolve, convolve_plainly
from convlora._layer.functional import Geometry
from convlora._layer.paths import LayerSizes, choose
from convlora._methods import lora as lora_method

PATHS = ["auto", "fused", "weight", "branch"]
paths = pytest.mark.parametrize("path", PATHS)


def adapt(layer, path="auto", rank=2):
    convlora.inject(
        layer, rank, modules_to_save=None, training_path=path, target_modules=type(layer), method_pattern={"*": "lora"}
    )
    randomise(layer)
    return layer


def with_dense_weight(layer):
    """The plain layer with W + ΔW, and a gradient for it."""
    return convlora.remove(convlora.merge(copy.deepcopy(layer))).requires_grad_(True)


def dense_gradients(layer, plain):
    """What the chain rule makes of the dense weight's gradient."""
    lora = layer.convlora["default"]
    dense = lora.scaling * plain.weight.grad.flatten(1)
    return (lora.lora_B.T @ dense).view(lora.lora_A.shape), dense @ lora.lora_A.flatten(1).T


@paths
@pytest.mark.parametrize("channels_last", [False, True])
@given(geometry=convolutions(), freeze_A=st.booleans())
def test_output_and_gradients_are_those_of_the_dense_weight(path, channels_last, geometry, freeze_A):
    layer, x = geometry.build(torch.float64)
    if channels_last:
        layer, x = layer.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    plain = copy.deepcopy(layer)
    try:
        adapt(layer, path)
    except convlora.TargetError:
        return  # so small that even rank 1 would outweigh it
    layer.requires_grad_(False)
    for parameter in convlora.adapter_parameters(layer):
        parameter.requires_grad_(True)
    lora = layer.convlora["default"]
    lora.lora_A.requires_grad_(not freeze_A)
    if layer.bias is not None:
        layer.bias.requires_grad_(True)
    with torch.no_grad():
        plain.weight += dense_delta(layer)
    mine, theirs = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    y, expected = layer(mine), plain(theirs)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    g = torch.randn_like(expected)
    y.backward(g)
    expected.backward(g)
    grad_A, grad_B = dense_gradients(layer, plain)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-10)
    assert mine.grad.stride() == theirs.grad.stride() or 1 in mine.shape or path == "branch"
    if freeze_A:
        assert lora.lora_A.grad is None
    else:
        torch.testing.assert_close(lora.lora_A.grad, grad_A, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lora.lora_B.grad, grad_B, rtol=1e-10, atol=1e-10)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, plain.bias.grad, rtol=1e-10, atol=1e-10)


def drawn(groups, kernel, stride, freeze_A):
    """A geometry, a frozen weight, and x, A, B and bias of which derivatives are taken."""
    torch.manual_seed(0)
    geometry = Geometry((stride, stride), (kernel // 2,) * 2, (1, 1), groups)
    weight = torch.randn(4, 4 // groups, kernel, kernel, dtype=torch.float64)
    x, A, B, bias = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in [(2, 4, 4, 3), (2, *weight.shape[1:]), (4, 2), (4,)]
    )
    return geometry, weight, (x, A.requires_grad_(not freeze_A), B, bias)


@pytest.mark.parametrize("path", PATHS[1:])
@pytest.mark.parametrize("groups, kernel, stride", [(1, 3, 2), (1, 1, 1), (1, 1, 2), (2, 3, 1), (4, 5, 1)])
@pytest.mark.parametrize("freeze_A", [False, True])
def test_first_and_second_derivatives_in_double_precision(path, groups, kernel, stride, freeze_A):
    geometry, weight, leaves = drawn(groups, kernel, stride, freeze_A)

    def run(x, A, B, bias):
        return convolve(x, weight, A, B, bias, 0.7, geometry, path)

    assert gradcheck(run, leaves, fast_mode=True)
    assert gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("freeze_A", [False, True])
@pytest.mark.parametrize("path, groups, kernel, stride", [("branch", 1, 3, 2), ("weight", 1, 1, 2), ("auto", 2, 3, 1)])
def test_first_and_second_derivatives_in_few_calls(path, groups, kernel, stride, freeze_A):
    geometry, weight, leaves = drawn(groups, kernel, stride, freeze_A)
    x, A, B, bias = leaves

    def run(x, A, B, bias):
        return convolve_plainly(x, weight, A, B, bias, 0.7, geometry, path)

    torch.testing.assert_close(run(x, A, B, bias), convolve(x, weight, A, B, bias, 0.7, geometry, "fused"))
    assert gradcheck(run, leaves, fast_mode=True)
    assert gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.pairwise
@pytest.mark.parametrize("path", PATHS[1:])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 3)])
@pytest.mark.parametrize("large", [1, 10**9], ids=["large", "small"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("outputs", [4, 7], ids=["narrows", "widens"])
def test_a_1x1_kernels_gradient_to_the_input_is_autograds(path, stride, large, memory_format, outputs, monkeypatch):
    """A product over channels where the image is large, at the positions read; with t's where the layer widens."""
    monkeypatch.setattr(convolution, "LARGE", large)
    torch.manual_seed(0)
    x = torch.randn(2, 5, 7, 6, dtype=torch.float64).to(memory_format=memory_format).requires_grad_(True)
    A, B = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 5, 1, 1), (outputs, 2)))
    weight, geometry = torch.randn(outputs, 5, 1, 1, dtype=torch.float64), Geometry(stride, (0, 0), (1, 1), 1)

    def own(x, A, B):
        return convolve(x, weight, A, B, None, 0.7, geometry, path)

    def plain(x, A, B):
        return nn.functional.conv2d(x, weight + 0.7 * torch.einsum("or,riyx->oiyx", B, A), None, stride)

    assert gradgradcheck(own, (x, A, B))
    grads = []
    for run in (own, plain):
        first = torch.autograd.grad(run(x, A, B).square().sum(), (x, A, B), create_graph=True)
        grads.append((*first, *torch.autograd.grad(first[0].square().sum(), (x, A, B))))
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


@paths
def test_fresh_adapter_is_exact_also_where_gradients_are_asked_for(path, images):
    torch.manual_seed(0)
    net = SmallNet()
    base = copy.deepcopy(net).eval()
    convlora.inject(net, training_path=path)
    net.eval()
    assert torch.equal(net(images), base(images))


@given(data=st.data())
def test_a_depthwise_weight_gradient_by_bands_is_autograds(data):
    """Whatever the kernel, also where it is larger than the image, strided or dilated."""
    pair = lambda low, high: st.tuples(st.integers(low, high), st.integers(low, high))  # noqa: E731
    kernel, stride, padding, dilation = (data.draw(pair(*limits)) for limits in ((1, 7), (1, 3), (0, 4), (1, 2)))
    size = data.draw(pair(1, 9))
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    assume(all(s + 2 * p >= span for s, p, span in zip(size, padding, spans, strict=True)))
    images, channels = data.draw(pair(1, 4))
    geometry = Geometry(stride, padding, dilation, channels)
    x = torch.randn(images, channels, *size, dtype=torch.float64)
    weight = torch.randn(channels, 1, *kernel, dtype=torch.float64, requires_grad=True)
    y = nn.functional.conv2d(x, weight, None, *geometry)
    g = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, weight, g)
    torch.testing.assert_close(depthwise.weight_grad(g, x, kernel, geometry), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "kernel, images, size, wins",
    [(3, 2, 8, False), (3, 16, 2, True), (5, 2, 8, True), (5, 2, 4, False), (7, 2, 112, False)],
)
def test_bands_take_the_place_of_torchs_own_where_that_is_slow(kernel, images, size, wins, monkeypatch):
    layer, x = nn.Conv2d(8, 8, kernel, padding=kernel // 2, groups=8), torch.randn(images, 8, size, size)
    adapt(layer)
    asked = []
    own = depthwise.weight_grad
    monkeypatch.setattr(depthwise, "weight_grad", lambda *args: asked.append(1) or own(*args))
    layer(x).sum().backward()
    assert bool(asked) is wins
    plain, dense = with_dense_weight(layer), layer.convlora["default"]
    plain(x).sum().backward()
    grads = dense_gradients(layer, plain)
    torch.testing.assert_close((dense.lora_A.grad, dense.lora_B.grad), grads, rtol=1e-4, atol=1e-3)
    asked.clear()
    layer.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last)).sum().backward()
    assert not asked


def saved_bytes(layer, x):
    """Bytes that autograd keeps for the layer's backward, the layer's own tensors not counted, a storage once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    return sum(size for address, size in storages.items() if address not in own)


@pytest.mark.parametrize("path, kept", [("fused", 0), ("weight", 0), ("branch", 2 * 8 * 6 * 6 * 4)])
def test_nothing_is_saved_but_the_input(path, kept):
    """The merged weight is computed again; a branch keeps its few channels."""
    layer, x = nn.Conv2d(64, 64, 3, padding=1, bias=False), torch.randn(2, 64, 6, 6)
    adapt(layer, path, rank=8)
    assert saved_bytes(layer, x) == x.numel() * 4 + kept


def output_and_whether_kept(x, layer):
    """The layer's output, and whether autograd keeps x, a tensor of its own, for the backward."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = layer(x)
    return y, any(each.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for each in kept)


LEAN = {
    "3x3": (nn.Conv2d(64, 64, 3, padding=1), (2, 64, 6, 6), 6 * 6),
    "1x1": (nn.Conv2d(64, 32, 1, bias=False), (2, 64, 6, 6), 6 * 6),
    "1x1 with a stride": (nn.Conv2d(64, 128, 1, 2), (2, 64, 6, 6), 3 * 3),
    "padded otherwise": (nn.Conv2d(64, 64, 3, padding=1, padding_mode="circular"), (2, 64, 6, 6), 6 * 6),
    "1-D": (nn.Conv1d(64, 64, 3), (2, 64, 12), 10),
    "3-D": (nn.Conv3d(64, 32, 2), (2, 64, 4, 4, 4), 27),
}


@pytest.mark.parametrize("path", ["auto", "fused", "branch"])
@pytest.mark.parametrize("name", LEAN)
@pytest.mark.parametrize("by_hand", [False, True], ids=["asked for", "by hand"])
def test_with_a_constant_A_a_layer_keeps_r_channels_and_not_its_input(path, name, by_hand):
    layer, shape, positions = copy.deepcopy(LEAN[name][0]), *LEAN[name][1:]
    convlora.inject(
        layer, 4, modules_to_save=None, target_modules=type(layer), training_path=path, freeze_A=not by_hand
    )
    lora = layer.convlora["default"]
    torch.nn.init.normal_(lora.lora_B, std=0.1)
    x = torch.randn(shape).requires_grad_(True)
    if by_hand:
        assert saved_bytes(layer, x) >= x.numel() * 4
        lora.lora_A.requires_grad_(False)
    assert saved_bytes(layer, x) == 2 * 4 * positions * 4
    layer(x).square().sum().backward()
    mine, plain = x.grad.clone(), with_dense_weight(layer)
    theirs = x.detach().requires_grad_(True)
    plain(theirs).square().sum().backward()
    torch.testing.assert_close(mine, theirs.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lora.lora_B.grad, dense_gradients(layer, plain)[1], rtol=1e-4, atol=1e-3)
    assert lora.lora_A.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("kernel, stride", [(3, 1), (3, 2), (1, 2)])
def test_the_gradient_to_an_input_that_is_not_kept_is_torchs_to_the_bit(dtype, channels_last, kernel, stride):
    """torch's function asks for the input, of which the form alone counts."""
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 24, kernel, stride, padding=kernel // 2, dtype=dtype)
    convlora.inject(layer, 4, modules_to_save=None, training_path="fused", freeze_A=True)
    torch.nn.init.normal_(layer.convlora["default"].lora_B)
    x = torch.randn(2, 16, 5, 7, dtype=dtype)
    if channels_last:
        layer, x = layer.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_(True)
    y, is_kept = output_and_whether_kept(x, layer)
    g = torch.randn_like(y)
    y.backward(g)
    plain, theirs = with_dense_weight(layer), x.detach().requires_grad_(True)
    plain(theirs).backward(g)
    assert not is_kept
    if kernel > 1:
        assert torch.equal(x.grad, theirs.grad) and x.grad.stride() == theirs.grad.stride()
    torch.testing.assert_close(x.grad, theirs.grad)  # a stride of 1×1 kernels is taken apart: other sums


def test_where_h_would_be_the_larger_of_the_two_the_input_is_kept():
    layer, x = nn.Conv2d(3, 64, 7), torch.randn(2, 3, 12, 12, requires_grad=True)
    convlora.inject(layer, 8, modules_to_save=None, freeze_A=True, training_path="fused")
    assert saved_bytes(layer, x) == x.numel() * 4


def test_with_a_constant_A_a_linear_layer_does_not_keep_its_input():
    layer, x = adapt(nn.Linear(64, 48)), torch.randn(2, 7, 64, requires_grad=True)
    plain, lora = with_dense_weight(layer), layer.convlora["default"]
    assert output_and_whether_kept(x, layer)[1]
    lora.lora_A.requires_grad_(False)
    y, is_kept = output_and_whether_kept(x, layer)
    assert not is_kept
    for each in (y, plain(x)):
        each.square().sum().backward()
    torch.testing.assert_close(lora.lora_B.grad, dense_gradients(layer, plain)[1], rtol=1e-4, atol=1e-4)


def test_where_neither_factor_is_trained_nothing_is_kept():
    layer, x = adapt(nn.Conv2d(16, 16, 3)), torch.randn(2, 16, 9, 9, requires_grad=True)
    expected = torch.autograd.grad(layer(x).square().sum(), x)
    layer.requires_grad_(False)
    assert saved_bytes(layer, x) == 0
    assert torch.equal(torch.autograd.grad(layer(x).square().sum(), x)[0], expected[0])


@paths
def test_autocast_computes_as_the_merged_layer_does(path):
    layer, x = adapt(nn.Conv2d(8, 16, 3), path), torch.randn(2, 8, 9, 9)
    plain = with_dense_weight(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = layer(x), plain(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    y.float().square().sum().backward()
    expected.float().square().sum().backward()
    lora, (grad_A, grad_B) = layer.convlora["default"], dense_gradients(layer, plain)
    assert lora.lora_A.grad.dtype == torch.float32
    # bf16 has 8 bits: single roundings of 0.4 %, and sums of them
    for mine, theirs in ((y, expected), (lora.lora_A.grad, grad_A), (lora.lora_B.grad, grad_B)):
        assert (mine - theirs).abs().max() <= 0.02 * theirs.abs().max()


@paths
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_with_fp32_factors(path, dtype):
    layer, x = adapt(nn.Conv2d(8, 16, 3, dtype=dtype), path), torch.randn(2, 8, 9, 9, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in convlora.adapter_parameters(layer))
    assert (y - with_dense_weight(layer)(x)).abs().max() <= 0.02 * y.abs().max()


def test_where_the_own_autograd_does_not_know_the_way_torch_does_it():
    layer, x = adapt(nn.Conv2d(4, 8, 3)), torch.randn(2, 4, 7, 7)
    plain = with_dense_weight(layer)
    torch.testing.assert_close(layer(x[0]), plain(x[0]))  # no batch
    y, tangent = torch.func.jvp(layer, (x,), (x,))  # forward mode
    torch.testing.assert_close((y, tangent), torch.func.jvp(plain, (x,), (x,)))
    torch.testing.assert_close(torch.func.vmap(layer)(x[:, None]), torch.func.vmap(plain)(x[:, None]))
    parameters = dict(layer.named_parameters())
    gradients = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).square().sum())(parameters)
    layer(x).square().sum().backward()
    lora = layer.convlora["default"]
    torch.testing.assert_close(gradients["convlora.default.lora_A"], lora.lora_A.grad)
    torch.testing.assert_close(gradients["convlora.default.lora_B"], lora.lora_B.grad)
    with pytest.raises(RuntimeError):  # torch's own error
        layer(torch.randn(2, 5, 7, 7))
    empty = layer(torch.randn(0, 4, 7, 7))
    assert empty.shape == (0, 8, 5, 5)
    layer._parameters["weight"].requires_grad_(True)  # the base trained too
    layer(x).square().sum().backward()
    plain(x).square().sum().backward()
    torch.testing.assert_close(layer._parameters["weight"].grad, plain.weight.grad)


def test_frozen_factors_and_inputs_get_no_gradient():
    layer, x = adapt(nn.Conv2d(4, 8, 3)), torch.randn(2, 4, 7, 7)
    lora = layer.convlora["default"]
    lora.lora_A.requires_grad_(False)
    layer(x).sum().backward()
    assert lora.lora_A.grad is None and lora.lora_B.grad is not None
    lora.lora_B.requires_grad_(False)
    assert not layer(x).requires_grad
    x.requires_grad_(True)
    layer(x).sum().backward()
    assert x.grad is not None


@paths
def test_linear_layers(path):
    torch.manual_seed(0)
    layer, x = adapt(nn.Linear(12, 9, dtype=torch.float64), path), torch.randn(2, 5, 12, dtype=torch.float64)
    plain = with_dense_weight(layer)
    for each in (layer, plain):
        each(x).square().sum().backward()
    lora, (grad_A, grad_B) = layer.convlora["default"], dense_gradients(layer, plain)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((lora.lora_A.grad, lora.lora_B.grad), (grad_A, grad_B), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "geometry",
    [{"padding": 0}, {"padding": 2}, {"padding": [2, 0]}, {"stride": 2}, {"stride": [2, 1]}, {"dilation": 2}],
    ids=str,
)
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_geometry_that_is_set_afterwards_counts(geometry, mode):
    conv, x = nn.Conv2d(4, 8, 3, padding=1, padding_mode=mode), torch.randn(2, 4, 9, 9)
    for name, value in geometry.items():
        setattr(conv, name, value)
    layer = adapt(conv)
    plain = with_dense_weight(layer)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-5, atol=1e-5)
    layer(x).square().sum().backward(), plain(x).square().sum().backward()
    lora = layer.convlora["default"]
    torch.testing.assert_close(
        (lora.lora_A.grad, lora.lora_B.grad), dense_gradients(layer, plain), rtol=1e-4, atol=1e-4
    )


def test_the_input_may_be_given_by_its_name():
    layer, x = nn.Conv2d(4, 8, 3), torch.randn(2, 4, 7, 7)
    convlora.inject(layer, 2, modules_to_save=None, dropout=0.5)
    randomise(layer)
    torch.manual_seed(0)
    by_place = layer(x)
    torch.manual_seed(0)
    assert torch.equal(layer(input=x), by_place) and not torch.equal(layer(input=x), by_place)
    with pytest.raises(TypeError):  # torch's own error
        layer(x, input=x)
    with pytest.raises(TypeError):
        layer(inputs=x)


def test_unknown_path_is_refused(net):
    with pytest.raises(convlora.TargetError, match="training_path='fast'; it must be one of 'auto', 'fused'"):
        convlora.inject(net, training_path="fast")


def test_the_choice_follows_the_shapes():
    def chosen(out, into, kernel, positions, groups=1, rank=8):
        shapes = LayerSizes(out, into, kernel, groups, rank, positions, positions, input_grad=True)
        return choose(shapes)

    assert chosen(512, 512, 9, positions=16 * 56 * 56) == "fused"  # large image: W + ΔW costs next to nothing
    assert chosen(512, 512, 9, positions=9) == "branch"  # it would cost more than the convolution
    assert chosen(16, 16, 9, positions=16 * 56 * 56) == "weight"  # rank-r tensors are no smaller
    assert chosen(64, 64, 9, positions=16 * 56 * 56, groups=64) == "weight"


def test_with_a_constant_A_the_choice_is_between_the_paths_that_keep_no_input():
    def chosen(channels, rank, positions):
        return choose(LayerSizes(16, channels, 9, 1, rank, positions, positions, input_grad=True, trains_A=False))

    assert chosen(16, 8, positions=16 * 56 * 56) == "fused"
    assert chosen(512, 8, positions=9) == "branch"
    assert chosen(3, 8, positions=16 * 56 * 56) == "weight"  # h would be larger than the input


# ---- what is kept between forwards without gradients


def calls_of(run):
    """How many operators torch dispatches."""
    calls = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(function)
            return function(*args, **(kwargs or {}))

    with Count():
        run()
    return len(calls)


SMALL = {
    "3x3": (nn.Conv2d(16, 32, 3, padding=1), (2, 16, 4, 4), 20),
    "1x1 with a stride": (nn.Conv2d(32, 16, 1, 2, bias=False), (2, 32, 4, 4), 20),
    "depthwise": (nn.Conv2d(32, 32, 3, groups=32), (2, 32, 5, 5), 22),
    "grouped": (nn.Conv2d(32, 32, 3, groups=4), (2, 32, 5, 5), 22),
}


@pytest.mark.parametrize("freeze_A", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_a_small_layer_is_few_calls(name, freeze_A):
    """The bound is on growth: a tenth more than were found."""
    layer, shape, bound = copy.deepcopy(SMALL[name][0]), *SMALL[name][1:]
    convlora.inject(layer, 4, modules_to_save=None, freeze_A=freeze_A)
    torch.nn.init.normal_(layer.convlora["default"].lora_B, std=0.1)
    x = torch.randn(shape, requires_grad=True)
    plain = with_dense_weight(layer)
    assert calls_of(lambda: layer(x).sum().backward()) <= bound
    mine, x.grad = x.grad, None
    plain(x).sum().backward()
    torch.testing.assert_close(mine, x.grad, rtol=1e-4, atol=1e-4)
    lora, (grad_A, grad_B) = layer.convlora["default"], dense_gradients(layer, plain)
    torch.testing.assert_close(lora.lora_B.grad, grad_B, rtol=1e-4, atol=1e-4)
    assert freeze_A or torch.allclose(lora.lora_A.grad, grad_A, rtol=1e-4, atol=1e-4)


@pytest.fixture
def computed(monkeypatch):
    """A list that grows with every effective weight that is computed."""
    calls = []
    compute = lora_method.plus_delta
    monkeypatch.setattr(lora_method, "plus_delta", lambda *args: calls.append(1) or compute(*args))
    return calls


def test_the_effective_weight_is_computed_once_where_no_gradient_is_asked_for(computed):
    layer, x = adapt(nn.Conv2d(4, 8, 3)), torch.randn(2, 4, 7, 7)
    with torch.inference_mode():
        layer(x)  # watched for writes, and keeps nothing
        computed.clear()
        first = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), first) and len(computed) == 1
        layer.convlora["default"].lora_B.add_(1)
        assert not torch.equal(layer(x), first) and len(computed) == 2
    x.requires_grad_(True)
    layer.requires_grad_(False)
    layer(x).sum().backward()  # what was kept without gradients serves a gradient that ends at the input
    assert layer.weight is not layer.weight and x.grad is not None


@pytest.mark.parametrize("write", [lambda weight: weight.zero_(), lambda weight: weight.data.zero_()])
def test_writes_to_the_weight_that_was_handed_out_are_lost(write):
    layer, x = adapt(nn.Conv2d(4, 8, 3)), torch.randn(2, 4, 7, 7)
    with torch.no_grad():
        expected, weight = layer(x), layer.weight.clone()
        write(layer.weight)
        assert torch.equal(layer.weight, weight) and torch.equal(layer(x), expected)
        assert torch.equal(convlora.merge(layer).weight, weight)


def test_what_is_kept_goes_with_a_move_and_a_merge():
    layer, x = adapt(nn.Conv2d(4, 8, 3)), torch.randn(2, 4, 7, 7)
    kept = adapted.held(layer).kept
    layer(x)  # watched for writes, and keeps nothing
    for change in (lambda: layer.double().float(), lambda: convlora.unmerge(convlora.merge(layer))):
        with torch.no_grad():
            layer(x)
        assert kept._entry is not None
        change()
        assert kept._entry is None


def flatten(layer):
    """All parameters are views of one vector, as sharding and some optimizers keep them."""
    parameters = list(layer.parameters())
    vector = nn.utils.parameters_to_vector(parameters).detach()
    nn.utils.vector_to_parameters(vector, parameters)


@pytest.mark.parametrize("share", [nn.Module.share_memory, flatten], ids=["shared", "flat"])
def test_memory_that_others_may_write_is_not_trusted(share, computed):
    layer, x = adapt(nn.Conv2d(4, 8, 3)), torch.randn(2, 4, 7, 7)
    share(layer)
    with torch.no_grad():
        layer(x)
        layer(x)
    assert len(computed) == 2


def fused_step(layer, x):
    layer(x).sum().backward()
    torch.optim.AdamW(convlora.adapter_parameters(layer), lr=0.1, fused=True).step()


def evaluated_before_the_step(layer, x):
    layer(x).sum().backward()
    with torch.no_grad():
        layer(x)
    torch.optim.AdamW(convlora.adapter_parameters(layer), lr=0.1, fused=True).step()


def compiled_step(layer, x):
    torch.compile(layer, backend="eager")(x).sum().backward()
    torch.optim.AdamW(convlora.adapter_parameters(layer), lr=0.1, fused=True).step()


def base_step(layer, x):
    """A base that is trained too, with an optimizer that moves no version counter."""
    weight = convlora.base_weight(layer).requires_grad_(True)
    layer(x).sum().backward()
    torch.optim.AdamW([weight], lr=0.1, fused=True).step()
    weight.requires_grad_(False)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("train", [fused_step, evaluated_before_the_step, compiled_step, base_step])
def test_an_evaluation_before_training_leaves_nothing_stale(train, dropout):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(4, 8, 3), torch.randn(2, 4, 7, 7)
    convlora.inject(layer, 2, modules_to_save=None, dropout=dropout)
    randomise(layer)
    with torch.no_grad():
        before = layer.eval()(x)
    train(layer.train(), x)
    torch._dynamo.reset()
    with torch.no_grad():
        after = layer.eval()(x)
        fresh = copy.deepcopy(layer)(x)
        assert torch.equal(after, fresh) and (after - before).abs().max() > 0.01
        assert torch.equal(convlora.merge(layer)(x), fresh)


def refill(tensor):
    """As sharded training frees memory and fills it again; the tensor and its version stay."""
    storage, size = tensor.untyped_storage(), tensor.untyped_storage().nbytes()
    storage.resize_(0)
    storage.resize_(size)
    torch.frombuffer((ctypes.c_char * size).from_address(storage.data_ptr()), dtype=tensor.dtype).fill_(0.5)


MUTATIONS = {
    "factor in place": lambda layer: layer.convlora["default"].lora_A.mul_(1.5),
    "factor by foreach": lambda layer: torch._foreach_add_([layer.convlora["default"].lora_B], 0.25),
    "factor's data replaced": lambda layer: setattr(
        layer.convlora["default"].lora_A, "data", torch.randn_like(layer.convlora["default"].lora_A)
    ),
    "factor replaced": lambda layer: setattr(
        layer.convlora["default"], "lora_B", nn.Parameter(torch.randn(8, 2, dtype=layer._parameters["weight"].dtype))
    ),
    "base in place": lambda layer: convlora.base_weight(layer).add_(0.5),
    "base's data replaced": lambda layer: setattr(
        convlora.base_weight(layer), "data", torch.randn_like(convlora.base_weight(layer))
    ),
    "loaded": lambda layer: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}),
    "loaded by assignment": lambda layer: layer.load_state_dict(
        {k: v * 2 for k, v in layer.state_dict().items()}, assign=True
    ),
    "scaling": lambda layer: setattr(layer.convlora["default"], "scaling", layer.convlora["default"].scaling + 1),
    "factor past the counters": lambda layer: layer.convlora["default"].lora_A.data.mul_(0.5),
    "factor turned over": lambda layer: setattr(
        layer.convlora["default"].lora_A, "data", layer.convlora["default"].lora_A.data.transpose(2, 3)
    ),
    "base turned over": lambda layer: setattr(
        convlora.base_weight(layer), "data", convlora.base_weight(layer).data.transpose(2, 3)
    ),
    "memory given anew": lambda layer: refill(layer.convlora["default"].lora_A),
    "factor by numpy": lambda layer: layer.convlora["default"].lora_B.numpy().__imul__(0.5),
    "written to a copy": lambda layer: layer.weight.data.zero_(),
    "dtype": lambda layer: layer.double() if layer.weight.dtype == torch.float32 else layer.float(),
    "memory format": lambda layer: layer.to(memory_format=torch.channels_last),
    "merged and back": lambda layer: convlora.unmerge(convlora.merge(layer)),
    "another adapter": lambda layer: convlora.set_adapter(
        layer, "other" if convlora.summary(layer).adapter_name == "default" else "default"
    ),
    "copied": copy.deepcopy,
    "optimizer": None,
    "average past the counters": None,
}


def optimize(layer):
    with torch.enable_grad():
        layer(torch.randn(1, 4, 5, 5, dtype=layer._parameters["weight"].dtype)).sum().backward()
    torch.optim.AdamW(convlora.adapter_parameters(layer), lr=0.1).step()


def average(layer):
    """As many training scripts keep an average of weights: through .data, after a training step."""
    with torch.enable_grad():
        layer(torch.randn(1, 4, 5, 5, dtype=layer._parameters["weight"].dtype)).sum().backward()
    for factor in convlora.adapter_parameters(layer):
        factor.data.mul_(0.9)


MUTATIONS["optimizer"], MUTATIONS["average past the counters"] = optimize, average


@given(names=st.lists(st.sampled_from(sorted(MUTATIONS)), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_what_is_kept_is_never_stale(names, seed):
    random.seed(seed)
    torch.manual_seed(seed)
    layer = nn.Conv2d(4, 8, 3)
    convlora.inject(layer, 2, modules_to_save=None)
    convlora.add_adapter(layer, "other", 2, modules_to_save=None)
    randomise(layer)
    with torch.no_grad():
        for name in names:
            MUTATIONS[name](layer)
            for _ in range(random.randint(1, 2)):
                active = layer.convlora[convlora.summary(layer).adapter_name]
                delta = active.scaling * torch.einsum("or,riyx->oiyx", active.lora_B, active.lora_A)
                weight, x = convlora.base_weight(layer) + delta, torch.randn(1, 4, 5, 5, dtype=delta.dtype)
                expected = nn.functional.conv2d(x, weight, layer.bias)
                torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_an_ensemble_of_adapters_by_vmap_after_one_of_them_was_kept():
    layer, x = adapt(nn.Conv2d(4, 8, 3)), torch.randn(2, 4, 7, 7)
    own = {name: factor.detach() for name, factor in layer.named_parameters() if "lora" in name}

    def run(factors):
        return torch.func.functional_call(layer, factors, (x,))

    with torch.no_grad():
        kept = layer(x)
        outputs = torch.vmap(run)({name: torch.stack([factor, 2 * factor]) for name, factor in own.items()})
        torch.testing.assert_close(outputs[0], kept, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(outputs[1], run({name: 2 * factor for name, factor in own.items()}))
        assert torch.equal(layer(x), kept)


def test_copies_and_pickles_start_with_nothing_kept(tmp_path, computed):
    layer, x = adapt(nn.Conv2d(4, 8, 3)), torch.randn(2, 4, 7, 7)
    with torch.no_grad():
        expected = layer(x)
    torch.save(layer, tmp_path / "layer.pt")
    for each in (copy.deepcopy(layer), torch.load(tmp_path / "layer.pt", weights_only=False)):
        computed.clear()
        with torch.no_grad():
            assert torch.equal(each(x), expected) and len(computed) == 1
    size = convlora.base_weight(layer).numel() * 4
    assert (tmp_path / "layer.pt").stat().st_size < 8 * size + 20_000
