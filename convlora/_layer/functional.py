"""The arithmetic of LoRA on plain tensors, without modules or state.

Low-rank adaptation: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021 (arXiv:2106.09685);
rank-stabilised scaling: Kalajdzievski, 2023 (arXiv:2312.03732). A convolution's weight is read as the matrix
``(C_out, C_in / groups * kH * kW)``.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

Ints = tuple[int, ...]
Factors = tuple[Tensor, Tensor]
"""A ``(rank, *weight.shape[1:])`` and B ``(weight.shape[0], rank)`` of a change that is a multiple of B @ A."""


class Geometry(NamedTuple):
    """The geometry of a convolution; one number per spatial dimension."""

    stride: Ints
    padding: Ints
    dilation: Ints
    groups: int


class Form(NamedTuple):
    """Shape and strides of a tensor that is not kept: enough to compute the gradient of its shape."""

    shape: Ints
    strides: Ints

    @classmethod
    def of(cls, tensor: Tensor) -> Form:
        """Return a tensor's form."""
        return cls(tensor.shape, tensor.stride())

    def stride(self, dim: int) -> int:
        """Return one stride, as ``Tensor.stride`` does."""
        return self.strides[dim]

    def empty(self, like: Tensor) -> Tensor:
        """Return an uninitialised tensor of this form, in the dtype and on the device of ``like``."""
        return torch.empty_strided(self.shape, self.strides, dtype=like.dtype, device=like.device)


def delta_weight(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Compute ΔW, the change that LoRA makes to a layer's weight.

    >>> delta_weight(torch.ones(2, 3, 5, 5), torch.ones(8, 2), scaling=0.5).shape
    torch.Size([8, 3, 5, 5])

    .. math:: ΔW[o, i, y, x] = scaling · Σ_r B[o, r] · A[r, i, y, x]

    Args:
        lora_A: ``(rank, C_in / groups, kH, kW)`` for a convolution, ``(rank, in_features)`` for a linear layer.
        lora_B: ``(C_out, rank)``.
        scaling: alpha / rank, or alpha / √rank with rsLoRA; no unit.

    Returns:
        ``(C_out, *lora_A.shape[1:])`` in the factors' dtype, also under autocast.

    Raises:
        ValueError: the two ranks differ.
    """
    rank = lora_A.shape[0]
    if lora_B.shape[1] != rank:
        raise ValueError(f"lora_A has rank {rank}, lora_B has rank {lora_B.shape[1]}; both must be equal.")
    with no_autocast(lora_A.device.type):
        return (scaling * (lora_B @ lora_A.flatten(1))).view(lora_B.shape[0], *lora_A.shape[1:])


def hashed(tensor: Tensor) -> str:
    """Return a 64-bit hash of a tensor's values as 16 hex digits; the device makes no difference."""
    host = tensor.detach().cpu().contiguous()
    data = (ctypes.c_char * host.nbytes).from_address(host.data_ptr()) if host.nbytes else b""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def is_finite(tensor: Tensor | None) -> bool:
    """Whether the tensor, if there is one, has no NaN and no Inf: one pass, without a copy."""
    if tensor is None or tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    return bool(torch.isfinite(tensor if tensor.element_size() > 1 else tensor.float()).all())


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return a context in which autocast is off.

    W + ΔW is computed in it; under autocast B @ A would be rounded to half precision and not match the merged weight.
    """
    return torch.autocast(device_type, enabled=False) if autocasts(device_type) else nullcontext()


def autocasts(device_type: str) -> bool:
    """Return whether autocast is on for a device type. Some, such as meta, do not have it."""
    # PyTorch 2.6 cannot compile is_autocast_available, and its compiler serves only devices that have autocast.
    there = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)
    return there and torch.is_autocast_enabled(device_type)


def effective_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Compute W + ΔW in the weight's dtype, shape and memory format, rounding once from the wider dtype.

    One fused product and sum (addmm), which moves less memory than computing ΔW first.

    Args:
        weight: with as many elements as ``(C_out, *lora_A.shape[1:])``.
        lora_A: ``(rank, C_in / groups, kH, kW)``.
        lora_B: ``(C_out, rank)``, or ``(C_out, rank, 1, 1)`` as peft keeps it.
        scaling: what multiplies B @ A.
    """
    with no_autocast(lora_A.device.type):
        return plus_delta(weight, lora_A, lora_B, scaling)


def plus_delta(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """:func:`effective_weight` for a caller that has turned autocast off."""
    last = has_channels_last(weight)
    rows, A = (weight.movedim(1, -1), lora_A.movedim(1, -1)) if last else (weight, lora_A)
    base, A, B = rows.reshape(lora_B.shape[0], -1), A.flatten(1), lora_B.flatten(1)
    if weight.dtype != lora_A.dtype:
        wide = torch.promote_types(weight.dtype, lora_A.dtype)
        base, A, B = base.to(wide), A.to(wide), B.to(wide)
    merged = in_dtype(torch.addmm(base, B, A, alpha=scaling), weight.dtype).view(rows.shape)
    return merged.movedim(-1, 1) if last else merged


def has_channels_last(weight: Tensor) -> bool:
    """Return whether a kernel is in one of torch's channels_last memory formats."""
    return weight.ndim > 2 and not weight.is_contiguous() and weight.movedim(1, -1).is_contiguous()


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``tensor.to(dtype)``, without the call if the dtype is already right.

    The comparison takes a tenth of the time of that call, which is 15 µs in training, when caches are cold.
    """
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def is_tracing() -> bool:
    """Return whether ``torch.jit.trace`` is recording."""
    return torch._C._get_tracing_state() is not None


def is_transformed() -> bool:
    """Return whether tracing, ``torch.func`` or forward mode is active: our autograd functions support none of them."""
    functions: bool = torch._C._are_functorch_transforms_active()
    return functions or is_tracing() or cast(Any, forward_ad)._current_level >= 0


def is_float_on_cpu(x: Tensor) -> bool:
    """Return whether x is fp32 or fp64 on a CPU: only there do matrix products replace oneDNN's kernels."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def move_like(tensor: Tensor, other: Tensor | None) -> Tensor:
    """Move the tensor and its gradient to the other's device and dtype, in place; return the same object."""
    if other is not None and (other.device, other.dtype) != (tensor.device, tensor.dtype):
        grad, tensor.grad = tensor.grad, None
        tensor.data = tensor.data.to(other.device, other.dtype)
        tensor.grad = None if grad is None else grad.to(other.device, other.dtype)
    return tensor


def largest_rank(weight_shape: Sequence[int]) -> int:
    """Return the largest rank at which A and B have no more parameters than the weight; 0 if there is none.

    >>> largest_rank((64, 64, 3, 3)), largest_rank((32, 1, 3, 3)), largest_rank((1, 512))
    (57, 7, 0)
    """
    rows, columns = weight_shape[0], math.prod(weight_shape[1:])
    return rows * columns // max(rows + columns, 1)


def scaling_of(alpha: float, rank: int, use_rslora: bool) -> float:
    """Return the factor of B @ A: alpha / rank, or alpha / √rank with rsLoRA."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def alpha_of(scaling: float, rank: int, use_rslora: bool) -> float:
    """Return the alpha with exactly this :func:`scaling_of`, or the nearest if there is none."""
    near = scaling / scaling_of(1.0, rank, use_rslora)
    alphas = (near, math.nextafter(near, math.inf), math.nextafter(near, 0.0))
    return next((alpha for alpha in alphas if scaling_of(alpha, rank, use_rslora) == scaling), near)
