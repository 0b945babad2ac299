"""``convlora diff``: compares two adapters' settings, and the relative difference of their changes.

Adapters are equal if their products scaling · B @ A are, even if their factors or ranks differ.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import typer
from torch import Tensor

from .._checkpoint.contents import adapter_tensors
from .._checkpoint.digests import digest, fingerprint
from .._checkpoint.loading import load_adapter
from .._checkpoint.peft_format import factor_shapes
from .._layer.functional import is_finite
from .._layer.lowrank import Spectrum
from .._model.state import the_adapter, the_injection
from .._model.targets import dotted
from .._plan import LayerPlan, Plan
from .answers import DIFFERS, Answer, CommandError, table
from .files import is_foreign, located, read_saved
from .models import build
from .options import Building

SETTINGS = (
    *("model", "method", "rank", "alpha", "use_rslora", "dropout", "norm", "init", "modules_to_save", "norms"),
    "biases",
)
"""The fields of a plan that are compared. An adapter's name and the skipped layers are not."""


@dataclass(frozen=True)
class Side:
    """One of the two adapters."""

    plan: Plan
    tensors: dict[str, Tensor]
    base: str | None
    """The fingerprint of its base; None if the file does not hold it."""


def diff(sources: list[str], building: Building, exit_code: bool) -> Answer:
    """Compare two adapters layer by layer; a model may come before them in ``sources``."""
    if len(sources) not in (2, 3):
        raise typer.BadParameter(f"{len(sources)} arguments; give two adapters, or a model and two adapters.")
    *models, first, second = sources
    sides = _through_model(models[0], building, first, second) if models else (_from_file(first), _from_file(second))
    return _compared(*sides, exit_code)


def _from_file(source: str) -> Side:
    path = located(source)
    if is_foreign(path):
        raise CommandError(f"{source} was not written by convlora: `convlora diff MODEL FIRST SECOND` reads it.")
    saved = read_saved(path)
    return Side(saved.manifest.plan, saved.tensors, fingerprint(saved.manifest.base))


def _through_model(name: str, building: Building, *sources: str) -> tuple[Side, Side]:
    """Return both adapters as this model loads them; the base's weights are not compared."""
    model, sides = build(name, building).model, []
    for source, adapter_name in zip(sources, ("first", "second"), strict=True):
        path = located(source)
        load_adapter(model, path, adapter_name, check_base=False, check_finite=False)
        root, injection = the_injection(model)
        adapter = the_adapter(injection, adapter_name)
        base = None if is_foreign(path) else fingerprint(read_saved(path).manifest.base)
        sides.append(Side(adapter.plan, adapter_tensors(root, injection, adapter)[0], base))
    return sides[0], sides[1]


def _compared(first: Side, second: Side, exit_code: bool) -> Answer:
    ours, theirs = ({layer.name: layer for layer in side.plan.layers} for side in (first, second))
    layers = [_layer(first, second, ours[name], theirs[name]) for name in ours if name in theirs]
    factors = {key for side in (first, second) for layer in side.plan.layers for key in factor_shapes(layer)}
    factors -= {key for key in factors if key.endswith("lora_magnitude_vector")}
    rest = [{key: t for key, t in side.tensors.items() if key not in factors} for side in (first, second)]
    tensors = [{"key": key, "difference": _apart(rest[0][key], rest[1][key])} for key in rest[0] if key in rest[1]]
    settings = {
        key: [asdict(first.plan)[key], asdict(second.plan)[key]]
        for key in SETTINGS
        if getattr(first.plan, key) != getattr(second.plan, key)
    }
    names = [[*ours, *rest[0]], [*theirs, *rest[1]]]
    only = [[name for name in names[0] if name not in names[1]], [name for name in names[1] if name not in names[0]]]
    same_base = None if None in (first.base, second.base) else first.base == second.base
    moved = [each for each in (*layers, *tensors) if each["difference"] != 0]
    same = not (moved or settings or only[0] or only[1] or same_base is False)
    data = {
        "same": same,
        "base": {"same": same_base, "first": first.base, "second": second.base},
        "settings": settings,
        "layers": layers,
        "tensors": tensors,
        "only_first": only[0],
        "only_second": only[1],
    }
    return Answer(data, _shown(data), DIFFERS if exit_code and not same else 0)


