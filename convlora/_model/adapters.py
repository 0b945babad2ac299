"""Several adapters on one base, one of them active; and none of them for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from .._layer.places import SWAPPING
from ..errors import StateError
from .checks import check_model, check_not_ddp, warn_of_ddp
from .inject import begin
from .options import Options, Request
from .remove import drop
from .state import (
    RECORD,
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
    begin(request, root)
    return model


def set_adapter(model: M, adapter_name: str) -> M:
    """Let the model compute with this adapter: its factors, its head, its norm statistics and norm policy.

    >>> convlora.set_adapter(model, "lymph node")

    Only the active adapter is trainable; training it leaves every other bit for bit as it was. Each has parameters of
    its own: make an optimizer from ``trainable_parameters(model)`` after the switch. Switch between steps: a backward
    after a switch gives the adapter that computed the forward no gradient.

    Raises:
        StateError: no adapter of this name; the model is merged, or inside a ``disable_adapter`` block.
        UnsupportedLayerError: a DistributedDataParallel was given, which averages the gradients of those parameters
            alone that were trainable when it was made. The model inside is switched, with a warning: wrap it again.
    """
    check_not_ddp(model)
    parts = ready(model, check_unmerged, check_outside_blocks)
    for _, injection in parts:
        the_adapter(injection, adapter_name)
    before = [(injection.active, injection.disabled) for _, injection in parts]

    def switch() -> None:
        for root, injection in parts:
            activate(root, injection, adapter_name)

    try:
        to_the_end(switch)
    except Exception:
        for (root, injection), state in zip(parts, before, strict=True):
            activate(root, injection, *state)
        raise
    for (root, _), (active, _) in zip(parts, before, strict=True):
        if active != adapter_name:
            warn_of_ddp(root, stacklevel=2)
    return model


def delete_adapter(model: M, adapter_name: str) -> M:
    """Drop an adapter that is not active, with its head and its statistics.

    Raises:
        StateError: no adapter of this name; it is the active one; the model is merged, or its adapters are disabled.
    """
    _, injection = ready_alone(model, check_unmerged, check_enabled)
    the_adapter(injection, adapter_name)
    if adapter_name == injection.active:
        raise StateError(
            f"{adapter_name!r} is the active adapter; set_adapter another first, or convlora.remove(model) for the "
            "base. Nothing was changed."
        )
    with SWAPPING:
        check_unrouted(injection)
        to_the_end(lambda: drop(injection, adapter_name))
    return model


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """The base alone inside the block: its weights, its head, its statistics, bit for bit.

    >>> with convlora.disable_adapter(model), torch.no_grad():
    ...     reference = model(images)

    Norm layers are frozen inside, in train mode too, and other buffers are copies: no forward in the block moves the
    base. It holds for every thread, until the last of the blocks that are open is left.

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
                    activate(root, injection, injection.active, disabled=bool(injection.blocks))

    try:
        switch(is_open=True)
        yield
        switch(is_open=False)
    except BaseException:  # an interrupt on the line above as well
        to_the_end(lambda: switch(is_open=False))
        raise
