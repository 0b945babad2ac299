"""Files between convlora and Hugging Face peft, both ways: the same predictions, or one error that says why not."""

import contextlib
import copy
import importlib
import json
import warnings
from importlib.metadata import version

import pytest
import torch
from conftest import need, randomise, snapshot
from safetensors.torch import load_file, save_file
from torch import nn

import convlora
from convlora import CheckpointError

peft = need("peft")
timm = need("timm")
pytestmark = pytest.mark.filterwarnings("ignore")  # peft's and transformers' own

IS_OLD = tuple(map(int, version("peft").split(".")[:2])) < (0, 21)
WRITES_BIASES = pytest.mark.skipif(IS_OLD, reason="peft before 0.21 does not write what lora_only trains")
IMAGES = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(3))
# Two orders of summation in fp32 (a branch beside the layer, or one weight): last bits, relative to the output.
ROUNDING = 1e-6


@pytest.fixture(autouse=True)
def stock(monkeypatch):
    """peft as in a process in which nobody has called ``convlora.peft.register``."""
    importlib.import_module("convlora.peft")
    monkeypatch.delitem(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, "CONVLORA", raising=False)


def same(theirs, ours, images=IMAGES):
    with torch.no_grad():
        expected, found = theirs.eval()(images), ours.eval()(images)
    if hasattr(expected, "logits"):
        expected, found = expected.logits, found.logits
    return (found - expected).abs().max() <= ROUNDING * expected.abs().max().clamp(min=1)


def network(name="resnet18"):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=2)


def trained_in_peft(base, config, images=IMAGES, steps=2):
    """A PeftModel after steps in train mode; the statistics of norm layers that are not saved stay the base's."""
    torch.manual_seed(1)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    model.train()
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and "modules_to_save" not in name:
            module.eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        out = model(images)
        getattr(out, "logits", out).square().mean().backward()
        optimizer.step()
    return model.eval()


# ---- from convlora to stock peft


@pytest.mark.parametrize("norm", ["freeze", "track"])
def test_stock_peft_loads_and_predicts_the_same(tmp_path, train, norm):
    base = network()
    model = convlora.inject(copy.deepcopy(base), 4, norm=norm, rank_pattern={"layer4.*": 6}, alpha_pattern={"conv1": 3})
    train(model, IMAGES, steps=2, lr=0.01)
    convlora.save_adapter(model, tmp_path)
    assert same(peft.PeftModel.from_pretrained(base, tmp_path), model)


def test_stock_peft_loads_the_dense_part_of_a_mobilenet(tmp_path, train):
    base = network("mobilenetv3_small_050")
    model = convlora.inject(
        copy.deepcopy(base), 4, target_modules=lambda name, m: isinstance(m, nn.Conv2d) and m.groups == 1
    )
    train(model, IMAGES, steps=2, lr=0.01)
    convlora.save_adapter(model, tmp_path)
    assert same(peft.PeftModel.from_pretrained(base, tmp_path), model)


@pytest.mark.parametrize(
    "make, dims",
    [
        (lambda: nn.Conv1d(8, 6, 3, 2, 1), 1),
        (lambda: nn.Conv2d(8, 6, 3, padding="same"), 2),
        (lambda: nn.Conv3d(8, 6, (1, 3, 2), (2, 1, 1), (0, 1, 1)), 3),
        (lambda: timm.layers.Conv2dSame(8, 6, 3, 2), 2),
    ],
)
def test_plain_convolutions_of_every_dimension_go_to_stock_peft_and_back(tmp_path, make, dims):
    conv, images = make(), torch.randn(2, 8, *[6] * dims)
    base = nn.Sequential(conv)
    model = convlora.inject(copy.deepcopy(base), 2, target_modules=type(conv), modules_to_save=None)
    randomise(model)
    convlora.save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    assert same(theirs, model, images)
    theirs.save_pretrained(tmp_path / "theirs")
    assert same(model, convlora.load_adapter(base, tmp_path / "theirs"), images)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(8, 8, 3, groups=4),
        lambda: nn.Conv2d(8, 8, 3, dilation=2),
        lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        lambda: type("Own", (nn.Conv2d,), {})(8, 8, 3),
        lambda: timm.layers.ScaledStdConv2d(8, 8, 3),
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)),
    ],
)
def test_stock_peft_refuses_what_it_would_mispredict(tmp_path, make):
    base = nn.Sequential(make(), nn.Flatten())
    model = convlora.inject(copy.deepcopy(base), 2, modules_to_save=None)
    randomise(model)
    convlora.save_adapter(model, tmp_path)
    with pytest.raises((KeyError, ValueError)):
        peft.PeftModel.from_pretrained(base, tmp_path)


