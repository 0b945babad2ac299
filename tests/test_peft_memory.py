"""convlora.peft: adapters handed over in memory, and convlora's layers inside peft. Run with the oldest peft, too."""

import contextlib
import copy
import importlib
import inspect
import json
import pickle
import sys

import pytest
import torch
from conftest import convolutions, need, randomise, snapshot, thorough
from laws import at_most, given
from torch import nn

import convlora
from convlora import CheckpointError, StateError, TargetError, UnsupportedLayerError

peft = need("peft")
timm = need("timm")

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's own

IMAGES = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def imported():
    importlib.import_module("convlora.peft")


def predict(model, images=IMAGES):
    with torch.no_grad():
        return model.eval()(images)


def near(found, expected):
    """Within the last bits of fp32 sums in another order."""
    return (found - expected).abs().max() <= 1e-6 * expected.abs().max().clamp(min=1)


def network(name="resnet18"):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=2).eval()


def config(base, rank=4, **options):
    """Every convolution, and the head and norms in full, as peft names them."""
    head = base.get_classifier()
    saved = [n for n, m in base.named_modules() if m is head or isinstance(m, nn.BatchNorm2d)]
    names = [n for n, m in base.named_modules() if isinstance(m, nn.Conv2d)]
    options = {"target_modules": names, "modules_to_save": saved} | options
    return peft.LoraConfig(r=rank, **options)


def train(model, images=IMAGES, steps=2):
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
    return model.eval()


