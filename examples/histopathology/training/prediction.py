"""From a trained model to the logits that a method predicts by: views, statistics, threshold."""

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
    """Logits and labels ``(N,)``; above 0 means label 1.

    Args:
        how: the method's way.
        model: with its adapter; not changed.
        loader: of so many views of each patch, see `transforms.EvalTransform`.
        job: whose processes share the patches.

    Raises:
        ExampleError: AdaBN of a network without batch norms, or of one image at a time.
    """
    if how.adabn:
        model = adapted_to(loader(1), model)
    (logits,), labels = predict_together([model], loader(how.views), job)
    if how.views > 1:
        logits = ensembled(logits)
    return (balanced(logits) if how.balanced else logits), labels


def ensembled(logits: Tensor) -> Tensor:
    """The logit of the mean probability: ``(views, N)`` to ``(N,)``."""
    logits = logits.double()
    positive = torch.logsumexp(nn.functional.logsigmoid(logits), 0)
    negative = torch.logsumexp(nn.functional.logsigmoid(-logits), 0)
    return (positive - negative).float()


def balanced(logits: Tensor) -> Tensor:
    """Shifted so that exactly half of them lie above 0, rounded down: ``(N,)`` to the same, in the same order.

    Which of equal logits are among that half is drawn, always the same for so many patches: by the order of the file a
    network that says one thing of all would be right wherever the file is sorted by label.
    """
    drawn = torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))
    order = drawn[logits[drawn].argsort(descending=True, stable=True)]
    half = len(order) // 2
    if not half:
        return torch.zeros_like(logits)
    positive = torch.zeros(len(logits), dtype=torch.bool)
    positive[order[:half]] = True
    shifted = logits - logits[order[half - 1 : half + 1]].mean()
    # equal ones, and neighbours whose middle is rounded onto one of them, lie at 0
    return torch.where(positive, shifted.clamp(min=torch.finfo(logits.dtype).tiny), shifted.clamp(max=0))


def plain_copy(model: nn.Module) -> nn.Module:
    """The model merged and without its adapter."""
    return convlora.remove(convlora.merge(copy.deepcopy(model)))


def adapted_to(loader: Loader, model: nn.Module) -> nn.Module:
    """A plain copy whose batch norms have the statistics of these images; labels are not looked at.

    Li, Wang, Shi, Liu, Hou. Revisiting batch normalization for practical domain adaptation, 2016 (arXiv 1603.04779).
    """
    plain = plain_copy(model)
    norms = tracked_norms(plain)
    plain.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
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


ALONE = "adabn: statistics are of images together; give two or more, and --batch-size 2 or more."


def tracked_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms whose statistics AdaBN computes anew.

    Raises:
        ExampleError: there is none.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        raise ExampleError(f"adabn: {type(model).__name__} has no batch norm; leave adabn out for this backbone.")
    return norms
