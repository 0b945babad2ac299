"""What an injection would do, as data and as a table: the one object between "which" and "do".

``inject`` applies a plan, ``save_adapter`` writes it, ``load_adapter`` reads it back and applies it again, so that the
three cannot disagree. Making a plan changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ._layer.functional import factor_count, scaling_of
from ._layer.paths import Path

NormPolicy = Literal["freeze", "track"]
Init = Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva"]
NORM_POLICIES: tuple[NormPolicy, ...] = ("freeze", "track")
INITS: tuple[Init, ...] = ("kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva")
ANCHORED: tuple[Init, ...] = ("pissa", "olora")
"""Those that begin with factors whose product is not zero: it is kept, and taken away again."""


@dataclass(frozen=True)
class LayerPlan:
    """One layer: what it is and what it gets. ``rank`` 0 means that it is left alone, and ``note`` says why.

    ``weight_shape`` is ``(C_out, C_in / groups, kH, kW)`` or ``(out_features, in_features)``; ``geometry`` holds a
    convolution's stride, padding, dilation, groups and padding_mode. ``anchored``: the factors' first product is kept
    and taken away from the change. ``use_dora``: the weight's size per output channel is trained apart.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    rank: int
    alpha: float
    note: str = ""
    geometry: dict[str, Any] = field(default_factory=dict)
    anchored: bool = False
    use_dora: bool = False

    @property
    def base_parameters(self) -> int:
        """Numbers in the base's weight; 0 where it has none that could be adapted."""
        return math.prod(self.weight_shape) if self.weight_shape else 0

    @property
    def adapter_parameters(self) -> int:
        """Numbers that are trained: the two factors, and with DoRA the magnitudes."""
        return self.parameters_at(self.rank)

    def parameters_at(self, rank: int) -> int:
        """The same at another rank."""
        return factor_count(self.weight_shape, rank) + self.magnitudes if rank else 0

    @property
    def transposed_groups(self) -> int:
        """The groups of a transposed convolution; 0 for every other layer."""
        return int(self.geometry["groups"]) if self.geometry.get("transposed") else 0

    @property
    def magnitudes(self) -> int:
        """How many magnitudes DoRA has here: one for each output channel."""
        groups = self.transposed_groups
        channels = self.weight_shape[1] * groups if groups else self.weight_shape[0]
        return channels if self.use_dora else 0

    @property
    def stored_rank(self) -> int:
        """The rank of the change in a file: twice the factors' where they are anchored."""
        return self.rank * (2 if self.anchored else 1)


@dataclass(frozen=True)
class Part:
    """A module with parameters of its own that is neither a listed layer nor trained in full: it stays frozen."""

    name: str
    kind: str
    parameters: int
    """Numbers in its own parameters, those of its children not counted."""


