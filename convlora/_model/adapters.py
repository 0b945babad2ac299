"""Several adapters on one base, one of them active; and none of them for a while."""

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
    """Put another adapter beside those that the model carries, with a rank, targets, head and norms of its own.

    >>> convlora.add_adapter(model, "lymph node", rank=4)
    >>> convlora.set_adapter(model, "lymph node")

    It starts from the base, not from the active adapter, and is not active until :func:`set_adapter` says so.

    Args:
        model: an injected model.
        adapter_name: a name that the model does not know yet.
        rank: as for :func:`convlora.inject`.
        **options: the other arguments of :func:`convlora.inject`.

    Raises:
        StateError: the model carries no adapter yet (inject first), or one of this name, or it is merged.
        TargetError, UnsupportedLayerError: as :func:`convlora.inject`.

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
    """Let the model compute with an adapter, or with several: factors, head, norm statistics and norm policy.

    >>> convlora.set_adapter(model, "lymph node")
    >>> convlora.set_adapter(model, {"stain": 1.0, "tumour": 0.5}, owner="tumour")

    Of several, each adapted layer computes with W + Σ weight · (W' − W), where W' is the weight that each adapter alone
    would give it. The order of the names moves no bit. Weight 1 for one name is that adapter itself.

    Head, norm statistics and other modules that are trained in full cannot be in place twice. With ``owner`` they are
    that adapter's, and go on training with it. Without, they are a mixture by weight, made now and not trained: of
    parameters, base + Σ weight · (each − base); of statistics, those of all the data, as in
    :func:`convlora.combine_adapters`, and the base's among them where the weights sum to less than 1. Norm layers of a
    mixture are frozen. A bias that is trained as a part of an adapted layer's change (SSF) goes with the change's
    weight; where that is not 1 it is a mixture and not trained, which :func:`convlora.check` says. One name with a
    weight keeps its own head and statistics.

    Only what is active is trainable; training it leaves every other adapter bit for bit as it was. Each has parameters
    of its own: make an optimizer from ``trainable_parameters(model)`` after the switch. Switch between steps: a
    backward after a switch gives the adapter that computed the forward no gradient.

    Args:
        model: an injected model.
        adapter_name: a name; several names, each with weight 1; or a weight for each name, any finite number.
        owner: of several, the one whose head and statistics are in place.
        trained: of several, those whose factors are trained; default all.

    Raises:
        StateError: no adapter of a name; the model is merged, or inside a ``disable_adapter`` block; or one adapter
            trains in full what another one of them changes.
        TargetError: a weight is no finite number, no name is given, or ``owner`` or ``trained`` are not among them.
        UnsupportedLayerError: a DistributedDataParallel was given, which averages the gradients of those parameters
            alone that were trainable when it was made. The model inside is switched, with a warning: wrap it again.
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
            warn_of_ddp(root, stacklevel=2)
    return model


def _wanted(
    injection: Injection, adapter_name: Mapping[str, float], owner: str | None, trained: tuple[str, ...] | None
) -> str | Blend:
    """What :func:`set_adapter` is to activate."""
    weights = checked_weights(injection, adapter_name)
    for argument, names in (("owner", () if owner is None else (owner,)), ("trained", trained or ())):
        if strange := [name for name in names if name not in list(weights)]:
            raise TargetError(
                f"{argument}={strange[0]!r} is none of the adapters that are to be active: {', '.join(weights)}. "
                "Nothing was changed."
            )
    trained = tuple(weights) if trained is None else trained
    if list(weights.values()) == [1.0] and trained == tuple(weights):
        return next(iter(weights))
    if len(weights) == 1 and owner is None:
        owner = next(iter(weights))
    return Blend(weights, owner, trained)


def checked_names(asked: object, argument: str = "adapter_name") -> dict[str, float]:
    """Adapters' names as they may be asked for, each with its weight.

    Raises:
        TargetError: they are something else.
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
    """The weights of adapters that go together, in the order in which the model has these.

    Raises:
        StateError: there is none of a name, or one trains in full what another one changes.
        TargetError: a weight is no finite number, or no name is given, or one that is no string.
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
                        f"{saved} is trained in full in {name!r} and changed in {changed[module]!r}; such adapters do "
                        "not go together. Nothing was changed."
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
    """Adapters at another strength inside the block: W + factor · (W' − W), in inference and in training.

    >>> with convlora.scaled(model, 0.5), torch.no_grad():
    ...     cautious = model(images)

    Factor 0 is the base's weights and 1 the adapter, both to the bit. Head and norm statistics stay those of the active
    adapter; with ``interpolate`` they move with the weights, as a mixture with the base's that is not trained (see
    :func:`set_adapter`, also for biases), so that factor 0 is the base as a whole. It holds for every thread. Of blocks
    that are open at once the factors multiply; ``use_adapters`` blocks have weights of their own. When all are left
    every bit is as before. A copy that is made inside keeps the strength until :func:`set_adapter` is called on it.

    Args:
        model: an injected model.
        factor: any finite number.
        adapter_name: of several that are active, the one concerned; default all.
        target_modules: the layers concerned, as for :func:`convlora.inject`; default all.
        interpolate: whether head and statistics move, too; for all layers alone.

    Raises:
        StateError: no adapter of this name is active; the model is merged, or its adapters are disabled.
        TargetError: the factor is no finite number; a pattern names no adapted layer; or ``interpolate`` comes with
            ``target_modules``.
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
    """Let an adapter count with this strength from now on: W + scale · (W' − W). It is saved with the adapter.

    >>> convlora.set_scale(model, "tumour", 0.7)

    1 is the adapter as it was trained, to the bit, whatever was set before. Head and norm statistics stay as they are.

    Args:
        model: an injected model.
        adapter_name: the adapter, active or not.
        scale: any finite number.
        target_modules: the layers concerned, as for :func:`convlora.inject`; default all that it has.

    Raises:
        StateError: no adapter of this name; the model is merged, or a ``use_adapters`` block is open.
        TargetError: the scale is no finite number, or a pattern names no layer of the adapter.
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
    """The layers of an adapter, or of all, that these targets name; None for all."""
    adapters = [the_adapter(injection, adapter_name)] if adapter_name else list(injection.adapters.values())
    if targets is None:
        return None
    named = {layer: plan.name for each in adapters for plan, layer in zip(each.plan.layers, each.layers, strict=True)}
    candidates = [Named((name,), layer) for layer, name in named.items()]
    return frozenset(each.module for each in select(candidates, targets, "target_modules", root))


def delete_adapter(model: M, adapter_name: str) -> M:
    """Drop an adapter that is not active, with its head and its statistics.

    Raises:
        StateError: no adapter of this name; it is the active one; the model is merged, or its adapters are disabled.
    """
    _, injection = ready_alone(model, check_unmerged, check_enabled)
    the_adapter(injection, adapter_name)
    if adapter_name in (*(injection.blend.weights if injection.blend else ()), injection.active):
        raise StateError(
            f"{adapter_name!r} is active; set_adapter another first, or convlora.remove(model) for the "
            "base. Nothing was changed."
        )
    with SWAPPING:
        check_unrouted(injection)
        to_the_end(lambda: delete(injection, adapter_name))
    return model


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """The base alone inside the block: its weights, its head, its statistics, bit for bit.

    >>> with convlora.disable_adapter(model), torch.no_grad():
    ...     reference = model(images)

    Norm layers are frozen inside, in train mode too, and other buffers are copies: no forward in the block moves the
    base. It holds for every thread, until the last of the blocks that are open is left. Nothing happens without
    ``with``.

    Raises:
        StateError: there is no adapter, or it is merged; call convlora.unmerge(model) first.
    """
    # A copy that was made inside a block is the base alone, and stays it.
    found = ready(model, check_unmerged, check_unrouted)
    parts = [(root, each) for root, each in found if each.blocks or not each.disabled]
    block = object()

    def switch(is_open: bool) -> None:
        with SWAPPING:
            for _, injection in parts if is_open else ():
                check_unrouted(injection)
            for root, injection in parts:
                (injection.blocks.add if is_open else injection.blocks.discard)(block)
                if vars(root).get(RECORD) is injection:  # else removed inside the block
                    activate(root, injection, injection.now, disabled=bool(injection.blocks))

    yield from _block(switch)


def _block(switch: Callable[[bool], None]) -> Iterator[None]:
    """The course of a block that is switched on and off; off whatever happens, also halfway."""
    try:
        switch(True)
        yield
        switch(False)
    except BaseException:  # an interrupt on the line above as well
        to_the_end(lambda: switch(False))
        raise
