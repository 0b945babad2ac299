"""Which tensors does a forward write to by itself, and what did they hold before?

A codebook that follows an average, or a weight that is computed for evaluation, is a Parameter that no gradient moves.
What goes through torch's dispatcher is seen before it is done; ``.data = …`` and ``setattr``, which do not, afterwards:
the memory of before is still held.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import StateError


class Slot(NamedTuple):
    """A parameter's place in a module."""

    module: nn.Module
    name: str
    parameter: nn.Parameter


class Writes(TorchDispatchMode):
    """While it is entered, parameters keep what they held before the first write to them.

    Args:
        slots: the parameters.
        computed: names of modules whose ``weight`` is computed: a write to it, or to what it is computed from, raises.
    """

    def __init__(self, slots: Iterable[Slot], computed: dict[nn.Module, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._slots = list(slots)
        self._memory = {id(slot.parameter): slot.parameter.detach() for slot in self._slots}
        self._before: dict[int, Tensor] = {}
        self._at: dict[int, list[nn.Parameter]] = {}
        self._names = computed
        self._handed: dict[int, tuple[nn.Module, Tensor, Tensor]] = {}
        self._handed_at: dict[int, int] = {}
        self._lost: dict[nn.Module, None] = {}
        for slot in self._slots:
            self._at.setdefault(_address(slot.parameter), []).append(slot.parameter)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler at the first operation, which takes seconds

    def __enter__(self) -> Writes:
        _entered.append(self)
        return cast(Any, super()).__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *exception: Any) -> None:
        _entered.remove(self)
        cast(Any, super()).__exit__(*exception)

    def hand_out(self, layer: nn.Module, weight: Tensor) -> None:
        """What code that reads the layer's ``weight`` was given."""
        self._handed.setdefault(id(weight), (layer, weight, weight.detach()))
        self._handed_at[_address(weight)] = id(weight)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Before an operation, keep what the parameters hold that it writes to."""
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for position, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._note(args[position] if position < len(args) else kwargs.get(argument.name))
        return func(*args, **kwargs)

    def _note(self, written: Any) -> None:
        for tensor in written if isinstance(written, (list, tuple)) else [written]:
            if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
                continue
            address = _address(tensor)
            if (key := self._handed_at.get(address)) is not None:
                layer, weight, memory = self._handed[key]
                self._lost[layer] = None
                if memory.data_ptr() == weight.data_ptr():
                    self._handed[key] = layer, weight, _copy(memory)
            for parameter in self._at.get(address, ()):
                if id(parameter) not in self._before:
                    self._before[id(parameter)] = _copy(parameter)

    def check_computed(self) -> None:
        """Raise StateError where a computed weight was written to; a base's own, which was read, has its numbers back.

        The forward is over by then, so that all such layers are named at once.
        """
        for layer, weight, memory in self._handed.values():
            if weight.data_ptr() != memory.data_ptr():
                self._lost[layer] = None
                weight.data = memory
        if self._lost:
            names = [self._names[layer] for layer in self._lost]
            raise StateError(
                f"The model's own forward writes to {names[0]}.weight, and the layer is adapted, so what is written "
                "would be lost. Leave every such layer to the model: convlora.remove(model), and inject again with "
                f"exclude_modules={names!r}."
            )

    def found(self) -> Iterator[tuple[Slot, Tensor]]:
        """What was written, replaced or given other memory, and what it held before."""
        for slot in self._slots:
            memory, before = self._memory[id(slot.parameter)], self._before.get(id(slot.parameter))
            moved = slot.parameter.data_ptr() != memory.data_ptr() or slot.parameter.shape != memory.shape
            if before is not None or moved or slot.module._parameters.get(slot.name) is not slot.parameter:
                yield slot, memory if before is None else before


_entered: list[Writes] = []
"""Those of all threads: of a weight that is read, all are told."""


def told(layer: nn.Module, weight: Tensor) -> Tensor:
    """The weight, once who watches for writes knows whose it is."""
    for each in _entered:
        each.hand_out(layer, weight)
    return weight


def is_watching() -> bool:
    """Whether writes are watched for in any thread."""
    return bool(_entered)


def _copy(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return tensor.detach().clone()


def _address(tensor: Tensor) -> int:
    """Of its memory, that of a view's base; of one without memory, a number that is no other's."""
    return tensor.untyped_storage().data_ptr() or id(tensor)
