"""Reading what Hugging Face peft wrote: its configuration and tensors, in convlora's words.

The tensors' keys name the layers, so peft's ways of matching targets are not needed. Only what predicts here as it did
in peft is read; the rest is refused with its reason. peft itself is not imported.
"""

from __future__ import annotations

import re
import reprlib
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from .._layer.computed import weight_shape
from .._model.options import LARGEST_ALPHA
from .._model.targets import Named, dotted
from ..errors import CheckpointError
from .files import read_json
from .likeness import unlike_layer
from .peft_format import PREFIX, with_end
from .peft_methods import PEFT_METHODS, REGISTERED, STOCK
from .rebuilt import Found, by_any_name, layer_fault, refuse, take
from .stored import LayerTensors, PeftMethod, Stored, Taken

BESIDE = {
    *("auto_mapping", "peft_version", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
}
"""Fields that say how the layers were chosen, and nothing of what they predict; methods have more."""
REASONS = {
    "lora_bias": "a bias inside the branch has no place in an adapter here",
    "fan_in_fan_out": "it is for weights that are stored transposed",
    "layer_replication": "it changes the network itself",
    "trainable_token_indices": "embeddings are not adapted here",
}
INITIALISED = (True, False, "gaussian", "orthogonal", "eva")
"""Initialisations that leave the base's weight as it is; the others (PiSSA, OLoRA, LoftQ, ...) write to it."""
_PLAIN = re.compile(r"(\^?)((?:[^\\^$*+?{}\[\]|()]|\\[^A-Za-z0-9])+)\$?")
"""A name, or an escaped one: what exporters write. Other expressions may search for hours."""
_FORMS = 1000
"""Kinds of names that patterns may be of, by length and by where their dots are; real networks have a hundred."""
_WRAPPERS = ("original_module", "modules_to_save")


def read_config(file: Path) -> dict[str, Any]:
    """``adapter_config.json``.

    Raises:
        CheckpointError: it is no JSON object.
    """
    config = read_json(file)
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is no JSON object.")
    return config


def from_peft_tensors(config: Mapping[str, Any], tensors: Mapping[str, Tensor], root: nn.Module, origin: str) -> Found:
    """An adapter as peft has it on disk, for this model.

    Raises:
        CheckpointError: peft's adapter is none that predicts the same here; every reason is named.
    """
    refuse(origin, _config_faults(config))
    method = _method(config)
    alphas, ranks = (_Pattern(config.get(name) or {}) if has else None for name, has in _patterns(method).items())
    for name, pattern in zip(_patterns(method), (alphas, ranks), strict=True):
        if pattern and len(pattern.forms) > _FORMS:
            refuse(origin, [f"{name} has names of {len(pattern.forms)} lengths and forms; no network has {_FORMS}"])
    named = by_any_name(root)
    in_full = {name for name, _ in with_end(named, config.get("modules_to_save") or ())}
    layers: dict[str, LayerTensors] = {}
    own: dict[str, Tensor] = {}
    saved: dict[str, None] = {}
    biases: dict[str, None] = {}
    faults = []
    for full_key, tensor in tensors.items():
        key = full_key.removeprefix(PREFIX)
        part = next((part for part in method.tensors if key.endswith(f".{part}")), "")
        if part:
            layers.setdefault(key.removesuffix(f".{part}"), LayerTensors())[part] = tensor
        elif name := _outermost(key, in_full):
            if key.removeprefix(name + ".").split(".")[0] not in _WRAPPERS:  # bias="all" lists these twice
                saved[name] = None
                own[key] = tensor
        elif name := _with_bias(key, named, config):
            biases[name] = None
            own[dotted(name, "bias")] = tensor
        else:
            faults.append(_stray(key))
    differs = _unlike_registered if config["peft_type"] == REGISTERED else method.differs
    rank, alpha = config.get("r") or 1, float(config.get(method.alpha, 8))
    taken: dict[str, Taken] = {}
    for name, parts in layers.items():
        fault = layer_fault(name, named, differs, "peft")
        if not fault:
            its_alpha = alphas.of(name, alpha) if alphas else None
            its_rank = int(ranks.of(name, rank)) if ranks else 0
            module = named[name].module
            stored = Stored(parts, weight_shape(module), module, its_alpha, its_rank, config, name)
            fault = take(named[name], method.read, stored, taken)
        faults.append(fault)
    faults += [_shared(name, named) for name in (*saved, *biases)]
    refuse(origin, filter(None, faults))
    is_outline = any(tensor.is_meta for tensor in tensors.values())  # looked through before it is read
    has_none = not biases and any(_has_bias(named[name].module) for name in layers)
    if config.get("bias") == "lora_only" and has_none and not is_outline:
        warnings.warn(
            f"{origin}: bias='lora_only', and no bias in it: peft before 0.21 trains them and does not write them. The "
            "base's own are used, as peft would.",
            stacklevel=2,
        )
    return Found(
        origin=origin,
        layers=taken,
        rank=rank if "r" in method.known else max((its.rank for its in taken.values()), default=1),
        alpha=alpha,
        own=own,
        modules_to_save=tuple(saved),
        biases=tuple(biases),
        use_rslora=bool(config.get("use_rslora")),
        dropout=config.get(method.dropout) or 0.0,
    )


def _method(config: Mapping[str, Any]) -> PeftMethod:
    kind = config["peft_type"]
    return PEFT_METHODS[STOCK if kind == REGISTERED else kind]


def _patterns(method: PeftMethod) -> dict[str, bool]:
    """The patterns of a configuration, and whether they say what the tensors do not."""
    return {"alpha_pattern": bool(method.alpha), "rank_pattern": method.needs_rank}


def _unlike_registered(layer: nn.Module) -> str:
    """What convlora's layers in peft, which are all of its convolutions, do not compute as here."""
    return unlike_layer(layer) if isinstance(layer, nn.Linear) else ""


def _config_faults(config: Mapping[str, Any]) -> Iterator[str]:
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in (*PEFT_METHODS, REGISTERED):
        yield f"peft_type {kind!r}; {', '.join(PEFT_METHODS)} are read"
        return
    method = _method(config)
    read = {"peft_type", "modules_to_save", *method.known, *method.beside, *BESIDE}
    for name, value in config.items():
        if value and name not in read:
            yield f"{name}={value!r}: {REASONS.get(name, 'it changes what peft computes, or is not known here')}"
    initialised = config.get("init_lora_weights", True)
    if initialised not in INITIALISED:
        yield (
            f"init_lora_weights={initialised!r}: it may have changed the base's own weights; save it in peft with "
            "path_initial_model_for_weight_conversion, as plain LoRA"
        )
    for name in (method.alpha, "r" * method.needs_rank):
        if name and not _is_number(config.get(name, 8)):
            yield f"{name}={config[name]!r}: it must be a finite number above 0"
    for name, is_read in _patterns(method).items():
        patterns = config.get(name) or {}
        if not is_read:
            continue
        if not isinstance(patterns, dict):
            yield f"{name}={reprlib.repr(patterns)}: no table of names"
        elif strange := [pattern for pattern in patterns if not _PLAIN.fullmatch(pattern)]:
            yield f"{name}: {reprlib.repr(strange[0])} is neither a name nor an escaped one; name the layers"
        elif not all(map(_is_number, patterns.values())):
            yield f"{name}={reprlib.repr(patterns)}: each must be a finite number above 0"
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, (list, tuple, set)) or not all(isinstance(name, str) for name in saved):
        yield f"modules_to_save={saved!r}: no list of names"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= LARGEST_ALPHA


