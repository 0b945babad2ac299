"""The logits of a method's predictions: views, statistics, threshold."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import convlora

from ..errors import ExampleError
from ..methods.method import Predict
from .loading import Loader
from .processes import Job
from .recipe import predict_together


def predict_by(how: Predict, model: nn.Module, loader: Callable[[int], Loader], job: Job) -> tuple[Tensor, Tensor]:
    """Predict logits, and return them with the labels, both ``(N,)``; above 0 means label 1.

    Args:
        how: how the method predicts.
        model: the model with its adapter; not changed.
        loader: makes a loader with so many views of each patch, see `transforms.EvalTransform`.
        job: the job, whose processes share the patches.

    Raises:
        ExampleError: AdaBN for a network without batch norms, or for one image at a time.
    """
    if how.adabn:
        model = adapted_to(loader(1), model)
    (logits,), labels = predict_together([model], loader(how.views), job)
    if how.views > 1:
        logits = ensembled(logits)
    return (balanced(logits) if how.balanced else logits), labels


def ensembled(logits: Tensor) -> Tensor:
    """The logit of the mean probability over views: ``(views, N)`` to ``(N,)``."""
    logits = logits.double()
    positive = torch.logsumexp(nn.functional.logsigmoid(logits), 0)
    negative = torch.logsumexp(nn.functional.logsigmoid(-logits), 0)
    return (positive - negative).float()


def balanced(logits: Tensor) -> Tensor:
    """Shift the logits ``(N,)`` so that exactly half of them, rounded down, lie above 0; the order stays.

    Which of equal logits are in that half is drawn with a fixed seed. By their order in the file, a network that gives
    the same logit to all would be right on a file that is sorted by label.
    """
    drawn = torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))
    order = drawn[logits[drawn].argsort(descending=True, stable=True)]
    half = len(order) // 2
    if not half:
        return torch.zeros_like(logits)
    positive = torch.zeros(len(logits), dtype=torch.bool)
    positive[order[:half]] = True
    shifted = logits - logits[order[half - 1 : half + 1]].mean()
    # equal logits, and neighbours whose middle is rounded onto one of them, lie at 0
    return torch.where(positive, shifted.clamp(min=torch.finfo(logits.dtype).tiny), shifted.clamp(max=0))


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy of the model, merged and without its adapter."""
    return convlora.remove(convlora.merge(copy.deepcopy(model)))


def adapted_to(loader: Loader, model: nn.Module) -> nn.Module:
    """A plain copy whose batch norms have the statistics of these images; labels are not used.

    Li, Wang, Shi, Liu, Hou. Revisiting batch normalization for practical domain adaptation, 2016 (arXiv 1603.04779).
    """
    plain = plain_copy(model)
    norms = tracked_norms(plain)
    plain.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    device = next(plain.parameters()).device
    batches = 0
    with torch.inference_mode():
        for images, _, _ in loader.on(device):
            if len(images) > 1:
                plain(images)
                batches += 1
    if not batches:
        raise ExampleError(ALONE)
    return plain.eval()


ALONE = "adabn: statistics need several images; give two or more, and --batch-size 2 or more."


def tracked_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms whose statistics AdaBN replaces.

    Raises:
        ExampleError: the network has none.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        raise ExampleError(f"adabn: {type(model).__name__} has no batch norm; leave adabn out for this backbone.")
    return norms
