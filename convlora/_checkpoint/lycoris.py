"""Reads and writes files of LyCORIS and kohya's sd-scripts: one ``.safetensors`` file, a method for each layer.

A layer ``down.block.0.conv1`` has the tensors ``lora_unet_down_block_0_conv1.lora_down.weight`` (convlora's lora_A),
``.lora_up.weight`` (lora_B) and ``.alpha``. The file writes underscores for dots, so the layer is found by comparing
its name with the model's. The names of its tensors tell the method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from .._layer.computed import weight_shape
from .._methods.dense import Dense
from .._model.targets import Named, dotted, is_adaptable, modules_of
from .._plan import Plan
from ..errors import TargetError
from .fitting import highest_rank
from .likeness import unlike_branch, unlike_geometry
from .multiplied import read_lycoris_ia3, read_lycoris_oft
from .peft_methods import MAGNITUDE, PEFT_METHODS, STOCK, read_loha, read_lokr
from .rebuilt import Found, by_any_name, layer_fault, of_model, refuse, take
from .stored import LayerTensors, Stored, Taken

PREFIXES = ("lycoris_", "lora_unet_", "lora_te1_", "lora_te2_", "lora_te_", "lora_")
_MAGNITUDES = "dora_scale"


# ---- one layer's tensors, in both directions


def read_locon(found: Stored) -> Taken:
    """Read LoRA; the core of a Tucker decomposition is multiplied into lora_A, which is exact."""
    parts, shape = found.parts, found.shape
    down, up, core = parts["lora_down.weight"], parts["lora_up.weight"], parts.get("lora_mid.weight")
    if min(down.ndim, up.ndim) < 2:
        raise TargetError("lora_down and lora_up must be matrices or kernels")
    if up.ndim == 2 < down.ndim and core is None:
        raise TargetError("DyLoRA, which computes with a random part of its rank in each step")
    if core is not None:
        if not _core_fits(core, down, shape):
            raise TargetError(f"its Tucker core {tuple(core.shape)} does not fit its factors")
        wide = torch.promote_types(core.dtype, torch.float32)
        down = torch.einsum("rs...,si->ri...", core.to(wide), down.to(wide).flatten(1))
    rank = down.shape[0]
    A, B = _as(down, (rank, *shape[1:])), _as(up, (shape[0], rank, *[1] * len(shape[2:])))
    return Taken("lora", rank, found.scaling(rank), {"lora_A.weight": A, "lora_B.weight": B})


def write_locon(parts: LayerTensors, scaling: float) -> LayerTensors:
    """Return LoCon's tensors for a layer's lora_A and lora_B."""
    down, up = parts["lora_A.weight"], parts["lora_B.weight"]
    found = LayerTensors({"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(scaling * len(down))})
    if MAGNITUDE in parts:  # one for each output channel
        found[_MAGNITUDES] = parts[MAGNITUDE].reshape(-1, *[1] * (down.ndim - 1))
    return found


def _read_lokr(found: Stored) -> Taken:
    """Read LoKr; if both of its matrices are full, LyCORIS ignores alpha."""
    is_full = {"lokr_w1", "lokr_w2"} <= found.parts.keys()
    return read_lokr(replace(found, alpha=None) if is_full else found)


def _read_full(found: Stored) -> Taken:
    """Read the whole difference of the weight, and of the bias."""
    difference = found.parts["diff"]
    if difference.shape != found.shape:
        raise TargetError(f"diff {tuple(difference.shape)} in the file, the weight is {tuple(found.shape)}")
    its = Taken("dense", 1, 1.0, Dense.stored_as(difference))
    of_bias = found.parts.get("diff_b")
    return its if of_bias is None else replace(its, bias=partial(_plus, of_bias))


def _plus(difference: Tensor, bias: Tensor) -> Tensor:
    """Return bias + difference; if the shapes differ, the difference, which the caller then refuses for its shape."""
    return bias.to(difference.device) + difference if bias.shape == difference.shape else difference


# ---- the table


@dataclass(frozen=True)
class LycorisMethod:
    """One of LyCORIS' methods.

    Attributes:
        name: its usual name.
        known_by: tensor names; a layer of this method has at least one of them.
        beside: further tensor names that such a layer may have.
        read: converts a layer's tensors; None if the method is refused, for the ``reason``.
        methods: convlora's methods that ``write`` converts, from a layer's tensors and scaling.
    """

    name: str
    known_by: tuple[str, ...]
    beside: tuple[str, ...] = ()
    read: Callable[[Stored], Taken] | None = None
    reason: str = ""
    methods: tuple[str, ...] = ()
    write: Callable[[LayerTensors, float], LayerTensors] | None = None


LYCORIS_METHODS = (
    LycorisMethod(
        "LoCon",
        ("lora_down.weight", "lora_up.weight"),
        ("lora_mid.weight", _MAGNITUDES),
        read_locon,
        methods=PEFT_METHODS[STOCK].methods,
        write=write_locon,
    ),
    LycorisMethod("LoHa", PEFT_METHODS["LOHA"].tensors, (_MAGNITUDES,), read_loha),
    LycorisMethod("LoKr", PEFT_METHODS["LOKR"].tensors, (_MAGNITUDES,), _read_lokr),
    LycorisMethod("full", ("diff",), ("diff_b",), _read_full),
    LycorisMethod("(IA)³", ("on_input",), ("weight",), read_lycoris_ia3),
    LycorisMethod("Diag-OFT or BOFT", ("oft_blocks",), ("rescale",), read_lycoris_oft),
    LycorisMethod("norm", ("w_norm", "b_norm"), reason="differences of a norm layer are not read"),
    LycorisMethod(
        "GLoRA",
        ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"),
        reason="convlora has no such method",
    ),
    LycorisMethod(
        "T-LoRA",
        ("q_layer.weight", "p_layer.weight", "lambda_layer"),
        reason="its change is relative to its initial factors, which the file does not hold",
    ),
)


def method_of(parts: Iterable[str]) -> LycorisMethod | None:
    """Return the method of a layer with these tensor names; None if it is unknown."""
    names = {*parts} - {"alpha"}
    for method in LYCORIS_METHODS:
        if names & {*method.known_by} and names <= {*method.known_by, *method.beside}:
            return method
    return None


def by_layer(tensors: Mapping[str, Tensor]) -> dict[str, LayerTensors]:
    """Return each layer's tensors, by the layer's name as the file writes it."""
    layers: dict[str, LayerTensors] = {}
    for key, tensor in tensors.items():
        name, _, part = key.partition(".")
        layers.setdefault(name, LayerTensors())[part] = tensor
    return layers


def is_lycoris(keys: Iterable[str], prefix: str | None) -> bool:
    """Return whether these are keys of a LyCORIS or kohya file; a prefix that the user chose counts as known."""
    known = {part for method in LYCORIS_METHODS for part in method.known_by}
    prefixes = PREFIXES if prefix is None else (*PREFIXES, prefix)
    return any(key.startswith(prefixes) and key.partition(".")[2] in known for key in keys)


def from_lycoris_tensors(
    tensors: Mapping[str, Tensor], root: nn.Module, origin: str, prefix: str | None = None
) -> Found:
    """Return the adapter in such a file, or the one with this prefix if the file holds several.

    Raises:
        CheckpointError: a layer is not in the model, its name fits several layers, or it would predict something else
            here.
    """
    flat, named = _flattened(root), by_any_name(root)
    taken: dict[str, Taken] = {}
    layers = by_layer(tensors)
    names, _ = of_model(layers, PREFIXES, prefix, origin)
    faults = [_fault(written, layers[written], flat.get(name, []), named, taken) for written, name in names.items()]
    refuse(origin, filter(None, faults))
    rank = max((its.rank for its in taken.values()), default=1)
    return Found(origin, taken, rank, float(rank))


def _fault(
    written: str,
    parts: LayerTensors,
    candidates: list[str],
    named: Mapping[str, Named],
    taken: dict[str, Taken],
) -> str:
    """Add a layer's change to ``taken``, or return why it cannot be read."""
    method = method_of(parts)
    if method is None:
        return f"{written}: {', '.join(sorted(parts))}: no method has these tensors together"
    if method.read is None:
        return f"{written}: {method.name}: {method.reason}"
    layer, fault = _resolve(written, candidates)
    if fault or layer in taken:
        return fault or f"{written}: {layer} is in the file twice"
    if fault := layer_fault(layer, named, _differs(method, written), "the library that wrote the file"):
        return fault
    module = named[layer].module
    return take(named[layer], partial(_read, method.read), Stored(parts, weight_shape(module), module), taken)


