"""An adapter out of a full fine-tuning."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from .._layer.adapted import AdaptedLayer, change_of, own_weight
from .._layer.functional import is_finite
from .._layer.places import BASE
from .._methods.lora import LoRA
from .._model.checks import check_model
from .._model.inject import applied
from .._model.keys import base_keys, places_of, tensors_as
from .._model.options import MORE_THAN_ANY, Request
from .._model.planner import make_plan
from .._model.state import check_addable, check_plain, check_whole, root_of
from .._model.targets import Targets, exactly
from .._plan import LayerPlan, Plan
from ..errors import TargetError
from .approximation import Approximation, Goal, LayerError, spectrum_of


def extract(
    base: nn.Module,
    tuned: nn.Module,
    rank: int | None = None,
    *,
    energy: float | None = None,
    tolerance: float | None = None,
    target_modules: Targets = None,
    exclude_modules: Targets = None,
    modules_to_save: Targets = "auto",
    adapter_name: str = "default",
) -> Approximation:
    """Turn what a full fine-tuning changed into an adapter on the base, in place.

    >>> report = convlora.extract(base, tuned, energy=0.9)      # base now predicts nearly as tuned does
    >>> print(report)
    >>> convlora.save_adapter(base, "tuned/")

    Each target layer gets the factors nearest to its change. The head, norm statistics, scales and shifts are carried
    over as they are, and so is every other module that changed and gets no factors (a depthwise layer, say), unless it
    is excluded. Norm layers are tracked. Where the base carries adapters already, the new one comes beside them and
    waits for :func:`convlora.set_adapter`.

    Args:
        base: the network as it was before the fine-tuning.
        tuned: the same architecture after it; it is read, never changed.
        rank: for every layer, capped where the factors would outweigh it; or
        energy: the share of ‖ΔW‖² to keep in each layer, 0 to 1, each with the smallest rank that does; or
        tolerance: the relative error that a layer may have, 0 to 1, likewise.
        target_modules: as for :func:`convlora.inject`.
        exclude_modules: as for :func:`convlora.inject`.
        modules_to_save: as for :func:`convlora.inject`.
        adapter_name: names the adapter.

    Returns:
        Each layer's rank and error, and what was left out.

    Raises:
        TargetError: the two differ in structure, or in nothing, or by NaN or Inf; or an argument is out of range.
        StateError: ``base`` is merged or has an adapter of this name; ``tuned`` carries an adapter.

    Whatever is raised, the base is as it was.
    """
    goal = Goal.of(rank, energy, tolerance)
    root = root_of(base)
    check_addable(root, adapter_name)
    check_model(tuned)
    check_plain(tuned)
    check_whole(tuned)
    before, after = _same_keys(root, tuned)
    changed = {key for key in before if not torch.equal(before[key], after[key].to(before[key]))}
    if not changed:
        raise TargetError("base and tuned hold the same numbers: there is nothing to extract. Nothing was changed.")

    def planned(saved: Targets) -> Plan:
        request = Request(
            rank=goal.rank or MORE_THAN_ANY,
            method_pattern={"*": LoRA.method},
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            modules_to_save=saved,
            norm="track",
            adapter_name=adapter_name,
        )
        return make_plan(root, request)

    plan = planned(modules_to_save)
    plan = planned(exactly([*plan.modules_to_save, *_in_full(root, plan, changed)]))
    with torch.inference_mode(False), torch.no_grad():
        layers, factors, errors = _low_rank(root, tuned, plan, changed, goal)
        same = {layer.name for layer in plan.layers} - {layer.name for layer in layers}
        skipped = [replace(p, rank=0, note="unchanged") for p in plan.layers if p.name in same]
        top = goal.rank or max((layer.rank for layer in layers), default=1)
        plan = replace(
            plan, layers=tuple(layers), skipped=(*plan.skipped, *skipped), rank=top, alpha=float(top), use_rslora=False
        )
        with applied(plan, root):
            for layer, (lora_A, lora_B) in zip(layers, factors, strict=True):
                cast(LoRA, change_of(root.get_submodule(layer.name), adapter_name)).set_factors(lora_A, lora_B)
            carried = set()
            for key, place in places_of(root).items():
                own = place.own(adapter_name)
                if own is not None and key in after:
                    own.copy_(after[key])
                    carried.add(key)
    carried |= {f"{layer.name}.weight" if layer.name else "weight" for layer in layers}
    return Approximation(tuple(errors), tuple(sorted(changed - carried)))


def _same_keys(root: nn.Module, tuned: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of both by state-dict key.

    Raises:
        TargetError: one has a tensor that the other has not, or in another shape.
    """
    state, after = tensors_as(root, BASE), dict(tuned.state_dict())
    before = {key: state[key] for key in base_keys(root, state, set())}
    faults = [f"  {key}: only in base" for key in before if key not in after]
    faults += [f"  {key}: only in tuned" for key in after if key not in before]
    faults += [
        f"  {key}: {tuple(before[key].shape)} in base, {tuple(after[key].shape)} in tuned"
        for key in before
        if key in after and before[key].shape != after[key].shape
    ]
    if faults:
        lines = ["tuned is not base fine-tuned, the two differ in structure:", *faults[:8]]
        raise TargetError("\n".join([*lines, "Build both with the same architecture. Nothing was changed."]))
    return before, after


def _in_full(root: nn.Module, plan: Plan, changed: set[str]) -> list[str]:
    """Modules that changed, get no factors, hold no layer that does, and were not excluded."""
    modules = dict(root.named_modules())
    adapted = {modules[layer.name] for layer in plan.layers}
    excluded = {modules[layer.name] for layer in plan.skipped if layer.note == "excluded"}
    owned = {module for name in plan.modules_to_save for module in modules[name].modules()}
    owned |= {modules[name] for name in plan.norms}
    return [
        name
        for name, module in modules.items()
        if name
        and any(f"{name}.{key}" in changed for key in module._parameters)
        and module not in owned
        and not (adapted | excluded).intersection(module.modules())
    ]


def _low_rank(
    root: nn.Module, tuned: nn.Module, plan: Plan, changed: set[str], goal: Goal
) -> tuple[list[LayerPlan], list[tuple[Tensor, Tensor]], list[LayerError]]:
    layers, factors, errors = [], [], []
    for planned in plan.layers:
        layer = root.get_submodule(planned.name)
        now = own_weight(layer) if isinstance(layer, AdaptedLayer) else cast(Tensor, layer.weight)
        wide = torch.promote_types(now.dtype, torch.float32)
        delta = (cast(Tensor, tuned.get_submodule(planned.name).weight).to(now.device, wide) - now.to(wide)).detach()
        if not delta.any():
            continue
        if not is_finite(delta):
            raise TargetError(
                f"{planned.name}.weight: tuned and base differ by NaN or Inf, which has no nearest change of a lower "
                "rank. Take weights from before the training diverged, or use exclude_modules. Nothing was changed."
            )
        spectrum = spectrum_of(planned.name, delta.view(planned.weight_shape))
        fitting = min(goal.rank_of(spectrum), planned.rank)
        layers.append(replace(planned, rank=fitting, scaling=1.0, note=""))
        factors.append(spectrum.factors(fitting, 1.0))
        errors.append(LayerError(planned.name, fitting, spectrum.lost(fitting), spectrum.size))
    return layers, factors, errors
