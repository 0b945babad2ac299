"""torchvision: the smallest network of each family and kind: classification, segmentation, detection, video, flow."""

from __future__ import annotations

from typing import Any

import torch
import torchvision  # type: ignore[import-untyped]
from torch import nn

from .cases import BATCH, Case, Sample, images, noise

CLASSIFICATION = (
    "alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5 "
    "mobilenet_v2 mobilenet_v3_small quantized_googlenet quantized_inception_v3 quantized_mobilenet_v2 "
    "quantized_mobilenet_v3_large quantized_resnet18 quantized_shufflenet_v2_x0_5 "
    "regnet_x_400mf regnet_y_400mf resnet18 resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_1 swin_t "
    "swin_v2_t vgg11 vit_b_32"
)
SEGMENTATION = "deeplabv3_mobilenet_v3_large deeplabv3_resnet50 fcn_resnet50 lraspp_mobilenet_v3_large"
DETECTION = (
    "fasterrcnn_mobilenet_v3_large_320_fpn fasterrcnn_resnet50_fpn fasterrcnn_resnet50_fpn_v2 fcos_resnet50_fpn "
    "keypointrcnn_resnet50_fpn maskrcnn_resnet50_fpn maskrcnn_resnet50_fpn_v2 retinanet_resnet50_fpn "
    "retinanet_resnet50_fpn_v2 ssd300_vgg16 ssdlite320_mobilenet_v3_large"
)
VIDEO = "mc3_18 mvit_v1_b mvit_v2_s r2plus1d_18 r3d_18 s3d swin3d_t"
RESIZING = ("faster", "mask", "keypoint", "retina", "fcos")
"""Detectors that by default enlarge their images to 800 pixels."""
FEW_BOXES = {f"rpn_{when}_nms_top_n_{mode}": 50 for when in ("pre", "post") for mode in ("train", "test")}
"""Options for fifty proposals: those of an untrained network are noise, so more add nothing."""
FLOW = "raft_large raft_small"


def names() -> list[str]:
    """Every architecture name of every kind."""
    return list(torchvision.models.list_models())


def build(name: str, **options: Any) -> nn.Module:
    """Build the network with random weights, including those of the backbone."""
    if name.startswith(("deeplab", "fcn_", "lraspp", *RESIZING, "ssd")):
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3", "quantized_googlenet", "quantized_inception_v3"):
        options["init_weights"] = False
    return torchvision.models.get_model(name, weights=None, **options)  # type: ignore[no-any-return]


def cases() -> list[Case]:
    """One case of each network."""
    found = [_plain(name, images(3)) for name in (*CLASSIFICATION.split(), *SEGMENTATION.split())]
    found += [_plain(name, _boxes, (128, 320)) for name in DETECTION.split()]
    found += [_plain(name, _clip, (64, 112, 224)) for name in VIDEO.split()]
    return found + [_plain(name, _pair, (128, 256)) for name in FLOW.split()]


def kind_of(name: str) -> str:
    """classification, segmentation, detection, video or optical flow."""
    kinds = {"segmentation": SEGMENTATION, "detection": DETECTION, "video": VIDEO, "optical flow": FLOW}
    return next((kind for kind, names in kinds.items() if name in names.split()), "classification")


def _plain(
    name: str,
    sample: Any,
    sizes: tuple[int, ...] = (64, 96, 128, 224, 299),
) -> Case:
    def make(size: int) -> nn.Module:
        options = {"min_size": size, "max_size": 2 * size} if name.startswith(RESIZING) else {}
        return build(name, **options, **(FEW_BOXES if "rcnn" in name else {}))

    return Case(f"torchvision/{name}", make, sample, sizes)


def _clip(size: int) -> Sample:
    return Sample((noise(1, 3, 16, size, size),))


def _pair(size: int) -> Sample:
    return Sample((noise(1, 3, size, size), noise(1, 3, size, size).flip(-1)))


def _boxes(size: int) -> Sample:
    """Two images and, for train mode, two boxes on each with labels, masks and keypoints."""
    boxes = torch.tensor([[0.1, 0.1, 0.6, 0.7], [0.3, 0.4, 0.9, 0.9]]) * size
    masks = torch.zeros(2, size, size, dtype=torch.uint8)
    masks[:, size // 4 : size // 2, size // 4 : size // 2] = 1
    points = torch.full((2, 17, 3), size / 2.0)
    points[..., 2] = 1
    target = {"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks, "keypoints": points}
    pictures = list(noise(BATCH, 3, size, size).sigmoid())
    return Sample((pictures,), train={"targets": [{**target, "labels": torch.tensor([1, 1])} for _ in range(BATCH)]})
