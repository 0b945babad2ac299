"""pytorchcv: the smallest network of most families for classification, segmentation, poses, boxes and sound."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from .cases import BATCH, Case, Sample, images, noise

IMAGENET = (
    "resnet10 preresnet10 seresnet10 shufflenetv2_wd2 "
    "mobilenet_wd4 mobilenetv2_wd4 mobilenetv3_small_w7d20 squeezenet_v1_1 darknet_ref ghostnet mnasnet_small peleenet "
    "menet108_8x1_g3 igcv3_wd4 bagnet9 dla46c hardnet39ds octresnet10_ad2 diracnet18v2 "
    "condensenet74_c4_g4 sqnxt23_w1 regnetx002"
)
CIFAR = (
    "nin_cifar10 resnet20_cifar10 densenet40_k12_cifar10 ror3_56_cifar10 rir_cifar10 resdropresnet20_cifar10 "
    "msdnet22_cifar10"
)
SEGMENTATION = (
    "fcn8sd_resnetd50b_voc deeplabv3_resnetd50b_voc "
    "fastscnn_cityscapes cgnet_cityscapes bisenet_resnet18_celebamaskhq "
    "erfnet_cityscapes enet_cityscapes linknet_cityscapes segnet_cityscapes unet_cityscapes sqnet_cityscapes"
)
POSES_AND_BOXES = (
    "simplepose_resnet18_coco lwopenpose2d_mobilenet_cmupan_coco centernet_resnet18_voc lffd20x5s320v2_widerface"
)


def cases() -> list[Case]:
    """All cases."""
    found = [_case(name, (64, 224)) for name in IMAGENET.split()]
    found += [_case(name, (32,)) for name in CIFAR.split()]
    found += [_case(name, (64, 128, 256, 480)) for name in (*SEGMENTATION.split(), *POSES_AND_BOXES.split())]
    speech = partial(build, "quartznet5x5_en_ls", from_audio=False)
    return [*found, Case("pytorchcv/quartznet5x5_en_ls", lambda size: speech(0), _spectrogram, (128,))]


def build(name: str, size: int, **options: Any) -> nn.Module:
    """Build the network with random weights and its own number of classes."""
    from pytorchcv.model_provider import get_model

    if size and name in ("segnet_cityscapes", *SEGMENTATION.split(), *POSES_AND_BOXES.split()):
        options["in_size"] = (size, size)
    return get_model(name, pretrained=False, **options)  # type: ignore[no-any-return]


def _case(name: str, sizes: tuple[int, ...]) -> Case:
    return Case(f"pytorchcv/{name}", partial(build, name), images(3), sizes)


def _spectrogram(size: int) -> Sample:
    """Two spectrograms of 64 bands, and the numbers of their valid frames."""
    import torch

    return Sample((noise(BATCH, 64, size), torch.full((BATCH,), size)))
