"""A warning at an optimizer's first step if it does not hold the trained parameters of an injected model."""

from __future__ import annotations

import warnings
from weakref import WeakSet

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .._layer.places import BASE
from .state import RECORD, Injection

_models: WeakSet[nn.Module] = WeakSet()
_known: WeakSet[Optimizer] = WeakSet()
_watches = False


def watch(root: nn.Module) -> None:
    """Check the optimizers of this model from now on, each at its first step."""
    global _watches
    if not _watches:
        _watches = True
        register_optimizer_step_pre_hook(_look)
    _models.add(root)


def _look(optimizer: Optimizer, *_: object) -> None:
    if optimizer in _known:
        return
    _known.add(optimizer)
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for root in _models:
        injection = vars(root).get(RECORD)
        if isinstance(injection, Injection) and (fault := _fault(root, injection, own)):
            warnings.warn(f"{type(root).__name__}: {fault}", stacklevel=3)


def _fault(root: nn.Module, injection: Injection, own: set[int]) -> str:
    base = {id(p) for module, name in injection.frozen for p in (module._parameters.get(name),) if p is not None}
    base |= {id(place.of(BASE)) for place in injection.places if place.is_parameter}
    trained = {id(p) for p in root.parameters() if p.requires_grad}
    if injection.merged and own & (base | trained):
        return "the adapter is merged, so no factor is trained. Call convlora.unmerge(model) before you train."
    if own & base and not own & trained:
        return (
            "this optimizer has parameters of the frozen base and nothing that is trained. It was made before "
            "convlora.inject, or of the base's parameters: make it of convlora.trainable_parameters(model)."
        )
    frozen = _frozen_since(injection, own)
    if frozen:
        return (
            f"this optimizer has the factors of {frozen[0]} and {len(frozen) - 1} other layers, and they do not train: "
            "requires_grad was set to False after convlora.inject, as lock_image_tower of open_clip does. Lock before "
            "you inject, which freezes the base by itself; or set it to True for them."
        )
    return ""


def _frozen_since(injection: Injection, own: set[int]) -> list[str]:
    """Layers whose factors an optimizer has, though all of them were frozen by other code."""
    active = [injection.adapters[name] for name in injection.trained if not injection.adapters[name].lost()]
    changes = [pair for each in active for pair in zip(each.plan.layers, each.changes, strict=True)]
    return [
        planned.name
        for planned, change in changes
        if any(id(p) in own for p in change.parameters()) and not any(p.requires_grad for p in change.parameters())
    ]
