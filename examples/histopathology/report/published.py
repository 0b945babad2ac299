"""A table of the numbers of `clinical` for each method, split and centre."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.rows import NO_CENTRE
from ..runs.clinical import NAMES, RESAMPLES, SPECIFICITY, Estimate, OperatingPoint, estimates
from ..runs.scores import ece, reliability

HEADER = (
    "method",
    "split",
    "centre",
    "drawn",
    "AUROC",
    "AUPRC",
    f"sens. at {SPECIFICITY:.0%} spec.",
    "F1",
    "sensitivity",
    "specificity",
    "T",
    "ECE",
)
UNITS = {"patient": "patients", "slide": "slides", "patch": "patches"}


@dataclass(frozen=True)
class Published:
    """One method on one split or centre; the intervals are from resamples of ``units`` units of the kind ``unit``."""

    method: str
    split: str
    centre: str
    patches: int
    unit: str
    units: int
    estimates: Mapping[str, Estimate]
    threshold: float | None
    temperature: float | None
    ece: float
    calibrated_ece: float | None

    def row(self) -> list[str]:
        """Cells under `HEADER`."""
        drawn = f"{self.units:,} {self.unit if self.units == 1 else UNITS[self.unit]}"
        found = [str(self.estimates[name]) for name in NAMES]
        if self.threshold is None:
            found[3:] = ["no threshold"] * 3
        t = "none" if self.temperature is None else f"{self.temperature:.2f}"
        calibrated = "" if self.calibrated_ece is None else f" → {self.calibrated_ece:.3f}"
        return [self.method, self.split, self.centre, drawn, *found, t, f"{self.ece:.3f}{calibrated}"]


def publish(
    method: str,
    split: str,
    logits: Tensor,
    labels: Tensor,
    centres: Tensor,
    units: Tensor | None,
    unit: str,
    point: OperatingPoint,
) -> list[Published]:
    """The numbers of a split and, if it has several centres, of each; all but the names and ``point`` are ``(N,)``."""
    parts = {"all": torch.ones(len(logits), dtype=torch.bool)}
    found = sorted(set(centres.tolist()))
    if len(found) > 1:
        parts |= {"none named" if each == NO_CENTRE else str(each): centres == each for each in found}
    return [
        _part(method, split, name, logits[own], labels[own], None if units is None else units[own], unit, point)
        for name, own in parts.items()
    ]


def _part(
    method: str,
    split: str,
    centre: str,
    logits: Tensor,
    labels: Tensor,
    units: Tensor | None,
    unit: str,
    point: OperatingPoint,
) -> Published:
    t = point.temperature
    return Published(
        method,
        split,
        centre,
        len(logits),
        unit,
        len(logits) if units is None else len(set(units.tolist())),
        estimates(logits, labels, point.threshold, units),
        point.threshold,
        t,
        ece(reliability(logits, labels)),
        None if t is None else ece(reliability(logits / t, labels)),
    )


def published_notes(rows: Sequence[Published]) -> list[str]:
    """Notes on how the table was computed, a sentence each."""
    units = sorted({UNITS[each.unit] for each in rows})
    drawn = (
        "Single patches were resampled, since the data name no slide and no patient: where patches resemble each "
        "other, as those of one slide do, the intervals are too narrow."
        if "patches" in units
        else f"Whole {' or '.join(units)} were resampled, with all of their patches."
    )
    return [
        f"In brackets the 95 % intervals of a percentile bootstrap of {RESAMPLES:,} resamples, of each method's seed "
        "with the lowest validation loss. They say nothing about other seeds.",
        drawn,
        f"Sensitivity at {SPECIFICITY:.0%} specificity: the highest that any threshold reaches on the same patches. "
        "F1, sensitivity and specificity: at the threshold of the highest sensitivity + specificity on validation; "
        "those of validation are therefore optimistic.",
        "T: the temperature that calibrates on validation; ECE: the calibration error before and after the logits are "
        "divided by it.",
    ]
