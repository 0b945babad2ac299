"""An adapter of lower ranks out of a larger one."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from .._layer.functional import Factors
from .._methods.lora import LoRA
from .._model.state import (
    check_enabled,
    check_unmerged,
    check_unrouted,
    ready_alone,
    the_adapter,
    to_the_end,
)
from .approximation import Approximation, Goal, LayerError, check_factors, check_products, spectrum_of_sum


def shrink(
    model: nn.Module,
    rank: int | None = None,
    *,
    energy: float | None = None,
    tolerance: float | None = None,
    adapter_name: str | None = None,
) -> Approximation:
    """Lower the ranks of a trained adapter, in place, to the nearest change that each layer can have then.

    >>> print(convlora.shrink(model, energy=0.99))

    The factors are new parameters: an optimizer has to be made again. No rank is raised; but an adapter that began
    with PiSSA or OLoRA is a change of twice its rank, and becomes one whose factors hold all of it. DoRA's magnitudes
    stay; the errors are those of ΔW before them. A layer whose whole difference is trained (``dense``) stays as it is.

    Args:
        model: an injected model.
        rank: for every layer; or
        energy: the share of ‖ΔW‖² to keep in each layer, 0 to 1, each with the smallest rank that does; or
        tolerance: the relative error ‖ΔW − ΔW'‖ / ‖ΔW‖ that a layer may have, 0 to 1, likewise.
        adapter_name: one of the model's adapters; default the active one.

    Returns:
        Each layer's rank and error.

    Raises:
        TargetError: not exactly one of the three, or one out of range.
        StateError: no such adapter; a factor holds NaN or Inf; the model is merged, or its adapters are disabled, or a
            ``use_adapters`` block is open.

    Whatever is raised, the model is as it was.
    """
    goal = Goal.of(rank, energy, tolerance)
    _, injection = ready_alone(model, check_unmerged, check_enabled, check_unrouted)
    adapter = the_adapter(injection, adapter_name)
    check_factors(adapter)
    check_products(adapter.plan.adapter_name, adapter.plan)
    old, layers, errors = adapter.plan, [], []
    smaller: list[tuple[LoRA, Tensor, Tensor]] = []
    with torch.inference_mode(False), torch.no_grad():
        for planned, change in zip(old.layers, adapter.changes, strict=True):
            A, B = cast(Factors, change.factors())
            spectrum, full = spectrum_of_sum(planned.name, [(A, B, change.scaling)]), len(A)
            is_lora = issubclass(planned.change, LoRA)
            fitting = min(goal.rank_of(spectrum), full) if is_lora else full
            if is_lora:
                pair = (A, B) if fitting == full else spectrum.factors(fitting, change.scaling)
                smaller.append((cast(LoRA, change), *pair))
                planned = replace(planned, rank=fitting, method=LoRA.method)
            layers.append(planned)
            errors.append(LayerError(planned.name, fitting, spectrum.lost(fitting), spectrum.size))
    top = max((layer.rank for layer in layers), default=old.rank)
    plan = replace(old, layers=tuple(layers), rank=top, alpha=old.alpha * top / old.rank)

    def put() -> None:
        for lora, lora_A, lora_B in smaller:
            lora.replace_factors(lora_A, lora_B)
        adapter.plan = plan

    to_the_end(put)
    return Approximation(tuple(errors))
