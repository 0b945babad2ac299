"""The adapted convolution with its own autograd: one convolution forward, gradients through tensors of rank r.

Plain autograd of ``conv(x, W + ΔW)`` computes the dense gradient of the weight only to multiply it with the factors,
and saves W + ΔW. Here the weight is computed again in the backward, and with h = A ∗ x and t = Bᵀ g, both of r
channels, dB = scaling · Σ g hᵀ, and dA is scaling times the weight gradient of a convolution to r channels.

Every step of the backward is itself differentiable, so that double backward works by plain autograd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from . import depthwise
from .functional import Form, Geometry, Ints, in_dtype, is_float_on_cpu, no_autocast, plus_delta

LARGE = 256
"""On a CPU, the input gradient of a 1×1 convolution is computed as a matrix product if output positions per image,
times C_out / C_in where that is above 1, are at least this many. torch's kernel reorders its operands, and takes up to
a third longer in ResNet-50's layers on two cores with AVX2."""


def convolve(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    geometry: Geometry,
    path: str,
) -> Tensor:
    """Compute ``conv(x, weight + scaling · B @ A, bias)`` in x's dtype, with gradients to x, A, B and the bias.

    Where A needs no gradient, h = A ∗ x is kept for the backward in the place of x, unless x is the smaller of the two.

    Args:
        x: ``(N, C_in, *spatial)``.
        weight: ``(C_out, C_in / groups, *kernel)``; no gradient is computed for it.
        lora_A: ``(rank, C_in / groups, *kernel)``.
        lora_B: ``(C_out, rank)``.
        bias: ``(C_out,)`` or None.
        scaling: what multiplies B @ A.
        geometry: stride, padding, dilation, groups.
        path: ``"fused"``, ``"weight"`` or ``"branch"``; see ``paths.py``. With groups, ``"weight"`` takes their place.

    Returns:
        ``(N, C_out, *spatial_out)``.
    """
    if geometry.groups > 1:
        path = "weight"
    keeps_hidden = False
    if path != "weight" and lora_B.requires_grad and not lora_A.requires_grad:
        keeps_hidden = path == "branch" or lora_A.shape[0] < x.shape[1] * math.prod(geometry.stride)
    y = _Convolution.apply(x, weight, lora_A, lora_B, bias, scaling, geometry, path, keeps_hidden)
    return cast(Tensor, y[0] if keeps_hidden else y)


def convolve_plainly(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    geometry: Geometry,
    path: str,
) -> Tensor:
    """As :func:`convolve`, through torch's own autograd: fewer calls, for layers so small that calls take most time.

    All in one dtype. With groups, or on path ``"weight"``, one convolution with W + ΔW, which is kept for the backward;
    else a branch.
    """
    if geometry.groups > 1 or path == "weight":
        return conv(x, plus_delta(weight, lora_A, lora_B, scaling), bias, geometry)
    if lora_A.requires_grad:
        y, hidden = conv(x, weight, bias, geometry), conv(x, lora_A, None, geometry)
    else:
        y, hidden = _Constant.apply(x, weight, lora_A, bias, geometry)
    ones, zeros = (1,) * (x.ndim - 2), (0,) * (x.ndim - 2)
    B = lora_B.view(*lora_B.shape, *ones)
    return y.add_(torch.convolution(hidden, B, None, ones, zeros, ones, False, zeros, 1), alpha=scaling)


