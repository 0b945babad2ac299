"""Activations and pooling that keep for the backward only what their derivative needs.

torch keeps the output of a ReLU, 32 bits per element in fp32; its derivative needs one bit. Of max pooling torch keeps
the input and an int64 index per output; the gradient needs the position of the maximum within its window. Of average
pooling torch keeps the input; the gradient needs its shape alone.
Outputs and gradients equal torch's bit for bit: torch's own functions compute the forward and the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from .functional import Form, Ints, is_transformed
from .swap import Swapped, check_restorable, original_class, restore, swap_over

aten = torch.ops.aten

Masks = bool | Literal["bits"]
"""Whether masks are kept: one byte per element, or one bit, which takes a few more passes over the bytes."""

PACKED_FROM = 2**15
"""The smallest number of elements that is packed into bits; below it, packing costs calls and saves few bytes."""


class _Derivative(NamedTuple):
    """The backward of an activation, computed from a mask instead of its output."""

    mask: Callable[[Any, Tensor], Tensor]
    """(module, output) -> bool tensor: True where the derivative is 1."""
    backward: Any
    """torch's backward function. It gets signs instead of the output: negative where the mask is False."""
    arguments: Callable[[Any], tuple[Any, ...]]
    """module -> the further arguments of ``backward``."""
    offset: int = 0
    """A constant that is added to the signs first."""
    is_known: Callable[[Any], bool] = lambda module: True
    """module -> whether the mask follows from the output alone."""


def _passes(backward: Any, y: Tensor, *arguments: Any) -> Tensor:
    """Compute the mask by applying torch's own backward to a gradient of ones."""
    return cast(Tensor, backward(y.new_ones(()).expand_as(y), y, *arguments)).to(torch.bool)


# ReLU's output is positive or NaN where the derivative is 1, and 0 elsewhere. Casting it to bool takes a quarter of a
# comparison's time.
_RELU = _Derivative(lambda module, y: y.to(torch.bool), aten.threshold_backward, lambda module: (-0.5,))
_HARDTANH = _Derivative(
    lambda module, y: _passes(aten.hardtanh_backward, y, module.min_val, module.max_val),
    aten.hardtanh_backward,
    lambda module: (-0.5, 200),
)
_LEAKY = _Derivative(
    lambda module, y: _passes(aten.leaky_relu_backward, y, 0.0, False),
    aten.leaky_relu_backward,
    lambda module: (module.negative_slope, False),
    offset=1,
    is_known=lambda module: module.negative_slope >= 0,
)
DERIVATIVES: dict[Any, _Derivative] = {
    nn.ReLU.forward: _RELU,
    nn.Hardtanh.forward: _HARDTANH,
    nn.LeakyReLU.forward: _LEAKY,
}
"""By the class's forward function, so that subclasses that inherit it are included (nn.ReLU6 inherits Hardtanh's)."""

POOLS = (nn.MaxPool2d.forward, nn.AvgPool2d.forward)


class Masked(Swapped):
    """The base class of the mixins here, which compute the module's own output and keep less for the backward."""


class MaskedActivation(Masked):
    """An activation that keeps a mask of one byte per element."""

    _convlora_prefix: ClassVar[str] = "Masked"
    _convlora_packs: ClassVar[bool] = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the activation's own forward; if a gradient is needed, keep a mask and not the output."""
        if not isinstance(self, MaskedActivation):  # a wrapper has kept this method, and the class has been given back
            return type(self).forward(self, *args, **kwargs)
        derivative = DERIVATIVES[self._convlora_base.forward]
        if len(args) == 1 and not kwargs and _is_kept(args[0]) and derivative.is_known(self):
            x, in_place = args[0], cast(Any, self).inplace
            if not in_place or not (x.is_leaf or x._is_view()):  # torch refuses leaves, and tracks views itself
                return _Activation.apply(x, self, super().forward, derivative, in_place)  # type: ignore[misc]
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class PackedActivation(MaskedActivation):
    """An activation that keeps a mask of one bit per element."""

    _convlora_prefix: ClassVar[str] = "Packed"
    _convlora_packs: ClassVar[bool] = True


class MaskedPool(Masked):
    """A pooling that keeps no input: max pooling keeps the maxima's positions in their windows."""

    _convlora_prefix: ClassVar[str] = "Masked"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the pooling's own forward; if a gradient is needed, do not keep the input."""
        if not isinstance(self, MaskedPool):  # a wrapper has kept this method, and the class has been given back
            return type(self).forward(self, *args, **kwargs)
        if len(args) == 1 and not kwargs and _is_kept(args[0]) and args[0].ndim == 4:
            pool: Any = self
            if self._convlora_base.forward is nn.AvgPool2d.forward:
                return _AveragePool.apply(args[0], pool, super().forward)  # type: ignore[misc]
            if not pool.return_indices:
                return _MaxPool.apply(args[0], _Window.of(pool))
        return super().forward(*args, **kwargs)  # type: ignore[misc]


def mixin_for(module: nn.Module, masks: Masks = True) -> type[Masked] | None:
    """Return the mixin that saves memory in this module; None if there is none or masks are off."""
    forward: Any = original_class(module).forward
    if masks and forward in DERIVATIVES:
        return PackedActivation if masks == "bits" else MaskedActivation
    return MaskedPool if masks and forward in POOLS else None


def set_masked(module: nn.Module, masks: Masks) -> None:
    """Make the module keep a mask, or restore its class. May be run again.

    Raises:
        StateError: another library has put its own class on top of ours.
    """
    mixin = mixin_for(module, masks)
    if mixin is not None:
        swap_over(module, mixin)
    elif isinstance(module, Masked):
        restore(cast(nn.Module, module))
    else:
        check_restorable(module)


