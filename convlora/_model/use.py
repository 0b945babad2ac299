"""One batch, several adapters: ``use_adapters``.

Adapted layers and norms are of our classes already and look for a route by themselves (``routed.py``). Heads and
other modules with tensors per adapter are not: while a block is open, their class is swapped for one that does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import NoneType
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._layer.adapted import AdaptedLayer
from .._layer.compiler import uncompiled
from .._layer.places import BASE, SWAPPING, Place
from .._layer.routing import Block, Owner, Route, opened, route_of
from .._layer.swap import Swapped, check_swappable, restore, swap
from ..errors import StateError
from .adapters import checked_weights
from .checks import check_model
from .mixing import Mixtures
from .norms import FrozenNorm, TrackedNorm
from .state import InjectedPart, Injection, check_enabled, check_unmerged, ready, to_the_end, weights_of

Asked = str | Mapping[str, float] | None


@contextmanager
def use_adapters(model: nn.Module, adapter_names: Iterable[str | Mapping[str, float] | None]) -> Iterator[None]:
    """Compute each sample of a batch with its own adapter, all in one forward.

    >>> with convlora.use_adapters(model, ["tumour", {"tumour": 0.5, "stain": 0.5}, None]), torch.inference_mode():
    ...     predictions = model(three_images)

    The result is what each sample gives alone with its adapter active, its head and its norm statistics included, up to
    rounding; None is the base alone. A sample may have several adapters, each by its weight, as in
    :func:`convlora.set_adapter` without an owner: head and statistics are then a mixture; of one adapter, its own. It
    holds for the forwards of this thread or asyncio task; others go on with the active adapter. Of nested blocks on one
    model the inner one holds.

    It is for inference: every module in eval mode. All samples of a batch must give outputs of one shape, and layers
    must keep samples in the first dimension: where another is as long (tokens first, say), two more forwards, one of
    them with one sample more, tell, once for each layer. Where adapters differ in a layer whose forward is its own, the
    layer takes them one after another.

    Args:
        model: an injected model.
        adapter_names: one for each sample, or a weight for each of several names; None for the base.

    Raises:
        StateError: no adapter of a name; the model is merged, its adapters are disabled, or a module was replaced. From
            a forward inside: train mode, a batch of another size, or a layer that cannot be routed.
        UnsupportedLayerError: the model is wrapped (give the one inside), or a module cannot change its class.
    """
    asked = _checked(adapter_names)
    with _looking(model, asked) as routes, opened(routes):
        yield


def _checked(adapter_names: Iterable[Asked]) -> tuple[Asked, ...]:
    if isinstance(adapter_names, str):
        raise StateError(f"adapter_names={adapter_names!r}; it must be a list with a name or None for each sample.")
    names = tuple(adapter_names) if isinstance(adapter_names, Iterable) else ()
    wrong = [name for name in names if name == BASE or not isinstance(name, (str, Mapping, NoneType))]
    if wrong or not names:
        raise StateError(
            f"adapter_names={list(names) or adapter_names!r}; it must be a list with an adapter's name, or None for "
            "the base, for each sample."
        )
    return names


def _block(root: nn.Module, injection: Injection, owners: Iterable[Owner]) -> Block:
    """Make the block: the root, and every module of the part that differs between adapters."""
    places: dict[nn.Module, dict[str, Place]] = {root: {}}
    places.update((module, {}) for module in (*injection.layers, *injection.norms))
    for place in injection.places:
        places.setdefault(place.module, {})[place.name] = place
    block, mixtures = Block(root, places), Mixtures(injection.places)
    for owner in dict.fromkeys(owners):
        for place in injection.places if owner != BASE else ():
            alone = {owner[0][0]: 1.0} if not isinstance(owner, str) and len(owner) == 1 else None
            weights = weights_of(place, owner, alone)
            if list(weights.values()) != [1.0]:
                block.mixed[id(place), owner] = mixtures.of(place, weights)
            elif not isinstance(owner, str):
                block.mixed[id(place), owner] = place.of(*weights)
    return block


def _owner(injection: Injection, asked: Asked) -> Owner:
    """Return the owner of a sample."""
    if asked is None:
        return BASE
    weights = checked_weights(injection, asked)
    return next(iter(weights)) if list(weights.values()) == [1.0] else tuple(weights.items())


@contextmanager
def _looking(model: nn.Module, asked: tuple[Asked, ...]) -> Iterator[list[Route]]:
    """Swap the class of heads and similar modules inside the block, so that they look up the route."""
    parts: list[InjectedPart] = []
    modules: list[nn.Module] = []
    block = object()

    def leave() -> None:
        with SWAPPING:
            for _, injection in parts:
                injection.routed.discard(block)
            if not any(injection.routed for _, injection in parts):
                for module in modules:
                    if isinstance(module, Routed):
                        restore(module)

    try:
        with SWAPPING:  # held from the checks on, so that no other thread merges or removes in between
            check_model(model)
            parts = ready(model, check_unmerged, check_enabled)
            owners = [tuple(_owner(injection, each) for each in asked) for _, injection in parts]
            blocks = [_block(*part, each) for part, each in zip(parts, owners, strict=True)]
            own = (AdaptedLayer, FrozenNorm, TrackedNorm)
            modules = [module for each in blocks for module in each.places if not isinstance(module, own)]
            for module in modules:
                if not isinstance(module, Routed):
                    check_swappable(type(module).__name__, module, Routed)
            for _, injection in parts:
                injection.routed.add(block)
            for module in modules:
                if not isinstance(module, Routed):
                    swap(module, Routed)
        yield [Route(*each) for each in zip(blocks, owners, strict=True)]
        leave()
    except BaseException:  # an interrupt on the line above as well
        to_the_end(leave)
        raise


class Routed(Swapped):
    """The mixin of the root, and of modules with tensors per adapter, while a block is open.

    Another thread may restore the class during a call, when it closes the last block. So each method reads it once.
    """

    _convlora_prefix: ClassVar[str] = "Routed"

    @uncompiled
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the base's own forward once per group of samples with the same tensors; not compiled."""
        module, base = cast(nn.Module, self), _base(self)
        route = route_of(module)
        if route is None:
            return base.forward(self, *args, **kwargs)
        is_root = module is route.block.root
        route.check(module, _batch(args, kwargs) if is_root else None)

        def alone(_: str, *args: Any, **kwargs: Any) -> Any:
            return base.forward(self, *args, **kwargs)  # finds its tensors by __getattr__

        def run(*args: Any, **kwargs: Any) -> Any:
            route = cast(Route, route_of(module))
            return route.split(
                module, alone, route.sample_groups(lambda owner: route.tensors_key(module, owner)), args, kwargs
            )

        return route.run_confirming(run, args, kwargs) if is_root else run(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        found, module = _base(self).__getattr__(self, name), cast(nn.Module, self)
        route = route_of(module)
        place = None if route is None else route.block.places[module].get(name)
        if route is None or place is None:
            return found
        return route.tensor(
            module, name, route.single_owner(module, name, lambda owner: route.tensor_key(place, owner))
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy made inside a block has the plain class.
        _, _, *state = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        return (_new, (_base(self),), *state)


def _base(module: object) -> Any:
    cls = type(module)
    return vars(cls).get("_convlora_base", cls)


def _new(cls: type[nn.Module]) -> nn.Module:
    return cls.__new__(cls)


def _batch(args: Any, kwargs: Any) -> int | None:
    """Return the number of samples in the model's input; None if it has no tensor."""
    sizes = (leaf.shape[0] for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim)
    return next(sizes, None)
