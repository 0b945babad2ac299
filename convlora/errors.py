"""The errors that convlora raises. Each is a :class:`ValueError` and names the layer, the value and the remedy."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence


class ConvLoraError(ValueError):
    """The base class of all errors of convlora."""


class TargetError(ConvLoraError):
    """A pattern, rank or other argument does not fit the model. Nothing was changed."""


class UnsupportedLayerError(ConvLoraError):
    """A layer or a wrapper cannot carry an adapter. Nothing was changed."""


class StateError(ConvLoraError):
    """The call does not fit the state of the model: injected or not, merged or not. Nothing was changed."""


class CheckpointError(ConvLoraError):
    """An adapter's file is missing, damaged, or made for another base model. Nothing was changed."""


def listing(title: str, faults: Iterable[str], remedy: str) -> str:
    """Return an error's text for several faults: the title, the first faults, each on a line, and the remedy."""
    return "\n".join([title, *few([f"  {fault}" for fault in dict.fromkeys(faults)]), remedy])


def warn(text: str) -> None:
    """Warn with the file and line of the code that called convlora."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "convlora":
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


def few(parts: Sequence[str], rest: str = "  and {} more", shown: int = 8) -> list[str]:
    """The first parts of a list that may be long, and a last part that says how many more there are."""
    more = len(parts) - shown
    return [*parts[:shown], rest.format(more)] if more > 0 else list(parts)
