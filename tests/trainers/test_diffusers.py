"""diffusers' models: what is adapted, its LoRA files and LoCon both ways, and what diffusers itself does to a model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import convlora
from convlora import CheckpointError, StateError

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]
ATTENTION = [nn.Conv2d, "*.to_q", "*.to_v", "*.to_out.0"]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
"""They add the branch, and we the weights: other roundings in fp32 through thirty layers."""


def unet(seed: int = 0):
    torch.manual_seed(seed)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()


def batch():
    draw = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, 4, 8, 8, generator=draw),
        torch.tensor([1, 500]),
        torch.randn(2, 3, 8, generator=draw),
    )


@torch.no_grad()
def output(model):
    return model.eval()(*batch()).sample


def moved(model):
    """Factors as a training leaves them."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in convlora.adapter_parameters(model):
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def adapted(**options):
    return moved(convlora.inject(unet(), **{"rank": 8, "alpha": 12, "target_modules": ATTENTION, **options}))


def same(found, expected):
    assert (output(unet()) - expected).abs().max() > 0.05
    torch.testing.assert_close(found, expected, **CLOSE)


def in_lycoris(file):
    """A UNet with what LyCORIS itself reads of a file."""
    lycoris = pytest.importorskip("lycoris")
    model = unet()
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(file), model)
    network.apply_to()
    return model


# ---- what is adapted


def test_a_model_that_comes_trained_whole_has_no_head_and_every_convolution_is_adapted():
    image = diffusers.UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    coder = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    for model in (unet(), image, coder):
        convolutions = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
        plan = convlora.plan(model, 4)
        assert plan.modules_to_save == () and {layer.name for layer in plan.layers} == convolutions


def test_what_a_controlnet_has_beside_its_unet_is_new_until_it_is_trained():
    control = diffusers.ControlNetModel.from_unet(unet(), conditioning_embedding_out_channels=(4, 8))
    new = ("controlnet_cond_embedding", "controlnet_down_blocks", "controlnet_mid_block")
    assert set(convlora.plan(control, 4).modules_to_save) == set(new)
    with torch.no_grad():
        for parameter in control.parameters():
            parameter.add_(0.01)
    assert convlora.plan(control, 4).modules_to_save == ()


# ---- files


@pytest.mark.parametrize("prefix", [None, "unet"])
def test_diffusers_loads_what_is_exported_to_the_same_output(tmp_path, prefix):
    model = adapted(rank_pattern={"*.to_q": 3}, use_rslora=True)
    convlora.set_scale(model, "default", 0.7)
    expected = output(model)
    file = convlora.export_adapter(model, tmp_path / "style.safetensors", "diffusers", prefix=prefix)
    for options in ({}, {"use_safetensors": True}):  # without and with the header's configuration
        theirs = unet()
        theirs.load_lora_adapter(str(file), prefix=prefix, **options)
        same(output(theirs), expected)
    for again in (None, prefix):
        same(output(convlora.load_adapter(unet(), file, prefix=again)), expected)


def test_dora_is_exported_to_lycoris_and_refused_for_diffusers_which_leaves_out_its_magnitudes(tmp_path):
    model = adapted(use_dora=True)
    with pytest.raises(CheckpointError, match="DoRA, whose magnitudes"):
        convlora.export_adapter(model, tmp_path / "style.safetensors", "diffusers")
    file = convlora.export_adapter(model, tmp_path / "style.safetensors", "lycoris")
    same(output(in_lycoris(file)), output(model))
    same(output(convlora.load_adapter(unet(), file)), output(model))


def in_diffusers():
    from peft import LoraConfig

    model = unet()
    targets = ["conv1", "conv2", "to_q", "to_k"]
    model.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=targets, rank_pattern={"to_q": 2}))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def test_what_diffusers_saves_is_read_to_the_same_output(tmp_path):
    theirs = in_diffusers()
    theirs.save_lora_adapter(tmp_path / "model")
    same(output(convlora.load_adapter(unet(), tmp_path / "model")), output(theirs))


@pytest.mark.parametrize("has_metadata", [True, False])
def test_a_pipeline_s_file_of_several_models_is_read_by_prefix(tmp_path, has_metadata):
    from peft import get_peft_model_state_dict

    theirs = in_diffusers()
    layers, config = get_peft_model_state_dict(theirs), theirs.peft_config["default"].to_dict()
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=layers,
        text_encoder_lora_layers={
            "layers.0.q.lora_A.weight": torch.ones(1, 3),
            "layers.0.q.lora_B.weight": torch.ones(3, 1),
        },
        unet_lora_adapter_metadata=config if has_metadata else None,
    )
    with pytest.raises(CheckpointError, match="several models; prefix='text_encoder' or 'unet' chooses"):
        convlora.load_adapter(unet(), tmp_path)
    with pytest.raises(
        CheckpointError, match="prefix='prior': no layer's name begins with it; they begin with 'text_encoder'"
    ):
        convlora.load_adapter(unet(), tmp_path, prefix="prior")
    if not has_metadata:  # as diffusers does, which takes alpha for the rank
        theirs = unet()
        theirs.load_lora_adapter(str(tmp_path / "pytorch_lora_weights.safetensors"), prefix="unet")
    same(output(convlora.load_adapter(unet(), tmp_path, prefix="unet")), output(theirs))


