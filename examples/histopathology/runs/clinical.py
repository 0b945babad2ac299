"""The numbers of a pathology paper: areas under curves, an operating point, calibration, each with its 95 % interval.

- **AUROC**, **AUPRC** (average precision), and the **sensitivity at a fixed specificity**: the highest that any
  threshold reaches on the same patches.
- **F1, sensitivity and specificity at one threshold**, which is chosen on validation by the highest Youden's index,
  sensitivity + specificity - 1 (Youden, 1950).
- **Temperature**: the number T that gives validation's lowest cross-entropy when logits are divided by it (Guo et al.,
  ICML 2017). It does not change the order of logits, and so no area; the calibration error is given before and after.

Intervals are from a percentile bootstrap. Patches of one patient resemble each other, so patients are resampled with
all their patches if the data name them, else slides, else single patches, whose interval is too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

SPECIFICITY = 0.95
RESAMPLES = 1000
_FEWEST = 0.5
"""The least share of resamples with both labels for which an interval is given."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval. The value is None if labels are of one kind; the ends if there is one unit."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.value is None:
            return "one label only"
        return f"{self.value:.3f}" + ("" if self.low is None else f" [{self.low:.3f}, {self.high:.3f}]")


@dataclass(frozen=True)
class OperatingPoint:
    """The threshold, as a logit, and the temperature that were chosen on validation.

    Both are None if validation lacks one of the labels.
    """

    threshold: float | None
    temperature: float | None


NAMES = ("auroc", "auprc", "sensitivity_at", "f1", "sensitivity", "specificity")


def estimates(
    logits: Tensor, labels: Tensor, threshold: float | None = None, units: Tensor | None = None, seed: int = 0
) -> dict[str, Estimate]:
    """Compute each of `NAMES` with its interval.

    Args:
        logits: ``(N,)``.
        labels: ``(N,)`` of 0 and 1.
        threshold: the logit from which a patch is called positive; without it the last three numbers have no value.
        units: ``(N,)``, numbers of patients or slides, whose patches are resampled together; None resamples patches.
        seed: seed of the resamples.
    """
    ranked = _Ranked(logits, labels, threshold)
    whole = ranked.measure(np.ones(len(labels)))
    drawn = _resampled(ranked, units, seed)
    return {name: _estimate(whole[i], drawn[:, i]) for i, name in enumerate(NAMES)}


def operating_point(logits: Tensor, labels: Tensor) -> OperatingPoint:
    """Choose the threshold and the temperature from validation's logits and labels ``(N,)``."""
    if int(labels.sum()) in (0, len(labels)):
        return OperatingPoint(None, None)
    return OperatingPoint(youden_threshold(logits, labels), temperature(logits, labels))


def youden_threshold(logits: Tensor, labels: Tensor) -> float:
    """The threshold, as a logit, with the highest sensitivity + specificity.

    It lies midway between two patches' logits; of equally good thresholds it is the highest.
    """
    ranked = _Ranked(logits, labels, None)
    true, false = ranked.curve(np.ones(len(labels)))
    best = int((true / true[-1] - false / false[-1]).argmax())
    scores = ranked.scores[ranked.ends[1:]]
    if best == 0:
        return float(scores[0] + 1)
    return float((scores[best - 1] + (scores[best] if best < len(scores) else scores[best - 1] - 1)) / 2)


def temperature(logits: Tensor, labels: Tensor) -> float:
    """The T in [0.01, 100] with the lowest cross-entropy of ``logits / T``."""
    own, target = logits.double(), labels.double()

    def loss(logarithm: float) -> float:
        return float(binary_cross_entropy_with_logits(own / math.exp(logarithm), target))

    limit = math.log(100)
    return math.exp(float(minimize_scalar(loss, bounds=(-limit, limit), method="bounded").x))


def numbered(names: Sequence[str]) -> Tensor:
    """Number the names ``(N,)``; equal names get equal numbers."""
    known: Mapping[str, int] = {name: number for number, name in enumerate(sorted(set(names)))}
    return torch.tensor([known[name] for name in names])


class _Ranked:
    """Patches sorted by falling logit once, so that each resample takes one pass without sorting."""

    def __init__(self, logits: Tensor, labels: Tensor, threshold: float | None) -> None:
        scores = logits.double().numpy()
        self.order = np.argsort(-scores, kind="stable")
        self.scores: Array = scores[self.order]
        self.positive: Array = labels.double().numpy()[self.order]
        # equal logits are one step of the curve
        changes = np.flatnonzero(np.diff(self.scores)) if len(scores) else np.empty(0, int)
        self.ends = np.concatenate([[-1], changes, [len(scores) - 1]]).astype(int)
        self.called = None if threshold is None else int((self.scores >= threshold).sum())

    def curve(self, weights: Array) -> tuple[Array, Array]:
        """True and false positives by falling threshold, from none to all; weights are in the order of the logits."""
        own = weights * self.positive
        true, false = (np.concatenate([[0.0], each.cumsum()]) for each in (own, weights - own))
        return true[self.ends + 1], false[self.ends + 1]

    def measure(self, weights: Array) -> Array:
        """The values of `NAMES`; NaN for a number without a value."""
        true, false = self.curve(weights)
        positives, negatives = true[-1], false[-1]
        found = np.full(len(NAMES), np.nan)
        if positives == 0 or negatives == 0:
            return found
        sensitivity, wrong = true / positives, false / negatives
        found[0] = np.trapezoid(sensitivity, wrong)
        called = true[1:] + false[1:]
        precision = np.divide(true[1:], called, out=np.zeros_like(called), where=called > 0)
        found[1] = (np.diff(sensitivity) * precision).sum()
        # weights are counts of patches: rounding of their sum must not lose one
        found[2] = sensitivity[wrong <= 1 - SPECIFICITY + 1e-12].max()
        if self.called is not None:
            hits = float((weights * self.positive)[: self.called].sum())
            alarms = float(weights[: self.called].sum()) - hits
            found[3:] = 2 * hits / (hits + alarms + positives), hits / positives, 1 - alarms / negatives
        return found


def _resampled(ranked: _Ranked, units: Tensor | None, seed: int) -> Array:
    """Values of all resamples, ``(RESAMPLES, len(NAMES))``; units are drawn with replacement, whole."""
    size = len(ranked.order)
    own = np.arange(size) if units is None else np.unique(units.numpy(), return_inverse=True)[1]
    own = own[ranked.order]
    count = int(own.max()) + 1
    if count < 2:
        return np.full((1, len(NAMES)), np.nan)
    rng = np.random.default_rng(seed)
    draws = (np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(RESAMPLES))
    return np.stack([ranked.measure(drawn[own].astype(np.float64)) for drawn in draws])


def _estimate(value: float, drawn: Array) -> Estimate:
    if math.isnan(value):
        return Estimate(None)
    known = drawn[~np.isnan(drawn)]
    if len(known) < _FEWEST * RESAMPLES:
        return Estimate(float(value))
    low, high = np.quantile(known, (0.025, 0.975))
    return Estimate(float(value), float(low), float(high))