def randomise_peft(model, name=""):
    torch.manual_seed(len(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key and name in key:
                parameter.copy_(0.1 * torch.randn_like(parameter))


class Odd(nn.Module):
    """Everything that stock peft gets wrong or refuses."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.b = nn.Conv2d(8, 8, 3, groups=8, dilation=2, padding="same")
        self.c = nn.ConvTranspose2d(8, 6, 4, 2, groups=2)
        self.d = timm.layers.StdConv2d(6, 5, 3)
        self.fc = nn.Linear(5, 2)

    def forward(self, x):
        return self.fc(self.d(self.c(self.b(self.a(x)).relu())).mean((2, 3)))


LAYERS = ["a", "b", "c", "d", "fc"]


@pytest.fixture
def odd():
    torch.manual_seed(0)
    return Odd().eval()


@pytest.fixture
def small():
    return torch.randn(5, 3, 9, 9, generator=torch.Generator().manual_seed(4))


def registered(base, **options):
    return convlora.peft.register(peft.LoraConfig(r=2, target_modules=LAYERS, **options))


# ---- convlora's layers inside peft


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", *map(thorough, ("resnet18", "nf_resnet26"))])
def test_registered_layers_live_peft_s_whole_life(tmp_path, name):
    base = network(name)
    options = {} if name != "nf_resnet26" else {"modules_to_save": ["fc"]}
    model = peft.get_peft_model(copy.deepcopy(base), convlora.peft.register(config(base, **options)))
    assert torch.equal(predict(model), predict(base))
    train(model)
    expected, before = predict(model), copy.deepcopy(model.get_base_model().state_dict())
    assert not near(predict(base), expected)
    model.save_pretrained(tmp_path)

    again = convlora.peft.register(config(base, **options))
    for by in (again, None):
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, config=by)
        assert near(predict(loaded), expected)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=True)
    assert near(predict(loaded), expected)
    assert near(predict(convlora.load_adapter(copy.deepcopy(base), tmp_path)), expected)

    model.merge_adapter()
    assert torch.equal(predict(model), expected)
    model.unmerge_adapter()
    after = model.get_base_model().state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    with model.disable_adapter():
        assert torch.equal(predict(model), predict(base))
    assert torch.equal(predict(model.merge_and_unload()), expected)


def test_the_weight_of_several_active_adapters_is_computed_once_until_one_of_them_changes(odd, small, monkeypatch):
    model = peft.get_peft_model(odd, registered(odd)).eval()
    model.add_adapter("other", registered(odd))
    model.base_model.set_adapter(["default", "other"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    compute, calls = convlora._peft_layer.effective_weight, []
    monkeypatch.setattr(convlora._peft_layer, "effective_weight", lambda *args: calls.append(1) or compute(*args))
    with torch.no_grad():
        first = model(small)
        count = len(calls)
        assert count and torch.equal(model(small), first) and len(calls) == count
        odd.a.lora_B["other"].weight.data.mul_(2)
        assert not near(model(small), first) and len(calls) == count + 1
        odd.a.scaling["default"] *= 2
        model(small)
        assert len(calls) == count + 2
        expected = copy.deepcopy(model)(small)
        assert torch.equal(model(small), expected)


def test_what_a_registered_configuration_writes_stock_peft_reads_or_refuses(tmp_path, monkeypatch):
    base = network()
    dense = train(peft.get_peft_model(copy.deepcopy(base), convlora.peft.register(config(base))))
    dense.save_pretrained(tmp_path / "dense")
    reflect = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"))
    taught = convlora.peft.register(peft.LoraConfig(r=2, target_modules=["0"]))
    peft.get_peft_model(copy.deepcopy(reflect), taught).save_pretrained(tmp_path / "reflect")
    # as in a process in which nobody has called register
    monkeypatch.delitem(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, "CONVLORA")
    stock = peft.PeftModel.from_pretrained(base, tmp_path / "dense")
    assert type(stock.base_model.model.conv1) is peft.tuners.lora.Conv2d
    assert near(predict(stock), predict(dense))
    with pytest.raises((KeyError, ValueError)):
        peft.PeftModel.from_pretrained(reflect, tmp_path / "reflect")


def test_peft_reads_what_convlora_trained_on_every_layer_of_a_mobilenet(tmp_path):
    base = network("mobilenetv3_small_050")
    model = convlora.inject(copy.deepcopy(base), 4, norm="track")
    train(model)
    convlora.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "CONVLORA"
    convlora.peft.register()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    assert near(predict(theirs), predict(model))


@at_most(25)
@given(geometry=convolutions())
def test_registered_forward_and_gradients_are_those_of_the_changed_weight(geometry):
    conv, x = geometry.build(dtype=torch.float64)
    oracle = copy.deepcopy(conv)
    layer_config = convlora.peft.register(peft.LoraConfig(r=2, target_modules=["0"]))
    model = peft.get_peft_model(nn.Sequential(conv), layer_config)
    randomise_peft(model)
    A, B = (getattr(model.base_model.model[0], name)["default"].weight for name in ("lora_A", "lora_B"))
    x.requires_grad_()
    delta = 4.0 * torch.einsum("or,riyx->oiyx", B.flatten(1), A)  # lora_alpha 8, r 2
    expected = torch.func.functional_call(oracle, {"weight": oracle.weight.detach() + delta}, (x,))
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(expected)
    found = torch.autograd.grad(model(x), (x, A, B), upstream)
    torch.testing.assert_close(found, torch.autograd.grad(expected, (x, A, B), upstream), rtol=1e-8, atol=1e-8)


def test_several_adapters_per_sample_together_and_combined(odd, small):
    model = peft.get_peft_model(copy.deepcopy(odd), registered(odd))
    model.add_adapter("two", registered(odd, lora_alpha=5))
    randomise_peft(model, "default")
    randomise_peft(model, "two")
    alone = {"__base__": predict(odd, small)}
    for name in ("default", "two"):
        model.set_adapter(name)
        alone[name] = predict(model, small)
    names = ["two", "default", "__base__", "two", "default"]
    mixed = model.eval()(small, adapter_names=names)
    assert near(mixed, torch.stack([alone[name][i] for i, name in enumerate(names)]))
    model.base_model.set_adapter(["default", "two"])
    both = predict(model, small)
    model.merge_adapter()
    assert near(predict(model, small), both)
    model.unmerge_adapter()
    model.add_weighted_adapter(["default", "two"], [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    assert near(predict(model, small), both)
    model.delete_adapter("sum")
    model.add_weighted_adapter(["two"], [1.0], "line", combination_type="linear")
    model.set_adapter("line")
    assert near(predict(model, small), alone["two"])
    model.delete_adapter("line")
    model.set_adapter("two")
    assert near(predict(model, small), alone["two"])  # peft's own linear layer does not unmerge to the bit
    assert near(predict(pickle.loads(pickle.dumps(model)), small), alone["two"])


ONE_LAYER = {
    "strided": (lambda: nn.Conv2d(4, 6, 3, 2, 1), (2, 4, 8, 8)),
    "without bias": (lambda: nn.Conv2d(4, 6, 1, bias=False), (2, 4, 5, 5)),
    "1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 8)),
    "3d": (lambda: nn.Conv3d(2, 3, (1, 1, 3)), (2, 2, 3, 3, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=4, dilation=2, groups=4, padding_mode="circular"), (2, 4, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, groups=2), (2, 4, 5, 5)),
    "standardised": (lambda: timm.layers.StdConv2d(4, 6, 3, bias=True), (2, 4, 6, 6)),
}
IN_STOCK = ["strided", "without bias", "1d", "3d"]
NAMES = ["first", "second", "third"]
DORA, BIAS = {"use_dora": True}, {"lora_bias": True}
ADAPTERS = {"DoRA": [DORA], "bias": [BIAS], "DoRA twice": [DORA, DORA], "bias, DoRA and plain": [BIAS, DORA, {}]}


IS_NEW = "config" in inspect.signature(peft.tuners.lora.LoraLayer.update_layer).parameters


def check_stock_has(name, adapters, dropout=0):
    """Skip what older peft has not: DoRA on a 1-D convolution; several with dropout, of which each sees the last's."""
    if name == "1d" and DORA in ADAPTERS[adapters] and not hasattr(peft.tuners.lora.dora, "DoraConv1dLayer"):
        pytest.skip("this peft has no DoRA on 1-D convolutions")
    if dropout and DORA in ADAPTERS[adapters][1:] and not IS_NEW:
        pytest.skip("older peft drops anew what the adapter before has dropped")


def with_adapters(layer, adapters, taught=True, **options):
    """A layer in peft with an adapter of each of these options, all of them active."""
    teach = convlora.peft.register if taught else lambda config: config
    options = {"r": 2, "lora_alpha": 3, "target_modules": ["0"]} | options
    names, configs = NAMES[: len(adapters)], [teach(peft.LoraConfig(**options, **own)) for own in adapters]
    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), configs[0], adapter_name=names[0])
    for name, each in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, each)
    model.base_model.set_adapter(names)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in key)
    return model.eval()