def _read(read: Callable[[Stored], Taken], found: Stored) -> Taken:
    """Read a layer's tensors together with its alpha and DoRA's magnitudes."""
    parts, shape = LayerTensors(found.parts), found.shape
    alpha, magnitudes = parts.pop("alpha", None), parts.pop(_MAGNITUDES, None)
    if alpha is not None and (alpha.numel() != 1 or alpha.is_complex()):
        raise TargetError(f"alpha of shape {tuple(alpha.shape)}, {alpha.dtype}; it must be one real number")
    its = read(replace(found, parts=parts, alpha=None if alpha is None or alpha.is_meta else float(alpha) or None))
    if magnitudes is None:
        return its
    ones = [1] * len(shape[1:])
    if magnitudes.shape != (shape[0], *ones):
        raise TargetError(f"DoRA's magnitudes {tuple(magnitudes.shape)}; there must be one for each output channel")
    return replace(its, magnitudes=magnitudes.reshape(1, -1, *ones[1:]) if ones[1:] else magnitudes.flatten())


def _differs(method: LycorisMethod, written: str) -> Callable[[nn.Module], str]:
    """Return the function that says why a layer's prediction would differ; kohya's LoRA is a branch of two layers."""
    return unlike_branch if method.read is not read_locon or written.startswith("lycoris_") else _unlike_kohya


