"""A summary of an injected model, and the parameters that an optimizer should train."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from numbers import Real
from typing import Any

from torch import nn

from .._layer.change import Change
from .._methods.lora import LoRA
from .._plan import Plan
from ..errors import TargetError
from .integrity import check_trainable
from .state import injected, the_adapter, the_injection

PLUS = 16.0
"""The default ratio of B's learning rate to A's, from the LoRA+ paper."""


def summary(model: nn.Module, adapter_name: str | None = None) -> Plan:
    """Summarise an injected model; ``print`` shows a table of layers, ranks and sizes, and why layers were skipped.

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
    """Yield the trained adapters' factors of every layer, DoRA's magnitudes included, for an optimizer group.

    With ``freeze_A``, without lora_A.

    Raises:
        StateError: there is no adapter.
    """
    for _, _, injection in injected(model):
        for adapter in map(injection.adapters.__getitem__, injection.trained):
            constant = [lora.lora_A for lora in adapter.changes if adapter.plan.freeze_A and isinstance(lora, LoRA)]
            constants = set(map(id, constant))
            yield from (factor for factor in adapter.parameters() if id(factor) not in constants)


def trainable_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield all parameters that an optimizer should have: factors, head, and whatever else requires a gradient.

    >>> optimizer = torch.optim.AdamW(convlora.trainable_parameters(model), lr=2e-3)

    Raises:
        StateError: there is no adapter, or :func:`check` finds what training must not begin with, a replaced head say.

    Warns:
        UserWarning: :func:`check` finds parameters of the base that would train, or factors that would not.
    """
    check_trainable(model)
    return (p for p in model.parameters() if p.requires_grad)


def parameter_groups(
    model: nn.Module, *, lr: float, lr_B: float | None = None, weight_decay: float | None = None
) -> list[dict[str, Any]]:
    """Return all parameters that an optimizer should have, in groups: B learns faster than A, and no factor decays.

    >>> groups = convlora.parameter_groups(model, lr=5e-4, weight_decay=0.01)
    >>> optimizer = torch.optim.AdamW(groups)
    >>> [(group["name"], group["lr"]) for group in groups]
    [('A', 0.0005), ('B', 0.008), ('head', 0.0005), ('biases', 0.0005)]

    Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", 2024 (arXiv:2402.12354). Each
    parameter of :func:`trainable_parameters` is in exactly one group:

    - ``"B"``: ``lora_B`` and ``hira_B``. They begin at zero, A has no gradient before they move, and they read the
      ``rank`` numbers that A makes of the layer's input; :attr:`convlora.Change.fast` says it of a method.
    - ``"A"``: all else of an adapter's layers. LoHa's and LoKr's factors that begin at zero read the layer's input
      themselves, as A does. In ``dense``, ``ia3``, ``ssf``, ``oft``, ``boft``, ``hra``, and in LoRA that begins by
      PiSSA or OLoRA, all tensors have a gradient from the first step on.
    - ``"head"``: matrices and kernels of modules that are trained in full;
    - ``"biases"``: their biases, and scale and shift of norm layers, which do not decay either.

    A group without parameters is left out. A scheduler that multiplies each group's rate (``LambdaLR``, a cosine down
    to zero) keeps the ratio; ``OneCycleLR`` wants ``max_lr=[group["lr"] for group in groups]``.

    Args:
        model: an injected model.
        lr: the learning rate of all groups but ``"B"``.
        lr_B: that of ``"B"``; default 16 times ``lr``, so that ``lr`` wants to be lower than for one rate alone.
            ``lr_B=lr`` is one rate.
        weight_decay: of ``"head"``; default the optimizer's own. The other groups have 0.

    Returns:
        ``params``, ``name``, ``lr`` and, where it is said here, ``weight_decay`` of each group.

    Raises:
        TargetError: a rate or the decay is no finite number of at least 0.
        StateError: as :func:`trainable_parameters`.

    Warns:
        UserWarning: as :func:`trainable_parameters`.
    """
    for argument, value in (("lr", lr), ("lr_B", lr_B), ("weight_decay", weight_decay)):
        if value is not None and not (isinstance(value, Real) and 0 <= value < math.inf):
            raise TargetError(f"{argument}={value!r}; it must be a finite number of at least 0.")
    if lr_B is None and not PLUS * lr < math.inf:
        raise TargetError(f"lr={lr!r}; {PLUS:g} times it, for B, is no finite number. Give lr_B.")
    check_trainable(model)
    constant = {"weight_decay": 0.0}
    groups: dict[str, dict[str, Any]] = {
        "A": {"lr": lr, **constant},
        "B": {"lr": PLUS * lr if lr_B is None else lr_B, **constant},
        "head": {"lr": lr} if weight_decay is None else {"lr": lr, "weight_decay": weight_decay},
        "biases": {"lr": lr, **constant},
    }
    members: dict[str, list[nn.Parameter]] = {name: [] for name in groups}
    owners = {p: (module, name) for module in model.modules() for name, p in module.named_parameters(recurse=False)}
    changes = (module for module in model.modules() if isinstance(module, Change))
    owners |= {p: (change, _plain_name(name)) for change in changes for name, p in change.named_parameters()}
    for parameter, (module, name) in owners.items():
        if parameter.requires_grad:
            members[_group(module, name, parameter)].append(parameter)
    return [{"params": members[name], "name": name, **group} for name, group in groups.items() if members[name]]


def _plain_name(name: str) -> str:
    """Return the name of a pruned (``lora_B_orig``) or parametrized (``parametrizations.lora_B.original``) tensor."""
    return name.removeprefix("parametrizations.").partition(".")[0].removesuffix("_orig")


def _group(module: nn.Module, name: str, parameter: nn.Parameter) -> str:
    if isinstance(module, Change):
        return "B" if name in module.fast else "A"
    return "biases" if parameter.ndim < 2 or isinstance(module, (nn.LayerNorm, nn.RMSNorm)) else "head"