class _Constant(torch.autograd.Function):
    """Two convolutions of x with constant kernels. Only the shape and strides of x are kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, lora_A: Tensor, bias: Tensor | None, geometry: Geometry
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight, lora_A)
        ctx.form, ctx.geometry = Form.of(x), geometry
        ctx.set_materialize_grads(False)
        return conv(x, weight, bias, geometry), conv(x, lora_A, None, geometry)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = None
        for g, kernel in zip(grads, ctx.saved_tensors, strict=True):
            if g is not None and ctx.needs_input_grad[0]:
                through = _convolution_backward(g, ctx.form.empty(g), kernel, ctx.geometry, 0)
                found = through if found is None else found + through
        g = grads[0]
        for_bias = None if g is None or not ctx.needs_input_grad[3] else g.sum((0, *range(2, g.ndim)))
        return found, None, None, for_bias, None


class _Convolution(torch.autograd.Function):
    """With ``keeps_hidden``, h is a second output, so that second derivatives can flow from the saved h to x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        scaling: float,
        geometry: Geometry,
        path: str,
        keeps_hidden: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        hidden = None
        with no_autocast(x.device.type):
            if path == "branch" or keeps_hidden:
                A = in_dtype(lora_A, x.dtype)
                hidden = _project(_as_read(x, A, geometry), A, geometry)
            if path == "branch":
                assert hidden is not None, "computed above"
                y = conv(x, in_dtype(weight, x.dtype), bias, geometry)
                _add_mix(y, in_dtype(lora_B, x.dtype), hidden, scaling)
            else:
                y = conv(x, in_dtype(plus_delta(weight, lora_A, lora_B, scaling), x.dtype), bias, geometry)
        _, _, for_A, for_B, *_ = ctx.needs_input_grad
        is_read = for_A or (for_B and not keeps_hidden)
        ctx.save_for_backward(x if is_read else None, weight, lora_A, lora_B, bias, hidden)
        ctx.form, ctx.sizes = Form.of(x), y.shape[2:]
        ctx.scaling, ctx.geometry, ctx.path = scaling, geometry, path
        if not keeps_hidden:
            return y
        assert hidden is not None, "computed above"
        ctx.set_materialize_grads(False)
        return y, hidden

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        g, *of_hidden = grads
        saved = ctx.saved_tensors  # read once: under checkpointing each may be unpacked only once
        kept, weight, lora_A, *_ = saved
        x: Tensor | Form = ctx.form if kept is None else kept
        with no_autocast(weight.device.type):
            grad_x, grad_A, grad_B, grad_bias = (None,) * 4 if g is None else _gradients(ctx, saved, g, x)
            if ctx.needs_input_grad[0] and of_hidden and of_hidden[0] is not None:
                t = of_hidden[0].view(*of_hidden[0].shape[:2], *ctx.sizes)
                through_hidden = _input_grad(t, x, in_dtype(lora_A, t.dtype), ctx.geometry)
                grad_x = through_hidden if grad_x is None else grad_x + through_hidden
        return grad_x, None, grad_A, grad_B, grad_bias, None, None, None, None


def _gradients(ctx: Any, saved: tuple[Any, ...], g: Tensor, x: Tensor | Form) -> tuple[Tensor | None, ...]:
    """Compute the gradients of x, A, B and the bias; None for each that is not needed."""
    bias, for_bias = saved[4], ctx.needs_input_grad[4]
    grads = (_gradients_from_dense if ctx.path == "weight" else _gradients_of_rank_r)(ctx, saved, g, x)
    return (*grads, in_dtype(g.sum((0, *range(2, g.ndim))), bias.dtype) if for_bias else None)


def _gradients_from_dense(ctx: Any, saved: tuple[Any, ...], g: Tensor, x: Tensor | Form) -> tuple[Tensor | None, ...]:
    """Compute the gradients of x, A and B on path ``"weight"``: those of A and B from the dense weight gradient."""
    kept, weight, lora_A, lora_B, *_ = saved
    for_x, _, for_A, for_B, *_ = ctx.needs_input_grad
    grad_x = grad_A = grad_B = None
    if for_A or for_B:
        grad_A, grad_B = _through_dense(g, kept, lora_A, lora_B, ctx.scaling, ctx.geometry, for_A)
    if for_x:
        merged = plus_delta(weight, lora_A, lora_B, ctx.scaling)
        grad_x = _input_grad(g, x, in_dtype(merged, g.dtype), ctx.geometry)
    return grad_x, grad_A, grad_B


def _gradients_of_rank_r(ctx: Any, saved: tuple[Any, ...], g: Tensor, x: Tensor | Form) -> tuple[Tensor | None, ...]:
    """Compute the gradients of x, A and B on the other paths: those of A and B through tensors of r channels."""
    kept, weight, lora_A, lora_B, _, hidden = saved
    for_x, _, for_A, for_B, *_ = ctx.needs_input_grad
    geometry, scaling, is_branch = ctx.geometry, ctx.scaling, ctx.path == "branch"
    A, B, flat = in_dtype(lora_A, g.dtype), in_dtype(lora_B, g.dtype), _flat(g)
    read = None if kept is None else _as_read(kept, A, geometry)
    grad_x = grad_A = grad_B = t = None
    if for_A and for_x and not is_branch and _as_one_product(g, weight, geometry):
        grad_x, t = _both(flat, g, x, plus_delta(weight, lora_A, lora_B, scaling), B, geometry)
    elif for_A or (for_x and is_branch):
        t = _mix(B.T, flat)
    if for_A:
        assert t is not None and read is not None, "computed above"
        grad_A = in_dtype(_weight_grad(t, g, read, A, geometry), lora_A.dtype).mul_(scaling)
    if for_B:
        if read is not None and (hidden is None or torch.is_grad_enabled()):
            # Recomputed here: computing it in the forward would take as long, and saving it would take memory.
            hidden = _project(read, A, geometry)
        grad_B = in_dtype(_outer(flat, hidden), lora_B.dtype).mul_(scaling)
    if for_x and grad_x is None:
        merged = weight if is_branch else plus_delta(weight, lora_A, lora_B, scaling)
        grad_x = _input_grad(g, x, in_dtype(merged, g.dtype), geometry)
        if is_branch:
            assert t is not None, "computed above"
            _add_input_grad(grad_x, t, g, x, A, scaling, geometry)
    return grad_x, grad_A, grad_B


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    stride, padding, dilation, groups = geometry
    bias = None if bias is None else in_dtype(bias, x.dtype)
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, (0,) * len(stride), groups)


