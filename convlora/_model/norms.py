"""Norm layers with running statistics: frozen, or tracked so that each adapter owns its statistics."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._layer.compiler import uncompiled
from .._layer.functional import is_transformed
from .._layer.masters import DTYPES, Mastered
from .._layer.routed import batch_norm
from .._layer.routing import Route, route_of
from .._layer.swap import Swapped, restore, swap_over
from .._plan import NormPolicy
from ..errors import StateError


def keeps_statistics(module: nn.Module) -> bool:
    """Return whether training updates running statistics in this module, as in BatchNorm and tracking InstanceNorm.

    The buffers' usual names (``running_…``) decide, so that norms outside torch (timm's EvoNorm) are included. A module
    that contains weight matrices is a block and not a norm; it must keep following ``train()``.
    """
    keeps = any(name.startswith("running_") and buffer is not None for name, buffer in module._buffers.items())
    return keeps and not any(p.ndim > 1 for child in module.children() for p in child.parameters())


class OwnedNorm(Swapped):
    """A norm layer that belongs to an adapter, so that another library must not replace it by a norm of its own."""

    @property
    def affine(self) -> bool:
        """The norm's own attribute; functions that would replace the norm by another module get a StateError."""
        if sys._getframe(1).f_code.co_name.startswith(("convert", "revert", "freeze", "unfreeze")):
            raise StateError(
                f"A {type(self).__name__} belongs to the adapter of an injected model, and another norm in its place "
                f"would not. Frozen norms are constant already: nothing to synchronise, nothing to freeze. To have "
                'others, convert before convlora.inject (norm="track" where statistics should move). Every norm of '
                "the injected model is as it was."
            )
        try:
            return cast(bool, vars(self)["affine"])
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no attribute 'affine'") from None

    @affine.setter
    def affine(self, value: bool) -> None:
        vars(self)["affine"] = value


class FrozenNorm(OwnedNorm):
    """A norm layer that stays in eval behaviour whatever ``model.train()`` says."""

    _convlora_prefix: ClassVar[str] = "Frozen"

    @property
    def training(self) -> bool:
        """Always False, whatever ``train()`` or other code writes to it."""
        return False

    @training.setter
    def training(self, mode: bool) -> None:
        pass

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, unless a reset function assigns statistics (Lightning's weight averaging does)."""
        if name.startswith(("running_", "num_batches")) and sys._getframe(1).f_code.co_name.startswith("reset"):
            return
        super().__setattr__(name, value)

    def reset_running_stats(self) -> None:
        """Do nothing. ``update_bn`` and weight averaging call this and would set mean 0 and variance 1."""

    def reset_parameters(self) -> None:
        """Do nothing, for the same reason."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the norm's own forward; for torch's batch norm, without keeping the input for the backward."""
        if not isinstance(self, FrozenNorm):  # a wrapper has kept this method, and the class has been given back
            return type(self).forward(self, *args, **kwargs)
        norm = cast(nn.Module, self)
        route = route_of(norm)
        if route is not None:
            return _forward_routed(norm, self._convlora_base, route, args, kwargs)
        if len(args) == 1 and not kwargs and torch.is_grad_enabled():
            rest = _after_batch_norm(self._convlora_base)
            if rest is not None and _is_constant(norm, args[0]):
                cast(Any, norm)._check_input_dim(args[0])  # raises torch's own error for a wrong number of dimensions
                # Read from the dictionaries: nn.Module attributes cost several calls each, in every norm.
                state, affine = norm._buffers, norm._parameters
                mean, var, eps = state["running_mean"], state["running_var"], cast(Any, norm).eps
                return rest(norm, _Constant.apply(args[0], mean, var, affine["weight"], affine["bias"], eps))
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class _Constant(torch.autograd.Function):
    """Batch norm with constant statistics, scale and shift: the same output bit for bit, and ``g · scale`` backward.

    torch's own keeps the input for the gradient of the scale, which is not needed here.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        ctx.save_for_backward(var, weight)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        var, weight = ctx.saved_tensors
        scaled = F.batch_norm(grads[0], torch.zeros_like(var), var, weight, None, training=False, eps=ctx.eps)
        return scaled, None, None, None, None, None


def _after_batch_norm(cls: Any) -> Callable[[nn.Module, Tensor], Tensor] | None:
    """Return what a norm does after torch's batch norm, such as its activation; None for norms of other forwards."""
    if cls.forward in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward):
        return _nothing
    timm = sys.modules.get("timm.layers.norm_act")
    return _drop_and_act if timm is not None and cls.forward is timm.BatchNormAct2d.forward else None


def _nothing(norm: nn.Module, y: Tensor) -> Tensor:
    return y


