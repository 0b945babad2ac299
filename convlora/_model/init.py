"""How factors begin, other than as plain LoRA's: drawn otherwise, from the base's weight, or from data.

The weight is read as the matrix ``(C_out, fan_in)`` that the factors change: ``(C_out, C_in / groups · kH · kW)`` for a
convolution, depthwise and grouped too, ``(C_in, C_out / groups · kH · kW)`` for a transposed one.

- ``gaussian``: A normal with standard deviation 1 / rank, as in peft; B zero.
- ``orthogonal``: A's rows orthonormal; B zero.
- ``pissa``: the leading singular vectors and values of W (Meng et al. 2024, arXiv:2404.02948).
- ``olora``: the first columns of Q and rows of R in W = QR (Büyükakyüz 2024, arXiv:2406.01775).
- ``eva``: A's rows are the leading right singular vectors of what the kernels meet in a few batches (Paischer et al.
  2024, arXiv:2410.07170); B zero. The ranks stay as planned; the paper also moves them between layers.

PiSSA and OLoRA take their product away from the base's weight. Here the base stays as it is, and the factors are
anchored instead: the change is scaling · (B @ A − B0 @ A0), the same function of the same trained numbers, and exactly
zero at the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from .._layer.adapted import AdaptedLayer, held
from .._layer.computed import compute
from .._layer.lowrank import Spectrum
from .._plan import LayerPlan, Plan
from ..errors import TargetError
from .observe import base_alone, run_batch

Factors = tuple[Tensor, Tensor]
"""A ``(rank, fan_in)`` and B ``(C_out, rank)``."""


def first_factors(plan: Plan, root: nn.Module, data: Iterable[Any] | None) -> dict[str, Factors]:
    """Each layer's factors by its name; nothing where they begin as the layer draws them itself. Changes nothing.

    Raises:
        TargetError: data are missing, empty, not asked for, do not reach a layer, or are not finite there.
    """
    if (plan.init == "eva") != (data is not None):
        wanted = "needs a few batches: init_data=itertools.islice(loader, 8), say" if data is None else "reads no data"
        raise TargetError(f"init={plan.init!r} {wanted}. Nothing was changed.")
    layers = {planned.name: root.get_submodule(planned.name) for planned in plan.layers}
    with torch.inference_mode(False), torch.no_grad():
        if data is not None:
            return _from_data(plan, root, layers, data)
        begin = _BEGINNINGS.get(plan.init)
        return {p.name: begin(p, plan.scaling(p), layers[p.name]) for p in plan.layers} if begin else {}


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
    """The base's weight as ``(C_out, fan_in)``, in fp32 at least; one that is computed as in eval mode."""
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


# ---- from data


def _from_data(plan: Plan, root: nn.Module, layers: Mapping[str, nn.Module], data: Iterable[Any]) -> dict[str, Factors]:
    met = {p.name: _Met(layers[p.name], p) for p in plan.layers}
    batches = 0
    with base_alone(root), ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(met[name].watch(layer).remove)
        for batch in data:
            run_batch(root, batch)
            batches += 1
    if not batches:
        raise TargetError("init_data holds no batch (an iterator that was used up already?). Nothing was changed.")
    for fault, names in {
        "does not reach": [name for name, each in met.items() if not each.patches],
        "is not finite in": [name for name, each in met.items() if not each.covariance.diagonal().isfinite().all()],
    }.items():
        if names:
            raise TargetError(
                f"init_data {fault} {', '.join(names)}; give other batches, or leave these layers to another adapter "
                "with exclude_modules. Nothing was changed."
            )
    return {p.name: (_leading(met[p.name].covariance, p.rank), _blank(p, layers[p.name])[1]) for p in plan.layers}


class _Met:
    """What a layer's kernels meet: Σ patch · patchᵀ over all positions, images and groups, ``(fan_in, fan_in)``.

    Groups count alike, since they share A. Its size does not grow with the data.
    """

    def __init__(self, layer: nn.Module, planned: LayerPlan) -> None:
        like = next(p for p in layer.parameters() if p.is_floating_point())
        columns = math.prod(planned.weight_shape[1:])
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.covariance = like.new_zeros(columns, columns, dtype=dtype)
        self.patches = 0

    def watch(self, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
        return layer.register_forward_hook(self._see, with_kwargs=True)

    def _see(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = (args[0] if args else kwargs["input"]).detach().to(self.covariance.dtype)
        if isinstance(layer, nn.Linear):
            self._add(x)
        else:
            conv = cast(_ConvNd, layer)
            single = x.ndim == len(conv.kernel_size) + 1
            for image in x[None] if single else x:  # one at a time: patches are kernel-size times as large
                self._add(_patches(conv, image, output.shape[-len(conv.kernel_size) :]))

    def _add(self, rows: Tensor) -> None:
        rows = rows.reshape(-1, self.covariance.shape[0])
        self.covariance.addmm_(rows.T, rows)
        self.patches += len(rows)


def _patches(conv: _ConvNd, image: Tensor, outputs: Sequence[int]) -> Tensor:
    """What each kernel of each group meets in one image ``(C_in, *spatial)``: ``(*outputs, C_in, *kernel)``."""
    axes = range(len(conv.kernel_size))
    spans = [conv.dilation[i] * (conv.kernel_size[i] - 1) + 1 for i in axes]
    padded = _padded(conv, image)
    if any((padded.shape[i + 1] - spans[i]) // conv.stride[i] + 1 != outputs[i] for i in axes):
        # A forward that pads by itself, as TensorFlow does (timm's Conv2dSame): the odd one of the zeros goes last.
        total = [max((outputs[i] - 1) * conv.stride[i] + spans[i] - image.shape[i + 1], 0) for i in axes]
        padded = F.pad(image, [zeros for t in reversed(total) for zeros in (t // 2, t - t // 2)])
    for i in axes:
        padded = padded.unfold(i + 1, spans[i], conv.stride[i])[..., :: conv.dilation[i]]
    return padded.movedim(0, len(axes))


def _padded(conv: _ConvNd, image: Tensor) -> Tensor:
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(image[None], conv._reversed_padding_repeated_twice, mode)[0]


EXACT_UP_TO = 512
"""The largest matrix that is decomposed in full; a larger one by subspace iteration, in a fraction of the time."""


def _leading(covariance: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the largest eigenvalues, as rows: ``(rank, fan_in)``."""
    size = covariance.shape[0]
    if size <= EXACT_UP_TO:
        vectors: Tensor = torch.linalg.eigh(covariance).eigenvectors
        return vectors.flip(1)[:, :rank].T
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(size, min(size, 2 * rank + 16), generator=generator).to(covariance)
    for _ in range(8):
        basis = torch.linalg.qr(covariance @ basis).Q
    vectors = torch.linalg.eigh(basis.T @ covariance @ basis).eigenvectors
    return (basis @ vectors.flip(1)[:, :rank]).T