def changed_by(layer, theirs, names):
    """The weight that adapters make, one after another, and what they add to each output channel; written out."""
    W, transposed = layer.weight.detach(), layer.transposed
    groups = layer.groups if transposed else 1

    def by_output_channel(weight):
        return weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1) if transposed else weight

    def back(weight):
        return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1) if transposed else weight

    made, extra = W, torch.zeros(layer.out_channels, dtype=W.dtype)
    for name in names:
        A, B = theirs.lora_A[name].weight, theirs.lora_B[name]
        delta = 1.5 * torch.einsum("or,r...->o...", B.weight.flatten(1), A)  # lora_alpha 3, r 2
        made = made + delta
        extra = extra if B.bias is None else extra + 1.5 * B.bias
        if name in theirs.lora_magnitude_vector:
            norms = by_output_channel(W + delta).flatten(1).norm(dim=1).detach()
            scale = theirs.lora_magnitude_vector[name].weight.flatten() / norms
            made = back(by_output_channel(made) * scale.view(-1, *[1] * (W.ndim - 1)))
            extra = extra * scale
    return made, extra.view(-1, *[1] * (W.ndim - 2))


@pytest.mark.parametrize("adapters", ADAPTERS)
@pytest.mark.parametrize("name", ONE_LAYER)
def test_dora_and_lora_bias_compute_train_merge_and_are_saved(tmp_path, name, adapters):
    check_stock_has(name, adapters)
    torch.manual_seed(0)
    layer, x = ONE_LAYER[name][0]().double(), torch.randn(ONE_LAYER[name][1], dtype=torch.float64)
    model, names = with_adapters(layer, ADAPTERS[adapters]), NAMES[: len(ADAPTERS[adapters])]
    for training in (True, False):
        assert torch.equal(model.train(training)(x), layer(x))
    assert torch.equal(predict(model, x), layer(x))
    randomise_peft(model)
    registered = model.base_model.model[0]
    weight, extra = changed_by(layer, registered, names)
    expected = torch.func.functional_call(layer, {"weight": weight}, (x,)) + extra
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    tensors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    upstream = torch.randn_like(expected)
    found = torch.autograd.grad(model(x), tensors, upstream)
    torch.testing.assert_close(found, torch.autograd.grad(expected, tensors, upstream), rtol=1e-8, atol=1e-8)

    alone = predict(model, x)
    if layer.bias is None and BIAS in ADAPTERS[adapters]:
        with pytest.raises(RuntimeError, match="because the base layer has no bias"):
            model.merge_adapter()
        assert not registered.merged
    else:
        registered.merge(safe_merge=True)
        assert torch.equal(predict(model, x), alone)
        model.unmerge_adapter()
    left = registered.base_layer.state_dict()
    assert all(torch.equal(left[key], tensor) for key, tensor in layer.state_dict().items())
    with model.disable_adapter():
        assert torch.equal(predict(model, x), layer(x))

    model.save_pretrained(tmp_path)
    for own, options in zip(names, ADAPTERS[adapters], strict=True):
        model.set_adapter(own)
        again, by_own = nn.Sequential(copy.deepcopy(layer)), predict(model, x)
        loaded = peft.PeftModel.from_pretrained(again, tmp_path / own, low_cpu_mem_usage=True)
        if own == NAMES[0]:  # older peft does not tell a layer of later configurations
            assert (type(again[0]).__name__ == "ConvLoraLayer") is (name not in IN_STOCK)
        torch.testing.assert_close(predict(loaded, x), by_own, rtol=1e-6, atol=1e-6)  # in stock peft, of fp32 factors
        base = nn.Sequential(copy.deepcopy(layer))
        if options is BIAS:
            with pytest.raises(CheckpointError, match="convlora's adapters have no bias of lora_B"):
                convlora.load_adapter(base, tmp_path / own)
        elif BIAS not in ADAPTERS[adapters]:  # older peft writes other adapters' biases into this file, too
            torch.testing.assert_close(predict(convlora.load_adapter(base, tmp_path / own), x), by_own)