def test_a_layer_under_two_names_is_a_file_for_convlora_alone(tmp_path):
    conv = nn.Conv2d(4, 4, 3, padding=1)
    base = nn.Sequential(conv, nn.ReLU(), conv)
    model = convlora.inject(copy.deepcopy(base), 2, modules_to_save=None)
    randomise(model)
    convlora.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "CONVLORA_ALONE"
    with pytest.raises((KeyError, ValueError)):
        peft.PeftModel.from_pretrained(base, tmp_path)
    assert same(model, convlora.load_adapter(base, tmp_path), torch.randn(1, 4, 6, 6))


# ---- from stock peft to convlora


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["conv1", "conv2"]},
        {"target_modules": "all-linear", "lora_alpha": 3},
        {
            "target_modules": r".*(conv\d|fc)",
            "rank_pattern": {"layer4.*conv1": 5, "conv1": 2},
            "alpha_pattern": {"layer1.0.conv1": 3, "conv2": 16},
            "use_rslora": True,
            "lora_dropout": 0.1,
        },
        {"target_modules": ["conv1"], "modules_to_save": ["fc", "bn1"]},
        {"target_modules": ["conv2"], "modules_to_save": ["fc", "bn2"], "bias": "all"},
        pytest.param({"target_modules": ["conv1", "fc"], "bias": "lora_only"}, marks=WRITES_BIASES),
    ],
)
def test_a_peft_checkpoint_predicts_trains_and_is_saved_as_convlora_s(tmp_path, train, options):
    base = network()
    theirs = trained_in_peft(base, peft.LoraConfig(r=4, **options))
    theirs.save_pretrained(tmp_path / "peft")
    ours = convlora.load_adapter(copy.deepcopy(base), tmp_path / "peft")
    assert same(theirs, ours)
    assert convlora.summary(ours).dropout == options.get("lora_dropout", 0.0)
    train(ours, IMAGES, steps=1)
    assert not same(theirs, ours)
    convlora.save_adapter(ours, tmp_path / "ours")
    again = convlora.load_adapter(copy.deepcopy(base), tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(again.eval()(IMAGES), ours(IMAGES))
    before = snapshot(base)
    assert snapshot(convlora.remove(convlora.load_adapter(base, tmp_path / "peft"))) == before


def test_peft_s_biases_are_trained_on_and_combined(tmp_path, train):
    base = network()
    trained_in_peft(base, peft.LoraConfig(r=2, target_modules=["conv1"], bias="all")).save_pretrained(tmp_path)
    model = convlora.load_adapter(base, tmp_path)
    names = convlora.summary(model).biases
    assert {"bn1", "layer1.0.bn2", "fc"} <= set(names)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name}
    assert trainable == {f"{name}.bias" for name in names}
    own = model.bn1.bias.clone()
    convlora.combine_adapters(model, {"default": 0.5}, "mixed")
    with convlora.disable_adapter(model):
        without = model.bn1.bias.clone()
    convlora.set_adapter(model, "mixed")
    torch.testing.assert_close(model.bn1.bias, (own + without) / 2)
    assert not torch.equal(own, without)


@pytest.mark.filterwarnings("error")
def test_biases_that_were_trained_and_not_written_are_told_of(tmp_path):
    base = network()
    config = peft.LoraConfig(r=2, target_modules=["conv1", "fc"], bias="lora_only")
    model = peft.get_peft_model(copy.deepcopy(base), config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if not key.endswith("bias")}, file)
    with pytest.warns(UserWarning, match=r"bias='lora_only', and the file holds no bias.*The base's biases are used"):
        convlora.load_adapter(base, tmp_path)


