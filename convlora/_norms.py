"""Norm layers that keep running statistics: frozen in place, or tracked so that an adapter can own the statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn

from ._plan import NormPolicy
from ._swap import Swapped, restore, swap

if TYPE_CHECKING:
    from typing_extensions import Self


def keeps_statistics(module: nn.Module) -> bool:
    """Whether training moves statistics in this module: BatchNorm and its kin, InstanceNorm where it tracks.

    Told by the buffers' field-wide names, so that norms outside torch (timm's EvoNorm) count too. A module with
    weight matrices inside is a block that counts something, not a norm, and should hear ``train()``.
    """
    keeps = any(name.startswith("running_") and buffer is not None for name, buffer in module._buffers.items())
    return keeps and not any(p.ndim > 1 for child in module.children() for p in child.parameters())


class FrozenNorm(Swapped):
    """A norm layer that stays in eval behaviour whatever ``model.train()`` says."""

    _convlora_prefix: ClassVar[str] = "Frozen"

    def train(self, mode: bool = True) -> Self:
        """Children (activation, dropout) follow ``mode``; the norm itself remembers it and stays in eval."""
        super().train(mode)  # type: ignore[misc]
        _hold(cast(nn.Module, self), mode)
        return self


class TrackedNorm(Swapped):
    """A norm layer whose statistics move once a step, also where gradient checkpointing runs its forward twice."""

    _convlora_prefix: ClassVar[str] = "Tracked"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The norm's own forward; run again inside a backward, it leaves the statistics as they are."""
        if _inside_backward():
            with _spared(cast(nn.Module, self)):
                return super().forward(*args, **kwargs)  # type: ignore[misc]
        return super().forward(*args, **kwargs)  # type: ignore[misc]


MODE = "_convlora_mode"
"""Where a frozen norm remembers the mode that the model is in."""

POLICIES: dict[NormPolicy, type[Swapped]] = {"freeze": FrozenNorm, "track": TrackedNorm}


def _inside_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@contextmanager
def _spared(norm: nn.Module) -> Iterator[None]:
    """Copies take the buffers' places: the output in train mode does not depend on them."""
    buffers = dict(norm._buffers)
    norm._buffers.update({name: None if buffer is None else buffer.clone() for name, buffer in buffers.items()})
    try:
        yield
    finally:
        norm._buffers.update(buffers)


def set_policy(norm: nn.Module, policy: NormPolicy | None) -> None:
    """Freeze the norm, track it, or with None give it back its own class and the mode that the model is in."""
    if isinstance(norm, (FrozenNorm, TrackedNorm)):
        restore(cast(nn.Module, norm))
    norm.training = vars(norm).get(MODE, norm.training)
    vars(norm).pop(MODE, None)
    if policy is not None:
        swap(norm, POLICIES[policy])
    if policy == "freeze":
        _hold(norm, norm.training)


def _hold(norm: nn.Module, mode: bool) -> None:
    vars(norm)[MODE] = mode
    norm.training = False
