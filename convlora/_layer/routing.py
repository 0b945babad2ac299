"""Routing: which adapter computes each sample of a batch, and how a batch is split and put together again.

A :class:`Route` is kept in a context variable, together with the modules that it applies to. The modules themselves do
not store what a ``use_adapters`` block asks for, so forwards in other threads and tasks are not affected.
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
"""``use_adapters`` blocks that are open in any thread. A forward outside of them only tests whether this is empty."""
_routes: ContextVar[Routes] = ContextVar("convlora_routes")
_CONFIRMED: WeakSet[nn.Module] = WeakSet()
"""Modules whose input was ambiguous, and which a second forward has shown to have the samples in dimension 0."""


def route_of(module: nn.Module) -> Route | None:
    """Return the route of the samples that this module receives; None outside of ``use_adapters`` blocks."""
    return _find(module) if _open else None


@uncompiled
def _find(module: nn.Module) -> Route | None:
    return next((route for modules, route in reversed(_routes.get(())) if module in modules), None)


@dataclass(eq=False)
class Block:
    """One injected part inside one ``use_adapters`` block."""

    root: nn.Module
    places: dict[nn.Module, dict[str, Place]]
    """Every module whose output depends on the adapter, with its own places by name."""
    mixed: dict[tuple[int, Owner], Tensor | None] = field(default_factory=dict)
    """Mixtures of several adapters' tensors, for owners without a tensor of their own; keyed by (id(place), owner)."""

    def tensor(self, place: Place, owner: Owner) -> Tensor | None:
        """Return the owner's tensor in a place, or the base's where the owner has none."""
        if (found := self.mixed.get((id(place), owner), place)) is not place:
            return cast("Tensor | None", found)
        return place.of(owner if isinstance(owner, str) else BASE)

    def name(self, module: nn.Module) -> str:
        """Return the name that an error gives to a module."""
        return next((name for name, each in self.root.named_modules() if each is module and name), "the model")


@dataclass(frozen=True)
class SampleGroup:
    """Samples of a batch that one module computes with the same tensors."""

    owner: Owner
    """The first of their owners; in this module the others have the same tensors."""
    rows: tuple[int, ...]
    """Their indices in the batch, in ascending order."""

    @property
    def is_contiguous(self) -> bool:
        """Whether the samples are consecutive in the batch."""
        return self.rows[-1] - self.rows[0] + 1 == len(self.rows)

    def rows_of(self, tensor: Tensor) -> Tensor:
        """Return these samples of a batch; a view if they are consecutive, else a copy."""
        if self.is_contiguous:
            return tensor[self.rows[0] : self.rows[-1] + 1]
        return tensor.index_select(0, torch.tensor(self.rows, device=tensor.device))


