"""The methods that multiply a weight, in files of peft and LyCORIS: (IA)³, OFT, BOFT and HRA."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._layer.fast import is_plain
from .._layer.swap import original_class
from .._plan import LayerPlan, Plan
from ..errors import TargetError
from .likeness import is_faithful, is_torchs_own, unlike_class, unlike_kind
from .stored import PeftMethod, Stored, Taken

NEUMANN_SINCE = (0, 18)
"""The version of peft from which its Cayley-Neumann series is the one computed here."""
_NAME = re.compile(r"(?:[\w.-]|\\\W)+")


# ---- (IA)³


def read_ia3(found: Stored) -> Taken:
    """Read peft's (IA)³. Where it scales a layer's outputs it scales the bias too, so the adapter's bias is b · l."""
    scale, on_input = found.parts["ia3_l"], _is_on_input(found)
    return Taken(
        "ia3",
        1,
        1.0,
        found.parts,
        {"on_input": True} if on_input else {},
        bias=None if on_input or _bias(found.layer) is None else lambda bias: scaled_bias(bias, scale),
    )


def scaled_bias(bias: Tensor, scale: Tensor) -> Tensor:
    """Return b · l, rounded once; if the lengths differ, l, which the caller then refuses for its shape."""
    scale = scale.flatten()
    return (bias.to(scale.device) * scale).to(bias.dtype) if len(scale) == len(bias) else scale


def _is_on_input(found: Stored) -> bool:
    """Return whether the vector scales inputs: by its shape, or by the configuration if both shapes fit."""
    scale, inputs = found.parts["ia3_l"], found.shape[1] * getattr(found.layer, "groups", 1)
    ones = [1] * len(found.shape[2:])
    is_input = scale.shape == (1, inputs, *ones)
    is_output = scale.shape == ((1, found.shape[0], *ones) if ones else (found.shape[0], 1))
    if not (is_input and is_output):
        return is_input
    named = found.fields.get("feedforward_modules") or ()
    if isinstance(named, str):
        names = _plain_names(named)
        if names is None:
            raise TargetError("feedforward_modules is a regular expression; list the layers' names instead")
        return found.name in names
    return any(isinstance(end, str) and found.name.endswith(end) for end in named)


def _plain_names(expression: str) -> list[str] | None:
    """Return the names in an expression ``^(?:a|b)$``; None for others, whose search could take hours."""
    inner = expression.removeprefix("^").removesuffix("$")
    if inner.startswith("(?:") and inner.endswith(")"):
        inner = inner[3:-1]
    names = inner.split("|")
    return [re.sub(r"\\(.)", r"\1", n) for n in names] if all(map(_NAME.fullmatch, names)) else None


def _bias(layer: nn.Module) -> nn.Parameter | None:
    return layer._parameters.get("bias")


def _ia3_fields(plan: Plan) -> dict[str, Any]:
    names = [re.escape(p.name) for p in plan.layers if p.options.get("on_input")]
    return {"feedforward_modules": f"^(?:{'|'.join(names)})$" if names else []}


def _unlike_ia3(layer: nn.Module) -> str:
    """Return why peft, which scales the layer's inputs or outputs, would predict something else."""
    kind = original_class(layer)
    is_known = is_faithful(kind) or is_plain(layer, kind)
    return unlike_kind(layer, (nn.Conv2d, nn.Conv3d, nn.Linear)) or unlike_class(layer, is_known)


# ---- OFT


