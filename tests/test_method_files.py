"""Files of every method between convlora, Hugging Face peft and LyCORIS: the same predictions, or the reason why not.

A row of a table is a method with its options, or a layer; both libraries' own forwards are the oracles.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json

import pytest
import torch
from conftest import need, snapshot
from safetensors.torch import load_file, save_file
from torch import nn

import convlora
from convlora import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's and transformers' own

LAYERS = {
    "3x3": (lambda: nn.Conv2d(8, 12, 3, padding=1), (8, 6, 7)),
    "strided, dilated, not square": (lambda: nn.Conv2d(8, 12, (3, 2), (2, 1), (1, 0), (1, 2)), (8, 6, 7)),
    "same": (lambda: nn.Conv2d(8, 12, 3, padding="same"), (8, 6, 7)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=2), (8, 6, 7)),
    "1x1": (lambda: nn.Conv2d(8, 12, 1, bias=False), (8, 6, 7)),
    "1-d": (lambda: nn.Conv1d(8, 12, 3), (8, 7)),
    "3-d": (lambda: nn.Conv3d(8, 12, (1, 3, 2)), (8, 5, 5, 5)),
    "linear": (lambda: nn.Linear(8, 12), (8,)),
}
# Two orders of summation in fp32 (a branch beside the layer, or one weight): last bits, relative to the output.
ROUNDING = 1e-6


def case(name):
    """A network of the layer, and images for it."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    return nn.Sequential(make()).eval(), torch.randn(2, *shape)


def randomised(model, names):
    """The model, every trained tensor of which has these words in its name drawn anew."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(word in name for word in names):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def distance(first, second, images):
    """The largest difference of two networks' outputs, relative to their size."""
    with torch.no_grad():
        expected, found = first(images), second(images)
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


def there_and_back(base, theirs, images, folder, at_least):
    """peft's model in ``theirs`` as ours, which predicts the same; so does peft again from the file that we write."""
    peft = need("peft")
    ours = convlora.load_adapter(copy.deepcopy(base), folder / "theirs").eval()
    assert same(theirs, ours, images)
    assert distance(base, ours, images) > at_least
    convlora.save_adapter(ours, folder / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "ours").eval()
    assert same(theirs, back, images)
    return ours


def same(first, second, images):
    return distance(first, second, images) <= ROUNDING


# ---- peft

PEFT = {
    "loha": ("LoHaConfig", {"r": 3, "alpha": 5}),
    "loha tucker": ("LoHaConfig", {"r": 3, "alpha": 5, "use_effective_conv2d": True}),
    "lokr": ("LoKrConfig", {"r": 1, "alpha": 5}),
    "lokr full": ("LoKrConfig", {"r": 8, "alpha": 5}),
    "lokr tucker": ("LoKrConfig", {"r": 1, "alpha": 2, "use_effective_conv2d": True, "decompose_factor": 2}),
    "lokr both": ("LoKrConfig", {"r": 1, "alpha": 2, "decompose_both": True, "decompose_factor": 4}),
    "hira": ("HiraConfig", {"r": 3}),
}
"""peft's configurations."""
WORDS = ("hada_", "lokr_", "hira_", "lora_")
NOT_IN_PEFT = {
    **{("hira", "grouped"): "refused"},
    **{(method, "3-d"): "refused" for method in PEFT if method != "hira"},
    **{(method, "1-d"): "scrambled" for method in ("lokr full",)},
    ("lokr tucker", "1-d"): "crashes",
}
"""What peft itself does on a layer where it does not compute the method."""


def in_peft(name, base):
    """A PeftModel with random numbers; skips where peft refuses the layer or crashes in it."""
    peft = need("peft")
    kind, options = PEFT[name]
    if not hasattr(peft, kind):
        pytest.skip(f"this peft has no {kind}")
    with contextlib.redirect_stdout(io.StringIO()):
        return randomised(
            peft.get_peft_model(copy.deepcopy(base), getattr(peft, kind)(target_modules=["0"], **options)), WORDS
        )


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", PEFT)
def test_a_file_of_peft_predicts_the_same_here_and_goes_back(tmp_path, name, layer):
    need("peft")
    base, images = case(layer)
    reason = NOT_IN_PEFT.get((name, layer))
    if reason == "refused":
        with pytest.raises((TypeError, NotImplementedError)):
            in_peft(name, base)
        return
    theirs = in_peft(name, base)
    theirs.save_pretrained(tmp_path / "theirs")
    if reason == "scrambled":
        with pytest.raises(CheckpointError, match=r"0: peft multiplies a Conv1d's lokr_w2 along other dimensions"):
            convlora.load_adapter(base, tmp_path / "theirs")
        return
    if reason == "crashes":
        with pytest.raises(RuntimeError):
            theirs(images)
        return
    ours = there_and_back(base, theirs, images, tmp_path, at_least=1e-3)
    assert same(ours, importlib.import_module("convlora.peft").from_peft(theirs).eval(), images)