def _drop_and_act(norm: nn.Module, y: Tensor) -> Tensor:
    return cast(Tensor, norm.act(norm.drop(y)))  # type: ignore[operator]


@uncompiled
def _forward_routed(norm: nn.Module, cls: type[nn.Module], route: Route, args: Any, kwargs: Any) -> Any:
    """Compute a norm's forward, each sample with its own adapter's statistics."""
    route.check(norm)
    rest = _after_batch_norm(cls)
    if rest is not None and len(args) == 1 and not kwargs:
        cast(Any, norm)._check_input_dim(args[0])
        return rest(norm, batch_norm(norm, route, args[0]))

    def alone(owner: str, *args: Any, **kwargs: Any) -> Any:
        return route.run_as(norm, owner, cls.forward, *args, **kwargs)

    return route.split(norm, alone, route.sample_groups(lambda owner: route.tensors_key(norm, owner)), args, kwargs)


def _is_constant(norm: nn.Module, x: Any) -> bool:
    """Return whether x needs a gradient, scale and shift need none, and the norm accepts x."""
    affine = norm._parameters
    return (
        not torch.compiler.is_compiling()
        and not is_transformed()  # first, since a trace would record the checks of the shape
        and type(x) is Tensor
        and x.requires_grad
        and x.ndim > 1
        and x.shape[1] == norm.num_features
        # otherwise they are computed, for instance by a parametrization
        and {"weight", "bias"} <= affine.keys()
        and norm._buffers.get("running_mean") is not None  # otherwise torch uses the batch's statistics
        and norm._buffers.get("running_var") is not None
        and not any(p is not None and p.requires_grad for p in affine.values())
    )


class TrackedNorm(OwnedNorm):
    """A norm layer whose statistics are updated once per step, even if checkpointing runs its forward twice."""

    _convlora_prefix: ClassVar[str] = "Tracked"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the norm's own forward; inside a backward, which recomputes it, the statistics stay unchanged."""
        if not isinstance(self, TrackedNorm):  # a wrapper has kept this method, and the class has been given back
            return type(self).forward(self, *args, **kwargs)
        route = route_of(cast(nn.Module, self))
        if route is not None:
            return _forward_routed(cast(nn.Module, self), self._convlora_base, route, args, kwargs)
        if _inside_backward():
            with _spared(cast(nn.Module, self)):
                return super().forward(*args, **kwargs)  # type: ignore[misc]
        return super().forward(*args, **kwargs)  # type: ignore[misc]


MODES = "_convlora_modes"
"""The attribute in which a frozen norm stores its earlier mode and that of its parent."""

POLICIES: dict[NormPolicy, type[Swapped]] = {"freeze": FrozenNorm, "track": TrackedNorm}


def _inside_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@contextmanager
def _spared(norm: nn.Module) -> Iterator[None]:
    """Replace the buffers by copies inside the block; in train mode the output does not depend on them."""
    buffers = dict(norm._buffers)
    norm._buffers.update({name: None if buffer is None else buffer.clone() for name, buffer in buffers.items()})
    try:
        yield
    finally:
        norm._buffers.update(buffers)


class MasteredNorm(Mastered, TrackedNorm):
    """A tracked norm inside a module that is trained in full, on a half-precision base."""

    _convlora_prefix: ClassVar[str] = "Mastered"


def set_policy(norm: nn.Module, policy: NormPolicy | None, holder: nn.Module | None) -> None:
    """Freeze the norm, track it, or (with None) restore its class and mode. May be run again.

    Args:
        norm: a norm layer with running statistics.
        policy: what the active adapter asks for.
        holder: the module whose child the norm is; None for the root.
    """
    if policy is not None:
        swap_over(norm, MasteredNorm if policy == "track" and DTYPES in vars(norm) else POLICIES[policy])
    elif isinstance(norm, (FrozenNorm, TrackedNorm)):
        restore(cast(nn.Module, norm))
    mode = _mode_unfrozen(norm, holder)
    if policy == "freeze":
        vars(norm)[MODES] = mode, None if holder is None else holder.training
        vars(norm)["training"] = False  # for code that reads the instance's dictionary instead of the property
    else:
        norm.training = mode
        vars(norm).pop(MODES, None)  # last: an interrupt before this line must not lose the mode


def _mode_unfrozen(norm: nn.Module, holder: nn.Module | None) -> bool:
    """Return the mode that the norm has when it is not frozen.

    That is its mode before it was frozen, or the mode of the module that holds it, if that has changed since.
    """
    mode, mode_of_holder = vars(norm).get(MODES, (vars(norm)["training"], None))
    if holder is None or mode_of_holder is None or mode_of_holder == holder.training:
        return cast(bool, mode)
    return holder.training
