"""The conditions under which our autograd function replaces a layer's own forward, because it computes the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from . import depthwise, paths
from .convolution import convolve, convolve_plainly
from .functional import Geometry, Ints, autocasts, is_transformed
from .paths import LayerSizes, TrainingPath

PLAIN: dict[Any, Any] = {cls.forward: cls._conv_forward for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d)}


def is_plain(layer: nn.Module, cls: Any) -> bool:
    """Return whether a layer of this class computes exactly torch's own convolution with ``weight``."""
    return cls.forward in PLAIN and cls._conv_forward is PLAIN[cls.forward] and "_conv_forward" not in layer.__dict__


def linear(
    layer: nn.Module, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, path: TrainingPath
) -> Tensor | None:
    """Compute a linear layer as base plus branch, which needs no dense weight gradient; None if it does not apply."""
    if is_transformed() or path not in ("auto", "branch") or not (lora_A.requires_grad or lora_B.requires_grad):
        return None
    A, B = lora_A.to(weight.dtype), (scaling * lora_B).to(weight.dtype)
    return F.linear(x, weight, cast("Tensor | None", layer.bias)) + F.linear(F.linear(x, A), B)


def convolution(
    layer: nn.Module, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, path: TrainingPath
) -> Tensor | None:
    """Compute a plain convolution with our autograd function.

    None if no gradient is needed, if our function does not support the case (tracing, torch.func, forward mode, a base
    that is trained), or if the layer will refuse the input. The base's own forward must then compute it.
    """
    layer = cast(_ConvNd, layer)
    if not torch.is_grad_enabled() or weight.requires_grad or is_transformed() or not is_batch(layer, x, weight):
        return None
    if not (lora_A.requires_grad or lora_B.requires_grad or x.requires_grad):
        return None
    dtype = torch.get_autocast_dtype(x.device.type) if autocasts(x.device.type) else weight.dtype
    if dtype != weight.dtype and x.dtype == torch.float64:
        return None
    prepared = prepare(layer, x, dtype)
    if prepared is None:
        return None
    x, geometry = prepared
    if path == "auto":
        choice = choose if torch.compiler.is_compiling() else choose_once  # compilers warn about lru_cache
        sizes = x.shape, weight.shape, geometry, lora_A.shape[0]
        path, is_small = choice(*sizes, x.requires_grad, x.element_size(), lora_A.requires_grad, x.device.type)
        if geometry.groups > 1:
            is_small = not depthwise.wins(x, weight.shape[2:], geometry, weight.shape[0])
        if is_small and lora_B.requires_grad and dtype == weight.dtype == lora_A.dtype:
            return convolve_plainly(x, weight, lora_A, lora_B, layer.bias, scaling, geometry, path)
    return convolve(x, weight, lora_A, lora_B, layer.bias, scaling, geometry, path)


def prepare(layer: _ConvNd, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Geometry] | None:
    """Return the input, padded unless the mode is zeros, and the geometry; None for asymmetric padding.

    The cast comes after the padding, since on a CPU autocast pads some modes in fp32.
    """
    padding = _padding(layer)
    if padding is None:
        return None
    if layer.padding_mode != "zeros":
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = (0,) * len(padding)
    return x.to(dtype), Geometry(_each(layer, layer.stride), padding, _each(layer, layer.dilation), layer.groups)


def is_batch(layer: _ConvNd, x: object, weight: Tensor) -> bool:
    """Return whether the input is a batch that the layer accepts, directly or, under autocast, in another dtype."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and (x := cast(Tensor, x)).ndim == len(layer.kernel_size) + 2
        and x.shape[1] == layer.in_channels
        and x.numel() > 0
        and x.device == weight.device
        and (x.dtype == weight.dtype or (x.is_floating_point() and autocasts(x.device.type)))
    )


def _each(layer: _ConvNd, number: int | Sequence[int]) -> tuple[int, ...]:
    """Return one number per spatial dimension, also for a plain int set after construction, which torch accepts."""
    return (number,) * len(layer.kernel_size) if isinstance(number, int) else tuple(number)


def _padding(layer: _ConvNd) -> tuple[int, ...] | None:
    """Return the padding of each dimension; None if its two sides differ ('same' with an even kernel)."""
    if layer.padding == "same":
        both = [d * (k - 1) for d, k in zip(_each(layer, layer.dilation), layer.kernel_size, strict=True)]
        return None if any(total % 2 for total in both) else tuple(total // 2 for total in both)
    return _each(layer, 0 if isinstance(layer.padding, str) else layer.padding)


def sizes_of(layer: _ConvNd, x: Tensor, geometry: Geometry, rank: int) -> LayerSizes:
    weight = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    return _sizes(x.shape, weight, geometry, rank, x.requires_grad, x.element_size())


def _sizes(
    x: Ints, weight: Ints, geometry: Geometry, rank: int, input_grad: bool, width: int, trains_A: bool = True
) -> LayerSizes:
    sizes = zip(x[2:], weight[2:], geometry.stride, geometry.padding, geometry.dilation, strict=True)
    outputs = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes]
    return LayerSizes(
        out_channels=weight[0],
        in_channels=x[1],
        kernel=math.prod(weight[2:]),
        groups=geometry.groups,
        rank=rank,
        inputs=x[0] * math.prod(x[2:]),
        outputs=x[0] * math.prod(outputs),
        input_grad=input_grad,
        width=width,
        trains_A=trains_A,
    )


def choose(
    x: Ints, weight: Ints, geometry: Geometry, rank: int, input_grad: bool, width: int, trains_A: bool, device: str
) -> tuple[TrainingPath, bool]:
    """Return the path for these shapes, and whether the number of calls decides the time; see ``paths.py``."""
    sizes = _sizes(x, weight, geometry, rank, input_grad, width, trains_A)
    return paths.choose(sizes), paths.launching_decides(sizes, device)


choose_once = lru_cache(maxsize=4096)(choose)
"""``choose`` with a cache: a network meets few sizes, each at every step."""