@pytest.mark.parametrize("adapters", ADAPTERS)
@pytest.mark.parametrize("name", IN_STOCK)
@pytest.mark.parametrize("dropout", [0, 0.5])
def test_dora_and_lora_bias_are_stock_peft_s_where_it_has_them(name, adapters, dropout):
    check_stock_has(name, adapters, dropout)
    torch.manual_seed(0)
    layer, x = ONE_LAYER[name][0](), torch.randn(ONE_LAYER[name][1])
    ours, theirs = (with_adapters(layer, ADAPTERS[adapters], taught, lora_dropout=dropout) for taught in (True, False))
    randomise_peft(ours)
    theirs.load_state_dict(ours.state_dict())
    found = []
    for model in (ours, theirs):
        torch.manual_seed(1)
        y = model.train()(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), [p for p in model.parameters() if p.requires_grad])))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)  # sums of fp32 in another order


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_fresh_dora_of_a_half_precision_base_is_the_base(dtype):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(4, 6, 3).to(dtype), torch.randn(2, 4, 6, 6, dtype=dtype)
    model = with_adapters(layer, [DORA])
    assert torch.equal(predict(model, x), layer(x)) and torch.equal(model.train()(x), layer(x))
    randomise_peft(model)
    expected = predict(model, x)
    assert torch.equal(predict(copy.deepcopy(model), x), expected) and not torch.equal(expected, layer(x))
    written = with_adapters(layer, [DORA])
    randomise_peft(written)
    assert torch.equal(predict(written, x), expected)


