"""One layer's change as another library's file holds it, the same change as convlora holds it, and peft's methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .._layer.change import Option
from .._layer.functional import scaling_of
from .._model.options import check_alpha
from .._plan import LayerPlan, Plan
from ..errors import TargetError


class LayerTensors(dict[str, Tensor]):
    """A layer's tensors in a file, by the part of the key that follows the layer's name."""

    def __missing__(self, name: str) -> Tensor:
        raise TargetError(f"{name} is missing")

    def size(self, name: str, dimension: int) -> int:
        """Return one dimension of a tensor's shape; 0 if the tensor has no such dimension."""
        shape = self[name].shape
        return shape[dimension] if dimension < len(shape) else 0


@dataclass(frozen=True)
class Stored:
    """One layer's change as a file holds it.

    Attributes:
        parts: the layer's tensors in the file.
        shape: the shape of the layer's weight.
        layer: the model's layer.
        alpha, rank: from the file or the configuration; None and 0 if neither states them.
        fields: peft's configuration.
        name: the layer's name.
    """

    parts: LayerTensors
    shape: tuple[int, ...]
    layer: nn.Module
    alpha: float | None = None
    rank: int = 0
    fields: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""

    def scaling(self, rank: int) -> float:
        """Return alpha / rank, or alpha / √rank with rsLoRA; without an alpha, 1 or √rank."""
        alpha = max(rank, 1) if self.alpha is None else self.alpha
        check_alpha(alpha, "alpha")
        return scaling_of(alpha, max(rank, 1), bool(self.fields.get("use_rslora")))


@dataclass(frozen=True)
class Taken:
    """One layer's change as convlora holds it.

    Attributes:
        tensors: by the names of :meth:`convlora.Change.stored_shapes` for the method, rank and options.
        magnitudes: DoRA's magnitudes.
        bias: computes the adapter's bias from the base's.
    """

    method: str
    rank: int
    scaling: float
    tensors: Mapping[str, Tensor]
    options: Mapping[str, Option] = field(default_factory=dict)
    magnitudes: Tensor | None = None
    bias: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class PeftMethod:
    """One of peft's adapter types.

    Attributes:
        methods: convlora's methods that a file of this type can hold.
        tensors: the parts of a tensor's key that follow the layer's name.
        read: converts a layer's tensors; raises TargetError if convlora does not compute that change.
        differs: returns why peft would predict something else for a layer; empty if it would not.
        fields: returns the configuration's fields for a plan.
        fault: returns why peft would build a planned layer differently from these fields; empty if it would not.
        known: the configuration's fields that are read.
        beside: further fields, which change no prediction.
        alpha, dropout: the names of the fields for alpha and dropout; empty if there is none.
        needs_rank: whether some layers' ranks are only in the configuration.
    """

    methods: tuple[str, ...]
    tensors: tuple[str, ...]
    read: Callable[[Stored], Taken]
    differs: Callable[[nn.Module], str]
    fields: Callable[[Plan], dict[str, Any]]
    fault: Callable[[LayerPlan, nn.Module, Mapping[str, Any]], str]
    known: tuple[str, ...]
    beside: tuple[str, ...] = ()
    alpha: str = ""
    dropout: str = ""
    needs_rank: bool = False

    def split(self, key: str) -> tuple[str, str]:
        """Return the layer's name and the rest of a tensor's key; two empty texts for other keys."""
        part = next((part for part in self.tensors if key.endswith(f".{part}")), "")
        return (key.removesuffix(f".{part}"), part) if part else ("", "")