# ---- methods that multiply the weight

TURNED = LAYERS | {
    "reflect": (lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect"), (8, 6, 7)),
    "1x1, strided, padded": (lambda: nn.Conv2d(8, 12, 1, 2, 1), (8, 6, 7)),
    "as many out as in": (lambda: nn.Conv2d(8, 8, 3, padding=1), (8, 6, 7)),
    "linear, square": (lambda: nn.Linear(8, 8), (8,)),
}
SQUARE = ("3x3", "1x1", "linear", "1x1, strided, padded", "as many out as in", "linear, square")
POINTWISE = ("1x1", "linear", "1x1, strided, padded", "linear, square")
EXACT = {"oft_block_size": 4, "use_cayley_neumann": False}
MULTIPLYING = {
    "ia3": ("IA3Config", {"feedforward_modules": []}, [name for name in TURNED if name != "1-d"]),
    "ia3 on input": ("IA3Config", {"feedforward_modules": ["0"]}, [name for name in TURNED if name != "1-d"]),
    "oft": ("OFTConfig", EXACT, POINTWISE),
    "oft series": ("OFTConfig", {"oft_block_size": 4}, POINTWISE),
    "oft short series": ("OFTConfig", {"oft_block_size": 4, "num_cayley_neumann_terms": 3}, POINTWISE),
    "oft shared": (
        "OFTConfig",
        {"r": 2, "oft_block_size": 0, "use_cayley_neumann": False, "block_share": True},
        POINTWISE,
    ),
    "oft constrained": ("OFTConfig", {**EXACT, "coft": True, "eps": 0.5}, POINTWISE),
    "boft": ("BOFTConfig", {"boft_block_size": 4}, SQUARE),
    "hra": ("HRAConfig", {"r": 4}, SQUARE),
    "hra orthogonal": ("HRAConfig", {"r": 4, "apply_GS": True}, SQUARE),
}
"""peft's configurations, and the layers on which the two compute the same."""
REASONS = {
    "OFTConfig": r"0: kernel \(3, 3\): peft's OFT sums the overlapping patches",
    "BOFTConfig": r"0: dilation \(1, 1\), groups 1, padding_mode 'reflect', which peft ignores",
    "HRAConfig": r"0: dilation \(1, 1\), groups 1, padding_mode 'reflect', which peft ignores",
}


def multiplied_in_peft(kind, options, base):
    """A PeftModel whose layer is well away from the base; None where peft refuses it or crashes in it."""
    peft = need("peft")
    generator = torch.Generator().manual_seed(1)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            theirs = peft.get_peft_model(copy.deepcopy(base[0]), getattr(peft, kind)(target_modules=["0"], **options))
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if name.rpartition("0.")[2].startswith(("ia3_", "oft_", "boft_", "hra_")):
                    parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            theirs.eval()(base[1])
    except (TypeError, ValueError, NotImplementedError, RuntimeError):
        return None
    return theirs


@pytest.mark.parametrize("layer", TURNED)
@pytest.mark.parametrize("name", MULTIPLYING)
def test_a_file_of_peft_that_multiplies_predicts_the_same_here_and_goes_back(tmp_path, name, layer):
    need("peft")
    kind, options, exact = MULTIPLYING[name]
    make, shape = TURNED[layer]
    torch.manual_seed(0)
    base, images = nn.Sequential(make()).eval(), torch.randn(2, *shape)
    theirs = multiplied_in_peft(kind, options, (base, images))
    if theirs is None:
        assert layer not in exact
        return
    theirs.save_pretrained(tmp_path / "theirs")
    if layer not in exact:
        with pytest.raises(CheckpointError, match=REASONS[kind]):
            convlora.load_adapter(base, tmp_path / "theirs")
        return
    ours = there_and_back(base, theirs, images, tmp_path, at_least=1e-2)
    module = importlib.import_module("convlora.peft")
    assert same(theirs, module.from_peft(copy.deepcopy(theirs)).eval(), images)
    assert same(theirs, module.to_peft(copy.deepcopy(ours)).eval(), images)
    assert same(ours, convlora.load_adapter(copy.deepcopy(base), tmp_path / "ours").eval(), images)


@pytest.mark.parametrize(
    "kind, options, lie, message",
    [
        ("HRAConfig", {"r": 3}, {}, "0: rank=3: reflections come in pairs"),
        ("OFTConfig", {"oft_block_size": 4}, {"peft_version": "0.17.1"}, "of a peft before 0.18, which computed"),
        ("OFTConfig", {"oft_block_size": 4}, {"peft_version": None}, "of a peft before 0.18, which computed"),
        ("OFTConfig", {"oft_block_size": 4}, {"num_cayley_neumann_terms": "5"}, "must be a whole number above 0"),
        ("OFTConfig", {"oft_block_size": 4}, {"num_cayley_neumann_terms": 10**9}, "from 0, which is exact, to 100"),
        ("OFTConfig", {"oft_block_size": 4}, {"fan_in_fan_out": True}, "fan_in_fan_out"),
        (
            "IA3Config",
            {"feedforward_modules": []},
            {"feedforward_modules": "(.*a)*"},
            "is a regular expression",
        ),
    ],
)
def test_what_peft_computes_otherwise_is_refused_with_the_reason(tmp_path, kind, options, lie, message):
    base, images = nn.Sequential(nn.Conv2d(8, 8, 1)).eval(), torch.randn(2, 8, 3, 3)
    multiplied_in_peft(kind, options, (base, images)).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | lie))
    with pytest.raises(CheckpointError, match=message):
        convlora.load_adapter(base, tmp_path)


