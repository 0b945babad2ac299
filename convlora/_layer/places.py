"""Places in a module whose tensor differs from owner to owner: the base has its own, and so has each adapter.

The head, norm statistics and every other buffer are such places. One owner's tensor is in the module, where the
forward, the optimizer and the state dict find it; the others' are kept here, the same objects, until it is their turn.
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
"""A passing copy of a base buffer, in place while adapters are disabled, so that no forward moves the base."""
MIXTURE = ".."
"""Several adapters' tensors by weight, in place while they compute together."""

SWAPPING = RLock()
"""Held by who changes classes or tensors of modules, from the check to the change: a ``use_adapters`` block that
another thread opens, or a forward inside it, must find neither half-way."""


@dataclass
class Place:
    """A parameter's or buffer's place in a module. A buffer may be None, for all owners or for some."""

    module: nn.Module
    name: str
    is_parameter: bool
    owner: str = BASE
    """Whose tensor is in the module."""
    kept: dict[str, Tensor | None] = field(default_factory=dict)
    """The other owners' tensors."""
    moves: int = 0
    """How often a tensor was put into the module: counted just before, when the one that leaves is kept already."""

    @property
    def home(self) -> dict[str, Tensor | None]:
        """The module's parameters or buffers."""
        parameters: dict[str, Tensor | None] = self.module._parameters  # type: ignore[assignment]
        return parameters if self.is_parameter else self.module._buffers

    @property
    def now(self) -> Tensor | None:
        """The tensor in the module; None where the user has taken it away."""
        return self.home.get(self.name)

    @property
    def is_saved(self) -> bool:
        """Whether the state dict holds it."""
        return self.is_parameter or self.name not in self.module._non_persistent_buffers_set

    def of(self, owner: str) -> Tensor | None:
        """This owner's tensor; where it has none here, the base's."""
        while True:  # a forward of another thread asks while put() is at work; it must not wait for a lock
            moves, kept = self.moves, self.kept
            found = kept.get(owner if owner in kept or owner == self.owner else BASE, self)
            found = self.now if found is self else found
            if moves == self.moves:
                return cast("Tensor | None", found)

    def own(self, owner: str) -> Tensor | None:
        """The owner's own tensor; None where it has the base's."""
        return self.of(owner) if self.has(owner) else None

    def has(self, owner: str) -> bool:
        """Whether the owner has its own here, which may be None in the place of a buffer."""
        return owner in self.kept or owner == self.owner

    def has_moved(self, owner: str) -> bool:
        """Whether the owner's tensor holds other numbers than the base's, or the base has none."""
        now, base = self.of(owner), self.of(BASE)
        return now is not None and (base is None or not torch.equal(now, base.to(now.device, now.dtype)))

    def put(self, owner: str) -> None:
        """Put the owner's tensor, or the base's where it has none, into the module; bit for bit, the same object.

        It follows the model to the device and dtype where that is by now. May be run again after an interrupt.
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
        """A tensor of the device and dtype that the owner's has by now; ``now`` is the one in the module."""
        dtype = None if now is None else base_dtype(self.module, self.name)
        if now is None or dtype is None:
            return now
        return now.new_empty(0, dtype=dtype if owner == BASE else torch.promote_types(dtype, torch.float32))

    def put_copy(self, copies: dict[int, Tensor]) -> None:
        """Put the base's tensor in; of a buffer, a copy.

        Args:
            copies: those made so far, by the identity of what they are copies of; shared buffers stay shared.
        """
        if not self.is_parameter and self.owner != COPY:
            base = self.of(BASE)
            self.kept[COPY] = None if base is None else copies.setdefault(id(base), base.clone())
        self.put(BASE if self.is_parameter else COPY)

    def set_tensor(self, owner: str, tensor: Tensor) -> None:
        """Make a tensor the owner's."""
        tensors = self.home if owner == self.owner else self.kept
        tensors[self.name if owner == self.owner else owner] = tensor

    def discard(self, owner: str) -> None:
        """Drop an owner's tensor that is not in the module."""
        self.kept.pop(owner, None)
