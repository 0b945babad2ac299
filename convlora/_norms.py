"""Norm layers that keep running statistics: frozen in place, or found so that an adapter can own their statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, cast

from torch import nn

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


def _hold(norm: nn.Module, mode: bool) -> None:
    vars(norm)["_convlora_mode"] = mode
    norm.training = False


def freeze(norm: nn.Module) -> None:
    """Keep the norm in eval behaviour until :func:`unfreeze`."""
    swap(norm, FrozenNorm)
    _hold(norm, norm.training)


def unfreeze(norm: nn.Module) -> None:
    """Undo :func:`freeze`; the norm takes the mode that the model was last put in."""
    if isinstance(norm, FrozenNorm):
        restore(cast(nn.Module, norm))
    norm.training = vars(norm).pop("_convlora_mode", norm.training)
