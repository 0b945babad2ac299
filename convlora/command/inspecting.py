"""``convlora inspect``: shows a saved adapter from its file, without a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from .._checkpoint.contents import State
from .._checkpoint.digests import fingerprint
from .._checkpoint.files import opened
from .._checkpoint.foreign import file_in
from .._checkpoint.lycoris import by_layer, is_lycoris, method_of
from .._checkpoint.manifest import CONFIG
from .._checkpoint.peft_methods import ALONE, PEFT_METHODS, REGISTERED, STOCK
from .answers import Answer, CommandError, table
from .files import Saved, is_foreign, is_stock_peft, located, read_fields, read_saved
from .planning import plan_data

READERS = {
    **dict.fromkeys(PEFT_METHODS, "stock peft reads it and predicts the same"),
    REGISTERED: "peft reads it after convlora.peft.register()",
    ALONE: "convlora alone reads it",
}
RANKED = ("lora_A.weight", "lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b", "hira_A")
"""The tensors whose first dimension is the rank."""


def inspect(source: str) -> Answer:
    """Show an adapter's layers, ranks, sizes, metrics, and the base that it is for."""
    path = located(source)
    return _of_foreign(file_in(path)) if is_foreign(path) else _of_saved(read_saved(path))


def _of_saved(saved: Saved) -> Answer:
    manifest, kind = saved.manifest, str(saved.config.get("peft_type", "unknown"))
    size = manifest.file.stat().st_size
    base = fingerprint(manifest.base)
    data: dict[str, Any] = {
        "format": "convlora",
        "file": str(manifest.file),
        "bytes": size,
        "plan": plan_data(manifest.plan),
        "base": {
            "fingerprint": base,
            "tensors": len(manifest.base),
            "name": saved.config.get("base_model_name_or_path"),
        },
        "tensors": {key: list(tensor.shape) for key, tensor in saved.tensors.items()},
        "buffers": sorted(manifest.buffers),
        "metrics": dict(manifest.metrics),
        "peft_type": kind,
    }
    lines = [
        str(replace(manifest.plan, state="saved")),
        f"file: {manifest.file}, {size / 1e6:,.2f} MB, every tensor as it was saved",
    ]
    named = f" ({data['base']['name']})" if data["base"]["name"] else ""
    lines.append(f"base: fingerprint {base} over {len(manifest.base)} tensors{named}")
    lines += [f"buffers that moved: {', '.join(data['buffers'])}"] if manifest.buffers else []
    lines += [f"{name}: {value:g}" for name, value in manifest.metrics.items()]
    lines.append(f"peft_type {kind}: {READERS.get(kind, f'there is no {CONFIG} of a known type beside it')}")
    return Answer(data, lines)


def _of_foreign(file: Path) -> Answer:
    """Show another library's file: each layer's tensors as they are, which only a model could check."""
    with opened(file) as stored:
        tensors = stored.read()
    kind = "peft" if is_stock_peft(file) else "lycoris" if is_lycoris(tensors, None) else ""
    if not kind:
        raise CommandError(f"{file} is not a file of convlora, peft or LyCORIS. Nothing was changed.")
    config = read_fields(file.parent / CONFIG) if kind == "peft" else {}
    layers = _of_peft(tensors, config) if kind == "peft" else _of_lycoris(tensors)
    names = {name for layer in layers for name in layer["tensors"]}
    size = file.stat().st_size
    data = {
        "format": kind,
        "file": str(file),
        "bytes": size,
        "layers": layers,
        "others": {key: list(tensor.shape) for key, tensor in tensors.items() if key not in names},
        "config": config,
    }
    rows = [
        (each["name"], each["method"], str(each["rank"] or "-"), ", ".join(map(_sizes, each["tensors"].values())))
        for each in layers
    ]
    whose = "Hugging Face peft" if kind == "peft" else "LyCORIS or kohya's scripts"
    return Answer(
        data,
        [
            f"written by {whose}; `convlora convert MODEL {file} OUT` makes it convlora's",
            table(("layer", "method", "rank", "tensors"), rows, "llrl"),
            f"other tensors: {len(tensors) - len(names)}",
            f"file: {file}, {size / 1e6:,.2f} MB",
        ],
    )


def _of_peft(tensors: State, config: dict[str, Any]) -> list[dict[str, Any]]:
    kind = str(config.get("peft_type"))
    method = PEFT_METHODS.get(STOCK if kind == REGISTERED else kind)
    layers: dict[str, State] = {}
    for key, tensor in tensors.items():
        name, part = method.split(key) if method else ("", "")
        if part:
            layers.setdefault(name, {})[part] = tensor
    return [_layer(name, kind, parts) for name, parts in layers.items()]


def _of_lycoris(tensors: State) -> list[dict[str, Any]]:
    found = ((name, parts, method_of(parts)) for name, parts in by_layer(tensors).items())
    return [_layer(name, method.name, parts) for name, parts, method in found if method]


def _layer(name: str, method: str, parts: State) -> dict[str, Any]:
    ranks = [parts[part].shape[0] for part in RANKED if part in parts and parts[part].ndim]
    shapes = {f"{name}.{part}": list(tensor.shape) for part, tensor in parts.items()}
    return {"name": name, "method": method, "rank": ranks[0] if ranks else None, "tensors": shapes}


def _sizes(shape: list[int]) -> str:
    return "×".join(map(str, shape)) or "1"
