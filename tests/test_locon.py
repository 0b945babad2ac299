"""LoCon files, as LyCORIS itself writes them and as kohya's scripts name them."""

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
        (lambda b: kohya("up_conv", b.down.conv_in), r"lora_unet_up_conv: no such layer.*split by prefix"),
        (lambda b: kohya("wide", b.wide), r"wide: dilation \(2, 2\), which the branch beside the layer drops"),
        (lambda b: kohya("pad", b.pad, prefix="lycoris_"), r"pad: padding_mode 'circular', which the branch beside"),
        (lambda b: kohya("down_conv_in", b.wide), r"down\.conv_in\.lora_A\.weight: \(2, 5, 3, 3\) in the file"),
        (
            lambda b: kohya("down_proj", b.down.proj) | {"lora_unet_down_proj.hada_w1_a": torch.ones(4, 1)},
            r"lora_unet_down_proj: alpha, hada_w1_a, lora_down\.weight, lora_up\.weight: together of no method",
        ),
        (
            lambda b: dict(list(kohya("down_proj", b.down.proj).items())[:1]),
            r"down\.proj: lora_up\.weight is missing",
        ),
        (
            lambda b: kohya("down_proj", b.down.proj) | kohya("down_proj", b.down.proj, prefix="lora_te_"),
            r"lora_(te|unet)_down_proj: down\.proj is in the file twice",
        ),
        (tucker_of_wrong_shape, r"down\.conv_in: its Tucker core \(2, 7, 3, 3\) fits no"),
        (lambda b: {"x": torch.ones(1)}, r"holds no convlora manifest, no adapter_config\.json of peft lies beside it"),
    ],
)
def test_what_is_not_exact_or_does_not_fit_is_refused(tmp_path, tensors, reason):
    base = Net()
    save_file(tensors(base), tmp_path / "x.safetensors")
    before = snapshot(base)
    with pytest.raises(CheckpointError, match=f"(?s){reason}.*Nothing was changed"):
        convlora.load_adapter(base, tmp_path / "x.safetensors")
    assert snapshot(base) == before


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
