"""``convlora inspect``: what a saved adapter is, from its file alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .._checkpoint.contents import State
from .._checkpoint.digests import fingerprint
from .._checkpoint.files import opened
from .._checkpoint.foreign import file_in
from .._checkpoint.locon import is_locon
from .._checkpoint.manifest import CONFIG
from .._checkpoint.peft_format import ALONE, REGISTERED, STOCK
from .answers import Answer, CommandError, table
from .files import Saved, is_foreign, is_stock_peft, located, read_fields, read_saved
from .planning import plan_data

READERS = {
    STOCK: "stock peft reads it and predicts the same",
    REGISTERED: "peft reads it after convlora.peft.register()",
    ALONE: "convlora alone reads it",
}
PAIRS = {"peft": ("lora_A.weight", "lora_B.weight"), "locon": ("lora_down.weight", "lora_up.weight")}
"""How a layer's two factors end, by whose file it is."""


def inspect(
    source: Annotated[str, typer.Argument(metavar="DIR", help="A folder, a file, or user/repo.", show_default=False)],
) -> Answer:
    """Show what a saved adapter holds, without a model: layers, ranks, sizes, metrics, and which base it is for."""
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
    """Another library's file: its factors by name; what they are in a model only a model can say."""
    with opened(file) as stored:
        tensors = stored.read()
    kind = "peft" if is_stock_peft(file) else "locon" if is_locon(tensors) else ""
    if not kind:
        raise CommandError(f"{file} is neither convlora's, nor peft's, nor a LoCon file. Nothing was changed.")
    layers = list(_pairs(tensors, *PAIRS[kind]))
    config = read_fields(file.parent / CONFIG) if kind == "peft" else {}
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
    rows = [(each["name"], str(each["rank"]), _sizes(each["lora_A"]), _sizes(each["lora_B"])) for each in layers]
    whose = "Hugging Face peft" if kind == "peft" else "LyCORIS or kohya's scripts"
    return Answer(
        data,
        [
            f"written by {whose}; `convlora convert MODEL {file} OUT` makes it convlora's",
            table(("layer", "rank", "A", "B"), rows, "lrll"),
            f"other tensors: {len(tensors) - len(names)}",
            f"file: {file}, {size / 1e6:,.2f} MB",
        ],
    )


def _pairs(tensors: State, first: str, second: str) -> list[dict[str, Any]]:
    found = []
    for key, down in tensors.items():
        other = key.removesuffix(first) + second
        if key.endswith(f".{first}") and other in tensors:
            found.append(
                {
                    "name": key.removesuffix(f".{first}"),
                    "rank": down.shape[0],
                    "lora_A": list(down.shape),
                    "lora_B": list(tensors[other].shape),
                    "tensors": [key, other],
                }
            )
    return found


def _sizes(shape: list[int]) -> str:
    return "×".join(map(str, shape))
