"""Files of LyCORIS, as LyCORIS itself writes them and as kohya's scripts name them: each method and each refusal."""

import copy

import pytest
import torch
from conftest import need, snapshot, thorough
from safetensors.torch import save_file
from torch import nn

import convlora
from convlora import CheckpointError

timm = need("timm")
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def file_of_lycoris(base, path, **options):
    """What LyCORIS predicts with random factors, unmerged, and the file that it writes."""
    lycoris = need("lycoris")
    torch.manual_seed(1)
    model = copy.deepcopy(base)
    network = lycoris.create_lycoris(model, 1.0, linear_dim=4, linear_alpha=2, algo="lora", conv_dim=3, **options)
    network.apply_to()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter))
        expected = model.eval()(IMAGES)
    network.save_weights(str(path), torch.float32, {})
    return expected


def refused(base, tensors, reason, folder):
    """The file that ``tensors`` makes for this base is refused with the reason, and the base is as it was."""
    save_file(tensors(base), folder / "x.safetensors")
    before = snapshot(base)
    with pytest.raises(CheckpointError, match=f"(?s){reason}.*Nothing was changed"):
        convlora.load_adapter(base, folder / "x.safetensors")
    assert snapshot(base) == before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [thorough("resnet18"), "mobilenetv3_small_050"])
