"""Ranks under a budget: the number of parameters that all factors may have, and how layers share it.

Ranks are assigned one at a time, each to the layer with the largest score / (rank + 1), so that ranks are proportional
to scores (the D'Hondt method of apportionment). Without scores all layers count equally.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from .._layer.adapted import CHILD
from .._plan import LayerPlan
from ..errors import TargetError
from .checks import check_model
from .observe import base_alone
from .state import check_plain, check_unmerged, check_whole, injections, ready_alone
from .targets import is_adaptable, is_packed, modules_of


def allotted(layers: Sequence[LayerPlan], numbers: int, importance: Mapping[str, float] | None) -> dict[str, int]:
    """Return each layer's rank by name, 0 for layers that get none; together they use at most ``numbers`` parameters.

    Args:
        layers: those that are adapted, each with the largest rank that it may have.
        numbers: of parameters that all factors, and DoRA's magnitudes, may have together.
        importance: a score for each layer by its name; None for equal ones.

    Raises:
        TargetError: a layer has no score, or one below 0; or no layer can have rank 1.
    """
    scores = _scores(layers, importance)
    ranks = [0] * len(layers)
    waiting = [(-score, index) for index, score in enumerate(scores)]  # of two with the same score, the earlier layer
    heapq.heapify(waiting)
    left = numbers
    while waiting:
        _, index = heapq.heappop(waiting)
        layer, rank = layers[index], ranks[index]
        cost = layer.parameters_at(rank + 1) - layer.parameters_at(rank)
        if rank < layer.rank and cost <= left:  # otherwise drop it for good: what is left only shrinks
            ranks[index], left = rank + 1, left - cost
            heapq.heappush(waiting, (-scores[index] / (rank + 2), index))
    if layers and not any(ranks):
        least = min(layer.parameters_at(1) for layer in layers)
        raise TargetError(
            f"A budget of {numbers:,} parameters is less than rank 1 of any layer, which takes at least {least:,}; "
            "raise it. Nothing was changed."
        )
    return {layer.name: rank for layer, rank in zip(layers, ranks, strict=True)}


def _scores(layers: Sequence[LayerPlan], importance: Mapping[str, float] | None) -> list[float]:
    if importance is None:
        return [1.0] * len(layers)
    faults = [layer.name for layer in layers if layer.name not in importance]
    if faults:
        raise TargetError(f"importance has no score for {', '.join(faults)}. Nothing was changed.")
    scores = [importance[layer.name] for layer in layers]
    for layer, score in zip(layers, scores, strict=True):
        if not isinstance(score, Real) or not 0 <= score < math.inf:
            raise TargetError(f"importance of {layer.name} is {score!r}; it must be a number of at least 0.")
    return [float(score) for score in scores]


def sensitivity(model: nn.Module, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor]) -> dict[str, float]:
    """Measure how much the loss depends on each convolution and linear layer, for ``importance``.

    >>> scores = convlora.sensitivity(model, itertools.islice(loader, 4), lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    >>> convlora.inject(model, budget="1%", importance=scores)

    The mean over a layer's weight of |w · ∂loss/∂w|, the gradient summed over the batches: how far the loss would move,
    to first order, were the weight taken away (AdaLoRA, Zhang et al. 2023, arXiv:2303.10512; GoRA, He et al. 2025,
    arXiv:2502.12171, gives out ranks by it before training).

    The base runs alone, in eval mode, and the model is as it was afterwards; no ``.grad`` is touched. The gradient
    comes through the head: train a new one first (a probe) where the scores are to be about the task.

    Args:
        model: a plain or an injected model.
        batches: a few; whatever ``loss`` takes.
        loss: ``(model, batch) -> scalar``.

    Returns:
        A score of at least 0 by layer name; of a weight that is computed (weight_norm), that of its largest parameter.

    Raises:
        TargetError: no batch, no layer, or what ``loss`` returns is no scalar that depends on the weights.
    """
    check_model(model)
    root = _root(model)
    totals: dict[str, Tensor] = {}
    with base_alone(root), torch.inference_mode(False), torch.enable_grad():
        kernels = {n.name: kernel for n in modules_of(root) if (kernel := _kernel(n.module)) is not None}
        if not kernels:
            raise TargetError(f"{type(model).__name__} has no convolution and no linear layer.")
        with _alone_requiring_grad(kernels.values(), root):
            for batch in batches:
                value = loss(model, batch)
                if not isinstance(value, Tensor) or value.ndim or not value.requires_grad:
                    raise TargetError("loss must return a scalar tensor that depends on the weights.")
                grads = torch.autograd.grad(value, list(kernels.values()), allow_unused=True)
                for (name, kernel), grad in zip(kernels.items(), grads, strict=True):
                    totals[name] = totals.get(name, torch.zeros_like(kernel)) + (0 if grad is None else grad.detach())
    if not totals:
        raise TargetError("batches holds no batch (an iterator that was used up already?).")
    return {name: float((kernels[name].detach() * total).abs().double().mean()) for name, total in totals.items()}


@contextmanager
def _alone_requiring_grad(wanted: Iterable[nn.Parameter], root: nn.Module) -> Iterator[None]:
    flags = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for parameter in wanted:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _root(model: nn.Module) -> nn.Module:
    if not list(injections(model)):
        check_plain(model)
        check_whole(model)
        return model
    return ready_alone(model, check_unmerged)[0]


def _kernel(layer: nn.Module) -> nn.Parameter | None:
    """Return the weight, or the largest of the parameters that it is computed from."""
    if not is_adaptable(layer) or is_packed(layer):
        return None
    weight = layer._parameters.get("weight")
    own = [p for name, p in layer.named_parameters() if p.is_floating_point() and not name.startswith(f"{CHILD}.")]
    kernel = weight if weight is not None else max(own, key=torch.numel, default=None)
    return kernel if kernel is not None and kernel.is_floating_point() else None
