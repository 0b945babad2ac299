"""Adapters out of dense changes and out of larger adapters: what a lower rank keeps, and what it loses."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ._adapters import check_new
from ._checks import check_model, checked_rank
from ._files import is_finite
from ._functional import scaling_of
from ._inject import applied
from ._layer import AdaptedLayer, lora_of, own_weight
from ._lowrank import Spectrum, tolerance_of
from ._manifest import base_keys, places_of, tensors_as
from ._places import BASE
from ._plan import LayerPlan, Plan
from ._planner import MORE_THAN_ANY, make_plan
from ._state import (
    Adapter,
    check_enabled,
    check_intact,
    check_plain,
    check_unmerged,
    check_unrouted,
    check_whole,
    injections,
    the_adapter,
    the_injection,
    to_the_end,
)
from ._targets import Targets
from .errors import StateError, TargetError


@dataclass(frozen=True)
class LayerError:
    """How near one layer's factors come to the change that they stand for."""

    name: str
    rank: int
    lost: float
    """‖ΔW − scaling · B @ A‖, the Frobenius norm."""
    size: float
    """‖ΔW‖."""

    @property
    def error(self) -> float:
        """The share that is lost: 0 where nothing is, 1 where all is."""
        return self.lost / self.size if self.size else 0.0


@dataclass(frozen=True)
class Approximation:
    """How near an adapter comes to the change that it stands for; ``print`` shows a table.

    Attributes:
        layers: each adapted layer, with its rank and its error.
        left_out: keys of parameters that differ and that no adapter can carry, such as an adapted layer's bias.
    """

    layers: tuple[LayerError, ...]
    left_out: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """‖ΔW − ΔW'‖ / ‖ΔW‖ over all layers together."""
        lost = sum(layer.lost**2 for layer in self.layers) ** 0.5
        size = sum(layer.size**2 for layer in self.layers) ** 0.5
        return lost / size if size else 0.0

    def __str__(self) -> str:
        width = max([5, *(len(layer.name) for layer in self.layers)])
        lines = [f"{'layer':{width}}  rank    error"]
        lines += [f"{layer.name:{width}}  {layer.rank:4}  {layer.error:7.3%}" for layer in self.layers]
        lines += [f"{'all':{width}}        {self.error:7.3%}"]
        return "\n".join([*lines, *(f"left out: {name}" for name in self.left_out)])


@dataclass(frozen=True)
class _Goal:
    """A rank, or the relative error that a layer may have."""

    rank: int | None
    tolerance: float

    @classmethod
    def of(cls, rank: int | None, energy: float | None, tolerance: float | None) -> _Goal:
        if sum(value is not None for value in (rank, energy, tolerance)) != 1:
            raise TargetError(f"Give one of rank={rank}, energy={energy}, tolerance={tolerance}. Nothing was changed.")
        if rank is not None:
            return cls(checked_rank(rank, "rank"), 0.0)
        for name, value in (("energy", energy), ("tolerance", tolerance)):
            if value is not None and not 0.0 <= value <= 1.0:
                raise TargetError(f"{name}={value}; it is a share, from 0 to 1. Nothing was changed.")
        return cls(None, tolerance_of(cast(float, energy)) if tolerance is None else tolerance)

    def rank_of(self, spectrum: Spectrum) -> int:
        return spectrum.rank_for(self.tolerance) if self.rank is None else self.rank


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
    stay; the errors are those of ΔW before them.

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
    goal = _Goal.of(rank, energy, tolerance)
    root, injection = the_injection(model)
    adapter = the_adapter(injection, adapter_name)
    check_unmerged(injection)
    check_intact(root, injection)
    check_enabled(injection)
    check_unrouted(injection)
    check_factors(adapter)
    old, layers, errors, smaller = adapter.plan, [], [], []
    with torch.inference_mode(False), torch.no_grad():
        for planned, lora in zip(old.layers, adapter.loras, strict=True):
            A, B = lora.factors()
            spectrum = spectrum_of_sum(planned.name, [(A, B, lora.scaling)])
            fitting = min(goal.rank_of(spectrum), lora.rank)
            pair = (A, B) if fitting == lora.rank else spectrum.factors(fitting, lora.scaling)
            lost = 0.0 if fitting == lora.rank else spectrum.lost(fitting)
            alpha = planned.alpha * scaling_of(1.0, planned.rank, old.use_rslora)
            alpha /= scaling_of(1.0, fitting, old.use_rslora)  # the same scaling
            layers.append(replace(planned, rank=fitting, alpha=alpha, anchored=False))
            errors.append(LayerError(planned.name, fitting, lost, spectrum.size))
            smaller.append(pair)
    top = max((layer.rank for layer in layers), default=old.rank)
    plan = replace(old, layers=tuple(layers), rank=top, alpha=old.alpha * top / old.rank)

    def put() -> None:
        for lora, (lora_A, lora_B) in zip(adapter.loras, smaller, strict=True):
            lora.replace_factors(lora_A, lora_B)
        adapter.plan = plan

    to_the_end(put)
    return Approximation(tuple(errors))


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
    goal = _Goal.of(rank, energy, tolerance)
    root = _root(base, adapter_name)
    check_model(tuned)
    check_plain(tuned)
    check_whole(tuned)
    before, after = _same_keys(root, tuned)
    changed = {key for key in before if not torch.equal(before[key], after[key].to(before[key]))}
    if not changed:
        raise TargetError("base and tuned hold the same numbers: there is nothing to extract. Nothing was changed.")

    def planned(saved: Targets) -> Plan:
        wanted = goal.rank or MORE_THAN_ANY
        options: dict[str, Any] = {"target_modules": target_modules, "exclude_modules": exclude_modules}
        return make_plan(root, wanted, adapter_name, modules_to_save=saved, norm="track", **options)

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
                put_factors(root.get_submodule(layer.name), adapter_name, lora_A, lora_B)
            carried = set()
            for key, place in places_of(root).items():
                own = place.own(adapter_name)
                if own is not None and key in after:
                    own.copy_(after[key])
                    carried.add(key)
    carried |= {f"{layer.name}.weight" if layer.name else "weight" for layer in layers}
    return Approximation(tuple(errors), tuple(sorted(changed - carried)))


