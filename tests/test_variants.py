"""The variants, each by its defining property: how factors begin, PiSSA and OLoRA on a base that stays, DoRA."""

import copy
import math

import numpy
import pytest
import torch
from conftest import SmallNet, convolutions, need, randomise, snapshot, thorough, through_torch_save
from laws import at_most, given
from torch import nn
from torch.nn import functional as F

import convlora

ANCHORED = ["pissa", "olora"]
anchored = pytest.mark.parametrize("init", ANCHORED)
OTHERS = {
    "linear": lambda: (nn.Linear(12, 10), torch.randn(3, 12)),
    "transposed": lambda: (nn.ConvTranspose2d(6, 8, 3, groups=2), torch.randn(2, 6, 5, 5)),
    "1d": lambda: (nn.Conv1d(6, 8, 3), torch.randn(2, 6, 9)),
    "3d": lambda: (nn.Conv3d(4, 8, 2), torch.randn(2, 4, 4, 4, 4)),
    "depthwise": lambda: (nn.Conv2d(12, 12, 3, groups=12), torch.randn(2, 12, 6, 6)),
}
others = pytest.mark.parametrize("kind", OTHERS)


@pytest.fixture(autouse=True)
def seeded():
    """Whatever ran before: some random weights have singular values too close to be told apart in fp32."""
    torch.manual_seed(0)


def adapt(layer, rank=2, **options):
    factored = {"method_pattern": {"*": "lora"}}  # also where the layer is so small that it would be taken whole
    return convlora.inject(layer, rank, modules_to_save=None, target_modules=type(layer), **factored, **options)


def factors_of(model):
    return [module for module in model.modules() if type(module).__name__ in ("LoRA", "AnchoredLoRA")]


def nudge(model, size=0.05, seed=3):
    """Move every trained number of the adapter, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factor in convlora.adapter_parameters(model):
            factor += size * torch.randn(factor.shape, generator=generator, dtype=torch.float64).to(factor)


def matrix(tensor):
    return tensor.detach().double().flatten(1).numpy()


# ---- how factors begin


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
@pytest.mark.parametrize("training", [False, True])
def test_factors_that_are_drawn_change_no_bit_of_the_output(net, images, init, training):
    base = copy.deepcopy(net).eval()
    convlora.inject(net, init=init).eval()
    with torch.set_grad_enabled(training):
        assert torch.equal(net(images), base(images))


def test_the_default_draws_what_it_always_drew(net):
    torch.manual_seed(7)
    convlora.inject(net, 2)
    torch.manual_seed(7)
    for lora in factors_of(net):
        expected = nn.init.kaiming_uniform_(torch.empty_like(lora.lora_A), a=math.sqrt(5))
        assert torch.equal(lora.lora_A, expected) and not lora.lora_B.any()


def test_gaussian_is_normal_with_a_deviation_of_one_over_rank():
    layer = adapt(nn.Conv2d(128, 128, 3), 16, init="gaussian")
    A = layer.convlora["default"].lora_A
    # 18432 numbers: the deviation's own error is 1/√(2n) = 0.5 %, the kurtosis' is √(24/n) = 0.036; five of each.
    assert A.std().item() == pytest.approx(1 / 16, rel=0.026)
    assert ((A - A.mean()) / A.std()).pow(4).mean().item() == pytest.approx(3, abs=0.18)


@others
def test_orthogonal_has_orthonormal_rows(kind):
    layer, _ = OTHERS[kind]()
    A = adapt(layer, init="orthogonal").convlora["default"].lora_A.flatten(1)
    torch.testing.assert_close(A @ A.T, torch.eye(len(A)))


def test_an_unknown_beginning_is_refused(net):
    before = snapshot(net)
    with pytest.raises(convlora.TargetError, match="init='svd'; it must be one of 'kaiming', 'gaussian'"):
        convlora.inject(net, init="svd")
    assert snapshot(net) == before


# ---- PiSSA and OLoRA


@anchored
@given(geometry=convolutions())
def test_anchored_factors_begin_at_the_base_and_remove_gives_its_bits(init, geometry):
    layer, x = geometry.build()
    expected, before = layer(x), snapshot(layer)
    try:
        adapt(layer, init=init)
    except convlora.TargetError:
        return  # so small that even rank 1 would outweigh it
    assert layer.convlora["default"].lora_B.any()
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            assert torch.equal(layer(x), expected)
    nudge(layer)
    assert snapshot(convlora.remove(layer)) == before
    assert torch.equal(layer(x), expected)


@anchored
@others
def test_anchored_factors_begin_at_the_base_for_other_layers(init, kind):
    layer, x = OTHERS[kind]()
    expected, before = layer(x), snapshot(layer)
    adapt(layer, init=init)
    assert torch.equal(layer(x), expected)
    nudge(layer)
    assert not torch.allclose(layer(x), expected, atol=1e-3)
    assert snapshot(convlora.remove(layer)) == before


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", *map(thorough, ("resnet18", "nf_resnet26"))])
@anchored
def test_anchored_factors_begin_at_the_base_in_real_networks(name, init):
    timm = need("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        model.train()(images)
        expected, before = model.eval()(images), snapshot(model)
        convlora.inject(model, 4, init=init)
        assert torch.equal(model(images), expected)
        nudge(model, 0.01)
        convlora.remove(model)
        assert snapshot(model) == before and torch.equal(model(images), expected)


@others
def test_pissa_is_the_leading_part_of_the_weight(kind):
    """Of the matrix (rows, all else), whatever the layer: by numpy's decomposition."""
    layer, _ = OTHERS[kind]()
    lora = adapt(layer, init="pissa").convlora["default"]
    U, S, V = numpy.linalg.svd(matrix(convlora.base_weight(layer)), full_matrices=False)
    leading = (U[:, :2] * S[:2]) @ V[:2]
    numpy.testing.assert_allclose(lora.scaling * matrix(lora.lora_B) @ matrix(lora.lora_A), leading, atol=1e-6)
    # Each factor carries the root of the singular values.
    numpy.testing.assert_allclose(numpy.linalg.norm(matrix(lora.lora_A), axis=1) ** 2 * lora.scaling, S[:2], rtol=1e-5)


