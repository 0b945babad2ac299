"""convlora.peft: adapters handed over in memory, and convlora's layers inside peft. Run with the oldest peft, too."""

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
        ({"use_dora": True}, (UnsupportedLayerError, ValueError)),
        ({"lora_bias": True, "init_lora_weights": False}, (UnsupportedLayerError, ValueError)),
        ({"lora_dropout": 0.1}, UnsupportedLayerError),  # of a transposed convolution
        ({"init_lora_weights": "loftq"}, (UnsupportedLayerError, ValueError, ImportError)),
    ],
)
def test_what_registered_layers_do_not_serve_is_refused(odd, options, error):
    with pytest.raises(error):
        peft.get_peft_model(odd, registered(odd, **options))


def test_computed_weights_are_refused_by_name():
    base = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)))
    with pytest.raises(UnsupportedLayerError, match=r"its weight is computed from others.*Use convlora\.inject"):
        peft.get_peft_model(base, convlora.peft.register(peft.LoraConfig(target_modules=["0"])))


def test_an_unregistered_second_adapter_is_refused_where_its_file_would_mispredict(odd):
    if "config" not in inspect.signature(peft.tuners.lora.LoraLayer.update_layer).parameters:
        pytest.skip("older peft does not tell a layer of the configuration")
    model = peft.get_peft_model(odd, registered(odd))
    with pytest.raises(UnsupportedLayerError, match=r"'two'.*through convlora\.peft\.register first"):
        model.add_adapter("two", peft.LoraConfig(r=2, target_modules=LAYERS))


def test_register_refuses_what_is_no_lora_config(monkeypatch):
    for wrong in (peft.LoHaConfig(), "lora", peft.AdaLoraConfig(total_step=10)):
        with pytest.raises(TargetError, match=r"is no peft\.LoraConfig"):
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
    with pytest.raises(TargetError, match=r"Sequential is no peft\.PeftModel"):
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