def _root(base: nn.Module, adapter_name: str) -> nn.Module:
    check_model(base)
    if not list(injections(base)):
        check_plain(base)
        return base
    root, injection = the_injection(base)
    check_new(injection, adapter_name)
    check_intact(root, injection)
    return root


def _same_keys(root: nn.Module, tuned: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of both by state-dict key.

    Raises:
        TargetError: one has a tensor that the other has not, or in another shape.
    """
    state, after = tensors_as(root, BASE), dict(tuned.state_dict())
    before = {key: state[key] for key in base_keys(state, set())}
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
    root: nn.Module, tuned: nn.Module, plan: Plan, changed: set[str], goal: _Goal
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
        layers.append(replace(planned, rank=fitting, alpha=float(fitting), note=""))
        factors.append(spectrum.factors(fitting, 1.0))
        errors.append(LayerError(planned.name, fitting, spectrum.lost(fitting), spectrum.size))
    return layers, factors, errors


def check_factors(adapter: Adapter) -> None:
    """Raise StateError where a factor holds NaN or Inf: no change is near to that."""
    for planned, lora in zip(adapter.plan.layers, adapter.loras, strict=True):
        for name, factor in (*lora.named_parameters(), *lora.named_buffers()):
            if not is_finite(factor):
                raise StateError(
                    f"{planned.name}: {name} of adapter {adapter.plan.adapter_name!r} holds NaN or Inf; has its "
                    "training diverged? Load the adapter from before, or delete it. Nothing was changed."
                )


def spectrum_of_sum(name: str, factors: Sequence[tuple[Tensor, Tensor, float]]) -> Spectrum:
    """:meth:`Spectrum.of_sum` of one layer, its failure with the layer's name."""
    return _decomposed(name, lambda: Spectrum.of_sum(factors))


def spectrum_of(name: str, delta: Tensor) -> Spectrum:
    """:meth:`Spectrum.of` of one layer, its failure with the layer's name."""
    return _decomposed(name, lambda: Spectrum.of(delta))


_LinAlgError: type[Exception] = cast(Any, torch.linalg).LinAlgError


def _decomposed(name: str, decompose: Callable[[], Spectrum]) -> Spectrum:
    try:
        spectrum = decompose()
        if is_finite(spectrum.S):
            return spectrum
        cause: Exception | None = None
    except _LinAlgError as error:
        cause = error
    raise StateError(
        f"{name}: its change cannot be decomposed; is it beyond what its dtype holds? Use smaller weights or an alpha "
        "nearer to 1. Nothing was changed."
    ) from cause


def exactly(names: Iterable[str]) -> Targets:
    """A target that names these modules and no other."""
    return tuple(re.compile(re.escape(name)) for name in names) or None


def put_factors(layer: nn.Module, adapter_name: str, lora_A: Tensor, lora_B: Tensor) -> None:
    """Write numbers into an adapter's factors."""
    lora = lora_of(layer, adapter_name)
    lora.lora_A.copy_(lora_A)
    lora.lora_B.copy_(lora_B)
