"""What a plan refuses: arguments out of range, wrappers, layers that cannot carry an adapter."""

from __future__ import annotations

import math

from torch import nn

from ._layer import CHILD, supports_dropout
from ._plan import LayerPlan
from ._targets import Named
from .errors import TargetError, UnsupportedLayerError


def check_values(rank: int, alpha: float | None, norm: str, dropout: float, adapter_name: str) -> None:
    """Arguments that need no model."""
    checked_rank(rank, "rank")
    if alpha is not None:
        check_alpha(alpha, "alpha")
    if norm not in ("freeze", "track"):
        raise TargetError(f"norm={norm!r}; it must be 'freeze' or 'track'.")
    if not 0.0 <= dropout < 1.0:
        raise TargetError(f"dropout={dropout!r}; it must be at least 0 and below 1.")
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise TargetError(f"adapter_name={adapter_name!r}; it must be a name without a dot.")
    if hasattr(nn.ModuleDict(), adapter_name):
        raise TargetError(f"adapter_name={adapter_name!r} is taken by torch's ModuleDict; choose another.")


def check_any_conv(adaptable: list[Named], model: nn.Module) -> None:
    """The default targets are convolutions: there must be one."""
    if not any(isinstance(n.module, nn.Conv2d) for n in adaptable):
        raise TargetError(
            f"{type(model).__name__} has no nn.Conv2d. For linear layers give target_modules=nn.Linear; for a probe "
            "of the head alone, target_modules=(). Nothing was changed."
        )


def check_any_left(layers: list[LayerPlan], targets: set[nn.Module], model: nn.Module) -> None:
    """Targets of which none can be adapted are a mistake."""
    if targets and not any(layer.rank for layer in layers):
        reasons = "; ".join(f"{layer.name}: {layer.note}" for layer in layers if layer.note != "not a target")
        raise TargetError(f"No layer of {type(model).__name__} would be adapted ({reasons}). Nothing was changed.")


def checked_rank(rank: int, argument: str) -> int:
    """The rank itself, once it is known to be one."""
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise TargetError(
            f"{argument}={rank!r}; a rank is a whole number of at least 1. To leave a layer alone, "
            "use exclude_modules; to train the head only, target_modules=()."
        )
    return rank


def check_alpha(alpha: float, argument: str) -> None:
    """A finite number."""
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise TargetError(f"{argument}={alpha!r}; it must be a finite number.")


WRAPPERS = {
    "DistributedDataParallel": "inject first, then wrap",
    "DataParallel": "inject first, then wrap",
    "FullyShardedDataParallel": "inject first, then wrap",
    "FSDPModule": "inject first, then shard",
    "OptimizedModule": "inject first, then torch.compile",
    "ScriptModule": "inject into the Python module, then trace it",
}


def check_model(model: nn.Module) -> None:
    """A module, and neither wrapped nor compiled nor sharded."""
    if not isinstance(model, nn.Module):
        raise TargetError(f"model is a {type(model).__name__}; it must be a torch.nn.Module.")
    for name, module in model.named_modules():
        for cls in type(module).__mro__:
            if cls.__name__ in WRAPPERS and cls.__module__.startswith("torch."):
                where = name or "the model"
                raise UnsupportedLayerError(
                    f"{where} is a {cls.__name__}: {WRAPPERS[cls.__name__]}. Nothing was changed."
                )


def check_initialised(n: Named) -> None:
    """Lazy layers have no shape to factor."""
    if any(nn.parameter.is_lazy(p) for p in n.module.parameters()):
        raise UnsupportedLayerError(
            f"{n.name}: {type(n.module).__name__} has no shape yet; run one batch through the model before "
            "convlora.inject. Nothing was changed."
        )


def check_adaptable(n: Named, dropout: float) -> None:
    """A floating weight, a free attribute, and a forward that dropout knows."""
    weight = n.module._parameters["weight"]
    if weight is None or not weight.is_floating_point():
        raise UnsupportedLayerError(f"{n.name}: its weight is not of a floating type; use exclude_modules.")
    if hasattr(n.module, CHILD):
        raise UnsupportedLayerError(f"{n.name} has an attribute named {CHILD!r} already; use exclude_modules.")
    if dropout and not supports_dropout(n.module):
        raise UnsupportedLayerError(
            f"{n.name}: dropout needs a layer with the plain forward of nn.Conv2d or nn.Linear, and this is a "
            f"{type(n.module).__name__}. Use dropout=0 or exclude_modules. Nothing was changed."
        )