def _is_kept(x: Any) -> bool:
    """Return whether autograd would keep something of x, and the functions here support x."""
    return (
        not torch.compiler.is_compiling()  # compilers decide themselves what to keep
        and not is_transformed()
        and type(x) in (Tensor, nn.Parameter)
        and x.requires_grad
        and torch.is_grad_enabled()
        and x.numel() > 0
        and x.is_floating_point()
    )


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, module: Any, forward: Callable[[Tensor], Tensor], derivative: _Derivative, in_place: bool
    ) -> Tensor:
        y = forward(x)
        if in_place:
            ctx.mark_dirty(x)
        mask = derivative.mask(module, y)
        ctx.packed = None
        if module._convlora_packs and mask.numel() >= PACKED_FROM:
            ctx.packed = mask.shape, mask.stride()
            ctx.save_for_backward(pack(mask))
        else:
            ctx.save_for_backward(mask.view(torch.int8).sub_(1))
        ctx.derivative, ctx.arguments = derivative, derivative.arguments(module)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (signs,), (g,) = ctx.saved_tensors, grads
        signs = (signs if ctx.packed is None else unpack(signs, *ctx.packed)).to(g.dtype)
        if ctx.derivative.offset:
            signs.add_(ctx.derivative.offset)
        # Without memory of its own is what batches several gradients: autograd.grad(is_grads_batched=True), torch.func.
        if torch.is_grad_enabled() or not torch._C._has_storage(g) or g.stride() != signs.stride():
            grad = ctx.derivative.backward(g, signs, *ctx.arguments)
        else:  # the same into memory that is at hand
            grad = ctx.derivative.backward.grad_input(g, signs, *ctx.arguments, grad_input=signs)
        return grad, None, None, None, None


_SHIFTS = torch.arange(7, -1, -1, device="cpu").unsqueeze(1)


def pack(mask: Tensor) -> Tensor:
    """A bool tensor without gaps as bits, ``(numel / 16,)`` of int16, rounded up to whole int64: 1 where it is False.

    Bit i of each byte is from the i-th eighth of the numbers in memory, so that whole words are added and shifted: of
    16 bits where they are added, of 64 where they are shifted, as processors do it fastest.
    """
    numel = mask.numel()
    if numel % 64 or not mask.is_contiguous():
        mask = mask.as_strided((numel,), (1,))
        mask = torch.cat([mask, mask.new_zeros(-numel % 64)]) if numel % 64 else mask
    words = mask.view(8, -1).view(torch.int16)
    low, high = words.chunk(2)
    low, high = torch.add(low, high, alpha=16).chunk(2)
    low, high = torch.add(low, high, alpha=4).unbind()
    return torch.add(low, high, alpha=2).bitwise_not_()


def unpack(packed: Tensor, shape: Ints, stride: Ints) -> Tensor:
    """What :func:`pack` was given, of this shape and with these strides, as signs of int8: below 0 where it was False.

    Each bit in turn is made the highest of its byte; what is below it there is of others.
    """
    shifts = _SHIFTS if packed.is_cpu else torch.arange(7, -1, -1, device=packed.device).unsqueeze(1)
    words = torch.bitwise_left_shift(packed.view(torch.int64), shifts)
    return words.view(torch.int8).as_strided(shape, stride)


def _pair(size: int | Ints) -> Ints:
    return (size, size) if isinstance(size, int) else tuple(size)


class _AveragePool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pool: Any, forward: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.form = Form.of(x)
        kernel, rest = _pair(pool.kernel_size), (pool.ceil_mode, pool.count_include_pad, pool.divisor_override)
        ctx.arguments = kernel, _pair(pool.stride or kernel), _pair(pool.padding), *rest
        return forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        return aten.avg_pool2d_backward(g, ctx.form.empty(g), *ctx.arguments), None, None


class _Window(NamedTuple):
    """The arguments of a max pooling, each for height and width."""

    kernel: Ints
    stride: Ints
    padding: Ints
    dilation: Ints
    ceil_mode: bool

    @classmethod
    def of(cls, pool: nn.MaxPool2d) -> _Window:
        kernel = _pair(pool.kernel_size)
        stride, padding, dilation = map(_pair, (pool.stride or kernel, pool.padding, pool.dilation))
        return cls(kernel, stride, padding, dilation, pool.ceil_mode)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, window: _Window) -> Tensor:
        y, indices = aten.max_pool2d_with_indices(x, *window)
        ctx.form, ctx.window = Form.of(x), window
        ctx.save_for_backward((indices - _corners(ctx, indices)).to(_smallest(ctx)))
        return cast(Tensor, y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (places,), (g,) = ctx.saved_tensors, grads
        indices = places + _corners(ctx, places)
        return aten.max_pool2d_with_indices_backward(g, ctx.form.empty(g), *ctx.window, indices), None


def _corners(ctx: Any, like: Tensor) -> Tensor:
    """Return the flat index where each output's window begins; padding counts: int64, ``(height, width)``."""
    height, width = (
        torch.arange(count, device=like.device) * stride - padding
        for count, stride, padding in zip(like.shape[2:], ctx.window.stride, ctx.window.padding, strict=True)
    )
    corners: Tensor = height.unsqueeze(1) * ctx.form.shape[3] + width
    return corners


def _smallest(ctx: Any) -> torch.dtype:
    """Return the smallest integer type that can hold every position within a window."""
    down, right = ((k - 1) * d for k, d in zip(ctx.window.kernel, ctx.window.dilation, strict=True))
    furthest = down * ctx.form.shape[3] + right
    dtypes = (torch.uint8, torch.int16, torch.int32, torch.int64)
    return next(derivative for derivative in dtypes if furthest <= torch.iinfo(derivative).max)