def test_a_bias_that_is_trained_by_itself_leaves_the_scale_beside_it_frozen(tmp_path):
    base = network()
    trained_in_peft(base, peft.LoraConfig(r=2, target_modules=["conv1"], bias="all")).save_pretrained(tmp_path)
    model = convlora.load_adapter(base, tmp_path)
    assert model.bn1.bias.requires_grad and not model.bn1.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_factors_are_trained_in_fp32(tmp_path, dtype):
    base = network()
    trained_in_peft(base, peft.LoraConfig(r=2, target_modules=["conv1"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    stored = {key: tensor.to(dtype) for key, tensor in load_file(file).items()}
    save_file(stored, file)
    model = convlora.load_adapter(base, tmp_path)
    lora = model.conv1.convlora["default"]
    assert lora.lora_A.dtype == torch.float32
    assert torch.equal(lora.lora_A.to(dtype), stored["base_model.model.conv1.lora_A.weight"])


def test_a_second_adapter_from_peft_waits_beside_the_first(tmp_path):
    base = network()
    theirs = trained_in_peft(base, peft.LoraConfig(r=2, target_modules=["conv1"]))
    theirs.save_pretrained(tmp_path)
    model = convlora.inject(base, 3)
    convlora.load_adapter(model, tmp_path, adapter_name="from peft")
    assert convlora.summary(model).adapter_name == "default"
    convlora.set_adapter(model, "from peft")
    assert same(theirs, model)


def test_peft_s_checkpoint_of_a_transformers_resnet(tmp_path):
    transformers = need("transformers")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], num_labels=3)
    base = transformers.ResNetForImageClassification(config).eval()
    options = {"target_modules": ["convolution"], "modules_to_save": ["classifier"]}
    theirs = trained_in_peft(base, peft.LoraConfig(r=3, **options))
    theirs.save_pretrained(tmp_path)
    ours = convlora.load_adapter(copy.deepcopy(base), tmp_path)
    convolutions = [name for name, m in base.named_modules() if isinstance(m, nn.Conv2d)]
    assert [layer.name for layer in convlora.summary(ours).layers] == convolutions
    assert same(theirs, ours)
    assert not same(base, ours)


# ---- what would not be exact is refused, with its reason, and the model untouched


def refused(base, directory, message):
    before = snapshot(base)
    with pytest.raises(CheckpointError, match=message) as raised:
        convlora.load_adapter(base, directory)
    assert "Nothing was changed" in str(raised.value)
    assert snapshot(base) == before


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: nn.Conv2d(8, 8, 3, groups=4), r"0: groups 4; the other library's lora_A reads all channels"),
        (lambda: nn.Conv2d(8, 8, 3, dilation=2), r"0: dilation \(2, 2\), which the branch beside the layer drops"),
        (lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), r"0: padding_mode 'reflect'"),
        (
            lambda: timm.layers.StdConv2d(8, 8, 3),
            r"0: a StdConv2d with its own forward, from which a branch",
        ),
        (lambda: nn.Embedding(8, 8), r"0\.lora_embedding_A: convlora does not adapt embeddings"),
    ],
)
def test_layers_that_peft_computes_otherwise_are_refused(tmp_path, make, reason):
    base = nn.Sequential(make())
    peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=["0"])).save_pretrained(tmp_path)
    refused(base, tmp_path, reason)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"use_dora": True}, r"use_dora=True, and the file has no magnitudes"),
        ({"lora_bias": True}, r"lora_bias=True: convlora's adapters have no bias"),
        ({"fan_in_fan_out": True}, r"fan_in_fan_out=True: it is for weights that are stored transposed"),
        ({"layer_replication": [[0, 2]]}, r"layer_replication=.*: it changes the network itself"),
        ({"some_later_field": 3}, r"some_later_field=3: it changes what peft computes, or is unknown here"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa': it may have changed the base's own weights"),
        ({"peft_type": "XLORA"}, r"peft_type 'XLORA'; it must be one of LORA, LOHA"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern: '\(' is a regular expression; list the layers' names"),
        ({"modules_to_save": 3}, r"modules_to_save=3: it must be a list of names"),
        (
            {"modules_to_save": None},
            r"fc\.weight: it belongs neither to a layer's change nor",
        ),
        ({"lora_alpha": 0}, r"lora_alpha=0: it must be a finite number above 0"),
        ({"lora_dropout": 2.0}, r"dropout=2\.0; it must be at least 0 and below 1"),
    ],
)
def test_configurations_that_mean_more_than_lora_are_refused(tmp_path, change, reason):
    base = network()
    config = peft.LoraConfig(r=2, target_modules=["conv1"], modules_to_save=["fc"])
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    before = snapshot(base)
    with pytest.raises(CheckpointError, match=reason):
        convlora.load_adapter(base, tmp_path)
    assert snapshot(base) == before


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda t: t.pop("conv1.lora_B.weight"), r"conv1: lora_B\.weight is missing"),
        (lambda t: t.update({"conv9.lora_A.weight": torch.ones(2, 2)}), r"conv9: no such layer in the model"),
        (lambda t: t.update({"bn1.lora_A.weight": torch.ones(2, 2)}), r"bn1: a BatchNorm2d; only convolutions"),
        (
            lambda t: t.update({"conv1.lora_A.weight": torch.ones(2, 3, 5, 5)}),
            r"conv1\.lora_A\.weight: \(2, 3, 5, 5\) in the file, \(2, 3, 7, 7\) in the model",
        ),
        (lambda t: t.pop("fc.bias"), r"fc\.bias: nothing in the file, \(2,\) in the model"),
        (lambda t: t.update({"conv1.lora_B.bias": torch.ones(64)}), r"convlora's adapters have no bias"),
        (
            lambda t: t.update({"conv1.lora_magnitude_vector": torch.ones(64)}),
            r"use_dora=False, and the file has magnitudes",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, reason):
    base = network()
    config = peft.LoraConfig(r=2, target_modules=["conv1"], modules_to_save=["fc"])
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    prefix = "base_model.model."
    tensors = {key.removeprefix(prefix): tensor for key, tensor in load_file(file).items()}
    change(tensors)
    save_file({prefix + key: tensor for key, tensor in tensors.items()}, file)
    refused(base, tmp_path, reason)


