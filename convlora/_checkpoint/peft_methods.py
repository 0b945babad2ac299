"""The methods in Hugging Face peft's files: a table with one entry for each of peft's types.

convlora names its tensors as peft does. An entry therefore holds the rest: how a file's tensors give rank, scaling and
options; the fields of peft's configuration; and the layers for which peft predicts the same. LyCORIS' LoHa and LoKr
have the same tensors and are read by the same functions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .._layer.functional import alpha_of, scaling_of
from .._layer.swap import original_class
from .._methods.lokr import LoKr
from .._methods.lokr import split as split_of
from .._plan import LayerPlan, Plan
from ..errors import TargetError
from .likeness import is_faithful, is_torchs_own, unlike_branch, unlike_kind, unlike_layer
from .multiplied import MULTIPLYING, scaling_fault
from .stored import LayerTensors, PeftMethod, Stored, Taken

STOCK, REGISTERED, ALONE = "LORA", "CONVLORA", "CONVLORA_ALONE"
"""Values of ``peft_type``: LoRA that stock peft reads; LoRA that peft reads after ``convlora.peft.register``; an
adapter that only convlora reads. Other methods that stock peft reads have peft's own types."""

MAGNITUDE = "lora_magnitude_vector"
"""The part of the key of DoRA's magnitudes that follows the layer's name."""
CONV1D = "peft multiplies a Conv1d's lokr_w2 along other dimensions than its lokr_w1"


# ---- from a file's tensors


def read_lora(found: Stored) -> Taken:
    """Read LoRA and DoRA."""
    parts, use_dora = dict(found.parts), bool(found.fields.get("use_dora"))
    magnitudes = parts.pop(MAGNITUDE, None)
    if use_dora is not (magnitudes is not None):
        raise TargetError(f"use_dora={use_dora}, and the file has {'no ' if use_dora else ''}magnitudes")
    kind = original_class(found.layer)
    is_ours = found.fields.get("peft_type") == REGISTERED and issubclass(kind, _ConvNd)
    if use_dora and not is_torchs_own(kind) and not is_ours:
        raise TargetError(f"DoRA in a {kind.__name__}, whose own forward peft's DoRA does not call")
    rank = found.parts.size("lora_A.weight", 0)
    return Taken("lora", rank, found.scaling(rank), parts, magnitudes=magnitudes)


def read_loha(found: Stored) -> Taken:
    """Read LoHa; LyCORIS stores the core of a one-dimensional kernel without peft's last dimension."""
    parts, rank = dict(found.parts), found.parts.size("hada_w1_b", 0)
    cores = [name for name in ("hada_t1", "hada_t2") if name in parts]
    for name in cores:
        if parts[name].ndim == len(found.shape) == 3:
            parts[name] = parts[name].unsqueeze(-1)
    return Taken("loha", rank, found.scaling(rank), parts, {"tucker": True} if cores else {})


def read_lokr(found: Stored) -> Taken:
    """Read LoKr with the blocks of W₁; factors of W₁ or W₂ that convlora stores as their product are multiplied."""
    parts, shape = found.parts, found.shape
    rows, columns = (parts.size("lokr_w1" if "lokr_w1" in parts else f"lokr_w1_{s}", i) for i, s in enumerate("ab"))
    if not rows or not columns or shape[0] % rows or shape[1] % columns:
        raise TargetError(f"lokr_w1 makes {rows} by {columns} blocks, which do not divide {tuple(shape[:2])} channels")
    factored = [name for name in ("lokr_w2_b", "lokr_w1_b") if name in parts]
    rank = parts.size(factored[0], 0) if factored else found.rank or 1
    options: dict[str, Any] = {"rows": rows, "columns": columns}
    if (rows, columns) == (split_of(shape[0]), split_of(shape[1])):
        options = {}
    given = {"decompose_both": "lokr_w1_a" in parts, "full": "lokr_w2" in parts, "tucker": "lokr_t2" in parts}
    options |= {name: True for name, value in given.items() if value}
    if options.get("full") and "lokr_w2" in LoKr.shapes(shape, rank, **{**options, "full": False}):
        del options["full"]
    inner = shape[0] // rows, shape[1] // columns
    wanted = LoKr.shapes(shape, max(rank, 1), **options)
    for name, sides, kernel in (("lokr_w1", (rows, columns), ()), ("lokr_w2", inner, shape[2:])):
        if name in wanted and name not in parts:
            parts = LayerTensors({**parts, name: _multiplied(parts, name, sides, kernel, rank)})
            for used in (f"{name}_a", f"{name}_b", "lokr_t2" if name == "lokr_w2" else ""):
                parts.pop(used, None)
    return Taken("lokr", rank, found.scaling(rank), parts, options)