@others
def test_olora_is_the_first_part_of_q_and_r(kind):
    layer, _ = OTHERS[kind]()
    lora = adapt(layer, init="olora").convlora["default"]
    Q, R = numpy.linalg.qr(matrix(convlora.base_weight(layer)))
    numpy.testing.assert_allclose(matrix(lora.lora_B) @ matrix(lora.lora_A), Q[:, :2] @ R[:2], atol=1e-6)
    numpy.testing.assert_allclose(matrix(lora.lora_B.T) @ matrix(lora.lora_B), numpy.eye(2), atol=1e-6)


@anchored
@pytest.mark.parametrize("wrap", ["weight_norm", "spectral_norm", "old weight_norm", "old spectral_norm"])
def test_anchored_to_a_computed_weight(init, wrap):
    parametrize = getattr(nn.utils if wrap.startswith("old") else nn.utils.parametrizations, wrap.split()[-1])
    model = nn.Sequential(parametrize(nn.Conv2d(6, 8, 3))).train()
    before, x = snapshot(model), torch.randn(2, 6, 6, 6)
    expected = model.eval()(x)
    convlora.inject(model.train(), 2, modules_to_save=None, init=init)
    assert torch.equal(model.eval()(x), expected)
    lora = model[0].convlora["default"]
    assert lora.lora_B.any() and not lora.delta_weight().any()
    convlora.add_adapter(model, "second", 2, modules_to_save=None, init=init)  # of the base, not of what is adapted
    torch.testing.assert_close(model[0].convlora["second"].lora_A.abs(), lora.lora_A.abs(), rtol=1e-4, atol=1e-5)
    assert snapshot(convlora.remove(model))["bits"] == before["bits"]  # nothing was moved by looking


