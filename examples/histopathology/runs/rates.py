"""The learning rates of a sweep."""

import math
from collections.abc import Collection

from ..errors import ExampleError

FURTHER = 2
"""The most rates that a sweep tries beyond its ends."""


def beyond(tried: Collection[float], best: float) -> float | None:
    """The next rate beyond the end at which the best one lies, by the same factor; None if the best lies inside."""
    rates = sorted(tried)
    if len(rates) < 2 or rates[0] < best < rates[-1]:
        return None
    neighbour = rates[1] if best == rates[0] else rates[-2]
    return float(f"{best * best / neighbour:.12g}")  # 12 digits remove rounding: 0.009 from 0.003 and 0.001


def parse_rates(text: str) -> list[float]:
    """Parse comma-separated learning rates.

    Raises:
        ExampleError: a rate that is not a number above 0, or is given twice.
    """
    try:
        rates = [float(word) for word in text.split(",")]
    except ValueError:
        rates = []
    if not rates or len(set(rates)) < len(rates) or not all(lr > 0 and math.isfinite(lr) for lr in rates):
        raise ExampleError(f"--lrs {text}: give different positive numbers, such as 1e-4,3e-4,1e-3.")
    return rates
