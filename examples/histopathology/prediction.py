"""From a trained model to the logits that a method predicts by: views, statistics, threshold."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import convlora

from .errors import ExampleError
from .loading import Loader
from .method import Predict
from .processes import Job
from .training import predict_together


def predict_by(how: Predict, model: nn.Module, loader: Callable[[int], Loader], job: Job) -> tuple[Tensor, Tensor]:
    """Logits and labels ``(N,)``; above 0 means label 1.

    Args:
        how: the method's way.
        model: with its adapter; not changed.
        loader: of so many views of each patch, see `transforms.EvalTransform`.
        job: whose processes share the patches.

    Raises:
        ExampleError: AdaBN of a network without batch norms.
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
    """Shifted so that half of them lie above 0: ``(N,)`` to the same."""
    order = logits.sort().values
    half = len(order) // 2
    return logits - (order[half - 1 : half + 1].mean() if half else order[0])


def adapted_to(loader: Loader, model: nn.Module) -> nn.Module:
    """A plain copy whose batch norms have the statistics of these images; labels are not looked at.

    Li, Wang, Shi, Liu, Hou. Revisiting batch normalization for practical domain adaptation, 2016 (arXiv 1603.04779).
    """
    plain = convlora.remove(convlora.merge(copy.deepcopy(model)))
    norms = [module for module in plain.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        raise ExampleError(f"adabn: {type(plain).__name__} has no batch norm; leave adabn out for this backbone.")
    plain.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
        norm.train()
    device = next(plain.parameters()).device
    with torch.inference_mode():
        for images, _, _ in loader.on(device):
            if len(images) > 1:
                plain(images)
    return plain.eval()