@pytest.mark.parametrize("use_tucker", [False, True])
def test_a_file_of_lycoris_predicts_the_same(tmp_path, name, use_tucker):
    torch.manual_seed(0)
    base = timm.create_model(name, num_classes=2).eval()
    path = tmp_path / "lycoris.safetensors"
    expected = file_of_lycoris(base, path, conv_alpha=1.5, use_tucker=use_tucker)
    ours = convlora.load_adapter(copy.deepcopy(base), path).eval()
    with torch.no_grad():
        # LyCORIS sums W + ΔW, too, in another order
        assert (ours(IMAGES) - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)
        assert (base(IMAGES) - expected).abs().max() > 0.01 * expected.abs().max()
    convlora.save_adapter(ours, tmp_path / "ours")
    again = convlora.load_adapter(copy.deepcopy(base), tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(again(IMAGES), ours(IMAGES))
    with torch.no_grad():  # also by the directory that holds the file alone
        assert torch.equal(convlora.load_adapter(base, tmp_path).eval()(IMAGES), ours(IMAGES))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.ModuleDict({"conv_in": nn.Conv2d(3, 4, 3), "proj": nn.Conv2d(4, 5, 1)})
        self.wide = nn.Conv2d(5, 4, 3, groups=1, dilation=2)
        self.pad = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")

    def forward(self, x):
        return self.pad(self.wide(self.down.proj(self.down.conv_in(x)))).mean((2, 3))


def kohya(name, module, rank=2, alpha=3.0, prefix="lora_unet_"):
    torch.manual_seed(2)
    shape = module.weight.shape
    return {
        f"{prefix}{name}.lora_down.weight": torch.randn(rank, *shape[1:]),
        f"{prefix}{name}.lora_up.weight": torch.randn(shape[0], rank, *[1] * len(shape[2:])),
        f"{prefix}{name}.alpha": torch.tensor(alpha),
    }


def test_kohya_s_tensors_are_the_change_that_they_define(tmp_path):
    base = Net()
    tensors = kohya("down_conv_in", base.down.conv_in) | kohya("down_proj", base.down.proj)
    for part in ("down", "up"):  # 1×1 convolutions are written as matrices by some versions
        key = f"lora_unet_down_proj.lora_{part}.weight"
        tensors[key] = tensors[key].flatten(1)
    save_file(tensors, tmp_path / "style.safetensors")
    model = convlora.load_adapter(copy.deepcopy(base), tmp_path / "style.safetensors", adapter_name="style")
    for name, layer in base.down.items():
        down, up = (tensors[f"lora_unet_down_{name}.lora_{part}.weight"].flatten(1) for part in ("down", "up"))
        expected = layer.weight + 3.0 / 2 * (up @ down).view(layer.weight.shape)
        torch.testing.assert_close(model.down[name].weight, expected)


def test_without_alpha_nothing_is_scaled(tmp_path):
    base = Net()
    tensors = kohya("down_conv_in", base.down.conv_in)
    del tensors["lora_unet_down_conv_in.alpha"]
    save_file(tensors, tmp_path / "x.safetensors")
    model = convlora.load_adapter(base, tmp_path / "x.safetensors")
    assert model.down.conv_in.convlora["default"].scaling == 1.0


def tucker_of_wrong_shape(base):
    return kohya("down_conv_in", base.down.conv_in) | {"lora_unet_down_conv_in.lora_mid.weight": torch.ones(2, 7, 3, 3)}


@pytest.mark.parametrize(
    "tensors, reason",
    [
        (lambda b: kohya("up_conv", b.down.conv_in), r"lora_unet_up_conv: no such layer"),
        (lambda b: kohya("wide", b.wide), r"wide: dilation \(2, 2\), which the branch beside the layer drops"),
        (lambda b: kohya("pad", b.pad, prefix="lycoris_"), r"pad: padding_mode 'circular', which the branch beside"),
        (lambda b: kohya("down_conv_in", b.wide), r"down\.conv_in\.lora_A\.weight: \(2, 5, 3, 3\) in the file"),
        (
            lambda b: kohya("down_proj", b.down.proj) | {"lora_unet_down_proj.hada_w1_a": torch.ones(4, 1)},
            r"lora_unet_down_proj: alpha, hada_w1_a, lora_down\.weight, lora_up\.weight: no method has these",
        ),
        (
            lambda b: dict(list(kohya("down_proj", b.down.proj).items())[:1]),
            r"down\.proj: lora_up\.weight is missing",
        ),
        (
            lambda b: kohya("down_proj", b.down.proj) | kohya("down_proj", b.down.proj, prefix="lora_te_"),
            r"its layers are of several models; prefix='lora_te' or 'lora_unet' chooses",
        ),
        (tucker_of_wrong_shape, r"down\.conv_in: its Tucker core \(2, 7, 3, 3\) does not fit"),
        (lambda b: {"x": torch.ones(1)}, r"holds no convlora manifest, peft's adapter_config\.json is not beside it"),
    ],
)
def test_what_is_not_exact_or_does_not_fit_is_refused(tmp_path, tensors, reason):
    refused(Net(), tensors, reason, tmp_path)


def test_names_that_fall_together_are_refused(tmp_path):
    base = nn.ModuleDict({"a_b": nn.Conv2d(3, 4, 3), "a": nn.ModuleDict({"b": nn.Conv2d(3, 4, 3)})})
    save_file(kohya("a_b", base["a_b"]), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"lora_unet_a_b: could be a_b or a\.b"):
        convlora.load_adapter(base, tmp_path)


def test_several_files_are_not_guessed_from(tmp_path):
    base = Net()
    for name in ("x", "y"):
        save_file(kohya("wide", base.wide), tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"several files \(x\.safetensors, y\.safetensors\); give one of them"):
        convlora.load_adapter(base, tmp_path)


def test_a_damaged_file(tmp_path):
    base = Net()
    path = tmp_path / "x.safetensors"
    save_file(kohya("wide", base.wide), path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged or no safetensors file"):
        convlora.load_adapter(base, path)


# ---- methods

LAYERS = {
    "3x3": (lambda: nn.Conv2d(8, 12, 3, padding=1), (8, 6, 7)),
    "strided, dilated, not square": (lambda: nn.Conv2d(8, 12, (3, 2), (2, 1), (1, 0), (1, 2)), (8, 6, 7)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=2), (8, 6, 7)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), (8, 6, 7)),
    "1x1": (lambda: nn.Conv2d(8, 12, 1, bias=False), (8, 6, 7)),
    "1-d": (lambda: nn.Conv1d(8, 12, 3), (8, 7)),
    "3-d": (lambda: nn.Conv3d(8, 12, (1, 3, 2)), (8, 5, 5, 5)),
    "linear": (lambda: nn.Linear(8, 12), (8,)),
}
METHODS = {
    "lora": {"algo": "lora"},
    "lora, scalar": {"algo": "lora", "use_scalar": True},
    "lora, tucker": {"algo": "lora", "use_tucker": True},
    "lora, dora": {"algo": "lora", "dora_wd": True},
    "loha": {"algo": "loha"},
    "loha, scalar": {"algo": "loha", "use_scalar": True},
    "loha, tucker": {"algo": "loha", "use_tucker": True},
    "loha, dora": {"algo": "loha", "dora_wd": True},
    "lokr": {"algo": "lokr", "linear_dim": 1},
    "lokr, full": {"algo": "lokr", "full_matrix": True},
    "lokr, tucker": {"algo": "lokr", "linear_dim": 1, "use_tucker": True, "factor": 2},
    "lokr, both": {"algo": "lokr", "linear_dim": 1, "decompose_both": True, "factor": 4},
    "lokr, unbalanced": {"algo": "lokr", "linear_dim": 1, "unbalanced_factorization": True, "factor": 2},
    "lokr, dora": {"algo": "lokr", "linear_dim": 1, "dora_wd": True},
    "full": {"algo": "full"},
}
"""What LyCORIS is asked for; all forms that its files have of a method."""


