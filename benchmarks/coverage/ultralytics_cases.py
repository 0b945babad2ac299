"""ultralytics: the smallest scale of each YOLO and of each task, and RT-DETR."""

from __future__ import annotations

from functools import partial

from torch import nn

from .cases import Case, images

DETECTION = (
    "yolov3-tiny yolov5n yolov6n yolov8n yolov8n-p2 yolov8n-ghost yolov9t yolov10n yolo11n yolo12n yolo26n yolo26n-p2"
)
SEGMENTATION = "yolov8n-seg yolo11n-seg yolo26n-seg"
TASKS = {
    **dict.fromkeys(DETECTION.split(), "DetectionModel"),
    **dict.fromkeys(SEGMENTATION.split(), "SegmentationModel"),
    "yolo11n-pose": "PoseModel",
    "yolo11n-obb": "OBBModel",
    "yolo11n-cls": "ClassificationModel",
    "yolo26n-sem": "SemanticSegmentationModel",
    "rtdetr-resnet50": "RTDETRDetectionModel",
}
"""Each configuration's name, and the class that the library builds for its task."""


def cases() -> list[Case]:
    """All cases."""
    return [Case(f"ultralytics/{name}", partial(build, name), images(3), (64, 128, 640)) for name in TASKS]


def build(name: str, size: int) -> nn.Module:
    """Build the network with three classes and random weights."""
    from ultralytics.nn import tasks

    return getattr(tasks, TASKS[name])(f"{name}.yaml", ch=3, nc=3, verbose=False)  # type: ignore[no-any-return]
