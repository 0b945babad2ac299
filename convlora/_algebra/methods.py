"""Each layer's change out of several adapters': their sum, the nearest of a lower rank, TIES, DARE."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from .._layer.lowrank import Spectrum
from .._methods.lora import LoRA
from .approximation import spectrum_of, spectrum_of_sum

Method = Literal["exact", "svd", "ties", "dare"]
WeightedLoRA = dict[str, tuple[LoRA, float]]
"""One layer's factors and their weight, by adapter."""
Combined = dict[str, tuple[Tensor, Tensor, float, float]]
"""Of each layer: lora_A, lora_B for a scaling of 1, what they lose, and ‖ΔW‖."""


def _terms(parts: WeightedLoRA) -> list[tuple[Tensor, Tensor, float]]:
    return [(*lora.factors(), share * lora.scaling) for lora, share in parts.values()]


def _own_rank(parts: WeightedLoRA) -> int:
    return max(len(lora.factors()[0]) for lora, _ in parts.values())


def _exact(every: Mapping[str, WeightedLoRA], rank: int | None, density: float, seed: int) -> Combined:
    found: Combined = {}
    for name, parts in every.items():
        terms = _terms(parts)
        rows, columns = terms[0][1].shape[0], terms[0][0][0].numel()
        if sum(len(A) for A, _, _ in terms) > min(rows, columns):  # more than any matrix of this shape has
            spectrum = spectrum_of_sum(name, terms)
            full = min(rows, columns)
            found[name] = (*spectrum.factors(full, 1.0), spectrum.lost(full), spectrum.size)
        else:
            A, B = torch.cat([A for A, _, _ in terms]), torch.cat([factor * B for _, B, factor in terms], dim=1)
            found[name] = (A, B, 0.0, spectrum_of_sum(name, [(A, B, 1.0)]).size)
    return found


def _svd(every: Mapping[str, WeightedLoRA], rank: int | None, density: float, seed: int) -> Combined:
    return {name: _nearest(spectrum_of_sum(name, _terms(parts)), parts, rank) for name, parts in every.items()}


def _nearest(spectrum: Spectrum, parts: WeightedLoRA, rank: int | None) -> tuple[Tensor, Tensor, float, float]:
    fitting = min(rank or _own_rank(parts), max(spectrum.room, 1))
    return (*spectrum.factors(fitting, 1.0), spectrum.lost(fitting), spectrum.size)


def _ties(every: Mapping[str, WeightedLoRA], rank: int | None, density: float, seed: int) -> Combined:
    """Trim, elect a sign, average those that agree. Trimmed over an adapter's layers together, as in the paper."""
    names = dict.fromkeys(name for parts in every.values() for name in parts)
    least = {name: _threshold([p[name][0] for p in every.values() if name in p], density) for name in names}

    def merged(parts: WeightedLoRA) -> Tensor:
        trimmed = []
        for name, (lora, share) in parts.items():
            delta = lora.delta_weight()
            trimmed.append(share * torch.where(delta.abs() >= least[name], delta, 0.0))
        stack = torch.stack(trimmed)
        agrees = stack.sign() == stack.sum(0).sign()
        agrees &= stack != 0
        return torch.where(agrees, stack, 0.0).sum(0) / agrees.sum(0).clamp(min=1)

    return {name: _nearest(spectrum_of(name, merged(parts)), parts, rank) for name, parts in every.items()}


def _threshold(loras: list[LoRA], density: float) -> Tensor:
    """The size of the smallest entry among the largest ``density`` of an adapter's change."""
    sizes = torch.cat([lora.delta_weight().abs().flatten() for lora in loras])
    kept = max(1, round(density * sizes.numel()))
    return sizes.kthvalue(sizes.numel() - kept + 1).values


def _dare(every: Mapping[str, WeightedLoRA], rank: int | None, density: float, seed: int) -> Combined:
    """Drop at random, scale up what is left: the expected change is the adapters' weighted sum."""
    generator = torch.Generator().manual_seed(seed)

    def thinned(parts: WeightedLoRA) -> Tensor:
        deltas = []
        for lora, share in parts.values():
            delta = lora.delta_weight()
            keep = torch.rand(delta.shape, generator=generator).to(delta.device) < density
            deltas.append(share / density * torch.where(keep, delta, 0.0))
        return torch.stack(deltas).sum(0)

    return {name: _nearest(spectrum_of(name, thinned(parts)), parts, rank) for name, parts in every.items()}


METHODS: dict[str, Callable[[Mapping[str, WeightedLoRA], int | None, float, int], Combined]] = {
    "exact": _exact,
    "svd": _svd,
    "ties": _ties,
    "dare": _dare,
}
DENSITIES = {"ties": 0.2, "dare": 0.5}
"""The share of entries that is kept where none is asked for."""