def to_lycoris_tensors(
    plan: Plan, tensors: Mapping[str, Tensor], root: nn.Module, prefix: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of a LyCORIS file by key, and why some layers cannot be written.

    Args:
        plan: the adapter's plan.
        tensors: the adapter's tensors, by their keys in convlora's file.
        root: the model.
        prefix: the beginning of every layer's name, such as ``lycoris``.
    """
    flat, named = _flattened(root), by_any_name(root)
    written: dict[str, Tensor] = {}
    faults = []
    for layer in plan.layers:
        method = next((each for each in LYCORIS_METHODS if layer.method in each.methods), None)
        flattened = layer.name.replace(".", "_")
        name = f"{prefix}_{flattened}"
        if method is None or method.write is None:
            faults.append(f"{layer.name}: changed by {layer.method}, which export_adapter does not write for LyCORIS")
            continue
        fault = layer_fault(layer.name, named, _differs(method, name), "the library that reads the file")
        fault = fault or _resolve(name, flat[flattened])[1]
        if layer.use_dora and layer.strength != 1:
            fault = f"{layer.name}: DoRA at strength {layer.strength:g}, which no alpha expresses"
        faults += [fault] if fault else []
        names = (*layer.stored_shapes, *([MAGNITUDE] if layer.use_dora else ()))
        parts = LayerTensors({part: tensors[dotted(layer.name, part)] for part in names})
        scaling = layer.scaling if layer.use_dora else layer.whole_scaling
        written |= {f"{name}.{part}": tensor for part, tensor in method.write(parts, scaling).items()}
    return written, faults


def _flattened(root: nn.Module) -> dict[str, list[str]]:
    """Return the names of the model's layers, by the name with underscores for dots; some may coincide."""
    flat: dict[str, list[str]] = {}
    for n in modules_of(root):
        if is_adaptable(n.module):
            for name in n.names:
                flat.setdefault(name.replace(".", "_"), []).append(name)
    return flat


def _resolve(written: str, candidates: list[str]) -> tuple[str, str]:
    """Return the layer's name, or an empty name and why the written one names no single layer."""
    if len(candidates) == 1:
        return candidates[0], ""
    fault = f"could be {' or '.join(candidates)}" if candidates else "no such layer in the model"
    return "", f"{written}: {fault}"


def _unlike_kohya(layer: nn.Module) -> str:
    return unlike_branch(layer) or unlike_geometry(layer)


def _core_fits(core: Tensor, down: Tensor, shape: tuple[int, ...]) -> bool:
    """Return whether core and lora_down fit the layer's shape, so that their product is no larger than lora_A."""
    if core.ndim != len(shape) or down.flatten(1).shape != (core.shape[1], shape[1]):
        return False
    return core.shape[2:] == shape[2:] and max(core.shape[:2]) <= highest_rank(shape)


def _as(factor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Reshape a factor if only dimensions of size 1 differ: some versions write 1×1 kernels as matrices, or back."""
    same = [n for n in factor.shape if n != 1] == [n for n in shape if n != 1]
    return factor.reshape(shape) if same else factor
