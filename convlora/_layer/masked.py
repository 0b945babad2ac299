"""Activations and pooling that keep for the backward what their derivative needs, and no more.

torch keeps the output of a ReLU, 32 bits a number in fp32; its derivative needs one. Of max pooling torch keeps the
input and an int64 index for each output; the gradient needs to know which number of the window was the largest.
Forward and gradient have the bits that torch's have: the output is torch's own, and so is the backward's arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from .functional import Ints, is_transformed
from .swap import Swapped, check_restorable, original_class, restore, turn

aten = torch.ops.aten

PACKED_FROM = 2**15
"""Numbers in a tensor from which on a mask takes one bit of each and not a byte: below, packing is calls and no bytes.

On a CPU alone, where packing was measured: it costs half of what the activation costs, well below a hundredth of a step
of ResNet-50 (``benchmarks/masks.py``). Elsewhere a mask is a bool until it is measured there.
"""


class _Kind(NamedTuple):
    """How an activation whose derivative is a mask goes backward, from a mask instead of its output."""

    mask: Callable[[Any, Tensor], Tensor]
    """Of the module and its output: where the gradient passes as it is, as bool."""
    backward: Any
    """torch's backward, which is given 1 where it passes and 0 where not, in place of what torch would have kept."""
    arguments: Callable[[Any], tuple[Any, ...]]
    """What else it is given."""
    is_known: Callable[[Any], bool] = lambda module: True
    """Whether the output tells what torch reads of the input."""


def _passes(backward: Any, y: Tensor, *arguments: Any) -> Tensor:
    """Where torch's own backward lets a gradient of 1 pass."""
    return cast(Tensor, backward(y.new_ones(()).expand_as(y), y, *arguments)).to(torch.bool)


# ReLU's output is above 0 or NaN where the gradient passes, and 0 elsewhere. A comparison says so too, in four times as
# long as a cast to bool.
_RELU = _Kind(lambda module, y: y.to(torch.bool), aten.threshold_backward, lambda module: (0,))
_HARDTANH = _Kind(
    lambda module, y: _passes(aten.hardtanh_backward, y, module.min_val, module.max_val),
    aten.hardtanh_backward,
    lambda module: (0, 2),  # between which 1 lies, and 0 does not
)
_LEAKY = _Kind(
    lambda module, y: _passes(aten.leaky_relu_backward, y, 0.0, False),
    aten.leaky_relu_backward,
    lambda module: (module.negative_slope, False),
    lambda module: module.negative_slope >= 0,
)
KINDS: dict[Any, _Kind] = {nn.ReLU.forward: _RELU, nn.Hardtanh.forward: _HARDTANH, nn.LeakyReLU.forward: _LEAKY}
"""By the forward of their class, so that a subclass with the same forward is known too: nn.ReLU6 is one."""


class Masked(Swapped):
    """Base of the mixins here: in training the base's own output, and less kept for the backward."""


class MaskedActivation(Masked):
    """An activation that keeps a mask."""

    _convlora_prefix: ClassVar[str] = "Masked"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The activation's own forward; where a gradient passes through, with a mask kept and no output."""
        kind = KINDS[self._convlora_base.forward]
        if len(args) == 1 and not kwargs and _is_kept(args[0]) and kind.is_known(self):
            x, in_place = args[0], cast(Any, self).inplace
            if not in_place or not (x.is_leaf or x._is_view()):  # which torch refuses, or tracks in its own way
                return _Activation.apply(x, self, super().forward, kind, in_place)  # type: ignore[misc]
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class MaskedPool(Masked):
    """A max pooling that keeps which number of each window was the largest, in a byte or two."""

    _convlora_prefix: ClassVar[str] = "Masked"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The pooling's own forward; where a gradient passes through, with no input kept."""
        pool = cast(nn.MaxPool2d, self)
        if len(args) == 1 and not kwargs and _is_kept(args[0]) and args[0].ndim == 4 and not pool.return_indices:
            return _MaxPool.apply(args[0], _window(pool))
        return super().forward(*args, **kwargs)  # type: ignore[misc]


def mixin_for(module: nn.Module) -> type[Masked] | None:
    """What a module would become; None where nothing less could be kept."""
    forward: Any = original_class(module).forward
    return MaskedActivation if forward in KINDS else MaskedPool if forward is nn.MaxPool2d.forward else None


def set_masked(module: nn.Module, masked: bool) -> None:
    """Let the module keep a mask, or give it its own class back; may be run again.

    Raises:
        StateError: another library has put its own class on top of ours.
    """
    mixin = mixin_for(module) if masked else None
    if mixin is not None:
        turn(module, mixin)
    elif isinstance(module, Masked):
        restore(cast(nn.Module, module))
    else:
        check_restorable(module)