def _layer(first: Side, second: Side, ours: LayerPlan, theirs: LayerPlan) -> dict[str, Any]:
    """Return one layer's name, ranks and difference: ‖ΔW₁ − ΔW₂‖ / max(‖ΔW₁‖, ‖ΔW₂‖).

    The difference is 0 for equal changes, 1 if one is zero, and 2 for opposite ones. For methods without factors the
    trained tensors themselves are compared. It is None if values are not finite and differ in their bytes.
    """
    if ours.weight_shape != theirs.weight_shape:
        raise CommandError(
            f"{ours.name}: {ours.weight_shape} in the first, {theirs.weight_shape} in the second: the adapters are for "
            "different models. Nothing was changed."
        )
    found = {"name": ours.name, "rank": [ours.rank, theirs.rank], "difference": 0.0}
    if not all("lora_A.weight" in layer.stored_shapes for layer in (ours, theirs)):  # their ΔW depends on the base
        return found | {"difference": _apart(_numbers(first, ours), _numbers(second, theirs))}
    changes = [_change(first, ours), _change(second, theirs)]
    (A, B, scaling), (A2, B2, scaling2) = changes
    if _same(A, A2) and _same(B, B2) and scaling == scaling2:
        return found
    if not all(is_finite(factor) for factor in (A, B, A2, B2)):
        return found | {"difference": None}
    size = max(Spectrum.of_sum([change]).size for change in changes)
    apart = Spectrum.of_sum([changes[0], (A2, B2, -scaling2)]).size
    return found | {"difference": _ratio(apart, size)}


def _change(side: Side, layer: LayerPlan) -> tuple[Tensor, Tensor, float]:
    """Return lora_A, lora_B as a matrix, and the scaling."""
    A, B = (side.tensors[key] for key in list(factor_shapes(layer))[:2])
    return A, B.flatten(1), layer.whole_scaling


def _numbers(side: Side, layer: LayerPlan) -> Tensor:
    """Return all values of a layer's tensors and its scaling as one vector."""
    tensors = [side.tensors[dotted(layer.name, name)].double().flatten() for name in layer.stored_shapes]
    return torch.cat([*tensors, torch.tensor([layer.whole_scaling], dtype=torch.float64)])


def _apart(one: Tensor, other: Tensor) -> float | None:
    """Return ‖a − b‖ / max(‖a‖, ‖b‖); 1 if the shapes differ, None if it is not finite."""
    if one.shape != other.shape:
        return 1.0
    if _same(one, other):
        return 0.0
    a, b = one.double(), other.double()
    size = max(float(torch.linalg.vector_norm(a)), float(torch.linalg.vector_norm(b)))
    return _ratio(float(torch.linalg.vector_norm(a - b)), size)


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal; NaN counts as equal if the bytes are."""
    return one.shape == other.shape and (torch.equal(one, other) or digest(one) == digest(other))


def _ratio(apart: float, size: float) -> float | None:
    if not (math.isfinite(apart) and math.isfinite(size)):  # JSON has no NaN
        return None
    return apart / size if size else 0.0


def _shown(data: dict[str, Any]) -> list[Any]:
    rows = [(each["name"], " → ".join(map(str, dict.fromkeys(each["rank"]))), _share(each)) for each in data["layers"]]
    others = [(each["key"], _share(each)) for each in data["tensors"]]
    shown: list[Any] = [table(("layer", "rank", "difference"), rows, "lrr")] if rows else []
    shown += [table(("tensor", "difference"), others, "lr")] if others else []
    shown += [f"{key}: {one} → {other}" for key, (one, other) in data["settings"].items()]
    for which in ("first", "second"):
        names = data[f"only_{which}"]
        shown += [f"only in the {which}: {', '.join(names)}"] if names else []
    base = data["base"]
    told = {None: "unknown, not in both files", True: "the same", False: f"{base['first']} → {base['second']}"}
    return [*shown, f"base: {told[base['same']]}", "the same adapter" if data["same"] else "the two differ"]


def _share(each: dict[str, Any]) -> str:
    if each["difference"] is None:
        return "not finite"
    return f"{each['difference']:.3%}" if each["difference"] else "same"