def test_from_peft_takes_the_dora_of_registered_layers_and_peft_reads_ours(odd, small, tmp_path):
    model = peft.get_peft_model(copy.deepcopy(odd), registered(odd, use_dora=True))
    randomise_peft(model)
    expected = predict(model, small)
    ours = convlora.peft.from_peft(model)
    assert near(predict(ours, small), expected)
    convlora.save_adapter(ours, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "CONVLORA"
    assert near(predict(peft.PeftModel.from_pretrained(odd, tmp_path), small), expected)


@pytest.mark.parametrize("name", ONE_LAYER)
def test_adapters_are_combined_by_singular_values_on_every_convolution(name):
    torch.manual_seed(0)
    layer, x = ONE_LAYER[name][0](), torch.randn(ONE_LAYER[name][1])
    model = with_adapters(layer, [{}, {}])
    randomise_peft(model)
    both = predict(model, x)
    for kind in ("svd", "magnitude_prune_svd"):
        density = None if kind == "svd" else 1.0
        model.add_weighted_adapter(NAMES[:2], [1.0, 1.0], kind, kind, svd_rank=16, density=density)
        model.set_adapter(kind)
        torch.testing.assert_close(predict(model, x), both, rtol=1e-4, atol=1e-4)
    model.add_weighted_adapter(NAMES[:2], [1.0, 1.0], "small", "svd", svd_rank=1)
    delta = [model.base_model.model[0].get_delta_weight(each).detach().flatten(1) for each in (*NAMES[:2], "small")]
    nearest = torch.linalg.svdvals(delta[0] + delta[1])[1:].norm()
    torch.testing.assert_close((delta[0] + delta[1] - delta[2]).norm(), nearest, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [DORA, BIAS])
def test_what_no_combination_of_factors_holds_is_refused_and_peft_s_own_layers_combine_as_before(options):
    layer = nn.Conv2d(4, 6, 3)
    model = with_adapters(layer, [options, options])
    before = snapshot(model)
    with pytest.raises(
        UnsupportedLayerError, match=r"model\.0: adapter 'first' has DoRA's magnitudes or a bias of lora_B"
    ):
        model.add_weighted_adapter(NAMES[:2], [1.0, 1.0], "sum", combination_type="cat")
    assert snapshot(model) == before
    stock = with_adapters(layer, [{}, {}], taught=False, lora_alpha=2)
    randomise_peft(stock)
    x = torch.randn(2, 4, 6, 6)
    both = predict(stock, x)
    stock.add_weighted_adapter(NAMES[:2], [1.0, 1.0], "sum", combination_type="svd", svd_rank=4)
    stock.set_adapter("sum")
    torch.testing.assert_close(predict(stock, x), both, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, DORA, BIAS], ids=["plain", "DoRA", "bias"])
