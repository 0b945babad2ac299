"""Places: parameters and buffers of a module for which the base and every adapter have a tensor of their own.

The head, running statistics and all other buffers are such places. The tensor of one owner is in the module, where the
forward, the optimizer and the state dict find it; the other owners' tensors are kept here until they are activated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import RLock
from typing import cast

import torch
from torch import Tensor, nn

from .functional import move_like
from .masters import base_dtype

BASE = ""
"""The base as an owner; no adapter can have this name."""
COPY = "."
"""The owner of temporary copies of base buffers: while adapters are disabled, no forward changes the base."""
MIXTURE = ".."
"""The owner of a weighted mean of several adapters' tensors, used while they are active together."""

SWAPPING = RLock()
"""Held from the check to the change by all code that changes classes or tensors of modules, so that a ``use_adapters``
block in another thread never sees a half-finished change."""


@dataclass
class Place:
    """One parameter or buffer of a module, with a tensor per owner. A buffer may be None for some or all owners."""

    module: nn.Module
    name: str
    is_parameter: bool
    owner: str = BASE
    """Whose tensor is in the module."""
    kept: dict[str, Tensor | None] = field(default_factory=dict)
    """The other owners' tensors."""
    is_written: bool = False
    """Whether it is a parameter that forwards write to by themselves, so that each adapter has it as it has buffers."""
    original: nn.Parameter | None = None
    """The base's own Parameter, where an adapter goes on with that object in the module."""
    moves: int = 0
    """How often a tensor was put into the module; incremented just before, when the old tensor is kept already."""

    @property
    def home(self) -> dict[str, Tensor | None]:
        """The module's parameters or buffers."""
        parameters: dict[str, Tensor | None] = self.module._parameters  # type: ignore[assignment]
        return parameters if self.is_parameter else self.module._buffers

    @property
    def now(self) -> Tensor | None:
        """The tensor in the module; None if the user has deleted it."""
        return self.home.get(self.name)

    @property
    def is_saved(self) -> bool:
        """Whether the state dict contains it."""
        return self.is_parameter or self.name not in self.module._non_persistent_buffers_set

    def of(self, owner: str) -> Tensor | None:
        """Return this owner's tensor, or the base's if it has none here."""
        while True:  # another thread's forward may call this during put(), and must not wait for a lock
            moves, kept = self.moves, self.kept
            found = kept.get(owner if owner in kept or owner == self.owner else BASE, self)
            found = self.now if found is self else found
            if moves == self.moves:
                return cast("Tensor | None", found)

    def own(self, owner: str) -> Tensor | None:
        """Return the owner's own tensor; None if it uses the base's."""
        return self.of(owner) if self.has(owner) else None

    def has(self, owner: str) -> bool:
        """Return whether the owner has an entry of its own here, which may be None for a buffer."""
        return owner in self.kept or owner == self.owner

    def has_moved(self, owner: str) -> bool:
        """Return whether the owner's tensor has other values than the base's, or the base has none."""
        now, base = self.of(owner), self.of(BASE)
        return now is not None and (base is None or not torch.equal(now, base.to(now.device, now.dtype)))

    def put(self, owner: str) -> None:
        """Put the owner's tensor, the same object, into the module; the base's if the owner has none.

        The tensor is moved to the model's current device and dtype. May be run again after an interrupt.
        """
        if owner not in self.kept and owner != self.owner:
            owner = BASE
        now = self.now
        if owner != self.owner:
            if self.name in self.home:
                self.kept[self.owner] = now
            self.owner = owner
        if owner in self.kept:
            theirs = self.kept[owner]
            self.moves += 1
            self.home[self.name] = None if theirs is None else move_like(theirs, self._like(owner, now))
            del self.kept[owner]

    def _like(self, owner: str, now: Tensor | None) -> Tensor | None:
        """Return a tensor with the device and dtype that the owner's must have; ``now`` is the one in the module."""
        dtype = None if now is None else base_dtype(self.module, self.name)
        if now is None or dtype is None:
            return now
        return now.new_empty(0, dtype=dtype if owner == BASE else torch.promote_types(dtype, torch.float32))

    def put_copy(self, copies: dict[int, Tensor]) -> None:
        """Put the base's parameter into the module, or a copy of a buffer or of a parameter that forwards write to.

        Args:
            copies: the copies so far, by the id of the original, so that shared buffers stay shared.
        """
        is_constant = self.is_parameter and not self.is_written
        if not is_constant and self.owner != COPY:
            base = self.of(BASE)
            self.kept[COPY] = None if base is None else copies.setdefault(id(base), own_copy(base))
        self.put(BASE if is_constant else COPY)

    def put_base(self) -> None:
        """Put the base's tensor in, where it was the same object before; may be run again."""
        self.put(BASE)
        now = self.now
        if self.original is not None and now is not None:
            self.original.data = now.detach()
            self.home[self.name], self.original = self.original, None

    def set_tensor(self, owner: str, tensor: Tensor) -> None:
        """Set the owner's tensor."""
        tensors = self.home if owner == self.owner else self.kept
        tensors[self.name if owner == self.owner else owner] = tensor

    def discard(self, owner: str) -> None:
        """Delete the tensor of an owner that is not in the module."""
        self.kept.pop(owner, None)


def own_copy(tensor: Tensor, requires_grad: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """A copy for another owner; of a Parameter a Parameter, in this dtype."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach().to(dtype, copy=True), requires_grad=requires_grad)
    return tensor.clone()