def oracle_weight(layer, base, A, B, anchor=None, magnitude=None):
    """W + ΔW, anchored or by DoRA with the norm as a constant; shares nothing with the library."""
    product = B @ A.flatten(1)
    if anchor:
        product = product - anchor[1] @ anchor[0].flatten(1)
    weight = base + layer.convlora["default"].scaling * product.view(base.shape)
    if magnitude is None:
        return weight
    sizes = weight.detach().square().sum(tuple(range(1, weight.ndim)), keepdim=True).sqrt()
    return magnitude.view(sizes.shape) * weight / sizes


@pytest.mark.parametrize("path", ["auto", "fused", "weight", "branch"])
@pytest.mark.parametrize("init, use_dora", [("pissa", False), ("kaiming", True), ("olora", True)])
@at_most(25)
@given(geometry=convolutions())
def test_gradients_are_those_of_plain_autograd(path, init, use_dora, geometry):
    layer, x = geometry.build(torch.float64)
    plain = copy.deepcopy(layer)
    try:
        adapt(layer, init=init, use_dora=use_dora, training_path=path)
    except convlora.TargetError:
        return  # so small that even rank 1 would outweigh it
    nudge(layer)
    lora = layer.convlora["default"]
    leaves = {name: p.detach().clone().requires_grad_() for name, p in lora.named_parameters()}
    anchor = (lora.lora_A0, lora.lora_B0) if lora.anchored else None
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    weight = oracle_weight(
        layer, plain.weight.detach(), leaves["lora_A"], leaves["lora_B"], anchor, leaves.get("lora_magnitude")
    )
    y = layer(mine)
    expected = plain._conv_forward(theirs, weight, None if plain.bias is None else plain.bias.detach())
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    g = torch.randn_like(expected)
    y.backward(g)
    expected.backward(g)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-10)
    for name, leaf in leaves.items():
        torch.testing.assert_close(lora.get_parameter(name).grad, leaf.grad, rtol=1e-10, atol=1e-10)


@anchored
def test_anchored_adapter_trains_saves_and_loads_bit_for_bit(net, images, train, tmp_path, init):
    base = copy.deepcopy(net)
    convlora.inject(net, 2, init=init, target_modules=(nn.Conv2d, nn.Linear))
    train(net, images)
    expected = net.eval()(images)
    assert not torch.allclose(expected, base.eval()(images), atol=1e-4)
    convlora.save_adapter(net, tmp_path)
    loaded = convlora.load_adapter(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(loaded(images), expected)
    assert convlora.summary(loaded).init == init
    for mine, theirs in zip(factors_of(net), factors_of(loaded), strict=True):
        assert all(torch.equal(t, theirs.state_dict()[key]) for key, t in mine.state_dict().items())
        assert set(mine.state_dict()) == {"lora_A", "lora_B", "lora_A0", "lora_B0"}
    train(loaded, images)  # it trains on, from where it was
    for one_way in (copy.deepcopy(net), through_torch_save(net)):
        assert torch.equal(one_way(images), expected)
    other = convlora.inject(copy.deepcopy(base), 2, init=init, target_modules=(nn.Conv2d, nn.Linear)).eval()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(images), expected)
    other.load_state_dict(base.state_dict(), strict=False)  # a base checkpoint still fits
    convlora.merge(net)
    torch.testing.assert_close(net(images), expected, rtol=1e-5, atol=1e-6)


@anchored
def test_only_the_factors_that_train_are_parameters(net, init):
    plan = convlora.plan(net, 2, init=init)
    convlora.inject(net, 2, init=init)
    assert sum(p.numel() for p in convlora.adapter_parameters(net)) == plan.adapter_parameters
    assert sum(p.numel() for p in convlora.trainable_parameters(net)) == plan.trainable_parameters
    assert plan.init == init and f", {init} (planned)" in str(plan)