def is_pointwise(kernel: Sequence[int], geometry: Geometry) -> bool:
    """Return whether the kernel is 1×1 without padding and groups, hence a matrix product over channels."""
    return math.prod(kernel) == 1 and not any(geometry.padding) and geometry.groups == 1


def sampled(x: Tensor, stride: Ints) -> Tensor:
    """Return the positions of x that a 1×1 kernel of this stride reads."""
    return x[tuple(slice(None, None, step) for step in (1, 1, *stride))] if _skips(stride) else x


def _skips(stride: Ints) -> bool:
    """Return whether a 1×1 kernel of this stride skips positions."""
    return math.prod(stride) > 1


def _as_read(x: Tensor, lora_A: Tensor, geometry: Geometry) -> Tensor:
    """Return x in the form that A reads: for a 1×1 kernel ``(N, C_in, positions)``, else x itself."""
    return _flat(sampled(x, geometry.stride)) if is_pointwise(lora_A.shape[2:], geometry) else x


def _project(read: Tensor, lora_A: Tensor, geometry: Geometry) -> Tensor:
    """Compute h = A ∗ x: ``(N, rank, positions)``."""
    if is_pointwise(lora_A.shape[2:], geometry):
        return _mix(_rows(lora_A), read)
    return _flat(conv(read, lora_A, None, geometry))


def _weight_grad(t: Tensor, g: Tensor, read: Tensor, lora_A: Tensor, geometry: Geometry) -> Tensor:
    """Compute dA in A's shape; of g, only the shape is used."""
    if is_pointwise(lora_A.shape[2:], geometry):
        return _outer(t, read).view(lora_A.shape)
    return _convolution_backward(_shaped(t, g), read, lora_A, geometry, 1)


def _input_grad(g: Tensor, x: Tensor | Form, weight: Tensor, geometry: Geometry) -> Tensor:
    """Compute the input gradient of a convolution with ``weight``; of x, only the form is used."""
    if _as_product(g, weight, geometry):
        return _spread(_shaped(_mix(_rows(weight).T, _flat(g)), g), x, geometry)
    if _skips(geometry.stride) and is_pointwise(weight.shape[2:], geometry) and is_float_on_cpu(g):
        # torch's is two to three times as slow with a stride as without
        once = geometry._replace(stride=(1,) * len(geometry.stride))
        read = torch.empty_like(sampled(_of_form(x, g), geometry.stride))
        return _spread(_convolution_backward(g, read, weight, once, 0), x, geometry)
    return _convolution_backward(g, _of_form(x, g), weight, geometry, 0)


def _of_form(x: Tensor | Form, g: Tensor) -> Tensor:
    """Return a tensor of x's form with arbitrary values."""
    return x.empty(g) if isinstance(x, Form) else x


