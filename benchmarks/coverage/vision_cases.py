"""open_clip, kornia, facenet-pytorch and torchxrayvision."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn

from .cases import BATCH, Case, Sample, images, noise

Options = dict[str, Any]

TEXT: Options = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
TOWERS: dict[str, Options] = {
    "RN50": {"layers": [1, 1, 1, 1], "width": 16, "head_width": 32, "image_size": 64},
    "ViT": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 64},
    "convnext_atto": {"timm_model_name": "convnext_atto", "timm_pool": "", "timm_proj": "linear", "image_size": 64},
    "resnet18": {"timm_model_name": "resnet18", "timm_pool": "avg", "timm_proj": "linear", "image_size": 64},
    "vitamin_small": {"timm_model_name": "vitamin_small_224", "timm_pool": "avg", "timm_proj": "", "image_size": 224},
}
"""Image towers of open_clip's CLIP, each under a text tower of one block."""
KORNIA: dict[str, tuple[str, str, Options, Callable[[int], Sample]]] = {
    "DexiNed": ("kornia.models.dexined", "DexiNed", {"pretrained": False}, images(3)),
    "RRDBNet": (
        "kornia.models.rrdbnet",
        "RRDBNet",
        {"num_in_ch": 3, "num_out_ch": 3, "num_feat": 16, "num_block": 1},
        images(3),
    ),
    "SmallSRNet": ("kornia.models.small_sr", "SmallSRNet", {"upscale_factor": 2, "pretrained": False}, images(1)),
    "TinyViT": (
        "kornia.models.tiny_vit",
        "TinyViT",
        {
            "img_size": 64,
            "num_classes": 3,
            "embed_dims": (16, 32, 32, 32),
            "depths": (1, 1, 1, 1),
            "num_heads": (1, 2, 2, 2),
            "window_sizes": (4, 4, 4, 2),
        },
        images(3),
    ),
    "VisionTransformer": (
        "kornia.models.vit",
        "VisionTransformer",
        {"image_size": 64, "embed_dim": 32, "depth": 1, "num_heads": 2},
        images(3),
    ),
    "MobileViT": ("kornia.models.vit_mobile", "MobileViT", {}, images(3)),
    "YuNet": ("kornia.models.yunet.model", "YuNet", {"phase": "test", "pretrained": False}, images(3)),
    "EfficientViTBackbone": (
        "kornia.models.efficient_vit.backbone",
        "EfficientViTBackbone",
        {"width_list": [8, 16, 32], "depth_list": [1, 1, 1], "dim": 8},
        images(3),
    ),
    "TFeat": ("kornia.feature", "TFeat", {"pretrained": False}, images(1)),
    "HardNet": ("kornia.feature", "HardNet", {"pretrained": False}, images(1)),
    "HardNet8": ("kornia.feature", "HardNet8", {"pretrained": False}, images(1)),
    "HyNet": ("kornia.feature", "HyNet", {"pretrained": False}, images(1)),
    "SOSNet": ("kornia.feature", "SOSNet", {"pretrained": False}, images(1)),
    "OriNet": ("kornia.feature", "OriNet", {"pretrained": False}, images(1)),
    "DeFMO": ("kornia.feature", "DeFMO", {"pretrained": False}, images(6)),
    "KeyNet": ("kornia.feature", "KeyNet", {"pretrained": False}, images(1)),
    "XFeat": ("kornia.feature.xfeat", "XFeatModel", {}, images(3)),
    "DISK-Unet": (
        "kornia.feature.disk._unets.unet",
        "Unet",
        {"in_features": 3, "down": [8, 16, 16], "up": [16, 9]},
        images(3),
    ),
}
"""Each network's module, class, options and sample."""
OTHERS: dict[str, tuple[str, str, Options, Callable[[int], Sample]]] = {
    "facenet/InceptionResnetV1": (
        "facenet_pytorch",
        "InceptionResnetV1",
        {"classify": True, "num_classes": 5},
        images(3),
    ),
    "facenet/InceptionResnetV1-embedding": ("facenet_pytorch", "InceptionResnetV1", {}, images(3)),
    "facenet/PNet": ("facenet_pytorch", "PNet", {"pretrained": False}, images(3)),
    "facenet/RNet": ("facenet_pytorch", "RNet", {"pretrained": False}, lambda size: Sample((noise(BATCH, 3, 24, 24),))),
    "facenet/ONet": ("facenet_pytorch", "ONet", {"pretrained": False}, lambda size: Sample((noise(BATCH, 3, 48, 48),))),
    "torchxrayvision/DenseNet": (
        "torchxrayvision.models",
        "DenseNet",
        {"growth_rate": 8, "block_config": (2, 2, 2), "num_init_features": 16},
        images(1),
    ),
    "torchxrayvision/ResNetAE50": ("torchxrayvision.autoencoders", "ResNetAE50", {}, images(1)),
    "torchxrayvision/PSPNet": ("torchxrayvision.baseline_models.chestx_det.ptsemseg.pspnet", "pspnet", {}, images(3)),
}


def cases() -> list[Case]:
    """All cases."""
    found = [Case(f"open_clip/{name}", partial(_clip, name), _pictures_and_texts, (64, 224)) for name in TOWERS]
    found.append(Case("open_clip/CoCa", _coca, _pictures_and_texts, (64,)))
    recipes = {f"kornia/{name}": recipe for name, recipe in KORNIA.items()} | OTHERS
    for name, (module, kind, options, sample) in recipes.items():
        found.append(Case(name, partial(_make, module, kind, options), sample, (32, 64, 128, 160, 256, 512)))
    return found


def _make(module: str, kind: str, options: Options, size: int) -> nn.Module:
    return getattr(import_module(module), kind)(**options)  # type: ignore[no-any-return]


def _clip(name: str, size: int) -> nn.Module:
    from open_clip.model import CLIP

    return CLIP(16, TOWERS[name], TEXT)  # type: ignore[no-any-return]


def _coca(size: int) -> nn.Module:
    from open_clip.coca_model import CoCa

    vision = {**TOWERS["ViT"], "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    words = {**TEXT, "embed_cls": True, "output_tokens": True}
    return CoCa(32, {**TEXT, "mlp_ratio": 2, "attn_pooler_heads": 2}, words, vision)  # type: ignore[no-any-return]


def _pictures_and_texts(size: int) -> Sample:
    """Two of each."""
    tokens = torch.randint(1, 60, (BATCH, 8), generator=torch.Generator().manual_seed(3))
    return Sample((noise(BATCH, 3, size, size), tokens))