def test_a_kohya_file_with_text_encoder_keys_is_read_by_prefix(tmp_path):
    model = adapted()
    file = convlora.export_adapter(model, tmp_path / "style.safetensors", "lycoris", prefix="lora_unet")
    tensors = load_file(file)
    assert all(key.startswith("lora_unet_") for key in tensors)
    text = {
        "lora_te_layers_0_q.lora_down.weight": torch.ones(1, 3),
        "lora_te_layers_0_q.lora_up.weight": torch.ones(3, 1),
    }
    save_file(tensors | text, file)
    with pytest.raises(CheckpointError, match="several models; prefix='lora_te' or 'lora_unet' chooses"):
        convlora.load_adapter(unet(), file)
    same(output(convlora.load_adapter(unet(), file, prefix="lora_unet")), output(model))
    encoder = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(3, 3)})])})
    assert [each.name for each in convlora.summary(convlora.load_adapter(encoder, file, prefix="lora_te")).layers] == [
        "layers.0.q"
    ]


def test_damaged_metadata_and_a_prefix_for_a_file_of_one_model_are_refused(tmp_path):
    model = adapted()
    file = convlora.export_adapter(model, tmp_path / "style.safetensors", "diffusers")
    save_file(load_file(file), tmp_path / "bad.safetensors", metadata={"lora_adapter_metadata": "["})
    with pytest.raises(CheckpointError, match="lora_adapter_metadata cannot be read"):
        convlora.load_adapter(unet(), tmp_path / "bad.safetensors")
    convlora.save_adapter(model, tmp_path / "ours")
    with pytest.raises(CheckpointError, match="holds the adapter of one model"):
        convlora.load_adapter(unet(), tmp_path / "ours", prefix="unet")


@pytest.mark.parametrize("to", ["diffusers", "lycoris"])
def test_what_has_no_place_in_a_file_is_named_and_nothing_is_written(tmp_path, to):
    file = tmp_path / "style.safetensors"
    for options, reason in (
        ({"modules_to_save": "conv_out"}, "conv_out: trained in full; inject with modules_to_save=None"),
        ({"method": "hira"}, "changed by hira"),
    ):
        with pytest.raises(CheckpointError, match=f"(?s){reason}.*Nothing was written"):
            convlora.export_adapter(adapted(**options), file, to)
    assert not file.exists()


def test_the_configuration_in_an_exported_header_is_peft_s(tmp_path):
    file = convlora.export_adapter(adapted(), tmp_path / "style.safetensors", "diffusers", prefix="unet")
    with safe_open(file, "pt") as opened:
        fields = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert fields["unet.peft_type"] == "LORA" and fields["unet.r"] == fields["unet.lora_alpha"] == 8


# ---- what diffusers does to an injected model


def test_copies_by_diffusers_end_in_an_error_with_the_remedy_and_are_right_when_merged(tmp_path):
    model = adapted()
    expected = output(model)
    for copy in (
        lambda: model.save_pretrained(tmp_path / "saved"),
        lambda: diffusers.ControlNetModel.from_unet(model),
        model.fuse_qkv_projections,
    ):
        with pytest.raises(StateError, match=r"convlora\.merge\(model\) first"):
            copy()
    model.state_dict()  # by anyone else
    convlora.merge(model)
    model.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(output(diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "saved")), expected)
    control = diffusers.ControlNetModel.from_unet(model)
    assert torch.equal(control.conv_in.weight, model.conv_in.weight)
    convlora.unmerge(model)
    assert torch.equal(output(model), expected)


def test_checkpointing_half_precision_and_averages_of_the_factors():
    from diffusers.training_utils import EMAModel

    model = adapted()
    gradients = []
    for enable in (False, True):
        if enable:
            model.enable_gradient_checkpointing()
        model.train()(*batch()).sample.square().mean().backward()
        gradients.append([p.grad.clone() for p in convlora.adapter_parameters(model)])
        model.zero_grad()
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)
    factors = list(convlora.trainable_parameters(model))
    before, expected = [p.detach().clone() for p in factors], output(model)
    average = EMAModel(factors)
    with torch.no_grad():
        for p in factors:
            p.add_(1)
    average.store(factors)
    average.copy_to(factors)
    assert all(map(torch.equal, factors, before))
    assert torch.equal(output(model), expected)
    images, times, words = batch()
    with torch.no_grad():
        half = model.to(torch.bfloat16)(images.bfloat16(), times, words.bfloat16()).sample
    assert half.dtype == torch.bfloat16 and (half.float() - expected).abs().max() < 0.1 * expected.abs().max()


# ---- a training


def test_twenty_steps_then_files_that_diffusers_and_lycoris_load_to_the_same_output(tmp_path):
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=100)
    model = convlora.inject(unet(), 4, target_modules=ATTENTION)
    base = {name: p.clone() for name, p in unet().named_parameters()}
    optimizer = torch.optim.AdamW(convlora.trainable_parameters(model), lr=5e-3)
    torch.manual_seed(3)
    latents, words = torch.randn(4, 4, 8, 8), torch.randn(4, 3, 8)
    noise, times = torch.randn_like(latents), torch.tensor([5, 30, 60, 95])
    noisy = scheduler.add_noise(latents, noise, times)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(model.train()(noisy, times, words).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
    expected = output(model)
    assert (output(unet()) - expected).abs().max() > 1e-2

    theirs = unet()
    file = convlora.export_adapter(model, tmp_path / "diffusers.safetensors", "diffusers", prefix="unet")
    theirs.load_lora_adapter(str(file), prefix="unet")
    torch.testing.assert_close(output(theirs), expected, **CLOSE)

    file = convlora.export_adapter(model, tmp_path / "locon.safetensors", "lycoris")
    torch.testing.assert_close(output(in_lycoris(file)), expected, **CLOSE)
    same_again = convlora.load_adapter(unet(), file)
    torch.testing.assert_close(output(same_again), expected, **CLOSE)