def _is_kept(x: Any) -> bool:
    """Whether autograd will keep something, and the functions here know how."""
    return (
        not torch.compiler.is_compiling()  # compilers choose by themselves what to keep
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
        ctx: Any, x: Tensor, module: Any, forward: Callable[[Tensor], Tensor], kind: _Kind, in_place: bool
    ) -> Tensor:
        y = forward(x)
        if in_place:
            ctx.mark_dirty(x)
        mask = kind.mask(module, y)
        ctx.packed = None
        if mask.device.type == "cpu" and mask.numel() >= PACKED_FROM:
            ctx.packed = mask.shape, mask.stride()
            mask = pack(mask)
        ctx.save_for_backward(mask)
        ctx.backward_of, ctx.arguments = kind.backward, kind.arguments(module)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (mask,), (g,) = ctx.saved_tensors, grads
        passes = mask.view(torch.int8) if ctx.packed is None else unpack(mask, *ctx.packed)
        passes = passes.to(g.dtype)
        # Without memory of its own is what batches several gradients: autograd.grad(is_grads_batched=True), torch.func.
        if torch.is_grad_enabled() or not torch._C._has_storage(g) or g.stride() != passes.stride():
            grad = ctx.backward_of(g, passes, *ctx.arguments)
        else:  # the same into memory that is at hand
            grad = ctx.backward_of.grad_input(g, passes, *ctx.arguments, grad_input=passes)
        return grad, None, None, None, None


_LOWEST_BITS = 0x0101010101010101


def pack(mask: Tensor) -> Tensor:
    """A bool tensor without gaps as bits: ``(numel / 64,)`` of int64, rounded up; eight bytes are added at a time.

    Bit i of each byte is from the i-th eighth of the numbers in memory, so that words, not bytes, are shifted.
    """
    numel = mask.numel()
    flat = mask.as_strided((numel,), (1,))
    if numel % 64:
        flat = torch.cat([flat, flat.new_zeros(-numel % 64)])
    words = flat.view(torch.int64).view(8, -1)
    four = torch.add(words[:4], words[4:], alpha=16)
    two = torch.add(four[:2], four[2:], alpha=4)
    return torch.add(two[0], two[1], alpha=2)


def unpack(packed: Tensor, shape: Ints, stride: Ints) -> Tensor:
    """The numbers that :func:`pack` was given, 0 or 1 as int8, of this shape and with these strides."""
    bits = torch.arange(8, device=packed.device).unsqueeze(1)
    words = torch.bitwise_right_shift(packed, bits).bitwise_and_(_LOWEST_BITS)
    return words.view(torch.int8).view(-1).as_strided(shape, stride)


class _Window(NamedTuple):
    """The arguments of a pooling, a number for each of both directions."""

    kernel: Ints
    stride: Ints
    padding: Ints
    dilation: Ints
    ceil_mode: bool


def _window(pool: nn.MaxPool2d) -> _Window:
    sizes = (pool.kernel_size, pool.stride or pool.kernel_size, pool.padding, pool.dilation)
    kernel, stride, padding, dilation = ((size, size) if isinstance(size, int) else tuple(size) for size in sizes)
    return _Window(kernel, stride, padding, dilation, pool.ceil_mode)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, window: _Window) -> Tensor:
        y, indices = aten.max_pool2d_with_indices(x, *window)
        ctx.shape, ctx.strides, ctx.window = x.shape, x.stride(), window
        ctx.save_for_backward((indices - _corners(ctx, indices)).to(_smallest(ctx)))
        return cast(Tensor, y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (places,), (g,) = ctx.saved_tensors, grads
        indices = places + _corners(ctx, places)
        x = torch.empty_strided(ctx.shape, ctx.strides, dtype=g.dtype, device=g.device)  # of it, only the form counts
        return aten.max_pool2d_with_indices_backward(g, x, *ctx.window, indices), None


def _corners(ctx: Any, like: Tensor) -> Tensor:
    """Where in the flat image the window of each output begins, also outside of it: int64, ``(height, width)``."""
    height, width = (
        torch.arange(count, device=like.device) * stride - padding
        for count, stride, padding in zip(like.shape[2:], ctx.window.stride, ctx.window.padding, strict=True)
    )
    corners: Tensor = height.unsqueeze(1) * ctx.shape[3] + width
    return corners


def _smallest(ctx: Any) -> torch.dtype:
    """The smallest type of number that tells places within a window apart."""
    down, right = ((k - 1) * d for k, d in zip(ctx.window.kernel, ctx.window.dilation, strict=True))
    furthest = down * ctx.shape[3] + right
    kinds = (torch.uint8, torch.int16, torch.int32, torch.int64)
    return next(kind for kind in kinds if furthest <= torch.iinfo(kind).max)
