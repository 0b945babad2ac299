"""The errors that convlora raises. Each is a :class:`ValueError` and names the layer, the value and the remedy."""

from __future__ import annotations

from collections.abc import Sequence


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


def few(parts: Sequence[str], rest: str = "  and {} more", shown: int = 8) -> list[str]:
    """The first parts of a list that may be long, and a last part that says how many more there are."""
    more = len(parts) - shown
    return [*parts[:shown], rest.format(more)] if more > 0 else list(parts)
