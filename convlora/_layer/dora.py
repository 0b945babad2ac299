"""DoRA: the direction and the magnitude of each output channel's weight, trained separately; on plain tensors.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024 (arXiv:2402.09353): W' = m ⊙ (W + ΔW) / ‖W + ΔW‖, the
norm over all that meets one output channel and, as in section 4.3 there, a constant to the gradient. For a convolution
that is a norm over ``(C_in / groups, kH, kW)``, as in peft. A transposed convolution keeps its output channels in the
second dimension of the weight, one block of it for each group; the norm is over the other dimensions of that block.
"""

from __future__ import annotations

import torch
from torch import Tensor


def channel_norms(weight: Tensor, groups: int) -> Tensor:
    """Compute the Frobenius norm of each output channel's weight: ``(C_out,)``, in the weight's dtype.

    Args:
        weight: ``(C_out, ...)``, or ``(C_in, C_out / groups, ...)`` of a transposed convolution.
        groups: of a transposed convolution; 0 for every other layer.
    """
    rows = weight.shape[0]
    blocks = weight.reshape(groups, rows // groups, weight.shape[1], -1) if groups else weight.reshape(rows, 1, 1, -1)
    # In double precision: the sum's order differs with memory format and device, and once rounded to fp32 the norms of
    # the same weight do not, so that a fresh adapter's scale is exactly 1.
    wide = torch.float64 if weight.device.type != "mps" else weight.dtype
    norms: Tensor = torch.linalg.vector_norm(blocks, dim=(1, 3), dtype=wide)
    return norms.flatten().to(weight.dtype)


def channel_scale(magnitude: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Compute m / ‖W‖ per output channel, or m for a channel of zeros."""
    norms = channel_norms(weight.detach(), groups)
    return magnitude / torch.where(norms > 0, norms, 1)


def scaled_weight(weight: Tensor, scale: Tensor, groups: int) -> Tensor:
    """Multiply each output channel's weight by its scale; the memory format is kept."""
    if not groups:
        return weight * scale.view(-1, *[1] * (weight.ndim - 1))
    rows = weight.shape[0]
    each = scale.view(groups, 1, -1).expand(groups, rows // groups, weight.shape[1]).reshape(rows, -1)
    return weight * each.view(*each.shape, *[1] * (weight.ndim - 2))


def scaled_output(y: Tensor, scale: Tensor, bias: Tensor | None, channel_dim: int) -> Tensor:
    """Scale an output that contains the bias, as if the weight had been scaled; a scale of 1 changes no bit.

    ``channel_dim`` is the dimension of the output channels. The result has y's dtype.
    """
    shape = [1] * y.ndim
    shape[channel_dim] = -1
    scale = scale.to(y.dtype).view(shape)
    return y * scale if bias is None else y * scale + bias.to(y.dtype).view(shape) * (1 - scale)