@dataclass(frozen=True, eq=False)
class Route:
    """The owner of each sample: an adapter's name, several with weights, or BASE for the base alone."""

    block: Block
    owners: tuple[Owner, ...]
    ambiguous: set[nn.Module] | None = None
    """Modules for whose input two dimensions are as long as the batch, so that either may hold the samples. None unless
    a forward of the whole model is running, which can be repeated with one sample more to find out."""

    def sample_groups(self, key: Callable[[Owner], Hashable]) -> list[SampleGroup]:
        """Group the batch's samples by ``key(owner)``, in order of first appearance."""
        found: dict[Hashable, tuple[Owner, list[int]]] = {}
        keys = {owner: key(owner) for owner in dict.fromkeys(self.owners)}
        for row, owner in enumerate(self.owners):
            found.setdefault(keys[owner], (owner, []))[1].append(row)
        return [SampleGroup(owner, tuple(rows)) for owner, rows in found.values()]

    def tensor(self, module: nn.Module, name: str, owner: Owner) -> Tensor | None:
        """Return the owner's tensor of this name, on the model's device and in its dtype; without one, the module's."""
        place = self.block.places.get(module, {}).get(name)
        if place is None:
            return cast("Tensor | None", module._parameters.get(name, module._buffers.get(name)))
        theirs, now = self.block.tensor(place, owner), place.now
        if theirs is None or now is None:
            return theirs
        return theirs.to(now.device, base_dtype(module, name) or now.dtype)

    def tensors_key(self, module: nn.Module, owner: Owner) -> tuple[Hashable, ...]:
        """Return a key that two owners share only if their tensors in this module are equal; see :meth:`tensor_key`."""
        return tuple(self.tensor_key(place, owner) for place in self.block.places.get(module, {}).values())

    def tensor_key(self, place: Place, owner: Owner) -> Hashable:
        """Return a key of the owner's tensor in one place: a parameter's identity, or a hash of a buffer's values."""
        mine = self.block.tensor(place, owner)
        if place.is_parameter or mine is None or is_traceable_wrapper_subclass(mine):
            return id(mine)
        # A hash: comparing every pair of owners would take quadratic time.
        return mine.dtype, mine.shape, hashed(mine)

    def check(self, module: nn.Module, batch: int | None = None) -> None:
        """Raise StateError in train mode, or if the batch has another number of samples than there are names."""
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

    def note_ambiguous(self, module: nn.Module, *inputs: Tensor) -> None:
        """Record a module if another dimension of its input is as long as the batch and may hold the samples.

        Raises:
            StateError: the module was called on its own, so a forward of the whole model cannot find out.
        """
        known = module in _CONFIRMED or module is self.block.root or isinstance(module, _ConvNd)
        if known or not any(len(self.owners) in tensor.shape[1:-1] for tensor in inputs):
            return
        if self.ambiguous is None:
            raise StateError(
                f"{self.block.name(module)} got an input of which two dimensions are as long as the batch, and the "
                "samples may be in either. Call the whole model once in a use_adapters block, which tells; or take a "
                "batch of another size."
            )
        self.ambiguous.add(module)

    def run_confirming(self, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run the whole model; if an input was ambiguous, run it again with one sample more.

        In that second forward only the samples' dimension is one longer, so the other candidates are ruled out. Each
        module is tested once.
        """
        if self.ambiguous is not None:
            return run(*args, **kwargs)
        ambiguous: set[nn.Module] = set()
        with _entered(self.block.places, replace(self, ambiguous=ambiguous)):
            y = run(*args, **kwargs)
        if not ambiguous:
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
                    f"{', '.join(map(self.block.name, ambiguous))}: two dimensions of the input are as long as the "
                    f"batch of {count}, and a forward with one sample more, to tell which is the samples', raised an "
                    f"error: {cause} Where samples are not in the first dimension, run the adapters one after another "
                    "with convlora.set_adapter."
                ) from cause
        _CONFIRMED.update(ambiguous)
        return run(*args, **kwargs)  # once more, so that the last batch that hooks see is the caller's

    def split(
        self, module: nn.Module, run: Callable[..., Any], sample_groups: list[SampleGroup], args: Any, kwargs: Any
    ) -> Any:
        """Call ``run(owner, *args, **kwargs)`` once per group; return the outputs in the batch's order."""
        if len(sample_groups) == 1:
            return run(sample_groups[0].owner, *args, **kwargs)
        leaves, structure = pytree.tree_flatten((args, kwargs))
        sizes = [leaf.shape[0] if leaf.ndim else 0 for leaf in leaves if isinstance(leaf, Tensor)]
        if not sizes:
            raise StateError(
                f"{self.block.name(module)} is called without a batch, and what it gives differs between the "
                "adapters, so it cannot be routed: run them one after another with convlora.set_adapter."
            )
        for size in sizes:
            self.check(module, size)
        self.note_ambiguous(module, *(leaf for leaf in leaves if isinstance(leaf, Tensor)))
        outputs = []
        for group in sample_groups:
            taken = [group.rows_of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            some, named = pytree.tree_unflatten(taken, structure)
            with self.narrowed(group.rows):
                outputs.append(run(group.owner, *some, **named))
        return self._joined(module, outputs, sample_groups)

    def _joined(self, module: nn.Module, outputs: list[Any], sample_groups: list[SampleGroup]) -> Any:
        parts = [pytree.tree_flatten(output)[0] for output in outputs]
        structure = pytree.tree_flatten(outputs[0])[1]
        rows = [row for group in sample_groups for row in group.rows]
        joined = []
        for leaves in zip(*parts, strict=True):
            if not isinstance(leaves[0], Tensor):
                joined.append(leaves[0])
                continue
            if any(
                leaf.ndim == 0 or len(leaf) != len(group.rows)
                for leaf, group in zip(leaves, sample_groups, strict=True)
            ):
                raise StateError(
                    f"{self.block.name(module)} does not give one output for each sample, so it cannot be routed: run "
                    "its adapters one after another with convlora.set_adapter."
                )
            joined.append(torch.cat(leaves) if rows == sorted(rows) else _put_back(leaves, sample_groups, len(rows)))
        return pytree.tree_unflatten(joined, structure)

    @contextmanager
    def narrowed(self, rows: tuple[int, ...]) -> Iterator[None]:
        """Inside this block the route covers only these samples of the batch."""
        part = replace(self, owners=tuple(self.owners[row] for row in rows))
        with _entered(self.block.places, part):
            yield

    def run_as(self, module: nn.Module, owner: Owner, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``run(copy, …)`` on a shallow copy of the module that holds the owner's tensors."""
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

    def single_owner(self, module: nn.Module, what: str, key: Callable[[Owner], Hashable]) -> Owner:
        """Return the owner whose tensor an attribute reads, if it is the same for all samples.

        Raises:
            StateError: they differ, and the attribute is read by other code than the module's own forward.
        """
        sample_groups = self.sample_groups(key)
        if len(sample_groups) > 1:
            raise StateError(
                f"{self.block.name(module)}: its {what} is read outside its own forward, and it differs between the "
                "adapters of this batch, so it cannot be routed: run them one after another with convlora.set_adapter."
            )
        return sample_groups[0].owner


def _has_rows(leaf: Any, count: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == count


def _put_back(parts: tuple[Tensor, ...], sample_groups: list[SampleGroup], count: int) -> Tensor:
    together = parts[0].new_empty(count, *parts[0].shape[1:])
    for part, group in zip(parts, sample_groups, strict=True):
        together.index_copy_(0, torch.tensor(group.rows, device=part.device), part)
    return together


Routes = tuple[tuple[Container[nn.Module], Route], ...]
"""Routes, each with the modules that it applies to; for a module in several of them, the last one applies."""


@contextmanager
def _entered(modules: Container[nn.Module], route: Route) -> Iterator[None]:
    """Apply this route to these modules inside the block, in this thread or task only."""
    token = _routes.set((*_routes.get(()), (modules, route)))
    try:
        yield
    finally:
        _routes.reset(token)


@contextmanager
def opened(routes: Iterable[Route]) -> Iterator[None]:
    """Apply these routes to their blocks' modules inside the block, on top of those of outer blocks."""
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