def test_several_adapters_with_beginnings_of_their_own(net, images, train):
    base = copy.deepcopy(net).eval()
    convlora.inject(net, 2, init="pissa")
    train(net, images)
    first = net.eval()(images)
    convlora.add_adapter(net, "second", 3, init="olora", use_dora=True, modules_to_save=None)
    convlora.set_adapter(net, "second")
    assert torch.equal(net.eval()(images), base(images))
    train(net, images)
    net.eval()
    with convlora.disable_adapter(net):
        assert torch.equal(net(images), base(images))
    convlora.set_adapter(net, "default")
    assert torch.equal(net(images), first)


@anchored
def test_shrink_holds_the_whole_change_and_drops_the_anchor(images, init):
    torch.manual_seed(0)
    net = SmallNet().eval()
    convlora.inject(net, 2, init=init)
    nudge(net)
    expected = net(images)
    exact, half = copy.deepcopy(net), copy.deepcopy(net)
    assert convlora.shrink(exact, tolerance=0.0).error <= 1e-6
    torch.testing.assert_close(exact(images), expected, rtol=1e-4, atol=1e-5)
    assert {layer.rank for layer in convlora.summary(exact).layers} <= {3, 4}
    report = convlora.shrink(half, 1)
    for module, layer in zip(factors_of(net), report.layers, strict=True):
        values = torch.linalg.svdvals(module.delta_weight().flatten(1).double())
        assert layer.lost == pytest.approx(values[1:].norm().item(), rel=1e-4)
    for each in (exact, half):
        assert not any(lora.anchored or list(lora.buffers()) for lora in factors_of(each))


@anchored
def test_anchored_adapters_combine(net, images, init):
    convlora.inject(net, 1, init=init, adapter_name="a", modules_to_save=None).eval()
    nudge(net)
    convlora.add_adapter(net, "b", 1, modules_to_save=None)
    convlora.set_adapter(net, "b")
    nudge(net, seed=5)
    expected = [
        0.5 * dict(zip(("a", "b"), (m["a"], m["b"]), strict=True))["a"].delta_weight() - 2 * m["b"].delta_weight()
        for m in (layer.convlora for layer in net.modules() if isinstance(layer, nn.Conv2d))
    ]
    convlora.combine_adapters(net, {"a": 0.5, "b": -2}, "both")
    combined = [layer.convlora["both"].delta_weight() for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    for mine, theirs in zip(combined, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@anchored
def test_untrained_anchored_adapter_warns_when_saved(net, tmp_path, init):
    convlora.inject(net, 2, init=init)
    with pytest.warns(UserWarning, match="every factor is as it began: nothing was trained"):
        convlora.save_adapter(net, tmp_path)


# ---- stock peft


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{"init": "pissa"}, {"init": "olora", "use_rslora": True}, {"use_dora": True}])
def test_stock_peft_loads_the_variants_and_predicts_the_same(tmp_path, options):
    peft, timm = need("peft"), need("timm")
    torch.manual_seed(0)
    base, images = timm.create_model("resnet18", num_classes=2).eval(), torch.randn(2, 3, 64, 64)
    model = convlora.inject(copy.deepcopy(base), 4, rank_pattern={"layer4.*": 6}, **options).eval()
    nudge(model, 0.02)
    convlora.save_adapter(model, tmp_path)
    with torch.no_grad():
        theirs, expected = peft.PeftModel.from_pretrained(base, tmp_path).eval()(images), model(images)
    assert (theirs - expected).abs().max() <= 1e-6 * expected.abs().max().clamp(min=1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{"init": "pissa"}, {"use_dora": True}, {"use_dora": True, "init": "olora"}])
def test_stock_peft_reads_the_variants_of_linear_layers(tmp_path, options):
    peft = need("peft")
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3)).eval(), torch.randn(4, 8)
    model = convlora.inject(copy.deepcopy(base), 2, target_modules=nn.Linear, modules_to_save=None, **options)
    nudge(model)
    convlora.save_adapter(model, tmp_path)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(base, tmp_path)(x), model(x), rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layer, x", [(nn.Conv2d(8, 12, 3, 2, 1), (2, 8, 9, 9)), (nn.Linear(8, 12), (3, 8))])
