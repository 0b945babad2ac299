"""The weight's gradient of a depthwise convolution on a CPU, where torch's own is slow.

oneDNN's fast kernel takes rows of at most three taps and an input no smaller than the kernel; the others, 5×5 and 7×7
ones of EfficientNet, MobileNetV3 and ConvNeXt among them, it unfolds. Here each row of taps is one matrix product for
each channel: of all pairs of columns, of which the band that the taps join is kept. That is more arithmetic, and it is
done where it is fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .functional import Geometry, is_float_on_cpu

FAST = 3
"""Taps in a row that oneDNN's own kernel takes."""
WIDE = 16
"""Widths of a kernel, over the stride, beyond which too many pairs of columns lie off the band. As found over shapes of
EfficientNet, MobileNetV3 and ConvNeXt on one core with AVX2: 0.2 to 0.6 of oneDNN's time, 0.8 at the limit."""


MANY = 64
"""Output positions in a batch, for each channel, from which a product for each channel and row of taps is worth its
start. As found on one core with AVX2: at 32 twice oneDNN's time, at 128 half of it to all of it."""


def wins(x: Tensor, kernel: Sequence[int], geometry: Geometry, channels: int) -> bool:
    """Whether :func:`weight_grad` is the faster way, and one at all, for a layer of as many output channels."""
    return (
        len(kernel) == 2
        and is_float_on_cpu(x)
        and geometry.groups == x.shape[1] == channels
        and x.shape[0] * x.shape[2] * x.shape[3] >= MANY * math.prod(geometry.stride)
        and (kernel[1] > FAST or x.shape[2] < kernel[0])
        and (x.shape[3] + 2 * geometry.padding[1]) * geometry.stride[1] <= WIDE * kernel[1]
        and x.is_contiguous()  # in channels_last oneDNN has another kernel, without that limit
        and not torch.compiler.is_compiling()
    )


def weight_grad(g: Tensor, x: Tensor, kernel: Sequence[int], geometry: Geometry) -> Tensor:
    """``(C, 1, kH, kW)`` from the output's gradient ``(N, C, *spatial_out)`` and the input ``(N, C, *spatial)``."""
    (n, channels, height, width), (kh, kw) = g.shape, kernel
    (sh, sw), (ph, pw), (dh, dw), _ = geometry
    # Channels are the batch of the products, rows and images what is summed over: (C, H, N, W).
    rows = F.pad(x.permute(1, 2, 0, 3), (pw, pw, 0, 0, ph, ph))
    grads = g.permute(1, 3, 2, 0).reshape(channels, width, height * n)
    columns = rows.shape[3]
    taps = []
    for i in range(kh):
        row = rows[:, i * dh : i * dh + sh * (height - 1) + 1 : sh].reshape(channels, height * n, columns)
        pairs = torch.bmm(grads, row)  # (C, columns of g, columns of x)
        band = pairs.as_strided((channels, width, kw), (width * columns, columns + sw, dw))
        taps.append(band.sum(1))
    return torch.stack(taps, 1).unsqueeze(1)
