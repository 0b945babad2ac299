"""A readers-writer lock: forwards of a whole model may run together, and a write of its weights runs alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, get_ident
from typing import Any, ClassVar, cast

import torch
from torch import nn

from .swap import Swapped, set_below

GATE = "_convlora_gate"
"""The root's attribute that holds its gate."""


class Gate:
    """A lock that forwards share. A write waits for running forwards, and later forwards wait for the write."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._inside: dict[int, int] = {}
        """The number of nested forwards that each thread is running."""
        self._writer: int | None = None
        self._depth = 0
        self._waiting = 0

    def enter(self) -> None:
        """Begin a forward."""
        me = get_ident()
        with self._changed:
            if me not in self._inside and self._writer != me:
                while self._writer is not None or self._waiting:
                    self._changed.wait()
            self._inside[me] = self._inside.get(me, 0) + 1

    def leave(self) -> None:
        """End it."""
        me = get_ident()
        with self._changed:
            self._inside[me] -= 1
            if not self._inside[me]:
                del self._inside[me]
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside the block no other thread runs a forward; blocks of one thread may be nested."""
        me = get_ident()
        with self._changed:
            self._waiting += 1
            try:
                while self._writer not in (None, me) or self._inside.keys() - {me}:
                    self._changed.wait()
                self._writer, self._depth = me, self._depth + 1
            finally:
                self._waiting -= 1
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._depth -= 1
                if not self._depth:
                    self._writer = None
                    self._changed.notify_all()

    def __deepcopy__(self, memo: dict[int, Any]) -> Gate:
        return Gate()

    def __reduce__(self) -> tuple[type[Gate], tuple[()]]:
        return Gate, ()


class Gated(Swapped):
    """The mixin of a root module whose adapters are swapped while other threads compute."""

    _convlora_prefix: ClassVar[str] = ""  # the class keeps its name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a forward through the gate; compiled code goes around it, since a lock would be traced only once."""
        if not isinstance(self, Gated):  # a wrapper has kept this method, and the class has been given back
            return type(self).__call__(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            return cast(Any, super()).__call__(*args, **kwargs)
        gate = vars(self)[GATE]
        gate.enter()
        try:
            return cast(Any, super()).__call__(*args, **kwargs)
        finally:
            gate.leave()


def add_gate(root: nn.Module) -> None:
    """Make the root's forwards go through a gate. May be run again."""
    from torch._dynamo.eval_frame import (
        skip_code,
    )  # imported late, since torch's compiler takes as long to import as torch

    # These frames are not compiled: compilation begins inside, and the lock is held in Python.
    for function in (Gated.__call__, Gate.enter, Gate.leave):
        skip_code(function.__code__)
    vars(root).setdefault(GATE, Gate())
    set_below(root, Gated, is_there=True)


def remove_gate(root: nn.Module) -> None:
    """Undo :func:`add_gate`; may be run again."""
    if isinstance(root, Gated):
        set_below(root, Gated, is_there=False)
    vars(root).pop(GATE, None)


@contextmanager
def alone(root: nn.Module) -> Iterator[None]:
    """Inside the block no other thread runs a forward of the model, if the model has a gate."""
    gate = vars(root).get(GATE)
    if gate is None:
        yield
        return
    with gate.alone():
        tensors = (*root.parameters(), *root.buffers()) if torch.accelerator.is_available() else ()
        waited = {tensor.device for tensor in tensors if tensor.device.type not in ("cpu", "meta")}
        for device in waited:  # forwards have ended on the host, perhaps not on the device
            torch.accelerator.synchronize(device)
        try:
            yield
        finally:
            for device in waited:  # forwards in other threads may be on other streams
                torch.accelerator.synchronize(device)
