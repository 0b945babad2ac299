"""The plan of an injection, as data and as a table.

``inject`` applies a plan, ``save_adapter`` writes it, ``load_adapter`` reads it back and applies it again, so that the
three cannot disagree. Making a plan changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any, Literal

from ._layer.change import Change, Option, Shapes
from ._layer.functional import scaling_of
from ._layer.masked import Masks
from ._layer.paths import TrainingPath
from ._methods.registry import METHODS

NormPolicy = Literal["freeze", "track"]
Init = Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva"]
NORM_POLICIES: tuple[NormPolicy, ...] = ("freeze", "track")
INITS: tuple[Init, ...] = ("kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva")


@dataclass(frozen=True)
class LayerPlan:
    """The plan of one layer. ``rank`` 0 means that the layer is skipped; ``note`` then gives the reason.

    ``weight_shape`` is ``(C_out, C_in / groups, kH, kW)`` or ``(out_features, in_features)``; ``geometry`` holds a
    convolution's stride, padding, dilation, groups and padding_mode. ``method`` and ``options`` name the change of the
    weight and ``scaling`` multiplies it; ``strength`` is the share of the finished change that is applied, 1 for all of
    it. A method without a rank has rank 1. ``use_dora``: the magnitude of each output channel's weight is trained
    separately.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    rank: int
    scaling: float
    note: str = ""
    geometry: dict[str, Any] = field(default_factory=dict)
    use_dora: bool = False
    method: str = "lora"
    options: dict[str, Option] = field(default_factory=dict)
    strength: float = 1.0

    @property
    def whole_scaling(self) -> float:
        """The scaling that gives the same change at strength 1; undefined with DoRA."""
        return self.scaling * self.strength

    @property
    def base_parameters(self) -> int:
        """The number of parameters of the base's weight; 0 for a layer without a weight that could be adapted."""
        return math.prod(self.weight_shape) if self.weight_shape else 0

    @property
    def adapter_parameters(self) -> int:
        """The number of trained parameters, DoRA's magnitudes included."""
        return self.parameters_at(self.rank)

    def parameters_at(self, rank: int) -> int:
        """Return the number of trained parameters at another rank."""
        rank = self.change.rank_at(self.weight_shape, rank, **self.options) if rank else 0
        shapes = self.change.shapes(self.weight_shape, rank, **self.asked).values() if rank else ()
        return sum(map(math.prod, shapes)) + (self.magnitudes if rank else 0)

    @property
    def change(self) -> type[Change]:
        """The class of the layer's method."""
        return METHODS[self.method]

    @property
    def channels(self) -> dict[str, Any]:
        """The layout of the channels in the weight: ``groups`` and ``transposed``."""
        return {"groups": self.geometry.get("groups", 1), "transposed": bool(self.geometry.get("transposed"))}

    @property
    def asked(self) -> dict[str, Any]:
        """The keyword arguments that the method's ``shapes`` gets besides the weight's shape and the rank."""
        return {**self.options, **(self.channels if self.change.by_channel else {})}

    @property
    def transposed_groups(self) -> int:
        """The groups of a transposed convolution; 0 for every other layer."""
        return int(self.geometry["groups"]) if self.geometry.get("transposed") else 0

    @property
    def magnitudes(self) -> int:
        """The number of DoRA's magnitudes: one per output channel, or 0 without DoRA."""
        groups = self.transposed_groups
        channels = self.weight_shape[1] * groups if groups else self.weight_shape[0]
        return channels if self.use_dora else 0

    @property
    def stored_shapes(self) -> Shapes:
        """The shapes of the layer's tensors in a file, by the end of their keys; magnitudes not included."""
        return self.change.stored_shapes(self.weight_shape, self.rank, **self.asked)


@dataclass(frozen=True)
class FrozenModule:
    """A module whose own parameters stay frozen: neither a listed layer nor trained in full."""

    name: str
    kind: str
    parameters: int
    """The number of its own parameters, without those of its children."""