def test_a_layer_under_two_names_is_refused(tmp_path):
    conv = nn.Conv2d(4, 4, 3, padding=1)
    base = nn.Sequential(conv, nn.ReLU(), conv)
    peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
    refused(base, tmp_path, r"0: the same layer as 2; peft adapts only one of the two")


def test_pickles_are_never_read(tmp_path):
    base = network()
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["conv1"]))
    model.save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    for path in (tmp_path, tmp_path / "adapter_model.bin"):
        refused(base, path, r"adapter_model\.bin is a pickle.*weights_only=True")


def test_a_configuration_that_is_no_json_object(tmp_path):
    base = network()
    peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["conv1"])).save_pretrained(tmp_path)
    for text, message in (("{", "cannot be read"), ("[1]", "is not a JSON object")):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            convlora.load_adapter(base, tmp_path)


def trained_dora(base, **options):
    """A model of stock peft with DoRA whose factors and magnitudes have all moved."""
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def plain_net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.Flatten())
    return net.append(nn.Linear(6 * 16, 4)).eval()


def test_pefts_dora_on_convolutions_and_linear_layers_is_read_and_saved_as_it_was(tmp_path):
    base, x = plain_net(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    theirs = trained_dora(base, target_modules=["0", "2", "4"])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = convlora.load_adapter(copy.deepcopy(base), tmp_path / "theirs").eval()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)  # the norm's sum in another order
    assert (ours(x) - base(x)).abs().max() > 0.05
    convlora.save_adapter(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    torch.testing.assert_close(back(x), theirs(x), rtol=1e-5, atol=1e-6)
    in_memory = convlora.peft.from_peft(theirs).eval()
    assert torch.equal(in_memory(x), ours(x))


def test_dora_that_peft_would_compute_otherwise_is_refused_both_ways(tmp_path):
    same = nn.Sequential(timm.layers.Conv2dSame(3, 4, 3, stride=2))
    with contextlib.suppress(RuntimeError):
        trained_dora(same, target_modules=["0"]).save_pretrained(tmp_path / "theirs")
        refused(same, tmp_path / "theirs", "0: DoRA in a Conv2dSame, whose own forward peft's DoRA does not call")
    convlora.inject(same, 1, use_dora=True, modules_to_save=None)
    with torch.no_grad():
        same[0].convlora["default"].lora_B.fill_(0.1)
    convlora.save_adapter(same, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["peft_type"] == "CONVLORA"
    linear = nn.Sequential(timm.layers.Linear(3, 4))
    convlora.inject(linear, 1, target_modules=nn.Linear, use_dora=True, modules_to_save=None)
    convlora.save_adapter(linear, tmp_path / "linear")
    assert json.loads((tmp_path / "linear" / "adapter_config.json").read_text())["peft_type"] == "CONVLORA_ALONE"


def test_a_combination_counts_and_lists_the_biases_that_it_trains_once(tmp_path):
    """What the plan says is trainable is what trainable_parameters gives."""
    base = plain_net()
    biased = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["0"], bias="all"))
    biased.save_pretrained(tmp_path)
    convlora.load_adapter(base, tmp_path, adapter_name="a")
    convlora.add_adapter(base, "b", 2, modules_to_save="4")
    for weights, name in (({"a": 1.0}, "one"), ({"a": 0.5, "b": 0.5}, "two")):
        convlora.combine_adapters(base, weights, name)
        convlora.set_adapter(base, name)
        trained = sum(p.numel() for p in convlora.trainable_parameters(base))
        assert convlora.summary(base).trainable_parameters == trained
    assert "4" not in convlora.summary(base, "two").biases
