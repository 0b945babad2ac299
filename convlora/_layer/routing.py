"""Which adapter each sample of a batch goes to, in this thread or task alone; how a batch is split and put together.

A :class:`Route` is kept in a context variable, beside the modules that it is for. Nothing on the modules says what a
block has asked for, so that forwards in other threads and tasks go their own way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Hashable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import StateError
from .compiler import uncompiled
from .functional import hashed
from .masters import base_dtype
from .places import BASE, Place

Owner = str | tuple[tuple[str, float], ...]
"""An adapter's name, BASE, or several adapters' names with weights."""

_open: dict[object, None] = {}
"""Blocks that are open anywhere: a glance whether there are any is all that a forward outside of them pays."""
_routes: ContextVar[Routes] = ContextVar("convlora_routes")
_SURE: WeakSet[nn.Module] = WeakSet()
"""Modules that were doubted, and have the samples in their inputs' first dimension."""


def route_of(module: nn.Module) -> Route | None:
    """Where the samples that this module sees are to go; None outside of blocks."""
    return _find(module) if _open else None


@uncompiled
def _find(module: nn.Module) -> Route | None:
    return next((route for modules, route in reversed(_routes.get(())) if module in modules), None)


@dataclass(eq=False)
class Block:
    """One injected part inside one ``use_adapters`` block."""

    root: nn.Module
    places: dict[nn.Module, dict[str, Place]]
    """Every module that computes otherwise from adapter to adapter, with the places of its own."""
    mixed: dict[tuple[int, Owner], Tensor | None] = field(default_factory=dict)
    """Tensors of owners who have none of their own, mixed from several adapters', by the identity of their place."""

    def tensor(self, place: Place, owner: Owner) -> Tensor | None:
        """The owner's tensor in a place; where it has none, the base's."""
        if (found := self.mixed.get((id(place), owner), place)) is not place:
            return cast("Tensor | None", found)
        return place.of(owner if isinstance(owner, str) else BASE)

    def name(self, module: nn.Module) -> str:
        """What to call a module in an error."""
        return next((name for name, each in self.root.named_modules() if each is module and name), "the model")


@dataclass(frozen=True)
class Kind:
    """Samples that go the same way through a module."""

    owner: Owner
    """One of their owners; the others' tensors are the same here."""
    rows: tuple[int, ...]
    """Where they are in the batch."""

    @property
    def is_run(self) -> bool:
        """Whether they lie side by side."""
        return self.rows[-1] - self.rows[0] + 1 == len(self.rows)

    def take(self, tensor: Tensor) -> Tensor:
        """Their part of a batch; a view where they lie side by side."""
        if self.is_run:
            return tensor[self.rows[0] : self.rows[-1] + 1]
        return tensor.index_select(0, torch.tensor(self.rows, device=tensor.device))