@dataclass(frozen=True, repr=False)
class Plan:
    """Everything that an injection does to a model; ``print(plan)`` shows it as a table.

    Attributes:
        adapter_name: the name under which the factors are kept.
        rank, alpha, method: as asked for; a layer's own are in ``layers``.
        layers: the layers that are adapted.
        skipped: the layers that are not, each with the reason in ``note``.
        modules_to_save: names of the modules trained in full, such as the head, and ``head_found_by`` how.
        norms: names of the norm layers that the policy ``norm`` concerns.
        training_path: how the convolutions compute in training.
        mask_activations: whether activations keep a mask, and pooling no input, in training.
        init: how the factors were initialised.
        freeze_A: whether every lora_A keeps its initial values, and lora_B alone is trained.
        biases: names of modules, adapted or not, whose bias alone is trained and belongs to the adapter.
        written: names of parameters that the model's forwards write to by themselves, found at the first ones: each
            adapter has its own.
        others: all other modules with parameters, so that each parameter of the model is accounted for.
        base_parameters: of the whole base model; ``saved_parameters``: of ``modules_to_save`` and ``biases``.
        notes: what of the arguments may be meant otherwise.
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
    others: tuple[FrozenModule, ...] = ()
    training_path: TrainingPath = "auto"
    mask_activations: Masks = False
    init: Init = "kaiming"
    freeze_A: bool = False
    biases: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    method: str = "lora"
    notes: tuple[str, ...] = ()
    state: str = "planned"
    trained_now: int | None = None

    @property
    def use_dora(self) -> bool:
        """Whether the magnitudes of any layer's output channels are trained separately."""
        return any(layer.use_dora for layer in self.layers)

    @property
    def adapter_parameters(self) -> int:
        """The number of parameters of all layers' changes, DoRA's magnitudes included."""
        return sum(layer.adapter_parameters for layer in self.layers)

    @property
    def constant_parameters(self) -> int:
        """The number of these that are not trained: with ``freeze_A``, the elements of every lora_A."""
        layers = self.layers if self.freeze_A else ()
        shapes = (layer.change.shapes(layer.weight_shape, layer.rank, **layer.asked) for layer in layers)
        return sum(math.prod(each["lora_A"]) for each in shapes if "lora_A" in each)

    @property
    def trainable_parameters(self) -> int:
        """The number of trained parameters: factors and modules trained in full, or what requires a gradient now."""
        planned = self.adapter_parameters - self.constant_parameters + self.saved_parameters
        return planned if self.trained_now is None else self.trained_now

    @property
    def trainable_share(self) -> float:
        """The share of trainable parameters in all parameters, factors included; 0 to 1."""
        return self.trainable_parameters / max(self.base_parameters + self.adapter_parameters, 1)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Read what :meth:`to_json` wrote; raise TypeError or KeyError for any other data."""
        use_rslora = data["use_rslora"]
        layers = {key: tuple(_layer_from_json(item, use_rslora) for item in data[key]) for key in ("layers", "skipped")}
        names = {key: tuple(data[key]) for key in ("modules_to_save", "norms")}
        names |= {key: tuple(data.get(key, ())) for key in ("biases", "written", "notes")}
        others = tuple(FrozenModule(**item) for item in data["others"])
        data = {"training_path" if key == "path" else key: value for key, value in data.items()}  # an older name
        return cls(**{**data, **layers, **names, "others": others})

    def __str__(self) -> str:
        return "\n".join([self._title(), *self._table(), *self._footer()])

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        """Return the table as HTML, for notebooks."""
        cells = [[f"<td>{escape(cell)}</td>" for cell in row] for row in self._rows()]
        table = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
        notes = "<br>".join(map(escape, self._footer()))
        return f"<p>{escape(self._title())}</p><table>{table}</table><p>{notes}</p>"

    def _title(self) -> str:
        change, strengths = METHODS[self.method], sorted({layer.strength for layer in self.layers})
        said = [
            (self.method, self.method != "lora"),
            (f"rank {self.rank}", change.has_rank),
            (f"alpha {self.alpha:g}", change.has_alpha),
            ("scaled by " + ", ".join(f"{s:g}" for s in strengths), strengths not in ([], [1.0])),
            ("rsLoRA", self.use_rslora),
            ("DoRA", self.use_dora),
            ("A constant", self.freeze_A),
            (self.init, self.init != "kaiming"),
        ]
        what = ", ".join(text for text, there in said if there)
        return f"{self.model}: adapter {self.adapter_name!r}, {what} ({self.state})"

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [("layer", "kind", "weight", "rank", "base", "adapter", "")]
        for layer in (*self.layers, *self.skipped):
            shape = "×".join(map(str, layer.weight_shape))
            name, rank = layer.name or "(the model itself)", self._rank(layer)
            counts = f"{layer.base_parameters:,}", f"{layer.adapter_parameters:,}"
            rows.append((name, layer.kind, shape, rank, *counts, layer.note))
        return rows

    def _table(self) -> list[str]:
        return aligned(self._rows(), "lllrrrl")

    def _rank(self, layer: LayerPlan) -> str:
        """Return the rank, preceded by the method where that is not the plan's."""
        change, own = layer.change, METHODS[self.method]
        other = layer.rank and not issubclass(change, own)
        words = [layer.method] * bool(other) + [str(layer.rank)] * change.has_rank
        return " ".join(words) if layer.rank and words else "-"

    def _footer(self) -> list[str]:
        moves = "statistics move and belong to the adapter" if self.norm == "track" else "frozen in eval behaviour"
        saved = ", ".join(self.modules_to_save) or "none"
        return [
            f"adapted layers: {len(self.layers)}, skipped: {len(self.skipped)}",
            f"trained in full: {saved} ({self.head_found_by}), {self.saved_parameters:,} parameters",
            *([f"biases also trained: of {len(self.biases)} modules"] if self.biases else []),
            *([f"written by forwards, each adapter's own: {', '.join(self.written)}"] if self.written else []),
            f"norm layers with statistics: {len(self.norms)}, {moves}",
            f"also frozen: {self._besides()}",
            f"trainable: {self.trainable_parameters:,} of {self.base_parameters + self.adapter_parameters:,} "
            f"parameters ({self.trainable_share:.2%}), {self.adapter_parameters:,} of them in factors",
            *(f"note: {note}" for note in self.notes),
        ]

    def _besides(self) -> str:
        kinds: dict[str, list[int]] = {}
        for part in self.others:
            kinds.setdefault(part.kind, []).append(part.parameters)
        return ", ".join(f"{len(sizes)} {kind} ({sum(sizes):,})" for kind, sizes in kinds.items()) or "nothing"


def _layer_from_json(item: Mapping[str, Any], use_rslora: bool) -> LayerPlan:
    fields = {**item, "weight_shape": tuple(item["weight_shape"])}
    if "alpha" in fields:  # up to format 2: LoRA alone, each layer with its alpha
        alpha, anchored = fields.pop("alpha"), fields.pop("anchored", False)
        fields["scaling"] = scaling_of(alpha, fields["rank"] or 1, use_rslora)
        fields["method"] = "anchored" if anchored else "lora"
    return LayerPlan(**fields)


def aligned(rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """Return the lines of a text table; ``align`` holds l (left) or r (right) for each column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [{"l": "<", "r": ">"}[side] for side in align]
    cells = ((f"{text:{side}{width}}" for text, side, width in zip(row, sides, widths, strict=True)) for row in rows)
    return ["  ".join(row).rstrip() for row in cells]
