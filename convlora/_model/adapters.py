"""Several adapters on one base: adding, activating, scaling, deleting and disabling them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import NoneType
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from .._layer.places import SWAPPING
from ..errors import StateError, TargetError
from .checks import check_model, check_not_ddp, warn_of_ddp
from .inject import add_requested
from .options import Options, Request, check_number
from .remove import delete
from .state import (
    RECORD,
    Blend,
    Injection,
    Scale,
    activate,
    check_addable,
    check_enabled,
    check_outside_blocks,
    check_unmerged,
    check_unrouted,
    ready,
    ready_alone,
    the_adapter,
    the_injection,
    to_the_end,
)
from .targets import Named, Targets, select

if TYPE_CHECKING:
    from typing_extensions import Unpack

M = TypeVar("M", bound=nn.Module)


def add_adapter(model: M, adapter_name: str, rank: int | None = None, **options: Unpack[Options]) -> M:
    """Add an adapter to an injected model, with its own rank, targets, head and norm statistics.

    >>> convlora.add_adapter(model, "lymph node", rank=4)
    >>> convlora.set_adapter(model, "lymph node")

    The new adapter starts from the base, not from the active adapter. :func:`set_adapter` makes it active.

    Args:
        model: an injected model.
        adapter_name: a name that no adapter of the model has.
        rank: as for :func:`convlora.inject`.
        **options: the other arguments of :func:`convlora.inject`.

    Returns:
        The same object.

    Raises:
        StateError: the model carries no adapter yet (inject first), or one of this name, or it is merged.
        TargetError, UnsupportedLayerError: as from :func:`convlora.inject`.

    Whatever is raised, the model is as it was.
    """
    request = Request.named("add_adapter", rank=rank, adapter_name=adapter_name, **options)
    check_model(model)
    root, _ = the_injection(model)
    check_addable(root, adapter_name)
    add_requested(request, root)
    return model


def set_adapter(
    model: M,
    adapter_name: str | Mapping[str, float] | Iterable[str],
    *,
    owner: str | None = None,
    trained: Iterable[str] | None = None,
) -> M:
    """Make one or several adapters active, with their factors, head, norm statistics and norm policy.

    >>> convlora.set_adapter(model, "lymph node")
    >>> convlora.set_adapter(model, {"stain": 1.0, "tumour": 0.5}, owner="tumour")

    With several adapters, each adapted layer computes with W + Σ weight · (W' − W), where W' is the layer's weight with
    one of the adapters alone. The order of the names does not change a bit. One name with weight 1 is that adapter.

    The model has only one head and one set of norm statistics. With ``owner`` they are that adapter's and are trained.
    Without ``owner`` they are a mixture, which is computed now and not trained. A mixed parameter is
    base + Σ weight · (each − base). Mixed statistics are those of all adapters' data, as in
    :func:`convlora.combine_adapters`, and of the base's data if the weights sum to less than 1. A mixture's norm layers
    are frozen. A bias that is trained as part of an adapted layer's change (SSF) has the change's weight; if that is
    not 1, the bias is a mixture and not trained, which :func:`convlora.check` reports. A single name with a weight
    keeps its own head and statistics.

    Only active adapters are trainable, and training changes no bit of the others. Every adapter has its own parameters,
    so make an optimizer from ``trainable_parameters(model)`` after the switch. Do not switch between a forward and its
    backward: the adapter that computed the forward would get no gradient.

    Args:
        model: an injected model.
        adapter_name: a name; several names, each with weight 1; or a weight for each name, any finite number.
        owner: the adapter whose head and statistics are used, if there are several.
        trained: the adapters whose factors are trained, if there are several; default all.

    Returns:
        The same object.

    Raises:
        StateError: there is no adapter of a name; the model is merged, or inside a ``disable_adapter`` block; or one
            adapter trains a module in full in which another changes a layer.
        TargetError: a weight is not a finite number, no name is given, or ``owner`` or ``trained`` is not among the
            names.
        UnsupportedLayerError: the model is a DistributedDataParallel, which averages only the gradients of parameters
            that were trainable when it was made. Unwrap it (``ddp.module``), switch, and wrap it again.

    Warns:
        UserWarning: a DistributedDataParallel holds the model, and must be made again.
    """
    check_not_ddp(model)
    parts = ready(model, check_unmerged, check_outside_blocks)
    asked, chosen = checked_names(adapter_name), None if trained is None else tuple(checked_names(trained, "trained"))
    wanted = [_wanted(injection, asked, owner, chosen) for _, injection in parts]
    before = [(injection.now, injection.trained, injection.disabled) for _, injection in parts]

    def switch() -> None:
        for (root, injection), each in zip(parts, wanted, strict=True):
            injection.scales = {block: scale for block, scale in injection.scales.items() if not isinstance(block, int)}
            activate(root, injection, each)

    try:
        to_the_end(switch)
    except Exception:
        for (root, injection), (now, _, disabled) in zip(parts, before, strict=True):
            activate(root, injection, now, disabled)
        raise
    for (root, injection), (_, was, _) in zip(parts, before, strict=True):
        if was != injection.trained:
            warn_of_ddp(root)
    return model


def _wanted(
    injection: Injection, adapter_name: Mapping[str, float], owner: str | None, trained: tuple[str, ...] | None
) -> str | Blend:
    """Return the adapter or blend that :func:`set_adapter` should activate."""
    weights = checked_weights(injection, adapter_name)
    for argument, names in (("owner", () if owner is None else (owner,)), ("trained", trained or ())):
        if strange := [name for name in names if name not in list(weights)]:
            raise TargetError(
                f"{argument}={strange[0]!r} is not among the adapters to activate: {', '.join(weights)}. Nothing was "
                "changed."
            )
    trained = tuple(weights) if trained is None else trained
    if list(weights.values()) == [1.0] and trained == tuple(weights):
        return next(iter(weights))
    if len(weights) == 1 and owner is None:
        owner = next(iter(weights))
    return Blend(weights, owner, trained)


def checked_names(asked: object, argument: str = "adapter_name") -> dict[str, float]:
    """Return adapter names with their weights, from a name, several names, or a mapping.

    Raises:
        TargetError: the argument is something else.
    """
    if isinstance(asked, Mapping):
        weights = dict(asked)
    else:
        names = (asked,) if isinstance(asked, str) else tuple(asked) if isinstance(asked, Iterable) else (None,)
        weights = dict.fromkeys((name if isinstance(name, str) else None for name in names), 1.0)
    if not all(isinstance(name, str) for name in weights):
        wanted = "a name, or several" if argument == "trained" else "a name, several, or a weight for each of several"
        raise TargetError(f"{argument}={asked!r}; it must be {wanted}, each a string. Nothing was changed.")
    return weights


def checked_weights(injection: Injection, asked: str | Mapping[str, float] | Iterable[str]) -> dict[str, float]:
    """Return the weights of adapters that can be active together, in the order of the model's adapters.

    Raises:
        StateError: there is no adapter of a name, or one trains a module in full in which another changes a layer.
        TargetError: a weight is not a finite number, a name is not a string, or no name is given.
    """
    weights = checked_names(asked)
    for name, weight in weights.items():
        the_adapter(injection, name)
        check_number(weight, f"weight of {name}")
    if not weights:
        raise TargetError("adapter_name names no adapter. Nothing was changed.")
    adapters = {name: each for name, each in injection.adapters.items() if name in weights}
    changed = {layer: name for name, each in adapters.items() for layer in each.layers}
    for name, each in adapters.items():
        for saved in each.plan.modules_to_save:
            for module in each.modules[saved].modules():
                if module in changed:
                    raise StateError(
                        f"{saved} is trained in full in {name!r} and changed in {changed[module]!r}; such adapters "
                        "cannot be active together. Nothing was changed."
                    )
    return {name: float(weights[name]) for name in adapters}


@contextmanager
def scaled(
    model: nn.Module,
    factor: float,
    adapter_name: str | None = None,
    *,
    target_modules: Targets = None,
    interpolate: bool = False,
) -> Iterator[None]:
    """Scale active adapters inside the block: layers compute with W + factor · (W' − W), also in training.

    >>> with convlora.scaled(model, 0.5), torch.no_grad():
    ...     cautious = model(images)

    Factor 0 gives the base's weights and factor 1 the adapter's, bit for bit. Head and norm statistics stay the active
    adapter's. With ``interpolate`` they become a mixture with the base's, which is not trained (see
    :func:`set_adapter`, also for biases), so that factor 0 is the whole base. The block applies to all threads. The
    factors of blocks that are open at the same time multiply; ``use_adapters`` blocks have their own weights. After the
    last block every bit is as before. A copy made inside a block keeps its factor until :func:`set_adapter` is called
    on it.

    Args:
        model: an injected model.
        factor: any finite number.
        adapter_name: the adapter to scale, if several are active; default all.
        target_modules: the layers to scale, as for :func:`convlora.inject`; default all.
        interpolate: whether to scale head and statistics too; not with ``target_modules``.

    Raises:
        StateError: no adapter of this name is active; the model is merged, or its adapters are disabled.
        TargetError: the factor is not a finite number; a pattern names no adapted layer; or ``interpolate`` is given
            with ``target_modules``.
    """
    check_number(factor, "factor")
    if interpolate and target_modules is not None:
        raise TargetError("interpolate=True is for all layers, not for target_modules. Nothing was changed.")
    if not isinstance(adapter_name, (str, NoneType)):
        raise TargetError(f"adapter_name={adapter_name!r}; it must be one adapter's name. Nothing was changed.")
    parts = ready(model, check_unmerged, check_enabled)
    for _, injection in parts:
        if adapter_name is not None and adapter_name not in Blend.of(injection.now).weights:
            the_adapter(injection, adapter_name)
            raise StateError(
                f"Adapter {adapter_name!r} is not active, so there is nothing to scale. Nothing was changed."
            )
    layers = [_concerned(*part, adapter_name, target_modules) for part in parts]
    scales = [Scale(float(factor), adapter_name, each, interpolate) for each in layers]
    block = object()

    def switch(is_open: bool) -> None:
        with SWAPPING:
            for (root, injection), scale in zip(parts, scales, strict=True):
                injection.scales.update({block: scale}) if is_open else injection.scales.pop(block, None)
                if vars(root).get(RECORD) is injection and not injection.merged:
                    activate(root, injection, injection.now, injection.disabled)

    yield from _block(switch)


def set_scale(model: M, adapter_name: str, scale: float, *, target_modules: Targets = None) -> M:
    """Set an adapter's strength: its layers compute with W + scale · (W' − W). The strength is saved with the adapter.

    >>> convlora.set_scale(model, "tumour", 0.7)

    Scale 1 is the adapter as it was trained, bit for bit, whatever was set before. Head and norm statistics do not
    change.

    Args:
        model: an injected model.
        adapter_name: the adapter, active or not.
        scale: any finite number.
        target_modules: the layers to scale, as for :func:`convlora.inject`; default all layers of the adapter.

    Returns:
        The same object.

    Raises:
        StateError: there is no adapter of this name; the model is merged, or a ``use_adapters`` block is open.
        TargetError: the scale is not a finite number, or a pattern names no layer of the adapter.
    """
    check_number(scale, "scale")
    root, injection = ready_alone(model, check_unmerged, check_unrouted)
    adapter = the_adapter(injection, adapter_name)
    layers = _concerned(root, injection, adapter_name, target_modules)

    def write() -> None:
        for layer, change in zip(adapter.layers, adapter.changes, strict=True):
            if layers is None or layer in layers:
                change.strength = float(scale)
        adapter.follow()
        activate(root, injection, injection.now, injection.disabled)

    with SWAPPING:
        to_the_end(write)
    return model


def _concerned(
    root: nn.Module, injection: Injection, adapter_name: str | None, targets: Targets
) -> frozenset[nn.Module] | None:
    """Return the layers of one adapter or of all adapters that these targets name; None means all layers."""
    adapters = [the_adapter(injection, adapter_name)] if adapter_name else list(injection.adapters.values())
    if targets is None:
        return None
    named = {layer: plan.name for each in adapters for plan, layer in zip(each.plan.layers, each.layers, strict=True)}
    candidates = [Named((name,), layer) for layer, name in named.items()]
    return frozenset(each.module for each in select(candidates, targets, "target_modules", root))


def delete_adapter(model: M, adapter_name: str) -> M:
    """Delete an adapter that is not active, with its head and statistics.

    Args:
        model: an injected model.
        adapter_name: the adapter to delete.

    Returns:
        The same object.

    Raises:
        StateError: there is no adapter of this name, or it is active; the model is merged, or its adapters are
            disabled.
    """
    _, injection = ready_alone(model, check_unmerged, check_enabled)
    the_adapter(injection, adapter_name)
    if adapter_name in (*(injection.blend.weights if injection.blend else ()), injection.active):
        raise StateError(
            f"{adapter_name!r} is active; call convlora.set_adapter with another one first, or convlora.remove(model) "
            "to get the base. Nothing was changed."
        )
    with SWAPPING:
        check_unrouted(injection)
        to_the_end(lambda: delete(injection, adapter_name))
    return model


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Compute with the base alone inside the block: its weights, head and statistics, bit for bit.

    >>> with convlora.disable_adapter(model), torch.no_grad():
    ...     reference = model(images)

    Inside the block norm layers are frozen, also in train mode, and other buffers are copies, so that no forward
    changes the base. The block applies to all threads, and adapters stay disabled until the last open block ends.
    Without ``with`` the call does nothing.

    Args:
        model: an injected model.

    Raises:
        StateError: there is no adapter, it is merged (call convlora.unmerge(model) first), or a ``use_adapters`` block
            is open.
    """
    # A copy that was made inside a block stays disabled.
    found = ready(model, check_unmerged, check_unrouted)
    parts = [(root, each) for root, each in found if each.blocks or not each.disabled]
    block = object()

    def switch(is_open: bool) -> None:
        with SWAPPING:
            for _, injection in parts if is_open else ():
                check_unrouted(injection)
            for root, injection in parts:
                (injection.blocks.add if is_open else injection.blocks.discard)(block)
                if vars(root).get(RECORD) is injection:  # False if the adapter was removed inside the block
                    activate(root, injection, injection.now, disabled=bool(injection.blocks))

    yield from _block(switch)


def _block(switch: Callable[[bool], None]) -> Iterator[None]:
    """Run a block between switch(True) and switch(False), which also runs after an error or an interrupt."""
    try:
        switch(True)
        yield
        switch(False)
    except BaseException:  # also for an interrupt in either switch
        to_the_end(lambda: switch(False))
        raise
