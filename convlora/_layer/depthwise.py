"""The weight gradient of a depthwise convolution on a CPU, where torch's own is slow.

oneDNN's fast kernel supports at most three taps per row and inputs no smaller than the kernel. All others, such as the
5×5 and 7×7 kernels of EfficientNet, MobileNetV3 and ConvNeXt, go through im2col. Here each row of taps is one matrix
product per channel, between all pairs of input and output columns; the sums along the band of matching columns are the
gradient. This takes more FLOPs, but matrix products run faster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .functional import Geometry, is_float_on_cpu

FAST = 3
"""The most taps per row that oneDNN's fast kernel supports."""
WIDE = 16
"""The largest ratio of padded input width times stride to kernel width. Beyond it too many pairs of columns lie off the
band. Measured on layers of EfficientNet, MobileNetV3 and ConvNeXt on one core with AVX2: 0.2 to 0.6 of oneDNN's time,
0.8 at the limit."""


MANY = 64
"""The fewest output positions of a batch, per channel, for which the products repay their overhead.
Measured on one core with AVX2: twice oneDNN's time at 32, between half and all of it at 128."""


def wins(x: Tensor, kernel: Sequence[int], geometry: Geometry, channels: int) -> bool:
    """Return whether :func:`weight_grad` applies to a layer with so many output channels, and is faster."""
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
    """Compute ``(C, 1, kH, kW)`` from the output gradient ``(N, C, *spatial_out)`` and x ``(N, C, *spatial)``."""
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