@dataclass(frozen=True)
class Plan:
    """Everything that an injection does to a model; ``print(plan)`` shows it as a table.

    Attributes:
        adapter_name: the name under which the factors are kept.
        rank, alpha: as asked for; a layer's own are in ``layers``.
        layers: the layers that are adapted.
        skipped: those that are not, each with its reason in ``note``.
        modules_to_save: names of the modules trained in full, such as the head, and ``head_found_by`` how.
        norms: names of the norm layers that the policy ``norm`` concerns.
        path: which way the layers take in training.
        mask_activations: whether activations keep a mask, and max pooling the places of its maxima, in training.
        init: how the factors began.
        biases: names of modules, adapted or not, whose bias alone is trained and belongs to the adapter.
        others: all other modules with parameters, so that each parameter of the model is accounted for.
        base_parameters: of the whole base model; ``saved_parameters``: of ``modules_to_save`` and ``biases``.
        state: planned, injected or merged.
        trained_now: in a summary of the active adapter, the numbers that require a gradient now, whoever has frozen or
            unfrozen some since; else None.
    """

    model: str
    adapter_name: str
    rank: int
    alpha: float
    use_rslora: bool
    dropout: float
    norm: NormPolicy
    layers: tuple[LayerPlan, ...]
    skipped: tuple[LayerPlan, ...]
    modules_to_save: tuple[str, ...]
    head_found_by: str
    norms: tuple[str, ...]
    base_parameters: int
    saved_parameters: int
    others: tuple[Part, ...] = ()
    path: Path = "auto"
    mask_activations: bool = False
    init: Init = "kaiming"
    biases: tuple[str, ...] = ()
    state: str = "planned"
    trained_now: int | None = None

    @property
    def use_dora(self) -> bool:
        """Whether the layers' sizes per output channel are trained apart."""
        return any(layer.use_dora for layer in self.layers)

    @property
    def adapter_parameters(self) -> int:
        """Numbers in all factors, and magnitudes with DoRA."""
        return sum(layer.adapter_parameters for layer in self.layers)

    @property
    def trainable_parameters(self) -> int:
        """Numbers that training moves: the factors and the modules trained in full, or what requires a gradient now."""
        planned = self.adapter_parameters + self.saved_parameters
        return planned if self.trained_now is None else self.trained_now

    @property
    def trainable_share(self) -> float:
        """Trainable parameters as a share of all, the factors included; 0 to 1."""
        return self.trainable_parameters / max(self.base_parameters + self.adapter_parameters, 1)

    def scaling(self, layer: LayerPlan) -> float:
        """What multiplies B @ A in this layer."""
        return scaling_of(layer.alpha, layer.rank, self.use_rslora)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that :meth:`to_json` wrote; raises TypeError or KeyError where the data are another thing."""
        layers = {key: tuple(_layer_from_json(item) for item in data[key]) for key in ("layers", "skipped")}
        names = {key: tuple(data[key]) for key in ("modules_to_save", "norms")}
        names["biases"] = tuple(data.get("biases", ()))
        others = tuple(Part(**item) for item in data["others"])
        return cls(**{**data, **layers, **names, "others": others})

    def __str__(self) -> str:
        return "\n".join([self._title(), *self._table(), *self._footer()])

    def _title(self) -> str:
        kinds = [("rsLoRA", self.use_rslora), ("DoRA", self.use_dora), (self.init, self.init != "kaiming")]
        what = ", ".join([f"rank {self.rank}", f"alpha {self.alpha:g}", *(name for name, there in kinds if there)])
        return f"{self.model}: adapter {self.adapter_name!r}, {what} ({self.state})"

    def _table(self) -> list[str]:
        rows = [("layer", "kind", "weight", "rank", "base", "adapter", "")]
        for layer in (*self.layers, *self.skipped):
            shape = "×".join(map(str, layer.weight_shape))
            name, rank = layer.name or "(the model itself)", str(layer.rank or "-")
            counts = f"{layer.base_parameters:,}", f"{layer.adapter_parameters:,}"
            rows.append((name, layer.kind, shape, rank, *counts, layer.note))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        left = (True, True, True, False, False, False, True)
        return ["  ".join(_pad(*cell) for cell in zip(row, widths, left, strict=True)).rstrip() for row in rows]

    def _footer(self) -> list[str]:
        moves = "statistics move and belong to the adapter" if self.norm == "track" else "frozen in eval behaviour"
        saved = ", ".join(self.modules_to_save) or "none"
        return [
            f"adapted layers: {len(self.layers)}, left alone: {len(self.skipped)}",
            f"trained in full: {saved} ({self.head_found_by}), {self.saved_parameters:,} parameters",
            *([f"biases trained besides: of {len(self.biases)} modules"] if self.biases else []),
            f"norm layers with statistics: {len(self.norms)}, {moves}",
            f"frozen besides: {self._besides()}",
            f"trainable: {self.trainable_parameters:,} of {self.base_parameters + self.adapter_parameters:,} "
            f"parameters ({self.trainable_share:.2%}), {self.adapter_parameters:,} of them in factors",
        ]

    def _besides(self) -> str:
        kinds: dict[str, list[int]] = {}
        for part in self.others:
            kinds.setdefault(part.kind, []).append(part.parameters)
        return ", ".join(f"{len(sizes)} {kind} ({sum(sizes):,})" for kind, sizes in kinds.items()) or "nothing"


def _layer_from_json(item: Mapping[str, Any]) -> LayerPlan:
    return LayerPlan(**{**item, "weight_shape": tuple(item["weight_shape"])})


def _pad(text: str, width: int, left: bool) -> str:
    return text.ljust(width) if left else text.rjust(width)
