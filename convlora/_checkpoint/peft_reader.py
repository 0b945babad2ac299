"""Reads adapters that Hugging Face peft wrote, from their configuration and tensors; peft is not imported.

The tensors' keys name the layers, so peft's matching of ``target_modules`` is not repeated here. An adapter that would
predict something else here than in peft is refused with the reason.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from .._layer.computed import weight_shape
from .._model.options import LARGEST_ALPHA
from .._model.targets import Named, dotted
from ..errors import CheckpointError, warn
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
"""Fields of peft's configuration that change no prediction. :class:`PeftMethod` has those of single methods."""
REASONS = {
    "lora_bias": "convlora's adapters have no bias of lora_B",
    "fan_in_fan_out": "it is for weights that are stored transposed",
    "layer_replication": "it changes the network itself",
    "trainable_token_indices": "convlora does not adapt embeddings",
}
INITIALISED = (True, False, "gaussian", "orthogonal", "eva")
"""Initialisations that do not change the base's weight. The others (PiSSA, OLoRA, LoftQ, ...) do."""
_PLAIN = re.compile(r"(\^?)((?:[^\\^$*+?{}\[\]|()]|\\[^A-Za-z0-9])+)\$?")
"""A name, escaped or not, as exporters write it. The search for other regular expressions could take hours."""
_FORMS = 1000
"""The most forms of patterns, see :class:`_Pattern`; real networks have a hundred."""
_WRAPPERS = ("original_module", "modules_to_save")


def read_config(file: Path) -> dict[str, Any]:
    """Read ``adapter_config.json``.

    Raises:
        CheckpointError: the file is not a JSON object.
    """
    config = read_json(file)
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is not a JSON object.")
    return config


def from_peft_tensors(config: Mapping[str, Any], tensors: Mapping[str, Tensor], root: nn.Module, origin: str) -> Found:
    """Convert peft's configuration and tensors to an adapter for this model.

    Raises:
        CheckpointError: the adapter would predict something else here; every reason is named.
    """
    refuse(origin, _config_faults(config))
    method = _method(config)
    alphas, ranks = (_Pattern(config.get(name) or {}) if has else None for name, has in _patterns(method).items())
    for name, pattern in zip(_patterns(method), (alphas, ranks), strict=True):
        if pattern and len(pattern.forms) > _FORMS:
            refuse(origin, [f"{name} has patterns of {len(pattern.forms)} forms; the limit is {_FORMS}"])
    named = by_any_name(root)
    in_full = {name for name, _ in with_end(named, config.get("modules_to_save") or ())}
    layers: dict[str, LayerTensors] = {}
    own: dict[str, Tensor] = {}
    saved: dict[str, None] = {}
    biases: dict[str, None] = {}
    faults = []
    for full_key, tensor in tensors.items():
        key = full_key.removeprefix(PREFIX)
        layer, part = method.split(key)
        if part:
            layers.setdefault(layer, LayerTensors())[part] = tensor
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
    is_outline = any(tensor.is_meta for tensor in tensors.values())  # the check before the values are read
    has_none = not biases and any(_has_bias(named[name].module) for name in layers)
    if config.get("bias") == "lora_only" and has_none and not is_outline:
        warn(
            f"{origin}: the configuration has bias='lora_only', and the file holds no bias: peft before 0.21 trains "
            "biases and does not save them. The base's biases are used, as in peft.",
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
    """Return the names of a configuration's patterns, and whether each has to be read besides the tensors."""
    return {"alpha_pattern": bool(method.alpha), "rank_pattern": method.needs_rank}


def _unlike_registered(layer: nn.Module) -> str:
    """Return why a layer of peft with convlora's layers registered would differ; those are its convolutions."""
    return unlike_layer(layer) if isinstance(layer, nn.Linear) else ""


def _config_faults(config: Mapping[str, Any]) -> Iterator[str]:
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in (*PEFT_METHODS, REGISTERED):
        yield f"peft_type {kind!r}; it must be one of {', '.join(PEFT_METHODS)}"
        return
    method = _method(config)
    read = {"peft_type", "modules_to_save", *method.known, *method.beside, *BESIDE}
    for name, value in config.items():
        if value and name not in read:
            yield f"{name}={value!r}: {REASONS.get(name, 'it changes what peft computes, or is unknown here')}"
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
            yield f"{name}={reprlib.repr(patterns)}: it must be a table of names"
        elif strange := [pattern for pattern in patterns if not _PLAIN.fullmatch(pattern)]:
            yield f"{name}: {reprlib.repr(strange[0])} is a regular expression; list the layers' names instead"
        elif not all(map(_is_number, patterns.values())):
            yield f"{name}={reprlib.repr(patterns)}: each must be a finite number above 0"
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, (list, tuple, set)) or not all(isinstance(name, str) for name in saved):
        yield f"modules_to_save={saved!r}: it must be a list of names"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= LARGEST_ALPHA


class _Pattern:
    """``alpha_pattern`` or ``rank_pattern``. As in peft, the first pattern that matches the end of a name counts.

    peft's patterns are regular expressions, in which an unescaped dot matches any character. Patterns of the same
    length with such dots at the same positions are one form; a name is looked up once in each form.
    """

    def __init__(self, patterns: Mapping[str, float]) -> None:
        self.forms: dict[tuple[bool, int, tuple[int, ...]], dict[str, tuple[int, float]]] = {}
        for at, (pattern, value) in enumerate(patterns.items()):
            anchor, written = cast("re.Match[str]", _PLAIN.fullmatch(pattern)).groups()
            letters = re.findall(r"\\?.", written, re.DOTALL) if "\\" in written else written
            dots = tuple(position for position, letter in enumerate(letters) if letter == ".")
            form = self.forms.setdefault((bool(anchor), len(letters), dots), {})
            form.setdefault("".join(letter[-1] for letter in letters), (at, float(value)))

    def of(self, name: str, default: float) -> float:
        """Return the value for a layer's name."""
        found = []
        for (is_whole, length, dots), form in self.forms.items():
            start = len(name) - length
            if start == 0 or (start > 0 and not is_whole and name[start - 1] == "."):
                letters = list(name[start:])
                for position in dots:
                    letters[position] = "."
                found += [form[text]] if (text := "".join(letters)) in form else []
        return min(found)[1] if found else default


def _outermost(key: str, modules: Collection[str]) -> str:
    """Return the outermost of these modules that contains the key; empty if none does."""
    return next((key[: dot.start()] for dot in re.finditer(r"\.", key) if key[: dot.start()] in modules), "")


def _with_bias(key: str, named: Mapping[str, Named], config: Mapping[str, Any]) -> str:
    """Return the module whose trained bias has this key: an adapted layer, or any module with ``bias="all"``."""
    if config.get("bias", "none") == "none" or not key.endswith(".bias"):
        return ""
    name = key.removesuffix(".bias").removesuffix(".base_layer")
    return name if name in named and _has_bias(named[name].module) else ""


def _has_bias(module: nn.Module) -> bool:
    return module._parameters.get("bias") is not None


def _stray(key: str) -> str:
    if "lora_embedding" in key:
        return f"{key}: convlora does not adapt embeddings"
    if key.endswith("lora_B.bias"):
        return f"{key}: {REASONS['lora_bias']}"
    return f"{key}: it belongs neither to a layer's change nor to a module of modules_to_save that the model has"


def _shared(name: str, named: Mapping[str, Named]) -> str:
    others = set(named[name].names) - {name}
    return f"{name}: the same module as {', '.join(others)}; peft trains only one of the two" if others else ""
