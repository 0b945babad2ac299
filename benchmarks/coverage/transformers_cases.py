"""transformers: networks with convolutions, built from small configurations without a download."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from .cases import BATCH, Case, Sample, noise

Options = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A model class, its configuration class and options; ``backbone`` is a timm name given to it."""

    model: str
    config: str
    options: Options
    sample: Callable[[int], Sample]
    sizes: tuple[int, ...] = (64, 128, 224)


def pixels(size: int) -> Sample:
    """Two images."""
    return Sample(kwargs={"pixel_values": noise(BATCH, 3, size, size)})


def grey(size: int) -> Sample:
    """Two images with one channel's content in all three."""
    return Sample(kwargs={"pixel_values": noise(BATCH, 1, size, size).expand(-1, 3, -1, -1).clone()})


def wave(size: int) -> Sample:
    """Two mono waves of 64 samples a pixel."""
    return Sample(kwargs={"input_values": noise(BATCH, 1, 64 * size)})


def speech(size: int) -> Sample:
    """Two waves without a channel dimension."""
    return Sample(kwargs={"input_values": noise(BATCH, 64 * size)})


def mel(size: int) -> Sample:
    """Two spectrograms, ``(2, frames, 80)``."""
    return Sample(kwargs={"spectrogram": noise(BATCH, size // 4, 80)})


STAGES: Options = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]}
DIMS: Options = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]}
PYRAMID: Options = {"hidden_sizes": [16, 32, 48, 64], "num_attention_heads": [1, 2, 2, 4]}
QUERIES: Options = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 5}
HEADS: Options = {
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
ENCODED: Options = {"encoder_in_channels": [32, 48, 64], "encoder_hidden_dim": 32, "encoder_ffn_dim": 64}
FOUND: Options = {"d_model": 32, "num_queries": 5, "decoder_layers": 2, "decoder_ffn_dim": 64, "num_denoising": 0}
SMALL_BERT: Options = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
AUDIO_FRONT: Options = {
    "conv_dim": [16, 16],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "num_feat_extract_layers": 2,
}
WAVES: Options = {**SMALL_BERT, **AUDIO_FRONT, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}


def _image(stem: str, task: str = "ForImageClassification", **options: Any) -> Recipe:
    return Recipe(f"{stem}{task}", f"{stem}Config", options, pixels)


RECIPES = {
    "resnet": _image("ResNet", **STAGES),
    "convnext": _image("ConvNext", **DIMS),
    "convnextv2": _image("ConvNextV2", **DIMS),
    "dinov3_convnext": _image("DINOv3ConvNext", "Model", **DIMS),
    "regnet": _image("RegNet", embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 1], groups_width=8),
    "mobilenet_v1": _image("MobileNetV1", depth_multiplier=0.25),
    "mobilenet_v2": _image("MobileNetV2", depth_multiplier=0.35),
    "efficientnet": _image("EfficientNet", width_coefficient=0.25, depth_coefficient=0.5, hidden_dim=320),
    "bit": _image("Bit", depths=[1, 1, 1, 1]),
    "focalnet": _image("FocalNet", embed_dim=16, depths=[1, 1, 1, 1], focal_levels=[2, 2, 2, 2], image_size=64),
    "levit": _image("Levit", image_size=64, hidden_sizes=[32, 48, 64], num_attention_heads=[2, 2, 2], depths=[1, 1, 1]),
    "poolformer": _image("PoolFormer", **DIMS),
    "mobilevit": _image(
        "MobileViT", hidden_sizes=[32, 48, 64], neck_hidden_sizes=[8, 16, 24, 32, 48, 64, 96], image_size=64
    ),
    "mobilevitv2": _image("MobileViTV2", width_multiplier=0.5, image_size=64),
    "swiftformer": _image("SwiftFormer", depths=[1, 1, 1, 1], embed_dims=[16, 32, 48, 64]),
    "cvt": _image("Cvt", embed_dim=[16, 48, 96]),
    "pvt": _image("Pvt", **PYRAMID, depths=[1, 1, 1, 1], image_size=64),
    "pvt_v2": _image("PvtV2", **PYRAMID, depths=[1, 1, 1, 1], image_size=64),
    "hgnet_v2": _image("HGNetV2"),
    "textnet": _image("TextNet"),
    "vit": _image("ViT", **SMALL_BERT, image_size=64),
    "swin": _image("Swin", embed_dim=16, depths=[1, 1], num_heads=[1, 2], window_size=4, image_size=64),
    "segformer": _image("Segformer", "ForSemanticSegmentation", **PYRAMID, depths=[1, 1, 1, 1], decoder_hidden_size=32),
    "mobilevit_deeplabv3": _image("MobileViT", "ForSemanticSegmentation"),
    "upernet": Recipe(
        "UperNetForSemanticSegmentation", "UperNetConfig", {"hidden_size": 32, "_backbone": True}, pixels
    ),
    "glpn": _image("GLPN", "ForDepthEstimation", **PYRAMID, depths=[1, 1, 1, 1], decoder_hidden_size=32),
    "dpt": _image(
        "DPT",
        "ForDepthEstimation",
        **{**SMALL_BERT, "num_hidden_layers": 4},
        image_size=64,
        neck_hidden_sizes=[16, 16, 16, 16],
        fusion_hidden_size=16,
        backbone_out_indices=[0, 1, 2, 3],
        is_hybrid=False,
    ),
    "swin2sr": _image(
        "Swin2SR",
        "ForImageSuperResolution",
        embed_dim=30,
        depths=[1, 1],
        num_heads=[3, 3],
        window_size=8,
        image_size=64,
    ),
    "superpoint": Recipe("SuperPointForKeypointDetection", "SuperPointConfig", {}, grey),
    "timm_backbone": Recipe(
        "TimmBackbone", "TimmBackboneConfig", {"backbone": "resnet18", "use_pretrained_backbone": False}, pixels
    ),
    "timm_wrapper": Recipe(
        "TimmWrapperForImageClassification", "TimmWrapperConfig", {"architecture": "resnet18", "num_labels": 3}, pixels
    ),
    "detr": _image("Detr", "ForObjectDetection", **QUERIES, **HEADS, _backbone=True),
    "conditional_detr": _image("ConditionalDetr", "ForObjectDetection", **QUERIES, **HEADS, _backbone=True),
    "deformable_detr": _image(
        "DeformableDetr", "ForObjectDetection", **QUERIES, **HEADS, _backbone=True, num_feature_levels=3
    ),
    "rt_detr": _image(
        "RTDetr", "ForObjectDetection", **FOUND, **ENCODED, decoder_in_channels=[32, 32, 32], _backbone=True
    ),
    "d_fine": _image(
        "DFine", "ForObjectDetection", **FOUND, **ENCODED, decoder_in_channels=[32, 32, 32], _backbone=True
    ),
    "maskformer": Recipe("MaskFormerForInstanceSegmentation", "MaskFormerConfig", {}, pixels),
    "encodec": Recipe("EncodecModel", "EncodecConfig", {"num_filters": 8, "hidden_size": 32}, wave),
    "dac": Recipe(
        "DacModel", "DacConfig", {"encoder_hidden_size": 8, "decoder_hidden_size": 64, "hidden_size": 128}, wave
    ),
    "speecht5_hifigan": Recipe("SpeechT5HifiGan", "SpeechT5HifiGanConfig", {"upsample_initial_channel": 64}, mel),
    "wav2vec2": Recipe("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", WAVES, speech),
    "hubert": Recipe("HubertForSequenceClassification", "HubertConfig", WAVES, speech),
}


def cases() -> list[Case]:
    """All recipes."""
    return [Case(f"transformers/{n}", partial(build, r), r.sample, r.sizes) for n, r in RECIPES.items()]


def build(recipe: Recipe, size: int) -> nn.Module:
    """Build the network from its configuration, with random weights."""
    import transformers

    options = dict(recipe.options)
    if options.pop("_backbone", False):
        stages = ["stage2", "stage3", "stage4"]
        options["backbone_config"] = transformers.ResNetConfig(**STAGES, out_features=stages, layer_type="basic")
    config = getattr(transformers, recipe.config)(**options)
    return getattr(transformers, recipe.model)(config)  # type: ignore[no-any-return]
