"""Saliency maps by Grad-CAM and occlusion, for any network with one logit, adapted or not.

- **Grad-CAM**: R. R. Selvaraju et al. Grad-CAM: Visual explanations from deep networks via gradient-based localization.
  ICCV 2017 (arXiv 1610.02391). Each channel of a layer's output is weighted by its mean gradient; the positive part of
  the sum is the map.
- **Occlusion**: M. D. Zeiler, R. Fergus. Visualizing and understanding convolutional networks. ECCV 2014 (arXiv
  1311.2901). The fall of the logit when a square of the image is made grey.

The model is used as it is, with its adapters if any, and not changed. No parameter gets a gradient, and none needs to
require one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

_COARSEST = 4


def cam_layer(model: nn.Module, images: Tensor) -> nn.Module | None:
    """The module whose output Grad-CAM uses; None if none is found.

    In a CNN it is the last module that returns a feature map of at least 4×4 positions, since a coarser map shows no
    position; the outermost if several return the same map. In a timm vision transformer it is the norm at the start of
    the last block, since after it only the class token counts.
    """
    blocks = getattr(model, "blocks", None)
    if hasattr(model, "num_prefix_tokens") and isinstance(blocks, nn.Sequential) and hasattr(blocks[-1], "norm1"):
        return blocks[-1].get_submodule("norm1")
    if getattr(model, "output_fmt", "NCHW") != "NCHW":  # timm's networks with channels last
        return None
    last: list[nn.Module] = []

    def seen(module: nn.Module, inputs: object, output: object) -> None:
        if (
            module is not model
            and isinstance(output, Tensor)
            and output.ndim == 4
            and min(output.shape[2:]) >= _COARSEST
        ):
            last[:] = [module]

    hooks = [module.register_forward_hook(seen) for module in model.modules()]
    try:
        with _evaluating(model), torch.no_grad():
            model(images[:1])
    finally:
        for hook in hooks:
            hook.remove()
    return last[0] if last else None


def grad_cam(model: nn.Module, images: Tensor, layer: nn.Module, towards: Tensor | None = None) -> Tensor:
    """Grad-CAM maps ``(B, H, W)`` of the images' size in [0, 1]; all 0 if no position supports the label.

    Args:
        model: gives logits ``(B, 1)``.
        images: ``(B, 3, H, W)``, normalised, on the model's device.
        layer: see `cam_layer`.
        towards: ``(B,)`` of 0 and 1: the label that the map explains; None for label 1.
    """
    outputs: list[Tensor] = []

    def cut(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        # A leaf replaces the output, so that it gets a gradient although nothing before it requires one. The layers
        # after it get a copy, since they may write to their input.
        outputs.append(output.detach().requires_grad_())
        return outputs[-1].clone()

    sign = torch.ones(len(images)) if towards is None else 2.0 * towards.cpu().float() - 1.0
    hook = layer.register_forward_hook(cut)
    try:
        with _evaluating(model), torch.enable_grad():
            logits = model(images).flatten().float()
            (gradient,) = torch.autograd.grad((logits * sign.to(logits.device)).sum(), outputs[-1])
    finally:
        hook.remove()
    features, gradient = _as_maps(model, outputs[-1].detach()), _as_maps(model, gradient)
    weights = gradient.mean((2, 3), keepdim=True)
    maps = (weights * features).sum(1, keepdim=True).relu()
    return _scaled(interpolate(maps.float(), images.shape[2:], mode="bilinear", align_corners=False)[:, 0])


def occlusion(model: nn.Module, images: Tensor, side: int, stride: int, towards: Tensor | None = None) -> Tensor:
    """Occlusion maps ``(B, H, W)``: the fall of a label's logit when a square is made grey, 0 or more.

    Args:
        model: gives logits ``(B, 1)``.
        images: ``(B, 3, H, W)``, normalised, so that 0 is the mean colour; on the model's device.
        side: side of the square in pixels.
        stride: distance between squares; each pixel gets the mean over the squares that cover it, or 0.
        towards: as in `grad_cam`.
    """
    height, width = images.shape[2:]
    fall, cover = torch.zeros(len(images), height, width), torch.zeros(height, width)
    sign = torch.ones(len(images)) if towards is None else 2.0 * towards.cpu().float() - 1.0
    with _evaluating(model), torch.no_grad():
        whole = model(images).flatten().float().cpu()
        for top, left in _corners(height, width, side, stride):
            hidden = images.clone()
            hidden[:, :, top : top + side, left : left + side] = 0
            less = sign * (whole - model(hidden).flatten().float().cpu())
            fall[:, top : top + side, left : left + side] += less[:, None, None]
            cover[top : top + side, left : left + side] += 1
    return (fall / cover.clamp(min=1)).relu()


def _corners(height: int, width: int, side: int, stride: int) -> Iterator[tuple[int, int]]:
    """Upper left corners of squares that cover all of the image."""
    for top in (*range(0, height - side, stride), height - side):
        for left in (*range(0, width - side, stride), width - side):
            yield top, left


def _as_maps(model: nn.Module, output: Tensor) -> Tensor:
    """Return feature maps ``(B, C, H, W)`` unchanged, and tokens ``(B, N, C)`` as a square of patches."""
    if output.ndim == 4:
        return output
    patches = output[:, int(getattr(model, "num_prefix_tokens", 0)) :]
    side = math.isqrt(patches.shape[1])
    return patches.transpose(1, 2).reshape(len(patches), -1, side, side)


def _scaled(maps: Tensor) -> Tensor:
    highest = maps.amax((1, 2), keepdim=True)
    return (maps / highest.clamp(min=torch.finfo(maps.dtype).tiny)).cpu()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; each module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
