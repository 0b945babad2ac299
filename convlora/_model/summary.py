"""What is in an injected model, and what an optimizer should have of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from .._methods.lora import LoRA
from .._plan import Plan
from .integrity import check_trainable
from .state import injected, the_adapter, the_injection


def summary(model: nn.Module, adapter_name: str | None = None) -> Plan:
    """What is in an injected model; ``print`` shows a table of layers, ranks, sizes, and what was skipped and why.

    >>> print(convlora.summary(model))
    >>> convlora.summary(model).trainable_share

    Args:
        model: an injected model.
        adapter_name: one of its adapters; default the active one.

    Raises:
        StateError: there is no such adapter, or there are several injected parts; then give one of them.
    """
    root, injection = the_injection(model)
    adapter = the_adapter(injection, adapter_name)
    adapter.follow()
    now = None
    if adapter.plan.adapter_name == injection.active and not injection.disabled and not injection.merged:
        now = sum(p.numel() for p in root.parameters() if p.requires_grad)
    return replace(adapter.plan, state=injection.state, trained_now=now)


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The active adapter's lora_A and lora_B, and DoRA's magnitudes, of every layer: an optimizer group of their own.

    With ``freeze_A``, without lora_A.

    Raises:
        StateError: there is no adapter.
    """
    for _, _, injection in injected(model):
        adapter = injection.adapters[injection.active]
        constant = (
            {id(lora.lora_A) for lora in adapter.changes if isinstance(lora, LoRA)} if adapter.plan.freeze_A else set()
        )
        yield from (factor for factor in adapter.factors() if id(factor) not in constant)


def trainable_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """All that an optimizer should have: the factors, the head, and whatever else requires a gradient.

    >>> optimizer = torch.optim.AdamW(convlora.trainable_parameters(model), lr=1e-3)

    Raises:
        StateError: there is no adapter, or :func:`check` finds what training must not begin with, a replaced head say.

    Warns:
        UserWarning: :func:`check` finds parameters of the base that would train, or factors that would not.
    """
    check_trainable(model, stacklevel=2)
    return (p for p in model.parameters() if p.requires_grad)