@pytest.mark.parametrize("name", ONE_LAYER)
def test_a_model_prepared_for_hot_swapping_takes_adapters_of_other_ranks(name, options):
    from peft.utils.hotswap import hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap

    torch.manual_seed(0)
    layer, x = ONE_LAYER[name][0](), torch.randn(ONE_LAYER[name][1])
    model = with_adapters(layer, [options])
    randomise_peft(model)
    before = predict(model, x)
    prepare_model_for_compiled_hotswap(model, target_rank=4, config=model.peft_config)
    assert model.base_model.model[0].lora_A["first"].weight.shape[0] == 4
    torch.testing.assert_close(predict(model, x), before, rtol=1e-4, atol=1e-4)
    for rank in (1, 4):
        config = convlora.peft.register(peft.LoraConfig(r=rank, lora_alpha=5, target_modules=["0"], **options))
        other = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config, adapter_name="first").eval()
        randomise_peft(other)
        tensors = {key: tensor for key, tensor in other.state_dict().items() if "lora_" in key}
        try:
            hotswap_adapter_from_state_dict(model, tensors, "first", config)
        except NotImplementedError as refusal:
            assert rank < 4 and layer.weight.ndim != 4 and "only Conv2d and Linear are supported" in str(refusal)
        else:
            torch.testing.assert_close(predict(model, x), predict(other, x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="has rank 4, which cannot be padded to 3"):
        prepare_model_for_compiled_hotswap(model, target_rank=3)


def test_dropout_drops_on_the_branch_in_training_alone():
    base = nn.Sequential(nn.Conv2d(3, 8, 3, dilation=2))
    options = {"target_modules": ["0"], "lora_dropout": 0.5}
    model = peft.get_peft_model(copy.deepcopy(base), convlora.peft.register(peft.LoraConfig(r=2, **options)))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model.train()(x), base(x))  # lora_B is zero
    randomise_peft(model)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_half_precision_bases_are_computed_in_fp32_and_rounded_once(small):
    conv = nn.Conv2d(3, 8, 3, dilation=2).bfloat16()
    model = peft.get_peft_model(
        nn.Sequential(copy.deepcopy(conv)), convlora.peft.register(peft.LoraConfig(r=2, target_modules=["0"]))
    )
    randomise_peft(model)
    layer = model.base_model.model[0]
    assert layer.lora_A["default"].weight.dtype == torch.float32
    expected = (conv.weight.float() + layer.get_delta_weight("default")).bfloat16()
    with torch.no_grad():
        conv.weight.copy_(expected)
        assert torch.equal(model(small.bfloat16()), conv(small.bfloat16()))


def test_inference_keeps_the_weight_and_sees_what_is_written(odd, small):
    model = peft.get_peft_model(copy.deepcopy(odd), registered(odd))
    first = predict(model, small)
    randomise_peft(model)
    assert not torch.equal(predict(model, small), first)


@pytest.mark.parametrize(
    "options, error",
    [
        ({"use_dora": True, "lora_dropout": 0.1}, UnsupportedLayerError),
        ({"lora_dropout": 0.1}, UnsupportedLayerError),  # of a transposed convolution
        ({"init_lora_weights": "loftq"}, (UnsupportedLayerError, ValueError, ImportError)),
    ],
)
def test_what_registered_layers_do_not_serve_is_refused(odd, options, error):
    with pytest.raises(error):
        peft.get_peft_model(odd, registered(odd, **options))


def test_computed_weights_are_refused_by_name():
    base = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)))
    with pytest.raises(UnsupportedLayerError, match=r"computed from other parameters.*Use convlora\.inject"):
        peft.get_peft_model(base, convlora.peft.register(peft.LoraConfig(target_modules=["0"])))


def test_an_unregistered_second_adapter_is_refused_where_its_file_would_mispredict(odd):
    if not IS_NEW:
        pytest.skip("older peft does not tell a layer of the configuration")
    model = peft.get_peft_model(odd, registered(odd))
    with pytest.raises(UnsupportedLayerError, match=r"'two'.*through convlora\.peft\.register first"):
        model.add_adapter("two", peft.LoraConfig(r=2, target_modules=LAYERS))


