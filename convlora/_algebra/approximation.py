"""How near factors come to the change that they stand for, and which rank is near enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from .._layer.change import Change
from .._layer.functional import is_finite
from .._layer.lowrank import Spectrum, tolerance_of
from .._model.options import checked_rank
from .._model.state import Adapter
from .._plan import Plan
from ..errors import StateError, TargetError


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
class Goal:
    """A rank, or the relative error that a layer may have."""

    rank: int | None
    tolerance: float

    @classmethod
    def of(cls, rank: int | None, energy: float | None, tolerance: float | None) -> Goal:
        """What is asked for; TargetError where it is not exactly one of the three, or out of range."""
        if sum(value is not None for value in (rank, energy, tolerance)) != 1:
            raise TargetError(f"Give one of rank={rank}, energy={energy}, tolerance={tolerance}. Nothing was changed.")
        if rank is not None:
            return cls(checked_rank(rank, "rank"), 0.0)
        for name, value in (("energy", energy), ("tolerance", tolerance)):
            if value is not None and not 0.0 <= value <= 1.0:
                raise TargetError(f"{name}={value}; it is a share, from 0 to 1. Nothing was changed.")
        return cls(None, tolerance_of(cast(float, energy)) if tolerance is None else tolerance)

    def rank_of(self, spectrum: Spectrum) -> int:
        """The rank that one layer gets."""
        return spectrum.rank_for(self.tolerance) if self.rank is None else self.rank


def check_factors(adapter: Adapter) -> None:
    """Raise StateError where a factor holds NaN or Inf: no change is near to that."""
    for planned, change in zip(adapter.plan.layers, adapter.changes, strict=True):
        for name, factor in (*change.named_parameters(), *change.named_buffers()):
            if not is_finite(factor):
                raise StateError(
                    f"{planned.name}: {name} of adapter {adapter.plan.adapter_name!r} holds NaN or Inf; has its "
                    "training diverged? Load the adapter from before, or delete it. Nothing was changed."
                )


def check_products(adapter_name: str, plan: Plan) -> None:
    """Raise StateError where a layer's change is no product of factors."""
    for layer in plan.layers:
        if layer.change.factors is Change.factors:
            raise StateError(
                f"{layer.name}: method {layer.method!r} of adapter {adapter_name!r} makes a change that is no product "
                "of factors. Shrink and combine adapters of method 'lora' or 'dense'. Nothing was changed."
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
