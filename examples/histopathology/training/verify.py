"""Two checks after each training: the saved adapter equals the trained model, and merging keeps its predictions.

A reloaded adapter that lacks a BatchNorm statistic or a head still predicts something; only a comparison with the model
in memory shows the fault.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import convlora

from .loading import Loader
from .processes import Job
from .recipe import predict_together


@dataclass(frozen=True)
class Proofs:
    """The results of the checks; differences are the largest of any test patch, in logits."""

    patches: int
    reload_bit_equal: bool
    reload_difference: float
    merge_same_labels: bool
    merge_difference: float

    @property
    def held(self) -> bool:
        """Whether the reloaded adapter gave the same bits and the merged model the same labels."""
        return self.reload_bit_equal and self.merge_same_labels

    def __str__(self) -> str:
        reload = "bit-equal" if self.reload_bit_equal else f"NOT EQUAL, off by {self.reload_difference:.2g}"
        labels = "the same labels" if self.merge_same_labels else "OTHER LABELS"
        return (
            f"reloaded on a fresh base: {reload} logits on {self.patches} test patches; "
            f"merged: {labels}, largest logit difference {self.merge_difference:.1g}"
        )


def prove(trained: nn.Module, reloaded: nn.Module, loader: Loader, job: Job) -> tuple[Tensor, Proofs]:
    """Test logits ``(N,)`` of the reloaded model, and the checks; the patches are read once.

    Args:
        trained: the best model in memory.
        reloaded: a fresh base with the saved adapter; not changed.
        loader: the test patches.
        job: the job, whose processes share the patches.
    """
    merged = convlora.merge(copy.deepcopy(reloaded))
    (in_memory, logits, of_merged), _ = predict_together([trained, reloaded, merged], loader, job)
    proofs = Proofs(
        patches=len(logits),
        reload_bit_equal=torch.equal(in_memory, logits),
        reload_difference=_largest_difference(in_memory, logits),
        merge_same_labels=torch.equal(logits > 0, of_merged > 0),
        merge_difference=_largest_difference(logits, of_merged),
    )
    return logits, proofs


def _largest_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