def test_dora_is_pefts(layer, x):
    peft, x = need("peft"), torch.randn(x)
    base = nn.Sequential(copy.deepcopy(layer))
    config = peft.LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["0"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    mine = convlora.inject(base, 2, alpha=3, use_dora=True, modules_to_save=None, target_modules="0")
    lora, module = mine[0].convlora["default"], theirs.base_model.model[0]
    nudge(mine, 0.3)
    with torch.no_grad():
        sizes = module.lora_magnitude_vector["default"].weight
        torch.testing.assert_close(layer.weight.flatten(1).norm(dim=1), sizes.flatten())
        module.lora_A["default"].weight.copy_(lora.lora_A)
        module.lora_B["default"].weight.copy_(lora.lora_B.view(module.lora_B["default"].weight.shape))
        sizes.copy_(lora.lora_magnitude.view(sizes.shape))
    g = torch.randn_like(mine(x))
    for each in (mine, theirs):
        each(x).backward(g)
    torch.testing.assert_close(mine(x), theirs(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lora.lora_magnitude.grad, sizes.grad.flatten(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lora.lora_A.grad, module.lora_A["default"].weight.grad, rtol=1e-5, atol=1e-5)
    grad_B = module.lora_B["default"].weight.grad.view_as(lora.lora_B)
    torch.testing.assert_close(lora.lora_B.grad, grad_B, rtol=1e-5, atol=1e-5)


# ---- DoRA


def sizes_by_channel(layer, weight):
    """‖W‖ per output channel, from the response to each: the norm of the kernel's gradient with that channel alone."""
    plain = convlora.remove(copy.deepcopy(layer))
    kernel = nn.Parameter(weight.detach().clone())
    del plain.weight
    plain.weight = kernel
    wanted = []
    for channel in range(plain.out_features if isinstance(plain, nn.Linear) else plain.out_channels):
        mask = touched(plain, channel)
        wanted.append((kernel.detach() * mask).norm())
    return torch.stack(wanted)


def touched(layer, channel):
    """Which weights meet an output channel: those through which it has a gradient."""
    shape = (
        (1, layer.in_features)
        if isinstance(layer, nn.Linear)
        else (1, layer.in_channels, *[7] * (layer.weight.ndim - 2))
    )
    y = layer(torch.rand(shape, dtype=layer.weight.dtype) + 1)
    picked = y[..., channel] if isinstance(layer, nn.Linear) else y[:, channel]
    (grad,) = torch.autograd.grad(picked.sum(), layer.weight)
    return (grad != 0).to(grad)


@others
def test_dora_has_the_direction_of_the_sum_and_the_size_of_the_magnitudes(kind):
    torch.manual_seed(0)
    layer, x = OTHERS[kind]()
    layer, x = layer.double(), x.double()
    fresh = copy.deepcopy(layer)
    adapt(layer, use_dora=True)
    lora = layer.convlora["default"]
    torch.testing.assert_close(lora.lora_magnitude.detach(), sizes_by_channel(layer, fresh.weight))
    nudge(layer, 0.2)
    weight, summed = layer.weight.detach(), (fresh.weight + lora.delta_weight()).detach()
    torch.testing.assert_close(sizes_by_channel(layer, weight), lora.lora_magnitude.detach().abs())
    for channel in range(len(lora.lora_magnitude)):
        mask = touched(fresh, channel)
        cosine = F.cosine_similarity((weight * mask).flatten(), (summed * mask).flatten(), dim=0)
        assert cosine.item() == pytest.approx(1.0, abs=1e-12)
    expected, trained = layer(x), layer(x.requires_grad_())
    torch.testing.assert_close(trained, expected)
    convlora.merge(layer)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradients", [False, True])
def test_fresh_dora_changes_no_bit(dtype, gradients):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(5, 24, 3, padding=1), nn.Conv2d(24, 48, 3, groups=4), nn.ConvTranspose2d(48, 6, 2))
    model = model.to(dtype)
    with torch.no_grad():
        model[0].weight[3] = 0  # a dead channel has no direction
    base, x = copy.deepcopy(model), torch.randn(2, 5, 8, 8, dtype=dtype)
    adapted = convlora.inject(
        model, 2, use_dora=True, modules_to_save=None, target_modules=(nn.Conv2d, nn.ConvTranspose2d)
    )
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model, base = adapted.to(memory_format=memory_format), base.to(memory_format=memory_format)
        with torch.set_grad_enabled(gradients):
            assert torch.equal(model(x), base(x))


def test_a_dead_channel_trains_without_nan():
    conv = nn.Conv2d(4, 6, 3)
    with torch.no_grad():
        conv.weight[2] = 0
    adapt(conv, use_dora=True)
    for grads_of in ("factors", "weight"):
        conv.zero_grad()
        (conv(torch.randn(2, 4, 5, 5)).sum() if grads_of == "factors" else conv.weight.sum()).backward()
        assert all(p.grad.isfinite().all() for p in convlora.adapter_parameters(conv))


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", *map(thorough, ("resnet18", "nf_resnet26"))])
def test_dora_in_real_networks(name, train, tmp_path):
    timm = need("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=2).eval()
    base, images = copy.deepcopy(model), torch.randn(2, 3, 48, 48)
    before = snapshot(model)
    convlora.inject(model, 4, use_dora=True)
    with torch.no_grad():
        assert torch.equal(model(images), base(images))
    train(model, images, steps=2, lr=0.01)
    with torch.no_grad():
        expected = model.eval()(images)
        convlora.save_adapter(model, tmp_path)
        assert torch.equal(convlora.load_adapter(copy.deepcopy(base), tmp_path).eval()(images), expected)
        assert not torch.allclose(expected, base(images), atol=1e-4)
        convlora.merge(model)
        assert (model(images) - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)
        convlora.unmerge(model)
        assert torch.equal(model(images), expected)
    convlora.remove(model)
    assert snapshot(model.eval())["bits"] == before["bits"]


@others
def test_dora_with_dropout_keeps_the_expected_output(kind):
    """The branch alone is thinned: W x stays, and the mean over many draws is the output without dropout."""
    torch.manual_seed(0)
    layer, x = OTHERS[kind]()
    if kind == "transposed":
        with pytest.raises(convlora.UnsupportedLayerError, match="dropout needs the plain forward"):
            adapt(layer, use_dora=True, dropout=0.5)
        return
    adapt(layer, use_dora=True, dropout=0.5).train()
    nudge(layer, 0.1)
    with torch.no_grad():
        expected = layer.eval()(x)
        draws = torch.stack([layer.train()(x) for _ in range(500)])
    # Five standard errors of the mean.
    assert ((draws.mean(0) - expected).abs() <= 5 * draws.std(0) / 500**0.5 + 1e-5).all()
    assert draws.std(0).max() > 0


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init": "pissa"}, {"use_dora": True, "init": "olora"}])
def test_layers_whose_kernels_lie_in_flat_rows(options):
    layers = need("timm.layers")
    torch.manual_seed(0)
    layer, routing = layers.CondConv2d(6, 8, 3, num_experts=3), torch.rand(2, 3)
    x = torch.randn(2, 6, 7, 7)
    expected, before = layer(x, routing), layer.weight.detach().clone()
    convlora.inject(layer, 2, modules_to_save=None, target_modules=type(layer), **options)
    assert torch.equal(layer(x, routing), expected)
    nudge(layer, 0.1)
    lora = layer.convlora["default"]
    rows = before.view(24, -1) + lora.delta_weight().view(24, -1)
    if lora.use_dora:
        rows = lora.lora_magnitude[:, None] * rows / rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer.weight, rows.view_as(before))


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*jit:FutureWarning")
@pytest.mark.parametrize(
    "options", [*map(thorough, ({"use_dora": True}, {"init": "pissa"})), {"use_dora": True, "init": "olora"}]
)
def test_variants_compile_trace_and_export(options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2))
    x = torch.randn(2, 3, 8, 8)
    convlora.inject(model, 2, modules_to_save=None, **options)
    nudge(model)
    expected = model(x)
    expected.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    for name, grad in grads.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad)
    for other in (compiled, torch.jit.trace(model, x), torch.export.export(model.eval(), (x,)).module()):
        torch.testing.assert_close(other(x), expected, rtol=1e-5, atol=1e-6)