def _multiplied(parts: LayerTensors, name: str, sides: tuple[int, int], kernel: tuple[int, ...], rank: int) -> Tensor:
    """Return W₁ or W₂ as the product of its factors, after checking their shapes."""
    A, B, core = parts[f"{name}_a"], parts[f"{name}_b"], parts.get("lokr_t2") if name == "lokr_w2" else None
    (c, d), size = sides, math.prod(kernel)
    wanted = [(c, rank), (rank, d * size)] if core is None else [(rank, c), (rank, d), (rank, rank, *kernel)]
    given = [tuple(t.shape) for t in (A, B, core) if t is not None]
    if given != wanted:
        raise TargetError(f"{name}'s factors have the shapes {given}; this layer's would have {wanted}")
    wide = torch.promote_types(A.dtype, torch.float32)
    A, B = A.to(wide), B.to(wide)
    product = A @ B if core is None else torch.einsum("pq...,pc,qd->cd...", core.to(wide), A, B)
    return product.view(c, d, *kernel)


def read_peft_lokr(found: Stored) -> Taken:
    """Read peft's LoKr, which is no Kronecker product for a one-dimensional kernel with a full W₂."""
    if isinstance(found.layer, nn.Conv1d) and "lokr_w2" in found.parts:
        raise TargetError(CONV1D)
    return read_lokr(found)


def read_hira(found: Stored) -> Taken:
    """Read HiRA."""
    return Taken("hira", found.parts.size("hira_A", 0), 1.0, found.parts)


# ---- peft's configuration for a plan


def _lora_fields(plan: Plan) -> dict[str, Any]:
    shapes = {p.name: p.stored_shapes for p in plan.layers}
    stored = {name: each["lora_A.weight"][0] for name, each in shapes.items() if "lora_A.weight" in each}
    alphas = {
        p.name: alpha_of(p.whole_scaling, stored[p.name], plan.use_rslora) for p in plan.layers if p.name in stored
    }
    # An anchored change has twice the rank that its factors have.
    rank = plan.rank * max(
        (stored[p.name] // p.rank for p in plan.layers if p.name in stored and p.change.has_rank), default=1
    )
    alpha = alpha_of(scaling_of(plan.alpha, plan.rank, plan.use_rslora), rank, plan.use_rslora)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": plan.dropout,
        "use_rslora": plan.use_rslora,
        "use_dora": plan.use_dora,
        "bias": "none",
        "rank_pattern": _unlike(stored, rank),
        "alpha_pattern": _unlike(alphas, alpha),
    }


def _loha_fields(plan: Plan) -> dict[str, Any]:
    has_cores = any("hada_t1" in p.stored_shapes for p in plan.layers)
    return {**_scaled(plan, {p.name: p.rank for p in plan.layers}), "use_effective_conv2d": has_cores}