def test_register_refuses_what_is_no_lora_config(monkeypatch):
    for wrong in (peft.LoHaConfig(), "lora", peft.AdaLoraConfig(total_step=10)):
        with pytest.raises(TargetError, match=r"is not a peft\.LoraConfig"):
            convlora.peft.register(wrong)
    again = convlora.peft.register(peft.LoraConfig())
    assert convlora.peft.register(again) is again
    monkeypatch.delattr(peft.LoraConfig, "_register_custom_module")
    with pytest.raises(UnsupportedLayerError, match=r"_register_custom_module.*tested with peft 0\.15\.0 to"):
        convlora.peft.register(peft.LoraConfig())


def test_without_peft_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "convlora.peft")
    with pytest.raises(ImportError, match=r"pip install 'convlora\[peft\]'"):
        importlib.import_module("convlora.peft")


# ---- handed over in memory


def test_from_peft_and_back_predict_the_same_with_every_adapter():
    base = network()
    first, second = config(base), config(base, rank=2, modules_to_save=["fc"])
    first.alpha_pattern = {r"layer[12].*": 3}  # any expression: peft has applied it
    model = train(peft.get_peft_model(base, first))
    model.add_adapter("second", second)
    model.set_adapter("second")
    train(model)
    # Norms that the second does not save moved in the base itself, peft's way.
    expected = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        expected[name] = predict(model)
    ours = convlora.peft.from_peft(model)
    assert ours is base and convlora.summary(ours).adapter_name == "second"
    assert isinstance(ours.conv1, nn.Conv2d) and not any("base_layer" in key for key in ours.state_dict())
    for name, output in expected.items():
        convlora.set_adapter(ours, name)
        assert near(predict(ours), output)
    theirs = convlora.peft.to_peft(ours)
    assert theirs.get_base_model() is base
    for name, output in expected.items():
        theirs.set_adapter(name)
        assert near(predict(theirs), output)


def test_from_peft_takes_registered_layers(odd, small):
    model = peft.get_peft_model(odd, registered(odd))
    randomise_peft(model)
    expected = predict(model, small)
    ours = convlora.peft.from_peft(model)
    assert near(predict(ours, small), expected)
    assert [layer.name for layer in convlora.summary(ours).layers] == LAYERS


def test_from_peft_leaves_a_model_that_it_refuses_as_it_was():
    base = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3, padding=1))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0", "1"]))
    randomise_peft(model)
    before, x = snapshot(model), torch.randn(1, 8, 6, 6)
    expected = predict(model, x)
    with pytest.raises(CheckpointError, match=r"adapter 'default'.*\s+0: groups 2"):
        convlora.peft.from_peft(model)
    assert snapshot(model.train()) == before
    assert torch.equal(predict(model, x), expected)


def test_from_peft_refuses_a_model_that_is_not_at_rest():
    model = peft.get_peft_model(nn.Sequential(nn.Conv2d(3, 8, 3)), peft.LoraConfig(r=2, target_modules=["0"]))
    model.merge_adapter()
    with pytest.raises(StateError, match="0 is merged; call unmerge_adapter first"):
        convlora.peft.from_peft(model)
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(StateError, match="0: its adapters are disabled"):
        convlora.peft.from_peft(model)
    model.add_adapter("b", peft.LoraConfig(r=2, target_modules=["0"]))
    model.base_model.set_adapter(["default", "b"])
    with pytest.raises(StateError, match=r"computes with \['default', 'b'\]"):
        convlora.peft.from_peft(model)
    with pytest.raises(TargetError, match=r"Sequential is not a peft\.PeftModel"):
        convlora.peft.from_peft(nn.Sequential())


def test_to_peft_names_every_layer_that_stock_peft_mispredicts(odd):
    model = convlora.inject(odd, 2, target_modules=LAYERS, modules_to_save=None)
    randomise(model)
    before = snapshot(model)
    reasons = r"(?s)a: padding_mode 'reflect'.*b: groups 8.*c: a ConvTranspose2d.*d: a StdConv2d.*unchanged"
    with pytest.raises(UnsupportedLayerError, match=reasons.replace("unchanged", "Nothing was changed")):
        convlora.peft.to_peft(model)
    assert snapshot(model) == before
    with pytest.raises(StateError, match="carries no adapter"):
        convlora.peft.to_peft(Odd())


