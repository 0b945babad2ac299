"""segmentation-models-pytorch: every decoder once, and a ResNet's, a mobile and a mixed encoder under a U-Net."""

from __future__ import annotations

from functools import partial

from torch import nn

from .cases import Case, images

DECODERS = {
    "Unet": "resnet18",
    "UnetPlusPlus": "resnet18",
    "MAnet": "resnet18",
    "Linknet": "resnet18",
    "FPN": "resnet18",
    "PSPNet": "resnet18",
    "PAN": "resnet18",
    "DeepLabV3": "resnet18",
    "DeepLabV3Plus": "resnet18",
    "UPerNet": "resnet18",
    "Segformer": "mit_b0",
    "DPT": "tu-vit_tiny_patch16_224",
}
ENCODERS = ("mobilenet_v2", "efficientnet-b0", "densenet121", "mobileone_s0", "tu-convnext_atto", "vgg11", "xception")


def cases() -> list[Case]:
    """Decoder and encoder pairs."""
    pairs = [*DECODERS.items(), *(("Unet", encoder) for encoder in ENCODERS)]
    return [Case(f"smp/{d}-{e}", partial(build, d, e), images(3), (64, 96, 128, 224)) for d, e in pairs]


def build(decoder: str, encoder: str, size: int) -> nn.Module:
    """Build the network with two classes and random weights."""
    import segmentation_models_pytorch as smp

    return getattr(smp, decoder)(encoder_name=encoder, encoder_weights=None, classes=2)  # type: ignore[no-any-return]