def _lokr_fields(plan: Plan) -> dict[str, Any]:
    shapes = [(p, p.stored_shapes) for p in plan.layers]
    blocks = {(p.weight_shape, LoKr.blocks_of(p.weight_shape, **cast(Any, p.options))) for p in plan.layers}
    factors = [-1, *sorted({n for _, each in blocks for n in each[:2] if n > 1})]
    factor = next((f for f in factors if all(each == LoKr.blocks_of(w, factor=f) for w, each in blocks)), -1)
    ranks = {p.name: max(p.rank, *(-(-n // 2) for n in each.get("lokr_w2", (0, 0))[:2])) for p, each in shapes}
    return {
        **_scaled(plan, ranks),
        "decompose_factor": factor,
        "decompose_both": any("lokr_w1_a" in each for _, each in shapes),
        "use_effective_conv2d": any("lokr_t2" in each for _, each in shapes),
    }


def _hira_fields(plan: Plan) -> dict[str, Any]:
    ranks = {p.name: p.rank for p in plan.layers}
    return {"r": plan.rank, "hira_dropout": plan.dropout, "rank_pattern": _unlike(ranks, plan.rank)}


def _scaled(plan: Plan, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return the ranks, and the alphas that give each layer its scaling at its rank."""
    alphas = {p.name: alpha_of(p.whole_scaling, ranks[p.name], False) for p in plan.layers}
    rank, alpha = next(iter(ranks.values()), plan.rank), next(iter(alphas.values()), plan.alpha)
    patterns = {"rank_pattern": _unlike(ranks, rank), "alpha_pattern": _unlike(alphas, alpha)}
    return {"r": rank, "alpha": alpha, **patterns}


def _unlike(values: Mapping[str, float], usual: float) -> dict[str, float]:
    """Return the values of layers that differ from the usual one, by patterns with anchors: peft matches name ends."""
    return {f"^{re.escape(name)}$": value for name, value in values.items() if value != usual}


# ---- layers that peft would build differently


def _lora_fault(planned: LayerPlan, layer: nn.Module, fields: Mapping[str, Any]) -> str:
    kind = original_class(layer)
    if not is_faithful(kind):
        return f"a {planned.kind}, from which peft's branch would differ"
    if planned.use_dora and not is_torchs_own(kind):
        return f"DoRA in a {planned.kind}, whose own forward peft's DoRA does not call"
    return ""


def _loha_fault(planned: LayerPlan, layer: nn.Module, fields: Mapping[str, Any]) -> str:
    shape, has_core = planned.weight_shape, "hada_t1" in planned.stored_shapes
    is_other = math.prod(shape[2:]) > 1 and has_core is not fields["use_effective_conv2d"]
    return "it has no Tucker core like other layers', and peft decides this for all layers" * is_other


def _lokr_fault(planned: LayerPlan, layer: nn.Module, fields: Mapping[str, Any]) -> str:
    shape, stored = planned.weight_shape, planned.stored_shapes
    rank = fields["rank_pattern"].get(f"^{re.escape(planned.name)}$", fields["r"])
    asked: dict[str, Any] = {"factor": fields["decompose_factor"], "decompose_both": fields["decompose_both"]}
    blocks = LoKr.blocks_of(shape, **asked)
    first_is_factored = fields["decompose_both"] and 2 * rank < max(blocks[:2])
    in_peft = LoKr.shapes(shape, rank, **asked, tucker=fields["use_effective_conv2d"])
    if in_peft != stored or first_is_factored is not ("lokr_w1_a" in stored):
        return "peft would give it other blocks and factors, since its options are the same for all layers"
    if len(shape) == 3 and "lokr_w2" in stored:
        return CONV1D
    if "lokr_t2" in stored and (len(shape) == 3 or shape[-1] == 1):
        return "it has a Tucker core for a kernel with which peft's forward fails"
    return ""


def _differs(layers: tuple[type[nn.Module], ...], *, grouped: bool = True) -> Callable[[nn.Module], str]:
    """Return the function that says why a branch of peft's, for these classes, would differ from a layer."""

    def unlike(layer: nn.Module) -> str:
        if not grouped and getattr(layer, "groups", 1) > 1:
            return f"groups {layer.groups}, for which peft lacks the method"
        return unlike_kind(layer, layers) or unlike_branch(layer)

    return unlike


# ---- the table


_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
_SCALED = ("r", "alpha", "rank_pattern", "alpha_pattern", "use_effective_conv2d")
_DROPPED = ("init_weights", "rank_dropout", "module_dropout", "rank_dropout_scale")

PEFT_METHODS: dict[str, PeftMethod] = {
    STOCK: PeftMethod(
        methods=("lora", "anchored", "dense"),
        tensors=("lora_A.weight", "lora_B.weight", MAGNITUDE),
        read=read_lora,
        differs=unlike_layer,
        fields=_lora_fields,
        fault=_lora_fault,
        known=("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias"),
        beside=(
            *("init_lora_weights", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
            *("qalora_group_size", "runtime_config", "ensure_weight_tying"),
        ),
        alpha="lora_alpha",
        dropout="lora_dropout",
    ),
    "LOHA": PeftMethod(
        methods=("loha",),
        tensors=("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
        read=read_loha,
        differs=_differs(_LAYERS),
        fields=_loha_fields,
        fault=_loha_fault,
        known=_SCALED,
        beside=_DROPPED,
        alpha="alpha",
    ),
    "LOKR": PeftMethod(
        methods=("lokr",),
        tensors=("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        read=read_peft_lokr,
        differs=_differs(_LAYERS),
        fields=_lokr_fields,
        fault=_lokr_fault,
        known=(*_SCALED, "decompose_both", "decompose_factor"),
        beside=_DROPPED,
        alpha="alpha",
        needs_rank=True,
    ),
    "HIRA": PeftMethod(
        methods=("hira",),
        tensors=("hira_A", "hira_B"),
        read=read_hira,
        differs=_differs((*_LAYERS, nn.Conv3d), grouped=False),
        fields=_hira_fields,
        fault=scaling_fault,
        known=("r", "hira_dropout", "rank_pattern"),
        beside=("init_weights",),
        dropout="hira_dropout",
    ),
    **MULTIPLYING,
}
"""peft's types, by ``peft_type``."""


def type_of(plan: Plan) -> str:
    """Return the peft type that has the methods of all layers of a plan; empty if there is none."""
    methods = {layer.method for layer in plan.layers}
    return next((name for name, each in PEFT_METHODS.items() if methods <= {*each.methods}), "")