def test_to_peft_gives_the_adapters_back_where_peft_fails(monkeypatch):
    model = convlora.inject(network(), 2)
    convlora.add_adapter(model, "other", 3)
    convlora.set_adapter(model, "other")
    train(model)
    expected = predict(model)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}

    def fails(*args, **kwargs):
        raise RuntimeError("peft is broken")

    monkeypatch.setattr(convlora.peft, "set_peft_model_state_dict", fails)
    with pytest.raises(RuntimeError, match="peft is broken"):
        convlora.peft.to_peft(model)
    assert torch.equal(predict(model), expected)
    now = model.state_dict()
    assert now.keys() == state.keys() and all(torch.equal(now[key], tensor) for key, tensor in state.items())


SCALERS = {
    "rescale_adapter_scale": lambda model: importlib.import_module("peft.helpers").rescale_adapter_scale(model, 0.5),
    "scale_layer": lambda model: scaled_layers(
        model, lambda layer: layer.scale_layer(0.5), lambda layer: layer.unscale_layer(0.5)
    ),
    "unscale_layer to the beginning": lambda model: scaled_layers(
        model, lambda layer: layer.scale_layer(0.5), lambda layer: layer.unscale_layer()
    ),
    "set_scale": lambda model: scaled_layers(
        model, lambda layer: layer.set_scale("default", 0.5), lambda layer: layer.set_scale("default", 1.0)
    ),
}


@contextlib.contextmanager
def scaled_layers(model, begin, end):
    layers = [m for m in model.modules() if isinstance(m, importlib.import_module("peft.tuners.lora").LoraLayer)]
    for layer in layers:
        begin(layer)
    yield
    for layer in layers:
        end(layer)


@pytest.mark.parametrize("way", SCALERS)
def test_peft_s_ways_to_scale_an_adapter_reach_our_layers_inside_its_model(way):
    """Half of each change by dense weights, merged in the block as unmerged, and the adapter again after it."""
    base = Odd().eval()
    model = peft.get_peft_model(
        copy.deepcopy(base),
        convlora.peft.register(peft.LoraConfig(r=2, target_modules=["a", "b"], alpha_pattern={"b": 5})),
    )
    randomise_peft(model)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    expected, half = predict(model, images), copy.deepcopy(base)
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    half.load_state_dict({key: (tensor + merged[key]) / 2 for key, tensor in base.state_dict().items()})
    with SCALERS[way](model):
        assert near(predict(model, images), predict(half, images))
        assert near(predict(copy.deepcopy(model).merge_and_unload(), images), predict(half, images))
    assert near(predict(model, images), expected)


def test_several_active_adapters_do_not_go_to_peft_as_one():
    net = convlora.add_adapter(convlora.inject(network(), 2, adapter_name="a"), "b", 2)
    convlora.set_adapter(net, {"a": 1.0, "b": 0.5})
    before = snapshot(net)
    with pytest.raises(StateError, match="Adapters are active by weight"):
        convlora.peft.to_peft(net)
    convlora.set_adapter(net, "a")
    with convlora.scaled(net, 0.5), pytest.raises(StateError, match="A scaled block is open"):
        convlora.peft.to_peft(net)
    assert snapshot(convlora.set_adapter(net, ["a", "b"])).keys() == before.keys()


def test_dora_at_a_strength_is_for_no_peft(tmp_path):
    net = convlora.inject(network(), 2, use_dora=True, modules_to_save=None)
    randomise(net)
    convlora.save_adapter(convlora.set_scale(net, "default", 0.5), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "CONVLORA_ALONE"
    convlora.peft.register()
    with pytest.raises(Exception, match="CONVLORA_ALONE"):
        peft.PeftModel.from_pretrained(network(), tmp_path)
    assert near(predict(convlora.load_adapter(network(), tmp_path)), predict(net))
