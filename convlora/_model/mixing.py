"""Mixtures: weighted means of several adapters' heads, biases and running statistics."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from .._layer.places import BASE, Place


class Mixtures:
    """Makes mixtures of several adapters' tensors; tensors that modules share stay shared."""

    def __init__(self, places: Iterable[Place]) -> None:
        self.means = {place.module: place for place in places if place.name == "running_mean"}
        self.made: dict[tuple[tuple[int, float], ...], Tensor | None] = {}

    def of(self, place: Place, weights: Mapping[str, float]) -> Tensor | None:
        """Return a new tensor that is not trained. A buffer includes the base's if the weights sum to less than 1.

        If one of the adapters has no tensor in this place, return the one with the largest weight.
        """
        key = tuple((id(place.of(name)), weight) for name, weight in weights.items())
        if key not in self.made:
            self.made[key] = self._mixed(place, weights)
        return self.made[key]

    def _mixed(self, place: Place, weights: Mapping[str, float]) -> Tensor | None:
        rest = 1.0 - sum(map(abs, weights.values()))
        shares = weights if place.is_parameter or rest <= 0 else {BASE: rest, **weights}
        largest = place.of(max(weights, key=lambda name: abs(weights[name])))
        with torch.inference_mode(False), torch.no_grad():
            found = mixed(place, self.means.get(place.module), shares)
            found = largest if found is None else found
            if found is None or largest is None:
                return None
            found = found.detach().to(largest.device, largest.dtype, copy=True)
        return nn.Parameter(found, requires_grad=False) if isinstance(largest, nn.Parameter) else found


def mixed(place: Place, mean: Place | None, weights: Mapping[str, float]) -> Tensor | None:
    """Mix a parameter to base + Σ weight · (each − base), a buffer to the mean weighted by |weight|.

    A running variance includes the variance between the means. A counter is that of the largest weight. The base may be
    among the adapters, under the name ``BASE``.

    Args:
        place: in a module.
        mean: the place of the same module's running mean, if it has one.
        weights: by the adapters' names.

    Returns:
        None where one of the adapters, or the base, has nothing there, or a tensor of another shape.
    """
    base = place.of(BASE)
    tensors = [place.of(name) for name in weights]
    theirs = [t.to(base.device) for t in tensors if t is not None and base is not None]
    if base is None or len(theirs) < len(weights) or any(tensor.shape != base.shape for tensor in theirs):
        return None
    by_weight = torch.tensor(list(weights.values()), dtype=torch.float64, device=base.device)
    if place.is_parameter:
        wide = torch.promote_types(base.dtype, torch.float64)
        return base.to(wide) + _sum(by_weight, [t.to(wide) - base.to(wide) for t in theirs])
    leading, shares = theirs[int(by_weight.abs().argmax())], by_weight.abs() / by_weight.abs().sum()
    means = _tensors_in(mean, weights) if mean is not None and place.name == "running_var" else []
    middle = _sum(shares, means) if means else base  # once, not for each of them
    spread = [(mean - middle).square() for mean in means]
    same = all(torch.equal(t, leading) for t in theirs) and not any(each.any() for each in spread)
    if same or not base.is_floating_point():
        return leading
    return _sum(shares, [t.double() for t in theirs]) + (_sum(shares, spread) if spread else 0.0)


def _sum(weights: Tensor, tensors: list[Tensor]) -> Tensor:
    return torch.stack([weight * tensor for weight, tensor in zip(weights, tensors, strict=True)]).sum(0)


def _tensors_in(mean: Place, names: Collection[str]) -> list[Tensor]:
    """Return the adapters' running means, or an empty list if one has none."""
    means = [tensor.double() for name in names if (tensor := mean.of(name)) is not None]
    return means if len(means) == len(names) else []