def in_lycoris(base, path, images, **asked):
    """What LyCORIS' own forward predicts with random numbers, and the file that it writes."""
    lycoris = need("lycoris")
    torch.manual_seed(1)
    model = copy.deepcopy(base)
    options = {"linear_dim": 2, "linear_alpha": 3, **asked}
    network = lycoris.create_lycoris(model, 1.0, **options)
    network.apply_to()
    network.eval()
    assert network.loras
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        expected = model(images)
    network.save_weights(str(path), torch.float32, {})
    return expected


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", METHODS)
def test_each_method_of_lycoris_predicts_the_same_here(tmp_path, name, layer):
    make, shape = LAYERS[layer]
    torch.manual_seed(0)
    base, images = nn.Sequential(make()).eval(), torch.randn(2, *shape)
    expected = in_lycoris(base, tmp_path / "theirs.safetensors", images, **METHODS[name])
    ours = convlora.load_adapter(copy.deepcopy(base), tmp_path / "theirs.safetensors").eval()
    with torch.no_grad():
        found = ours(images)
        # LyCORIS adds op(x, W' - W) to the layer's own output: last bits, relative to the output
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max().clamp(min=1)
        assert (base(images) - expected).abs().max() > 1e-3
    convlora.save_adapter(ours, tmp_path / "ours")
    again = convlora.load_adapter(base, tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(again(images), found)


def named(layer, **tensors):
    return {f"lycoris_{layer}.{part.replace('__', '.')}": tensor for part, tensor in tensors.items()}


def loha(layer, module, rank=2):
    rows, columns = module.weight.shape[0], module.weight[0].numel()
    sides = {"a": (rows, rank), "b": (rank, columns)}
    return named(layer, **{f"hada_w{i}_{side}": torch.randn(shape) for i in (1, 2) for side, shape in sides.items()})


def lokr(layer, w1=(2, 2), w2=(2, 2, 3, 3)):
    return named(layer, lokr_w1=torch.randn(w1), lokr_w2=torch.randn(w2))


def without(tensors, part):
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(part)}


