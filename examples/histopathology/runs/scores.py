"""Scores of predicted probabilities from logits and labels: ROC, calibration, confusion.

For calibration, the probabilities of label 1 are put into 10 bins of equal width. The **expected calibration error** is

.. math:: ECE = Σ_b (n_b / N) · | mean probability of b − share of label 1 in b |

(bins as in Naeini et al., AAAI 2015, but over the probability of label 1 and not of the predicted class). The Brier
score is the mean squared difference of probability and label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 10


@dataclass(frozen=True)
class Bin:
    """A bin of patches by their probability; the two means are 0 if it is empty."""

    patches: int
    probability: float
    share: float


@dataclass(frozen=True)
class Confusion:
    """Counts of patches by label and prediction, of one centre or of all."""

    true_negative: int
    false_positive: int
    false_negative: int
    true_positive: int

    @property
    def patches(self) -> int:
        """The number of patches."""
        return self.true_negative + self.false_positive + self.false_negative + self.true_positive

    @property
    def accuracy(self) -> float:
        """The share of correct predictions."""
        return (self.true_negative + self.true_positive) / self.patches

    @property
    def sensitivity(self) -> float | None:
        """The share of label 1 that is predicted as 1; None without label 1."""
        return _share(self.true_positive, self.false_negative)

    @property
    def specificity(self) -> float | None:
        """The share of label 0 that is predicted as 0; None without label 0."""
        return _share(self.true_negative, self.false_positive)


def roc(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """False and true positive rates ``(K,)`` by falling threshold, from (0, 0) to (1, 1); equal logits are one step.

    Raises:
        ValueError: the labels are of one kind.
    """
    positives = int(labels.sum())
    if positives in (0, len(labels)):
        raise ValueError("a ROC curve needs both labels")
    order = logits.argsort(descending=True, stable=True)
    found, hits = logits[order], labels[order].double()
    ends = torch.cat([(found[1:] != found[:-1]).nonzero().flatten(), torch.tensor([len(found) - 1])])
    true, false = hits.cumsum(0)[ends], (1 - hits).cumsum(0)[ends]
    start = torch.zeros(1, dtype=torch.float64)
    return torch.cat([start, false / (len(labels) - positives)]), torch.cat([start, true / positives])


def auc(logits: Tensor, labels: Tensor) -> float | None:
    """The area under the ROC curve; None if the labels are of one kind."""
    if int(labels.sum()) in (0, len(labels)):
        return None
    false, true = roc(logits, labels)
    return float(torch.trapezoid(true, false))


def reliability(logits: Tensor, labels: Tensor, bins: int = BINS) -> list[Bin]:
    """The patches in bins of equal width by their probability of label 1; the last bin includes 1."""
    probability = logits.double().sigmoid()
    number = (probability * bins).long().clamp(max=bins - 1)
    chosen = [number == each for each in range(bins)]
    return [
        Bin(int(own.sum()), float(probability[own].mean()), float(labels[own].double().mean()))
        if own.any()
        else Bin(0, 0.0, 0.0)
        for own in chosen
    ]


def ece(bins: Sequence[Bin]) -> float:
    """The expected calibration error, in [0, 1]; 0 is perfect."""
    total = sum(each.patches for each in bins)
    return sum(each.patches * abs(each.probability - each.share) for each in bins) / total


def brier(logits: Tensor, labels: Tensor) -> float:
    """Mean squared difference of probability and label, in [0, 1]; 0 is perfect."""
    return float((logits.double().sigmoid() - labels.double()).square().mean())


def confusion(logits: Tensor, labels: Tensor) -> Confusion:
    """Confusion counts at logit > 0, the threshold of all predictions."""
    predicted, positive = logits > 0, labels.bool()
    return Confusion(
        int((~predicted & ~positive).sum()),
        int((predicted & ~positive).sum()),
        int((~predicted & positive).sum()),
        int((predicted & positive).sum()),
    )


def confusion_by_centre(logits: Tensor, labels: Tensor, centres: Tensor) -> dict[int, Confusion]:
    """The confusion counts of each centre."""
    found = sorted(set(centres.tolist()))
    return {each: confusion(logits[centres == each], labels[centres == each]) for each in found}


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each patch, ``(N,)``."""
    return torch.nn.functional.binary_cross_entropy_with_logits(logits.double(), labels.double(), reduction="none")


def _share(part: int, rest: int) -> float | None:
    return part / (part + rest) if part + rest else None
