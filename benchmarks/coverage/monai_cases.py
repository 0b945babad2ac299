"""MONAI's networks for volumes and pictures, as small as possible; and nnU-Net's, from their own package."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from .cases import BATCH, Case, Sample, images, noise

Build = Callable[[Any], nn.Module]
Recipe = tuple[Build, Callable[[int], Sample], tuple[int, ...]]

FLAT, DEEP = images(1), images(1, 32)
CHANNELS: dict[str, Any] = {"channels": (8, 16, 32), "strides": (2, 2)}
STAGES: dict[str, Any] = {"channels": (16, 16, 32), "attention_levels": (False, False, True), "norm_num_groups": 8}
DIFFUSION: dict[str, Any] = {**STAGES, "num_res_blocks": 1, "num_head_channels": 8}
LATENT: dict[str, Any] = {**STAGES, "num_res_blocks": 1, "latent_channels": 4}


def volume(size: int) -> Sample:
    """Two cubic volumes of one channel."""
    return Sample((noise(BATCH, 1, size, size, size),))


def noisy(size: int) -> Sample:
    """Two pictures and their diffusion steps."""
    return Sample((noise(BATCH, 1, size, size),), {"timesteps": torch.tensor([3, 7])})


def controlled(size: int) -> Sample:
    """Two pictures with their diffusion steps and control pictures."""
    control = noise(BATCH, 1, 4 * size, 4 * size)
    return Sample((noise(BATCH, 1, size, size), torch.tensor([3, 7]), control))


def labelled(size: int) -> Sample:
    """Two pictures, and the three classes of their pixels."""
    classes = torch.arange(3).view(1, 3, 1, 1) == (noise(BATCH, 1, size, size) > 0)
    return Sample((noise(BATCH, 1, size, size), classes.float()))


def labelled_noisy(size: int) -> Sample:
    """Two pictures with their diffusion steps and the classes of their pixels."""
    picture, classes = labelled(size).args
    return Sample((picture, torch.tensor([3, 7]), classes))


def latent(size: int) -> Sample:
    """Two vectors of 8 numbers."""
    return Sample((noise(BATCH, 8),))


def bag(size: int) -> Sample:
    """Two bags of three pictures."""
    return Sample((noise(BATCH, 3, 3, size, size),))


def pair(size: int) -> Sample:
    """Two pairs of a moving and a fixed picture."""
    return Sample((noise(BATCH, 1, size, size), noise(BATCH, 1, size, size).flip(-1)))


def cases() -> list[Case]:
    """All cases; none if a package is missing."""
    if not (find_spec("monai") and find_spec("dynamic_network_architectures")):
        return []
    from monai.networks import nets

    found: dict[str, Recipe] = {}

    def add(name: str, make: Build, sample: Callable[[int], Sample], *sizes: int) -> None:
        found[name] = make, sample, sizes

    for dims, sample, label in ((2, FLAT, "2d"), (3, volume, "3d")):
        size = 32
        one_in = {"spatial_dims": dims, "in_channels": 1}
        one_out = {**one_in, "out_channels": 1}
        add(f"UNet-{label}", partial(nets.UNet, **one_out, **CHANNELS, num_res_units=2), sample, size)
        add(f"AttentionUnet-{label}", partial(nets.AttentionUnet, **one_out, **CHANNELS), sample, size)
        add(f"BasicUNet-{label}", partial(nets.BasicUNet, **one_out, features=(8, 8, 16, 16, 32, 8)), sample, size)
        kernels: dict[str, Any] = {"kernel_size": (3, 3, 3), "strides": (1, 2, 2), "upsample_kernel_size": (2, 2)}
        supervised = {"deep_supervision": True, "deep_supr_num": 1, "filters": (8, 16, 32)}
        add(f"DynUNet-{label}", partial(nets.DynUNet, **one_out, **kernels, **supervised), sample, size)
        add(f"SegResNet-{label}", partial(nets.SegResNet, **one_out, init_filters=8), sample, size)
        add(
            f"DenseNet121-{label}",
            partial(nets.DenseNet, **one_out, block_config=(2, 2), init_features=16),
            sample,
            size,
        )
        flat = dims == 2
        resnet = partial(nets.resnet10, spatial_dims=dims, n_input_channels=1, num_classes=2)
        add(f"ResNet10-{label}", resnet, sample, 64 if flat else size)
        add(f"SwinUNETR-{label}", partial(nets.SwinUNETR, **one_out, feature_size=12, depths=(1, 1, 1, 1)), sample, 64)
    add(
        "BasicUNetPlusPlus",
        partial(nets.BasicUNetPlusPlus, **FLAT_ONE, features=(8, 8, 16, 16, 32, 8), deep_supervision=True),
        FLAT,
        32,
    )
    add(
        "SegResNetDS", partial(nets.SegResNetDS, **FLAT_ONE, init_filters=8, blocks_down=(1, 1, 1), dsdepth=2), FLAT, 32
    )
    vae = partial(nets.SegResNetVAE, (32, 32), spatial_dims=2, init_filters=8, vae_nz=16)
    add("SegResNetVAE", vae, FLAT, 32)
    vit: dict[str, Any] = {"hidden_size": 32, "mlp_dim": 64, "num_heads": 2}
    add("UNETR-3d", partial(nets.UNETR, 1, 1, 32, feature_size=8, **vit), volume, 32)
    add("VNet-3d", nets.VNet, volume, 32)
    layers = [
        {"name": "conv_0", "n_features": 8, "kernel_size": 3},
        {"name": "conv_1", "n_features": 16, "kernel_size": 1},
    ]
    blocks = [{"name": f"res_{n}", "n_features": 8 * n, "kernels": (3, 3), "repeat": 1} for n in (1, 2)]
    highres = [layers[0], *blocks, layers[1], {"name": "conv_2", "kernel_size": 1}]
    add("HighResNet-3d", partial(nets.HighResNet, layer_params=highres), volume, 16)
    add("FlexibleUNet", partial(nets.FlexibleUNet, 3, 1, "efficientnet-b0"), images(3), 64)
    add(
        "EfficientNetBN-b0",
        partial(nets.EfficientNetBN, "efficientnet-b0", pretrained=False, num_classes=2),
        images(3),
        64,
    )
    senet = partial(nets.SENet, 2, 1, "se_resnet_bottleneck", (1, 1, 1, 1), 1, 16, inplanes=16, num_classes=2)
    add("SENet", senet, FLAT, 64)
    add("TorchVisionFCModel", partial(nets.TorchVisionFCModel, "resnet18", num_classes=2, pool=None), images(3), 64)
    add("MILModel", partial(nets.MILModel, 2, mil_mode="att", pretrained=False, backbone="resnet18"), bag, 64)
    add(
        "ViT",
        partial(nets.ViT, 1, (32, 32), (8, 8), **vit, num_layers=2, classification=True, spatial_dims=2),
        FLAT,
        32,
    )
    add("ViTAutoEnc", partial(nets.ViTAutoEnc, 1, (32, 32), (4, 4), **vit, num_layers=2, spatial_dims=2), FLAT, 32)
    add("AutoEncoder", partial(nets.AutoEncoder, **FLAT_ONE, channels=(8, 16), strides=(2, 2)), FLAT, 32)
    add("VarAutoEncoder", partial(nets.VarAutoEncoder, 2, (1, 32, 32), 1, 8, (8, 16), (2, 2)), FLAT, 32)
    add("AutoencoderKL", partial(nets.AutoencoderKL, **FLAT_ONE, **LATENT), FLAT, 32)
    residual = {"num_res_layers": 1, "num_res_channels": (16, 16), "num_embeddings": 32, "embedding_dim": 8}
    scales = {"downsample_parameters": ((2, 4, 1, 1),) * 2, "upsample_parameters": ((2, 4, 1, 1, 0),) * 2}
    add("VQVAE", partial(nets.VQVAE, **FLAT_ONE, channels=(16, 16), **residual, **scales), FLAT, 32)
    add("DiffusionModelUNet", partial(nets.DiffusionModelUNet, **FLAT_ONE, **DIFFUSION), noisy, 16)
    control = {"conditioning_embedding_in_channels": 1, "conditioning_embedding_num_channels": (8, 16, 16)}
    add("ControlNet", partial(nets.ControlNet, 2, 1, **DIFFUSION, **control), controlled, 16)
    spade = partial(nets.SPADEDiffusionModelUNet, **FLAT_ONE, label_nc=3, **DIFFUSION)
    add("SPADEDiffusionModelUNet", spade, labelled_noisy, 16)
    add("SPADEAutoencoderKL", partial(nets.SPADEAutoencoderKL, **FLAT_ONE, label_nc=3, **LATENT), labelled, 32)
    add("PatchDiscriminator", partial(nets.PatchDiscriminator, 2, 8, 1), FLAT, 64)
    scale = partial(nets.MultiScalePatchDiscriminator, 2, 2, 2, 8, 1, minimum_size_im=64)
    add("MultiScalePatchDiscriminator", scale, FLAT, 64)
    add("Generator", partial(nets.Generator, (8,), (16, 8, 8), (16, 8, 1), (2, 2, 1)), latent, 8)
    for name, more in (("Discriminator", ()), ("Critic", ()), ("Classifier", (3,)), ("Regressor", ((2,),))):
        add(name, partial(getattr(nets, name), (1, 32, 32), *more, (8, 16), (2, 2)), FLAT, 32)
    add("MedNeXt-3d", partial(nets.MedNeXt, init_filters=8, deep_supervision=True, **SMALL_BLOCKS), volume, 32)
    add("RegUNet", partial(nets.RegUNet, 2, 1, 8, 2, out_channels=2), FLAT, 32)
    add("GlobalNet", partial(nets.GlobalNet, [32, 32], 2, 1, 8, 2), FLAT, 32)
    add("LocalNet", partial(nets.LocalNet, 2, 1, 8, (0, 1, 2), out_channels=2), FLAT, 32)
    add("VoxelMorph", partial(_voxelmorph, nets), pair, 64)
    add("MaskedAutoEncoderViT", partial(nets.MaskedAutoEncoderViT, 1, (32, 32), (8, 8), **vit, **MASKED), FLAT, 32)
    add("Restormer", partial(_restormer), FLAT, 32)
    found = {f"monai/{name}": recipe for name, recipe in found.items()} | _nnunet()
    return [Case(name, partial(_made, make), sample, sizes) for name, (make, sample, sizes) in found.items()]


FLAT_ONE: dict[str, Any] = {"spatial_dims": 2, "in_channels": 1, "out_channels": 1}
SMALL_BLOCKS: dict[str, Any] = {"blocks_down": (1, 1), "blocks_bottleneck": 1, "blocks_up": (1, 1), "kernel_size": 3}
MASKED: dict[str, Any] = {
    "num_layers": 2,
    "decoder_hidden_size": 32,
    "decoder_mlp_dim": 64,
    "decoder_num_layers": 1,
    "decoder_num_heads": 2,
    "spatial_dims": 2,
}


def _made(make: Build, size: int) -> nn.Module:
    return make()  # type: ignore[call-arg]


def _voxelmorph(nets: Any) -> nn.Module:
    inner = nets.VoxelMorphUNet(2, 2, 8, (8, 8, 16, 16, 16, 8), (8, 8))
    return nets.VoxelMorph(inner, integration_steps=2, spatial_dims=2)  # type: ignore[no-any-return]


def _restormer() -> nn.Module:
    from monai.networks.nets.restormer import Restormer

    return Restormer(2, 1, 1, 8, (1, 1, 1), (1, 2, 2), num_refinement_blocks=1)  # type: ignore[no-any-return]


def _nnunet() -> dict[str, Recipe]:
    from dynamic_network_architectures.architectures import resnet, unet, vgg

    found: dict[str, Recipe] = {}
    for label, conv, norm, sample in (
        ("2d", nn.Conv2d, nn.InstanceNorm2d, FLAT),
        ("3d", nn.Conv3d, nn.InstanceNorm3d, volume),
    ):
        common: dict[str, Any] = {
            "input_channels": 1,
            "n_stages": 3,
            "features_per_stage": (8, 16, 32),
            "conv_op": conv,
            "kernel_sizes": 3,
            "strides": (1, 2, 2),
            "num_classes": 2,
            "n_conv_per_stage_decoder": 1,
            "conv_bias": True,
            "norm_op": norm,
            "norm_op_kwargs": {"affine": True},
            "nonlin": nn.LeakyReLU,
            "deep_supervision": True,
        }
        plain = partial(unet.PlainConvUNet, **common, n_conv_per_stage=1)
        residual = partial(unet.ResidualEncoderUNet, **common, n_blocks_per_stage=1)
        both = partial(unet.ResidualUNet, **{**common, "deep_supervision": False}, n_blocks_per_stage=1)
        for name, make in {"PlainConvUNet": plain, "ResidualEncoderUNet": residual, "ResidualUNet": both}.items():
            found[f"nnunet/{name}-{label}"] = make, sample, (32,)
    found["nnunet/ResNet18_CIFAR"] = partial(resnet.ResNet18_CIFAR, 3), images(3), (32,)
    found["nnunet/VGG16_cifar"] = partial(vgg.VGG16_cifar, 3), images(3), (32,)
    return found
