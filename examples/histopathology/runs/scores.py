"""How good predicted probabilities are: ROC, calibration, confusion; plain arithmetic on logits and labels.

Calibration: the probabilities of label 1 are put into 10 bins of equal width. The **expected calibration error** is

.. math:: ECE = Σ_b (n_b / N) · | mean probability of b − share of label 1 in b |

(binning: Naeini et al., AAAI 2015), here of the probability of label 1 and not of the predicted class. The Brier score
is the mean squared difference of probability and label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 10


@dataclass(frozen=True)
class Bin:
    """Some of the patches by their probability; the two means are 0 where there is none."""

    patches: int
    probability: float
    share: float


@dataclass(frozen=True)
class Confusion:
    """Patches by label and prediction, those of one centre or all."""

    true_negative: int
    false_positive: int
    false_negative: int
    true_positive: int

    @property
    def patches(self) -> int:
        """All of them."""
        return self.true_negative + self.false_positive + self.false_negative + self.true_positive

    @property
    def accuracy(self) -> float:
        """Share of right predictions."""
        return (self.true_negative + self.true_positive) / self.patches

    @property
    def sensitivity(self) -> float | None:
        """Share of label 1 that is found; None without any."""
        return _share(self.true_positive, self.false_negative)

    @property
    def specificity(self) -> float | None:
        """Share of label 0 that is left alone; None without any."""
        return _share(self.true_negative, self.false_positive)


def roc(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """False and true positive rates ``(K,)`` by falling threshold, from (0, 0) to (1, 1); equal logits are one step.

    Raises:
        ValueError: labels of one kind only.
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
    """Area under the ROC curve; None where there are labels of one kind only."""
    if int(labels.sum()) in (0, len(labels)):
        return None
    false, true = roc(logits, labels)
    return float(torch.trapezoid(true, false))


def reliability(logits: Tensor, labels: Tensor, bins: int = BINS) -> list[Bin]:
    """The patches by probability of label 1, in bins of equal width; the last one holds 1 itself."""
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
    """Predictions are by logit > 0, as everywhere."""
    predicted, positive = logits > 0, labels.bool()
    return Confusion(
        int((~predicted & ~positive).sum()),
        int((predicted & ~positive).sum()),
        int((~predicted & positive).sum()),
        int((predicted & positive).sum()),
    )


def confusion_by_centre(logits: Tensor, labels: Tensor, centres: Tensor) -> dict[int, Confusion]:
    """The same for each centre."""
    found = sorted(set(centres.tolist()))
    return {each: confusion(logits[centres == each], labels[centres == each]) for each in found}


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each patch, ``(N,)``: what it costs to have said this."""
    return torch.nn.functional.binary_cross_entropy_with_logits(logits.double(), labels.double(), reduction="none")


def _share(part: int, rest: int) -> float | None:
    return part / (part + rest) if part + rest else None