def test_kept_weight_follows_the_magnitudes():
    layer, x = adapt(nn.Conv2d(4, 6, 3), use_dora=True), torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        layer(x)  # the first forward is watched for writes, and keeps nothing
        before = layer(x) - layer.bias[:, None, None]
        assert layer.convlora.kept._entry is not None
        layer.convlora["default"].lora_magnitude.mul_(3)
        torch.testing.assert_close(layer(x) - layer.bias[:, None, None], 3 * before)
        layer.convlora["default"].lora_magnitude.data.div_(3)  # past the counter
        torch.testing.assert_close(layer(x) - layer.bias[:, None, None], before)


@anchored
def test_kept_weight_follows_the_anchor(init):
    layer, x = adapt(nn.Conv2d(4, 6, 3), init=init), torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        layer(x)  # the first forward is watched for writes, and keeps nothing
        layer(x)
        assert layer.convlora.kept._entry is not None
        layer.convlora["default"].lora_B0.zero_()
        torch.testing.assert_close(layer(x), layer._conv_forward(x, layer.weight, layer.bias))


def test_dora_refuses_a_weight_that_is_computed():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3)))
    before = snapshot(model)
    with pytest.raises(convlora.UnsupportedLayerError, match=r"1: its weight is computed .* exclude_modules"):
        convlora.inject(model, 2, use_dora=True)
    assert snapshot(model) == before