def test_scales_of_inputs_and_of_outputs_side_by_side(tmp_path):
    """A list of names' ends says which layers' inputs peft scales, and our file says the same by whole names."""
    peft = need("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1, bias=False), nn.Flatten(), nn.Linear(16, 16))
    images = torch.randn(2, 4, 2, 2)
    config = peft.IA3Config(target_modules=["0", "2", "4"], feedforward_modules=["2", "4"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter += ("ia3_l" in name) * torch.randn(parameter.shape)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    ours = convlora.load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    plan = convlora.summary(ours)
    assert [bool(layer.options.get("on_input")) for layer in plan.layers] == [False, True, True]
    assert plan.biases == ("0",) and same(theirs, ours, images)
    convlora.save_adapter(ours, tmp_path / "ours")
    assert same(theirs, peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval(), images)
    with torch.no_grad():
        ours[0].bias[0] += 1
    with pytest.raises(convlora.UnsupportedLayerError, match="0: its bias is not scaled like its weight"):
        importlib.import_module("convlora.peft").to_peft(ours)


@pytest.mark.parametrize(
    "method, options, message",
    [
        ("ia3", {}, "its bias is not scaled like its weight, and peft scales both"),
        ("ssf", {}, "changed by ssf: peft has no such method"),
        ("oft", {"on_output": True}, "its outputs are rotated, and peft rotates inputs"),
        ("boft", {"factors": 2}, "several butterfly factors, for which peft needs its CUDA extension"),
    ],
)
def test_what_peft_would_not_predict_is_written_for_convlora_alone(tmp_path, method, options, message):
    need("peft")
    net = nn.Sequential(nn.Conv2d(8, 8, 1))
    convlora.inject(net, 4, method=method, method_options=options, modules_to_save=None)
    with torch.no_grad():
        for parameter in convlora.adapter_parameters(net):
            parameter += 0.1
    convlora.save_adapter(net, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "CONVLORA_ALONE"
    with pytest.raises(convlora.UnsupportedLayerError, match=message):
        importlib.import_module("convlora.peft").to_peft(net)


@pytest.mark.parametrize("method", ["oft", "hra"])
def test_ranks_that_differ_have_no_place_in_a_configuration_of_one_rank(method):
    need("peft")
    net = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))
    convlora.inject(net, 4, method=method, rank_pattern={"1": 2}, modules_to_save=None)
    with pytest.raises(convlora.UnsupportedLayerError, match="1: rank 2, most layers have 4, and peft has one"):
        importlib.import_module("convlora.peft").to_peft(net)


# ---- LyCORIS

LYCORIS = {
    "ia3": ({"algo": "ia3"}, "ia3", {}),
    "diag-oft": ({"algo": "diag-oft"}, "oft", {"on_output": True}),
    "diag-oft within bounds": ({"algo": "diag-oft", "constraint": 0.01}, "oft", {"on_output": True}),
    "diag-oft rescaled": ({"algo": "diag-oft", "rescaled": True}, "boft", {"on_output": True, "factors": 1}),
    "boft": ({"algo": "boft"}, "boft", {"on_output": True, "factors": 3}),
    "boft rescaled": (
        {"algo": "boft", "constraint": 0.02, "rescaled": True},
        "boft",
        {"on_output": True, "factors": 3},
    ),
}
"""What LyCORIS is asked, and what that is here."""
IN_LYCORIS = {
    "3x3": (lambda: nn.Conv2d(8, 16, 3, padding=1), (8, 6, 7)),
    "grouped, dilated": (lambda: nn.Conv2d(8, 16, 3, 2, dilation=2, groups=2, bias=False), (8, 6, 7)),
    "1-d": (lambda: nn.Conv1d(8, 16, 3), (8, 7)),
    "3-d": (lambda: nn.Conv3d(8, 16, (1, 3, 2)), (8, 3, 4, 4)),
    "linear": (lambda: nn.Linear(8, 16), (8,)),
}


@pytest.mark.parametrize("layer", IN_LYCORIS)
@pytest.mark.parametrize("name", LYCORIS)
def test_a_file_of_lycoris_that_multiplies_predicts_the_same_here(tmp_path, name, layer):
    lycoris, (asked, method, options) = need("lycoris"), LYCORIS[name]
    make, shape = IN_LYCORIS[layer]
    torch.manual_seed(0)
    base, images = nn.Sequential(make()).eval(), torch.randn(2, *shape)
    theirs = copy.deepcopy(base)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        network = lycoris.create_lycoris(theirs, 1.0, linear_dim=4, linear_alpha=2, **asked)
        network.apply_to()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    network.save_weights(str(tmp_path / "file.safetensors"), None, {})
    ours = convlora.load_adapter(copy.deepcopy(base), tmp_path / "file.safetensors").eval()
    (planned,) = convlora.summary(ours).layers
    assert (planned.method, planned.options) == (method, options)
    assert same(theirs, ours, images) and distance(base, ours, images) > 1e-2


def test_a_scale_of_inputs_of_lycoris(tmp_path):
    """LyCORIS writes it and cannot build it from a configuration: W · (1 + w) over inputs, w from zero."""
    torch.manual_seed(0)
    base, images, w = nn.Sequential(nn.Conv2d(8, 12, 3), nn.Flatten(), nn.Linear(12, 4)), torch.randn(2, 8, 3, 3), []
    tensors = {}
    for name, shape in (("0", (1, 8, 1, 1)), ("2", (12,))):
        w.append(torch.randn(shape))
        tensors |= {f"lycoris_{name}.weight": w[-1], f"lycoris_{name}.on_input": torch.tensor(1)}
    save_file(tensors, tmp_path / "file.safetensors")
    theirs = copy.deepcopy(base)
    with torch.no_grad():
        theirs[0].weight.mul_(1 + w[0])
        theirs[2].weight.mul_(1 + w[1])
    assert same(theirs, convlora.load_adapter(base, tmp_path / "file.safetensors").eval(), images)


@pytest.mark.parametrize(
    "parts, message",
    [
        ({"oft_blocks": (3, 4, 2)}, "oft_blocks of shape .3, 4, 2.; they must be square"),
        ({"oft_blocks": (3, 5, 5)}, "rank=5 divides 12, the numbers to turn, into no blocks"),
        ({"oft_blocks": (1, 4, 3, 3)}, "blocks of size 3; a butterfly halves its blocks"),
        ({"oft_blocks": (3, 4, 4), "rescale": (5, 1)}, "rescale of 5 values for 12 output channels"),
        ({"on_input": (), "weight": (1, 5, 1, 1)}, "weight of 5 values for 8 input and 12 output channels"),
        ({"on_input": ()}, "weight is missing"),
    ],
)
def test_tensors_of_lycoris_that_fit_no_method_are_refused(tmp_path, parts, message):
    base = nn.Sequential(nn.Conv2d(8, 12, 3))
    tensors = {f"lycoris_0.{part}": torch.zeros(shape) for part, shape in parts.items()}
    save_file(tensors, tmp_path / "file.safetensors")
    with pytest.raises(CheckpointError, match=message):
        convlora.load_adapter(base, tmp_path / "file.safetensors")


# ---- what a product would not be exactly


ODD = {
    "reflect": (lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect"), r"0: padding_mode 'reflect'"),
    "standardised": (lambda: need("timm.layers").StdConv2d(8, 12, 3), r"0: a StdConv2d with its own forward"),
    "same by itself": (lambda: need("timm.layers").Conv2dSame(8, 12, 3), r"0: a Conv2dSame with its own forward"),
}


@pytest.mark.parametrize("layer", ODD)
@pytest.mark.parametrize("name", ["loha", "lokr", "hira"])
def test_layers_that_pefts_branch_leaves_something_out_of_are_refused_both_ways(tmp_path, name, layer):
    make, reason = ODD[layer]
    base = nn.Sequential(make())
    in_peft(name, base).save_pretrained(tmp_path / "theirs")
    before = snapshot(base)
    with pytest.raises(CheckpointError, match=f"(?s){reason}.*Nothing was changed"):
        convlora.load_adapter(base, tmp_path / "theirs")
    assert snapshot(base) == before
    ours = convlora.inject(base, 2, method=name, modules_to_save=None)
    convlora.save_adapter(randomised(ours, WORDS), tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["peft_type"] == "CONVLORA_ALONE"
    with pytest.raises(convlora.UnsupportedLayerError, match=reason):
        importlib.import_module("convlora.peft").to_peft(ours)


TENSORS = {
    "one missing": ("loha", lambda t: t.pop("0.hada_w1_a"), r"0: hada_w1_a is missing"),
    "half a core": ("loha", lambda t: t.update({"0.hada_t2": torch.ones(3, 3, 3, 3)}), r"0: hada_t1 is missing"),
    "of another layer": (
        "hira",
        lambda t: t.update({"0.hira_A": torch.ones(3, 8, 5, 5)}),
        r"0\.hira_A: \(3, 8, 5, 5\) in the file, \(3, 8, 3, 3\) in the model",
    ),
    "blocks": (
        "lokr full",
        lambda t: t.update({"0.lokr_w1": torch.ones(5, 2)}),
        r"0: lokr_w1 makes 5 by 2 blocks, which do not divide \(12, 8\) channels",
    ),
    "of another method": (
        "loha",
        lambda t: t.update({"0.hira_A": torch.ones(3, 8, 3, 3)}),
        r"0\.hira_A: it belongs neither to a layer's change nor",
    ),
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_are_no_change_of_the_layer_are_named(tmp_path, what):
    name, change, reason = TENSORS[what]
    base, _ = case("3x3")
    in_peft(name, base).save_pretrained(tmp_path)
    file, prefix = tmp_path / "adapter_model.safetensors", "base_model.model."
    tensors = {key.removeprefix(prefix): tensor for key, tensor in load_file(file).items()}
    change(tensors)
    save_file({prefix + key: tensor for key, tensor in tensors.items()}, file)
    with pytest.raises(CheckpointError, match=reason):
        convlora.load_adapter(base, tmp_path)


CONFIGURATIONS = {
    "no alpha": ("loha", {"alpha": 0}, r"alpha=0: it must be a finite number above 0"),
    "no rank": ("lokr", {"r": "8"}, r"r='8': it must be a finite number above 0"),
    "a search": ("lokr full", {"rank_pattern": {"(a+)+$": 2}}, r"rank_pattern: '\(a\+\)\+\$' is a regular expression"),
    "a later field": ("hira", {"alpha": 3}, r"alpha=3: it changes what peft computes, or is unknown here"),
}


@pytest.mark.parametrize("what", CONFIGURATIONS)
def test_configurations_of_a_method_that_mean_more_are_refused(tmp_path, what):
    name, lie, reason = CONFIGURATIONS[what]
    base, _ = case("3x3")
    in_peft(name, base).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | lie))
    with pytest.raises(CheckpointError, match=reason):
        convlora.load_adapter(base, tmp_path)


@pytest.mark.parametrize(
    "methods, options, message",
    [
        (("loha", "hira"), None, r"changed by hira, loha: peft has no such method, or does not combine these"),
        (("lokr", "lokr"), {"rows": 3, "columns": 2}, r"1: peft would give it other blocks and factors"),
        (("lokr", "lokr"), {"tucker": True, "decompose_both": True, "full": True}, None),
        (("lokr", "lokr"), {"factor": 2}, None),
        (("loha", "loha"), {"tucker": True}, None),
    ],
)
def test_what_one_configuration_can_say_is_written_for_stock_peft(tmp_path, methods, options, message):
    peft = need("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(8, 12, 3), nn.Conv2d(12, 30, 1), nn.Flatten())
    net = convlora.inject(
        copy.deepcopy(base),
        3,
        alpha_pattern={"1": 5},
        rank_pattern={"1": 2},
        method=methods[0],
        method_options=options,
        method_pattern=None if methods[0] == methods[1] else {"1": methods[1]},
        modules_to_save=None,
    )
    convlora.save_adapter(randomised(net, WORDS), tmp_path)
    if message is None:
        theirs = peft.PeftModel.from_pretrained(base, tmp_path)
        assert same(net, theirs.eval(), torch.randn(2, 8, 5, 5))
        return
    with pytest.raises(convlora.UnsupportedLayerError, match=message):
        importlib.import_module("convlora.peft").to_peft(net)