@dataclass(frozen=True, eq=False)
class Route:
    """The owner of each sample: an adapter's name, several with weights, or BASE for the base alone."""

    block: Block
    owners: tuple[Owner, ...]
    doubted: set[nn.Module] | None = None
    """Modules of which it is not sure that their inputs' first dimension is the samples': another one is as long. None
    where no forward of the whole model is under way, which could be asked."""

    def kinds(self, key: Callable[[Owner], Hashable]) -> list[Kind]:
        """The samples by what their owners have, as ``key`` tells it; in the order of their first."""
        found: dict[Hashable, tuple[Owner, list[int]]] = {}
        keys = {owner: key(owner) for owner in dict.fromkeys(self.owners)}
        for row, owner in enumerate(self.owners):
            found.setdefault(keys[owner], (owner, []))[1].append(row)
        return [Kind(owner, tuple(rows)) for owner, rows in found.values()]

    def tensor(self, module: nn.Module, name: str, owner: Owner) -> Tensor | None:
        """The owner's tensor in this place, where and as the model is by now; where it has none, the module's."""
        place = self.block.places.get(module, {}).get(name)
        if place is None:
            return cast("Tensor | None", module._parameters.get(name, module._buffers.get(name)))
        theirs, now = self.block.tensor(place, owner), place.now
        if theirs is None or now is None:
            return theirs
        return theirs.to(now.device, base_dtype(module, name) or now.dtype)

    def own(self, module: nn.Module, owner: Owner) -> tuple[Hashable, ...]:
        """What tells the owner's tensors of a module from others': parameters by identity, buffers by their numbers."""
        return tuple(self.told(place, owner) for place in self.block.places.get(module, {}).values())

    def told(self, place: Place, owner: Owner) -> Hashable:
        """What tells the owner's tensor in one place from others'."""
        mine = self.block.tensor(place, owner)
        if place.is_parameter or mine is None or is_traceable_wrapper_subclass(mine):
            return id(mine)
        # Not compared with each other owner's, which would take their number squared.
        return mine.dtype, mine.shape, hashed(mine)

    def check(self, module: nn.Module, batch: int | None = None) -> None:
        """Raise StateError in train mode, and where a batch is not of as many samples as there are names."""
        if module.training:
            raise StateError(
                f"{self.block.name(module)} is in train mode, and use_adapters is for inference: call model.eval(); "
                "to train an adapter, convlora.set_adapter."
            )
        if batch is not None and batch != len(self.owners):
            raise StateError(
                f"{self.block.name(module)} got {batch} samples, and use_adapters has {len(self.owners)} names: one "
                "for each sample, the first dimension of every input. A layer that folds other dimensions into that "
                "one cannot be routed: run its adapters one after another with convlora.set_adapter."
            )

    def doubt(self, module: nn.Module, *inputs: Tensor) -> None:
        """Note a module with an input whose samples may be in another dimension (tokens first, say).

        Raises:
            StateError: the module was called by itself, so that the whole model cannot be asked.
        """
        known = module in _SURE or module is self.block.root or isinstance(module, _ConvNd)
        if known or not any(len(self.owners) in tensor.shape[1:-1] for tensor in inputs):
            return
        if self.doubted is None:
            raise StateError(
                f"{self.block.name(module)} got an input of which two dimensions are as long as the batch, and the "
                "samples may be in either. Call the whole model once in a use_adapters block, which tells; or take a "
                "batch of another size."
            )
        self.doubted.add(module)

    def surely(self, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """``run(*args, **kwargs)``, the whole model; once more with a further sample where a module was doubted.

        With it the samples' dimension is longer than any other that was as long before. Each module is asked once.
        """
        if self.doubted is not None:
            return run(*args, **kwargs)
        doubted: set[nn.Module] = set()
        with _entered(self.block.places, replace(self, doubted=doubted)):
            y = run(*args, **kwargs)
        if not doubted:
            return y
        leaves, structure = pytree.tree_flatten((args, kwargs))
        count = len(self.owners)
        more = [torch.cat([leaf, leaf[-1:]]) if _has_rows(leaf, count) else leaf for leaf in leaves]
        some, named = pytree.tree_unflatten(more, structure)
        with _entered(self.block.places, Route(self.block, (*self.owners, self.owners[-1]), set())):
            try:
                run(*some, **named)
            except Exception as cause:
                raise StateError(
                    f"{', '.join(map(self.block.name, doubted))}: two dimensions of the input are as long as the batch "
                    f"of {count}, and a forward with one sample more, to tell which is the samples', raised an error: "
                    f"{cause} Where samples are not in the first dimension, run the adapters one after another with "
                    "convlora.set_adapter."
                ) from cause
        _SURE.update(doubted)
        return run(*args, **kwargs)  # again: hooks shall have seen this batch last

    def split(self, module: nn.Module, run: Callable[..., Any], kinds: list[Kind], args: Any, kwargs: Any) -> Any:
        """``run(owner, *args, **kwargs)`` for each kind with its part of every tensor; the outputs in their order."""
        if len(kinds) == 1:
            return run(kinds[0].owner, *args, **kwargs)
        leaves, structure = pytree.tree_flatten((args, kwargs))
        sizes = [leaf.shape[0] if leaf.ndim else 0 for leaf in leaves if isinstance(leaf, Tensor)]
        if not sizes:
            raise StateError(
                f"{self.block.name(module)} is called without a batch, and what it gives differs between the "
                "adapters, so it cannot be routed: run them one after another with convlora.set_adapter."
            )
        for size in sizes:
            self.check(module, size)
        self.doubt(module, *(leaf for leaf in leaves if isinstance(leaf, Tensor)))
        outputs = []
        for kind in kinds:
            taken = [kind.take(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            some, named = pytree.tree_unflatten(taken, structure)
            with self.narrowed(kind.rows):
                outputs.append(run(kind.owner, *some, **named))
        return self._joined(module, outputs, kinds)

    def _joined(self, module: nn.Module, outputs: list[Any], kinds: list[Kind]) -> Any:
        parts = [pytree.tree_flatten(output)[0] for output in outputs]
        structure = pytree.tree_flatten(outputs[0])[1]
        rows = [row for kind in kinds for row in kind.rows]
        joined = []
        for leaves in zip(*parts, strict=True):
            if not isinstance(leaves[0], Tensor):
                joined.append(leaves[0])
                continue
            if any(leaf.ndim == 0 or len(leaf) != len(kind.rows) for leaf, kind in zip(leaves, kinds, strict=True)):
                raise StateError(
                    f"{self.block.name(module)} does not give one output for each sample, so it cannot be routed: run "
                    "its adapters one after another with convlora.set_adapter."
                )
            joined.append(torch.cat(leaves) if rows == sorted(rows) else _put_back(leaves, kinds, len(rows)))
        return pytree.tree_unflatten(joined, structure)

    @contextmanager
    def narrowed(self, rows: tuple[int, ...]) -> Iterator[None]:
        """What is called inside sees these samples alone."""
        part = replace(self, owners=tuple(self.owners[row] for row in rows))
        with _entered(self.block.places, part):
            yield

    def run_with(self, module: nn.Module, owner: Owner, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``run(module, …)`` with the owner's tensors, on a passing copy of the module that shares all else."""
        places = self.block.places[module]
        if not places:
            return run(module, *args, **kwargs)
        twin = object.__new__(type(module))
        vars(twin).update(vars(module))
        twin._parameters, twin._buffers = copy.copy(module._parameters), copy.copy(module._buffers)
        for name, place in places.items():
            home: dict[str, Any] = twin._parameters if place.is_parameter else twin._buffers
            home[name] = self.tensor(module, name, owner)
        with _entered({twin}, cast(Route, _find(module))):
            return run(twin, *args, **kwargs)

    def the_owner(self, module: nn.Module, what: str, key: Callable[[Owner], Hashable]) -> Owner:
        """The owner whose tensor an attribute is, where all samples have the same.

        Raises:
            StateError: they differ, and the attribute is read by other code than the module's own forward.
        """
        kinds = self.kinds(key)
        if len(kinds) > 1:
            raise StateError(
                f"{self.block.name(module)}: its {what} is read outside its own forward, and it differs between the "
                "adapters of this batch, so it cannot be routed: run them one after another with convlora.set_adapter."
            )
        return kinds[0].owner


def _has_rows(leaf: Any, count: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == count


def _put_back(parts: tuple[Tensor, ...], kinds: list[Kind], count: int) -> Tensor:
    together = parts[0].new_empty(count, *parts[0].shape[1:])
    for part, kind in zip(parts, kinds, strict=True):
        together.index_copy_(0, torch.tensor(kind.rows, device=part.device), part)
    return together


Routes = tuple[tuple[Container[nn.Module], Route], ...]
"""Routes, each with the modules that it is for; of those for one module the last one holds."""


@contextmanager
def _entered(modules: Container[nn.Module], route: Route) -> Iterator[None]:
    """This route for these modules, in this context, inside the block; for others all stays as it is."""
    token = _routes.set((*_routes.get(()), (modules, route)))
    try:
        yield
    finally:
        _routes.reset(token)


@contextmanager
def opened(routes: Iterable[Route]) -> Iterator[None]:
    """These routes for their blocks' modules, beside those of blocks further out; they count as open meanwhile."""
    block = object()
    try:
        _open[block] = None
        token = _routes.set((*_routes.get(()), *((route.block.places, route) for route in routes)))
        try:
            yield
        finally:
            _routes.reset(token)
        _open.pop(block, None)
    except BaseException:  # an interrupt on the line above as well
        _open.pop(block, None)
        raise