def _as_product(g: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Return whether the input gradient is faster as a matrix product over channels than by torch's kernel."""
    positions, outputs, inputs = math.prod(g.shape[2:]), *weight.shape[:2]
    return (
        is_pointwise(weight.shape[2:], geometry)
        and is_float_on_cpu(g)
        and not _channels_last(g)
        and positions * max(outputs / inputs, 1) >= LARGE
    )


def _as_one_product(g: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Return whether t should be computed by the same product.

    That is so if g has more channels than x. Computing t then costs most, and networks seldom add another gradient to
    that of x, which would be slower for a part of a larger tensor.
    """
    return weight.shape[0] > weight.shape[1] and _as_product(g, weight, geometry)


def _both(
    flat: Tensor, g: Tensor, x: Tensor | Form, weight: Tensor, B: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """Compute the input gradient and t by one product, which reads g, the larger operand, once."""
    columns = weight.shape[1]
    both = _mix(torch.cat([_rows(in_dtype(weight, B.dtype)), B], 1).T, flat)
    return _spread(_shaped(both[:, :columns], g), x, geometry), both[:, columns:]


def _spread(grad: Tensor, x: Tensor | Form, geometry: Geometry) -> Tensor:
    """Expand a gradient from the positions that a 1×1 kernel reads to all positions of x, with zeros between."""
    if not _skips(geometry.stride):
        return grad
    n, channels, *sizes = x.shape  # zeros of grad's, not of x's, are batched where grad is
    last = _channels_last(x)
    whole = grad.new_zeros(n, *sizes, channels).movedim(-1, 1) if last else grad.new_zeros(x.shape)
    sampled(whole, geometry.stride).copy_(grad)
    return whole


def _add_input_grad(
    grad: Tensor, t: Tensor, g: Tensor, x: Tensor | Form, lora_A: Tensor, scaling: float, geometry: Geometry
) -> None:
    """Add to ``grad``, in place, the input gradient through A; of g and x, only the form is used."""
    if is_pointwise(lora_A.shape[2:], geometry):
        _add_mix(sampled(grad, geometry.stride), _rows(lora_A).T, t, scaling)
    else:
        grad.add_(_input_grad(_shaped(t, g), x, lora_A, geometry), alpha=scaling)


def _convolution_backward(g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, which: int) -> Tensor:
    stride, padding, dilation, groups = geometry
    mask = [which == 0, which == 1, False]
    found = torch.ops.aten.convolution_backward(
        g, x, weight, None, stride, padding, dilation, False, [0] * len(stride), groups, mask
    )
    grad: Tensor = found[which]
    return grad


def _through_dense(
    g: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, geometry: Geometry, for_A: bool
) -> tuple[Tensor | None, Tensor]:
    """Compute the gradients of A and B from the dense weight gradient."""
    kernel = lora_A.shape[2:]
    if depthwise.wins(x, kernel, geometry, g.shape[1]):
        dense = depthwise.weight_grad(g, x, kernel, geometry)
    else:
        dense = _convolution_backward(g, x, x.new_empty(()).expand(lora_B.shape[0], *lora_A.shape[1:]), geometry, 1)
    dense = _rows(dense).to(lora_A.dtype) * scaling
    return (lora_B.T @ dense).view(lora_A.shape) if for_A else None, dense @ _rows(lora_A).T


def _channels_last(x: Tensor | Form) -> bool:
    return x.stride(1) == 1 and x.shape[1] > 1


# reshape and view, for autograd.grad(is_grads_batched=True) has no rule for flatten and unflatten.


def _rows(weight: Tensor) -> Tensor:
    """Reshape a kernel to a matrix with one row per output channel."""
    return weight.reshape(weight.shape[0], -1)


def _flat(x: Tensor) -> Tensor:
    """Reshape ``(N, C, *spatial)`` to ``(N, C, positions)`` in x's memory format."""
    n, channels = x.shape[:2]
    return x.movedim(1, -1).reshape(n, -1, channels).mT if _channels_last(x) else x.reshape(n, channels, -1)


def _shaped(flat: Tensor, like: Tensor) -> Tensor:
    """Reshape ``(N, m, positions)`` to ``(N, m, *spatial)``, with the spatial shape of ``like``."""
    return flat.view(flat.shape[0], -1, *like.shape[2:])


def _mix(matrix: Tensor, x: Tensor) -> Tensor:
    """Multiply ``(m, C)`` by ``(N, C, positions)`` over channels to ``(N, m, positions)``, in x's memory format."""
    if _channels_last(x):
        return (x.mT @ matrix.T).mT
    return torch.bmm(matrix.expand(x.shape[0], *matrix.shape), x)


def _add_mix(y: Tensor, matrix: Tensor, x: Tensor, factor: float) -> None:
    """Add ``factor · _mix(matrix, x)`` to y ``(N, m, *spatial)``, in place: one pass over y."""
    if y.is_contiguous():
        y.view(*y.shape[:2], -1).baddbmm_(matrix.expand(y.shape[0], *matrix.shape), x, alpha=factor)
    else:
        y.add_(_shaped(_mix(matrix, x), y), alpha=factor)


def _positions(x: Tensor) -> Tensor:
    """Reshape ``(N, m, positions)`` to ``(N · positions, m)``."""
    return x.mT.reshape(-1, x.shape[1])


def _outer(g: Tensor, h: Tensor) -> Tensor:
    """Sum outer products of ``(N, m, positions)`` and ``(N, r, positions)`` over images and positions: ``(m, r)``."""
    if g.shape[1] > h.shape[1]:
        return _outer(h, g).T  # the thin one first: half as long
    if _channels_last(g):
        return _positions(g).T @ _positions(h)
    return torch.bmm(g, h.mT).sum(0)
