"""Initialisation of the factors other than LoRA's own: from another distribution, the base's weight, or data.

The weight is read as the matrix ``(C_out, fan_in)`` that the factors change: ``(C_out, C_in / groups · kH · kW)`` for a
convolution, depthwise and grouped too, ``(C_in, C_out / groups · kH · kW)`` for a transposed one.

- ``gaussian``: A normal with standard deviation 1 / rank, as in peft; B zero.
- ``orthogonal``: A's rows orthonormal; B zero.
- ``pissa``: the leading singular vectors and values of W (Meng et al. 2024, arXiv:2404.02948).
- ``olora``: the first columns of Q and rows of R in W = QR (Büyükakyüz 2024, arXiv:2406.01775).
- ``eva``: A from data, as ``init_data.py`` finds it; B zero. The paper also moves ranks between
  layers; here they stay as planned.

The papers of PiSSA and OLoRA subtract the initial product from the base's weight. Here the base is not changed, and
the factors are anchored instead: the change is scaling · (B @ A − B0 @ A0). It is the same function of the same trained
parameters, and exactly zero at the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._layer.adapted import AdaptedLayer, held
from .._layer.computed import compute
from .._layer.functional import Factors
from .._layer.lowrank import Spectrum
from .._plan import LayerPlan, Plan
from ..errors import TargetError
from .init_data import leading_directions


def first_factors(plan: Plan, root: nn.Module, data: Iterable[Any] | None) -> dict[str, Factors]:
    """Return the initial A and B by layer name; layers that initialise themselves are left out. Changes nothing.

    Raises:
        TargetError: data are missing, empty, not asked for, do not reach a layer, or are not finite there.
    """
    if (plan.init == "eva") != (data is not None):
        wanted = (
            "reads images, and none were given: add init_data=loader, or choose init='gaussian', which needs none"
            if data is None
            else "reads no data: leave out init_data, or leave out init, which is 'eva' where data are given"
        )
        raise TargetError(f"init={plan.init!r} {wanted}. Nothing was changed.")
    planned_layers = [p for p in plan.layers if plan.init in p.change.inits or (plan.freeze_A and p.method == "lora")]
    layers = {planned.name: root.get_submodule(planned.name) for planned in planned_layers}
    with torch.inference_mode(False), torch.no_grad():
        if data is not None:
            found = leading_directions(planned_layers, root, layers, data)
            return {p.name: (found[p.name], _blank(p, layers[p.name])[1]) for p in planned_layers}
        begin = _BEGINNINGS.get(plan.init)
        drawn = {p.name: begin(p, p.scaling, layers[p.name]) for p in planned_layers} if begin else {}
        return {name: (A, B.zero_()) for name, (A, B) in drawn.items()} if plan.freeze_A else drawn


def _gaussian(planned: LayerPlan, scaling: float, layer: nn.Module) -> Factors:
    A, B = _blank(planned, layer)
    return A.normal_(std=1 / planned.rank), B


def _orthogonal(planned: LayerPlan, scaling: float, layer: nn.Module) -> Factors:
    A, B = _blank(planned, layer)
    nn.init.orthogonal_(A)  # wide: a rank that the plan allows is below fan_in
    return A, B


def _blank(planned: LayerPlan, layer: nn.Module) -> Factors:
    like = next(p for p in layer.parameters() if p.is_floating_point())
    dtype = torch.promote_types(like.dtype, torch.float32)
    rows, columns = planned.weight_shape[0], math.prod(planned.weight_shape[1:])
    return like.new_empty(planned.rank, columns, dtype=dtype), like.new_zeros(rows, planned.rank, dtype=dtype)


def _pissa(planned: LayerPlan, scaling: float, layer: nn.Module) -> Factors:
    return Spectrum.of(_matrix(planned, layer)).factors(planned.rank, scaling)


def _olora(planned: LayerPlan, scaling: float, layer: nn.Module) -> Factors:
    Q, R = torch.linalg.qr(_matrix(planned, layer))
    return R[: planned.rank], Q[:, : planned.rank]


_BEGINNINGS: Mapping[str, Callable[[LayerPlan, float, nn.Module], Factors]] = {
    "gaussian": _gaussian,
    "orthogonal": _orthogonal,
    "pissa": _pissa,
    "olora": _olora,
}


def _matrix(planned: LayerPlan, layer: nn.Module) -> Tensor:
    """Return the base's weight as ``(C_out, fan_in)``, in fp32 or wider; a computed weight as in eval mode."""
    weight = layer._parameters.get("weight")
    if weight is None:
        adapters = held(layer) if isinstance(layer, AdaptedLayer) else None
        active = adapters.active if adapters else None
        try:
            if adapters:
                adapters.active = None
            weight = cast(nn.Parameter, compute(layer))
        finally:
            if adapters:
                adapters.active = active
    matrix = weight.detach().reshape(planned.weight_shape[0], -1)
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))