def test_dora_adapters_do_not_combine(net):
    convlora.inject(net, 2, adapter_name="a", use_dora=True, modules_to_save=None)
    convlora.add_adapter(net, "b", 2, modules_to_save=None)
    with pytest.raises(convlora.StateError, match="a: DoRA's magnitudes"):
        convlora.combine_adapters(net, {"a": 1, "b": 1}, "both")


def test_magnitudes_count_and_train(net):
    plan = convlora.plan(net, 2, use_dora=True)
    convlora.inject(net, 2, use_dora=True)
    assert sum(p.numel() for p in convlora.adapter_parameters(net)) == plan.adapter_parameters
    assert all(layer.adapter_parameters <= layer.base_parameters for layer in plan.layers)
    assert plan.use_dora and ", DoRA (planned)" in str(plan)


def test_shrunk_dora_keeps_its_magnitudes(net, images):
    convlora.inject(net, 3, use_dora=True, modules_to_save=None).eval()
    nudge(net)
    expected, sizes = net(images), [lora.lora_magnitude.clone() for lora in factors_of(net)]
    convlora.shrink(net, tolerance=1e-7)
    torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, lora.lora_magnitude) for a, lora in zip(sizes, factors_of(net), strict=True))


# ---- files


def test_files_without_the_new_fields_are_read_as_before(net, images, tmp_path):
    plan = convlora.plan(net, 2).to_json()
    del plan["init"]
    for layer in (*plan["layers"], *plan["skipped"]):
        del layer["scaling"], layer["method"], layer["use_dora"]
        layer["alpha"] = 2.0 * layer["rank"]
    assert convlora.Plan.from_json(plan) == convlora.plan(net, 2)


def test_randomised_adapters_of_every_variant_survive_a_round_trip(net, images, tmp_path):
    options = [{"init": init} for init in ("gaussian", "orthogonal", "pissa", "olora")]
    options += [{"init": "eva", "init_data": [images]}, {"use_dora": True, "init": "pissa", "use_rslora": True}]
    for number, each in enumerate(options):
        model = convlora.inject(copy.deepcopy(net), 2, **each).eval()
        randomise(model)
        convlora.save_adapter(model, tmp_path / str(number))
        loaded = convlora.load_adapter(copy.deepcopy(net), tmp_path / str(number)).eval()
        assert torch.equal(loaded(images), model(images))
        assert convlora.summary(loaded) == convlora.summary(model)
