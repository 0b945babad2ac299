"""Places in a module whose tensor differs from owner to owner: the base has its own, and so has each adapter.

The head, norm statistics and every other buffer are such places. One owner's tensor is in the module, where the
forward, the optimizer and the state dict find it; the others' are kept here, the same objects, until it is their turn.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from ._functional import move_like

BASE = ""
"""The base as an owner; no adapter can have this name."""
COPY = "."
"""A passing copy of a base buffer, in place while adapters are disabled, so that nothing can move the base."""


@dataclass
class Place:
    """A parameter's or buffer's place in a module."""

    module: nn.Module
    name: str
    is_parameter: bool
    owner: str = BASE
    """Whose tensor is in the module."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """The other owners' tensors."""

    @property
    def home(self) -> dict[str, Tensor | None]:
        """The module's parameters or buffers."""
        parameters: dict[str, Tensor | None] = self.module._parameters  # type: ignore[assignment]
        return parameters if self.is_parameter else self.module._buffers

    @property
    def now(self) -> Tensor | None:
        """The tensor in the module; None where the user has taken it away."""
        return self.home.get(self.name)

    def of(self, owner: str) -> Tensor | None:
        """This owner's tensor; where it has none here, the base's."""
        if owner in self.kept or owner == self.owner:
            return self.kept.get(owner, self.now)
        return self.kept.get(BASE, self.now)

    def put(self, owner: str) -> None:
        """Put the owner's tensor, or the base's where it has none, into the module; bit for bit, the same object.

        It follows the model to the device and dtype where that is by now. May be run again after an interrupt.
        """
        if owner not in self.kept and owner != self.owner:
            owner = BASE
        now = self.now
        if owner != self.owner:
            if now is not None:
                self.kept[self.owner] = now
            self.owner = owner
        if owner in self.kept:
            self.home[self.name] = move_like(self.kept[owner], now)
            del self.kept[owner]

    def put_copy(self) -> None:
        """Put the base's tensor in; of a buffer, a copy."""
        if not self.is_parameter and self.owner != COPY:
            base = self.of(BASE)
            if base is not None:
                self.kept[COPY] = base.clone()
        self.put(BASE if self.is_parameter else COPY)

    def forget(self, owner: str) -> None:
        """Drop an owner's tensor that is not in the module."""
        self.kept.pop(owner, None)