class Square(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.pad = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", bias=False)
        self.std = timm.layers.StdConv2d(4, 4, 3)
        self.same = timm.layers.Conv2dSame(4, 4, 3, stride=2)
        self.norm = nn.GroupNorm(2, 4)


ALL_REASONS = {
    "LoHa, padding mode": (lambda b: loha("pad", b.pad), r"pad: padding_mode 'reflect', which the branch beside"),
    "LoKr, padding mode": (lambda b: lokr("pad"), r"pad: padding_mode 'reflect'"),
    "full, padding mode": (lambda b: named("pad", diff=torch.ones(4, 4, 3, 3)), r"pad: padding_mode 'reflect'"),
    "subclass": (lambda b: loha("std", b.std), r"std: a StdConv2d with its own forward, from which a branch"),
    "same": (lambda b: loha("same", b.same), r"same: a Conv2dSame with its own forward"),
    "norm": (
        lambda b: named("norm", w_norm=torch.ones(4), b_norm=torch.ones(4)),
        r"lycoris_norm: norm: differences of a norm layer are not read",
    ),
    "GLoRA": (
        lambda b: named("conv", a1__weight=torch.ones(4, 2), a2__weight=torch.ones(2, 4), b1__weight=torch.ones(4, 2)),
        r"lycoris_conv: GLoRA: convlora has no such method",
    ),
    "T-LoRA": (
        lambda b: named("conv", q_layer__weight=torch.ones(2, 4), lambda_layer=torch.ones(1, 2)),
        r"lycoris_conv: T-LoRA: its change is relative to its initial factors",
    ),
    "DyLoRA": (
        lambda b: named("conv", lora_up__weight=torch.ones(4, 2), lora_down__weight=torch.ones(2, 4, 3, 3)),
        r"conv: DyLoRA, which computes with a random part of its rank in each step",
    ),
    "two methods in one layer": (
        lambda b: loha("conv", b.conv) | lokr("conv"),
        r"lycoris_conv: hada_w1_a, .*lokr_w2: no method has these tensors together",
    ),
    "magnitudes of inputs": (
        lambda b: loha("conv", b.conv) | named("conv", dora_scale=torch.ones(1, 4, 1, 1)),
        r"conv: DoRA's magnitudes \(1, 4, 1, 1\); there must be one for each output channel",
    ),
    "LoHa, one missing": (
        lambda b: without(loha("conv", b.conv), "w2_b"),
        r"conv: hada_w2_b is missing",
    ),
    "LoHa, half a core": (
        lambda b: loha("conv", b.conv) | named("conv", hada_t1=torch.ones(2, 2, 3, 3)),
        r"conv: hada_t2 is missing",
    ),
    "LoHa, of another layer": (
        lambda b: without(loha("conv", b.conv), "w1_b") | named("conv", hada_w1_b=torch.ones(2, 4)),
        r"conv\.hada_w1_b: \(2, 4\) in the file, \(2, 36\) in the model",
    ),
    "LoKr, blocks": (
        lambda b: lokr("conv", w1=(3, 2)),
        r"conv: lokr_w1 makes 3 by 2 blocks, which do not divide \(4, 4\) channels",
    ),
    "LoKr, a number": (lambda b: lokr("conv", w1=()), r"conv: lokr_w1 makes 0 by 0 blocks"),
    "LoKr, two forms": (
        lambda b: lokr("conv") | named("conv", lokr_w2_a=torch.ones(2, 1)),
        r"conv: lokr_w2_a does not belong|conv: lokr_w2_b is missing",
    ),
    "LoKr, factors that multiply to more than the layer": (
        lambda b: named(
            "conv", lokr_w1=torch.ones(2, 2), lokr_w2_a=torch.ones(10**5, 1), lokr_w2_b=torch.ones(1, 10**5)
        ),
        r"conv: lokr_w2's factors have the shapes \[\(100000, 1\), \(1, 100000\)\]; this layer's would",
    ),
    "full, of another layer": (
        lambda b: named("conv", diff=torch.ones(4, 4)),
        r"conv: diff \(4, 4\) in the file, the weight is \(4, 4, 3, 3\)",
    ),
    "full, a bias that is not there": (
        lambda b: named("conv", diff=torch.ones(4, 4, 3, 3), diff_b=torch.ones(3)),
        r"conv: the file changes a bias \(3,\), which the layer does not have",
    ),
    "core in float8": (
        lambda b: (
            named("conv", lora_up__weight=torch.ones(4, 2, 1, 1), lora_down__weight=torch.ones(2, 4, 1, 1))
            | named("conv", lora_mid__weight=torch.ones(2, 2, 3, 3).to(torch.float8_e4m3fn))
        ),
        r"conv: lora_mid\.weight is of torch\.float8_e4m3fn, with which torch does not compute",
    ),
    "alpha": (
        lambda b: loha("conv", b.conv) | named("conv", alpha=torch.tensor(float("inf"))),
        r"conv: alpha=inf; it must be a finite number above 0",
    ),
}


@pytest.mark.parametrize("what", ALL_REASONS)
def test_what_a_method_of_lycoris_is_not_exact_in_is_refused_with_its_reason(tmp_path, what):
    tensors, reason = ALL_REASONS[what]
    refused(Square(), tensors, reason, tmp_path)


def test_several_methods_in_one_file(tmp_path):
    base = Square()
    difference, bias = torch.randn(4, 4, 3, 3), torch.randn(4)
    tensors = loha("conv", base.conv) | lokr("std") | named("norm", w_norm=torch.ones(4))
    base.std, base.same = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)
    tensors = without(tensors, "w_norm") | named("same", diff=torch.ones(4, 4, 1, 1), diff_b=bias)
    tensors |= named("pad", diff=difference)
    base.pad.padding_mode = "zeros"
    save_file(tensors, tmp_path / "x.safetensors")
    model = convlora.load_adapter(copy.deepcopy(base), tmp_path / "x.safetensors")
    methods = {layer.name: layer.method for layer in convlora.summary(model).layers}
    assert methods == {"conv": "loha", "std": "lokr", "same": "dense", "pad": "dense"}
    torch.testing.assert_close(model.pad.weight, base.pad.weight + difference)
    assert torch.equal(model.same.bias, base.same.bias + bias) and model.same.bias.requires_grad
    with convlora.disable_adapter(model):
        assert torch.equal(model.same.bias, base.same.bias)
    assert convlora.summary(model).biases == ("same",)
