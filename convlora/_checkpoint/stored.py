"""What another library's file has of a layer, what that is in convlora's words, and how peft has a method."""

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
    """A layer's tensors in a file, by what follows its name."""

    def __missing__(self, name: str) -> Tensor:
        raise TargetError(f"{name} is missing")

    def size(self, name: str, dimension: int) -> int:
        """That of one of them, 0 where it has no such dimension."""
        shape = self[name].shape
        return shape[dimension] if dimension < len(shape) else 0


@dataclass(frozen=True)
class Stored:
    """What a file has of one layer.

    Attributes:
        parts: its tensors.
        shape: of the weight that they change.
        layer: the layer of the model.
        alpha, rank: what file or configuration says; None and 0 where neither does.
        fields: peft's configuration.
        name: the layer's.
    """

    parts: LayerTensors
    shape: tuple[int, ...]
    layer: nn.Module
    alpha: float | None = None
    rank: int = 0
    fields: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""

    def scaling(self, rank: int) -> float:
        """alpha / rank, with rsLoRA alpha / √rank; 1 without an alpha."""
        alpha = max(rank, 1) if self.alpha is None else self.alpha
        check_alpha(alpha, "alpha")
        return scaling_of(alpha, max(rank, 1), bool(self.fields.get("use_rslora")))


@dataclass(frozen=True)
class Taken:
    """One layer's change in convlora's words.

    Attributes:
        tensors: by the names that :meth:`convlora.Change.stored_shapes` has for the method, rank and options.
        magnitudes: DoRA's.
        bias: makes the layer's own bias of the base's.
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
    """A method as peft has it.

    Attributes:
        methods: ours that a file of this type holds.
        tensors: what follows a layer's name in a file.
        read: what a layer's tensors say; raises TargetError where that is nothing that is computed here.
        differs: what of a layer makes peft predict another thing; empty where nothing does.
        fields: what its configuration says of a plan.
        fault: what of a planned layer peft would not build so from these fields; empty where it would.
        known: the configuration's fields that are read; ``beside`` those that predict nothing.
        alpha, dropout: which of the fields these are.
        needs_rank: whether the rank is nowhere but in the configuration, for some layers.
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