def read_oft(found: Stored) -> Taken:
    """Read peft's OFT: rotations of the inputs, exact or by a series, constrained or shared between blocks."""
    triangles, fields = found.parts["oft_R.weight"], found.fields
    size, columns = _side(triangles), math.prod(found.shape[1:])
    if columns % size:
        raise TargetError(f"blocks of size {size}, which does not divide the weight's {columns} columns")
    if fields.get("coft"):
        most = float(fields.get("eps", 6e-5)) / math.sqrt(len(triangles))
        norms = triangles.float().norm(dim=1, keepdim=True) * math.sqrt(2)  # ‖Q‖: Q holds each value twice
        triangles = torch.where(norms <= most, triangles, most * triangles / norms)
    if fields.get("block_share") and len(triangles) == 1:
        triangles = triangles.expand(columns // size, -1)
    terms = _terms(fields)
    return Taken("oft", size, 1.0, {"oft_R.weight": triangles}, {"neumann": terms} if terms else {})


def _side(triangles: Tensor) -> int:
    """Return the side of the square matrices whose upper triangles are these rows."""
    count = triangles.shape[1] if triangles.ndim == 2 else 0
    size = (1 + math.isqrt(1 + 8 * count)) // 2
    if size < 2 or size * (size - 1) // 2 != count:
        raise TargetError(f"oft_R of shape {tuple(triangles.shape)}; its rows are not upper triangles")
    return size


def _terms(fields: Mapping[str, Any]) -> int:
    if not fields.get("use_cayley_neumann"):
        return 0
    written = re.match(r"(\d+)\.(\d+)", str(fields.get("peft_version") or "0.0"))
    if written is None or (int(written[1]), int(written[2])) < NEUMANN_SINCE:
        raise TargetError("use_cayley_neumann of a peft before 0.18, which computed another series")
    terms = fields.get("num_cayley_neumann_terms", 5)
    if type(terms) is not int or terms < 1:
        raise TargetError(f"num_cayley_neumann_terms={terms!r}; it must be a whole number above 0")
    return terms


def _oft_fields(plan: Plan) -> dict[str, Any]:
    terms = max((int(p.options.get("neumann", 0)) for p in plan.layers), default=0)
    series = {"use_cayley_neumann": True, "num_cayley_neumann_terms": terms, "peft_version": "0.18.0"}
    exact = {"use_cayley_neumann": False}
    return {"r": 0, "oft_block_size": _usual(plan), "bias": "none", **(series if terms else exact)}


def _oft_fault(planned: LayerPlan, layer: nn.Module, fields: Mapping[str, Any]) -> str:
    if planned.options.get("neumann", 0) != (fields.get("num_cayley_neumann_terms") or 0):
        return "another option neumann than other layers', and peft has one for all layers"
    return _turn_fault(planned, fields["oft_block_size"])


def _unlike_oft(layer: nn.Module) -> str:
    """Return why peft, which rotates the inputs at each position, would predict something else."""
    is_known = is_faithful(original_class(layer))
    if fault := unlike_kind(layer, (nn.Conv2d, nn.Linear)) or unlike_class(layer, is_known):
        return fault
    if isinstance(layer, nn.Conv2d):
        if layer.kernel_size != (1, 1):
            return (
                f"kernel {layer.kernel_size}: peft's OFT sums the overlapping patches of larger kernels, so that even "
                "a fresh adapter changes the predictions"
            )
        if layer.groups > 1 or layer.dilation != (1, 1):
            return f"groups {layer.groups} and dilation {layer.dilation}, for which peft lacks the method"
    return ""


# ---- BOFT


def read_boft(found: Stored) -> Taken:
    """Read peft's BOFT; the tensor's shape, not the configuration, gives the number of butterfly factors."""
    R, scale = found.parts["boft_R"], found.parts["boft_s"]
    if R.ndim != 4:
        raise TargetError(f"boft_R of shape {tuple(R.shape)}; it must be (factors, blocks, size, size)")
    if scale.numel() == found.shape[0]:
        scale = scale.reshape(_scale_shape(found.shape))
    return Taken("boft", R.shape[3], 1.0, {"boft_R": R, "boft_s": scale}, {"factors": R.shape[0]})


def _scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    return (1, shape[0]) if len(shape) > 2 else (shape[0], 1)


def _boft_fields(plan: Plan) -> dict[str, Any]:
    sizes = {"boft_block_size": _usual(plan), "boft_block_num": 0, "boft_n_butterfly_factor": 1}
    return {**sizes, "bias": "none"}


def _boft_fault(planned: LayerPlan, layer: nn.Module, fields: Mapping[str, Any]) -> str:
    if planned.stored_shapes["boft_R"][0] > 1:
        return "several butterfly factors, for which peft needs its CUDA extension"
    return _turn_fault(planned, fields["boft_block_size"])


# ---- HRA


def read_hra(found: Stored) -> Taken:
    """Read peft's HRA; with ``apply_GS`` the vectors are made orthogonal here, which gives the same reflections."""
    vectors = found.parts["hra_u"]
    rank = vectors.shape[1] if vectors.ndim == 2 else 0
    if not rank:
        raise TargetError(f"hra_u of shape {tuple(vectors.shape)}; it must be a matrix")
    if found.fields.get("apply_GS"):
        vectors = _orthogonal(vectors.double()).to(torch.promote_types(vectors.dtype, torch.float32))
    return Taken("hra", rank, 1.0, {"hra_u": vectors})


def _orthogonal(vectors: Tensor) -> Tensor:
    """Make the columns orthogonal by the Gram-Schmidt process."""
    found: list[Tensor] = []
    for vector in vectors.unbind(1):
        for other in found:
            vector = vector - (other @ vector) * other
        found.append(vector / vector.norm())
    return torch.stack(found, 1)


def _hra_fields(plan: Plan) -> dict[str, Any]:
    return {"r": _usual(plan), "apply_GS": False, "bias": "none"}


# ---- helpers of several methods


def _usual(plan: Plan) -> int:
    """Return the rank of most layers, since peft has one rank for all."""
    ranks = [p.rank for p in plan.layers]
    return max(dict.fromkeys(ranks), key=ranks.count, default=plan.rank)


def _turn_fault(planned: LayerPlan, rank: int) -> str:
    if planned.options.get("on_output"):
        return "its outputs are rotated, and peft rotates inputs"
    other_rank = f"rank {planned.rank}, most layers have {rank}, and peft has one for all layers"
    return scaling_fault(planned) or other_rank * (planned.rank != rank)


def scaling_fault(planned: LayerPlan, *_: object) -> str:
    """Return the layer's scaling if it is not 1, for methods that have none in peft."""
    return f"scaling {planned.whole_scaling:g}, which peft does not have for this method" * (planned.whole_scaling != 1)


def _unlike_square(layer: nn.Module) -> str:
    """Return what peft's BOFT and HRA leave out of a convolution, which they compute by themselves."""
    is_known = is_torchs_own(original_class(layer))
    if fault := unlike_kind(layer, (nn.Conv2d, nn.Linear)) or unlike_class(layer, is_known):
        return fault
    if isinstance(layer, nn.Linear):
        return ""
    layer = cast(nn.Conv2d, layer)
    sides = (layer.kernel_size, layer.stride, layer.padding)
    if any(isinstance(side, str) or side[0] != side[1] for side in sides):
        return f"kernel {sides[0]}, stride {sides[1]}, padding {sides[2]!r}; peft reads only the first number of each"
    if layer.dilation != (1, 1) or layer.groups > 1 or layer.padding_mode != "zeros":
        dropped = f"dilation {layer.dilation}, groups {layer.groups}, padding_mode {layer.padding_mode!r}"
        return f"{dropped}, which peft ignores"
    return ""


MULTIPLYING = {
    "IA3": PeftMethod(
        methods=("ia3",),
        tensors=("ia3_l",),
        read=read_ia3,
        differs=_unlike_ia3,
        fields=_ia3_fields,
        fault=scaling_fault,
        known=("feedforward_modules",),
        beside=("init_ia3_weights",),
    ),
    "OFT": PeftMethod(
        methods=("oft",),
        tensors=("oft_R.weight",),
        read=read_oft,
        differs=_unlike_oft,
        fields=_oft_fields,
        fault=_oft_fault,
        known=(
            *("oft_block_size", "bias", "coft", "eps", "block_share"),
            *("use_cayley_neumann", "num_cayley_neumann_terms"),
        ),
        beside=("r", "module_dropout", "init_weights"),
    ),
    "BOFT": PeftMethod(
        methods=("boft",),
        tensors=("boft_R", "boft_s", "boft_P"),
        read=read_boft,
        differs=_unlike_square,
        fields=_boft_fields,
        fault=_boft_fault,
        known=("boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "bias"),
        beside=("boft_dropout", "init_weights"),
    ),
    "HRA": PeftMethod(
        methods=("hra",),
        tensors=("hra_u",),
        read=read_hra,
        differs=_unlike_square,
        fields=_hra_fields,
        fault=lambda planned, layer, fields: _turn_fault(planned, fields["r"]),
        known=("r", "apply_GS", "bias"),
        beside=("init_weights",),
    ),
}
"""peft's types of these methods, by ``peft_type``."""


# ---- LyCORIS


def read_lycoris_ia3(found: Stored) -> Taken:
    """Read LyCORIS' (IA)³, which stores l − 1 and does not scale the bias."""
    scale, told = found.parts["weight"], found.parts["on_input"]
    outputs, inputs = found.shape[0], found.shape[1] * getattr(found.layer, "groups", 1)
    on_input = scale.numel() == inputs if told.is_meta else bool(told.any())
    if scale.numel() != (inputs if on_input else outputs):
        raise TargetError(f"weight of {scale.numel()} values for {inputs} input and {outputs} output channels")
    ones = [1] * len(found.shape[2:])
    shape = (1, scale.numel(), *ones) if ones or on_input else (scale.numel(), 1)
    scale = 1 + scale.to(torch.promote_types(scale.dtype, torch.float32))
    return Taken("ia3", 1, 1.0, {"ia3_l": scale.reshape(shape)}, {"on_input": True} if on_input else {})


def read_lycoris_oft(found: Stored) -> Taken:
    """Read LyCORIS' Diag-OFT and BOFT, which rotate outputs; alpha bounds the norm of Q."""
    blocks = found.parts["oft_blocks"]
    if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2] or (size := blocks.shape[-1]) < 2:
        raise TargetError(f"oft_blocks of shape {tuple(blocks.shape)}; they must be square")
    blocks = blocks.to(torch.promote_types(blocks.dtype, torch.float32))
    Q = blocks - blocks.mT
    if found.alpha is not None and found.alpha > 0:
        most, norm = found.alpha * found.shape[0], Q.norm() + 1e-8
        Q = torch.where(norm > most, Q * (most / norm), Q)
    rescale = found.parts.get("rescale")
    if rescale is not None and rescale.numel() != found.shape[0]:
        raise TargetError(f"rescale of {rescale.numel()} values for {found.shape[0]} output channels")
    if blocks.ndim == 3 and rescale is None:
        row, column = torch.triu_indices(size, size, 1)
        return Taken("oft", size, 1.0, {"oft_R.weight": Q[:, row, column]}, {"on_output": True})
    if blocks.ndim == 4:  # LyCORIS interleaves the two halves of a block, and stores the transposed rotation
        if size % 2:
            raise TargetError(f"blocks of size {size}; a butterfly halves its blocks, so the size must be even")
        order = torch.arange(size).view(-1, 2).T.flatten()
        Q = -Q[..., order, :][..., order]
    R = Q if Q.ndim == 4 else Q.unsqueeze(0)
    scale = torch.ones(found.shape[0], device=Q.device) if rescale is None else rescale
    parts = {"boft_R": R, "boft_s": scale.reshape(_scale_shape(found.shape))}
    return Taken("boft", size, 1.0, parts, {"on_output": True, "factors": len(R)})
