"""The outcome of a row of results, in a word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .checks import MERGE_TOLERANCE

WRONG = 1e-3
"""The error above which a merge is called wrong; between the tolerance and this it is inexact."""
FAILURES = {
    "inject": "inject fails",
    "forward": "forward fails",
    "identity": "identity off",
    "gradient": "no gradient",
    "merge": "merge refused",
    "unmerge": "unmerge fails",
    "reload": "reload wrong",
    "copy": "copy wrong",
    "remove": "remove not exact",
}
"""The steps in the order in which failures count, and the names of the failures."""


@dataclass(frozen=True)
class Outcome:
    """The first failure of a library on a network; ``strict`` and ``works`` are two criteria of passing.

    Attributes:
        label: "passes", or the failure.
        reason: the failure's error message, or its size.
        strict: whether every step passes, with merges within 1e-5 and unmerging bit for bit.
        works: whether every step passes, with merges within 1e-3 and unmerging up to rounding.
    """

    label: str
    reason: str
    strict: bool
    works: bool


def outcome(steps: dict[str, dict[str, Any]]) -> Outcome:
    """The outcome of one library's steps."""
    failed = [name for name in FAILURES if name in steps and not steps[name]["ok"]]
    serious = [name for name in failed if not _is_rounding(name, steps[name]["value"])]
    if not failed:
        return Outcome("passes", "", True, True)
    first = (serious or failed)[0]
    value = steps[first]["value"]
    size = f" ({value:.1e})" if value is not None else ""
    return Outcome(_label(first, value), steps[first]["reason"] + size, False, not serious)


def _is_rounding(step: str, value: float | None) -> bool:
    limits = {"merge": WRONG, "unmerge": MERGE_TOLERANCE}
    return step in limits and value is not None and value <= limits[step]


def _label(step: str, value: float | None) -> str:
    if step == "merge" and value is not None:
        return "merge silently wrong" if value > WRONG else "merge inexact"
    if step == "unmerge" and value is not None:
        return "unmerge not exact"
    return FAILURES[step]


def merge_error(steps: dict[str, dict[str, Any]]) -> float | None:
    """The merge error of the whole network's output; None if the merge was not reached."""
    value: float | None = steps.get("merge", {}).get("value")
    return value


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    if "error" in row:
        return f"ERROR {row['error']}"
    if row["kind"] == "plan":
        return "; ".join(row["problems"][:2]) or "planned"
    found = {name: outcome(row[name]) for name in ("convlora", "peft", "peft_plain") if name in row}
    return ", ".join(f"{name} {o.label}{f': {o.reason[:80]}' if o.reason else ''}" for name, o in found.items())