class _Pattern:
    """``alpha_pattern`` or ``rank_pattern``, looked up as peft does: of the patterns that a name ends with, the first.

    A pattern is a regular expression there, so that a dot which is not escaped stands for any letter. Patterns of one
    length with such dots in the same places are one form; a name is looked up once in each form.
    """

    def __init__(self, patterns: Mapping[str, float]) -> None:
        self.forms: dict[tuple[bool, int, tuple[int, ...]], dict[str, tuple[int, float]]] = {}
        for at, (pattern, value) in enumerate(patterns.items()):
            anchor, written = cast("re.Match[str]", _PLAIN.fullmatch(pattern)).groups()
            letters = re.findall(r"\\?.", written, re.DOTALL) if "\\" in written else written
            dots = tuple(place for place, letter in enumerate(letters) if letter == ".")
            form = self.forms.setdefault((bool(anchor), len(letters), dots), {})
            form.setdefault("".join(letter[-1] for letter in letters), (at, float(value)))

    def of(self, name: str, default: float) -> float:
        """What they say of a layer."""
        found = []
        for (is_whole, length, dots), form in self.forms.items():
            start = len(name) - length
            if start == 0 or (start > 0 and not is_whole and name[start - 1] == "."):
                letters = list(name[start:])
                for place in dots:
                    letters[place] = "."
                found += [form[text]] if (text := "".join(letters)) in form else []
        return min(found)[1] if found else default


def _outermost(key: str, modules: Collection[str]) -> str:
    """The outermost of these modules that a key lies in; empty where it lies in none."""
    return next((key[: dot.start()] for dot in re.finditer(r"\.", key) if key[: dot.start()] in modules), "")


def _with_bias(key: str, named: Mapping[str, Named], config: Mapping[str, Any]) -> str:
    """The module whose trained bias this is: an adapted layer's, or with ``bias="all"`` any module's."""
    if config.get("bias", "none") == "none" or not key.endswith(".bias"):
        return ""
    name = key.removesuffix(".bias").removesuffix(".base_layer")
    return name if name in named and _has_bias(named[name].module) else ""


def _has_bias(module: nn.Module) -> bool:
    return module._parameters.get("bias") is not None


def _stray(key: str) -> str:
    if "lora_embedding" in key:
        return f"{key}: embeddings are not adapted here"
    if key.endswith("lora_B.bias"):
        return f"{key}: {REASONS['lora_bias']}"
    return f"{key}: neither a layer's change nor in a module of modules_to_save that the model has"


def _shared(name: str, named: Mapping[str, Named]) -> str:
    others = set(named[name].names) - {name}
    return f"{name}: the same module as {', '.join(others)}; peft trains one of the two alone" if others else ""
