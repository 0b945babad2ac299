"""``convlora merge``, ``convert``, ``extract`` and ``shrink``: they read a model and an adapter, and write OUT.

OUT is written last and in one step, so that an error leaves no incomplete file or folder.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError
from torch import nn

from .._algebra.approximation import Approximation
from .._algebra.extract import extract as extract_adapter
from .._algebra.shrink import shrink as shrink_adapter
from .._checkpoint.card import CARD, is_replaceable
from .._checkpoint.exporting import export_adapter
from .._checkpoint.files import write_tensors
from .._checkpoint.loading import load_adapter
from .._checkpoint.manifest import TENSORS
from .._checkpoint.saving import save_adapter, warn_of_old_card
from .._model.adapters import scaled
from .._model.keys import tensors_of
from .._model.merge import merge as merge_adapter
from .._model.remove import remove
from .._model.summary import summary
from .answers import Answer, CommandError
from .files import is_foreign, located
from .models import Built, build, need_weights
from .options import Building, Nearness, Targeting, To
from .weights import load_weights

FOREIGN = "the file of another library does not describe its base"


def merge(
    model: str,
    source: str,
    out: Path,
    building: Building,
    factor: float,
    interpolate: bool,
    any_base: bool,
    force: bool,
) -> Answer:
    """Fold an adapter into the model's weights and write the plain state dict."""
    if out.suffix != ".safetensors":
        raise CommandError(f"{out}: OUT must be a .safetensors file. Nothing was written.")
    _check_free(out, force)
    path = located(source)
    built = build(model, building)
    if is_foreign(path):
        need_weights(built, FOREIGN)
    plain = built.model
    _load(built, path, any_base)
    layers = len(summary(plain).layers)
    with scaled(plain, factor, interpolate=interpolate):
        plain = remove(merge_adapter(plain))
    state = tensors_of(plain)
    write_tensors(out, state)
    size = out.stat().st_size
    data = {"out": str(out), "bytes": size, "layers": layers, "tensors": len(state), "scale": factor}
    strength = "" if factor == 1 else f" at {factor:g} of the adapter's strength"
    return Answer(data, [f"wrote {out}: {len(state)} tensors, {size / 1e6:,.2f} MB, {layers} layers merged{strength}"])


def convert(
    model: str, source: str, out: Path, building: Building, to: To, prefix: str | None, any_base: bool, force: bool
) -> Answer:
    """Turn an adapter of peft, diffusers, LyCORIS or kohya into convlora's files, or convlora's into theirs."""
    if to in ("diffusers", "lycoris") and out.suffix != ".safetensors":
        raise CommandError(f"{out}: OUT must be a .safetensors file for --to {to}. Nothing was written.")
    _check_free(out, force)
    path = located(source)
    foreign = is_foreign(path)
    if to == "convlora" and not foreign:
        raise CommandError(f"{source} is convlora's already; --to peft makes it peft's. Nothing was written.")
    built = build(model, building)
    if to == "convlora":
        need_weights(built, FOREIGN)
    _load(built, path, any_base, prefix if foreign else None)
    planned = summary(built.model)
    if to == "diffusers" or to == "lycoris":
        export_adapter(built.model, out, to, prefix=None if foreign else prefix)
    else:
        _fill(out, save_adapter if to == "convlora" else _save_as_peft, built.model)
    data = {"out": str(out), "to": to, "layers": len(planned.layers), "adapter_parameters": planned.adapter_parameters}
    return Answer(
        data, [f"wrote {out}: {len(planned.layers)} layers, {planned.adapter_parameters:,} parameters in factors"]
    )


def extract(
    model: str, tuned: Path, out: Path, building: Building, targeting: Targeting, nearness: Nearness, force: bool
) -> Answer:
    """Make an adapter of what a full fine-tuning changed; ``building`` has the weights before it."""
    _check_free(out, force)
    built = build(model, building)
    need_weights(built, "the fine-tuning's change is the difference to the weights before it")
    after = copy.deepcopy(built.model)
    load_weights(after, tuned, head=False)
    report = extract_adapter(built.model, after, **nearness.arguments(), **targeting.arguments())
    _fill(out, save_adapter, built.model)
    return _approximated(report, out)


def shrink(model: str, source: str, out: Path, building: Building, nearness: Nearness, force: bool) -> Answer:
    """Give each layer the nearest change that it can have at a lower rank."""
    _check_free(out, force)
    built = build(model, building)
    base = built.model
    _load(built, located(source))
    report = shrink_adapter(base, **nearness.arguments())
    _fill(out, save_adapter, base)
    return _approximated(report, out)


def _load(built: Built, path: Path, any_base: bool = False, prefix: str | None = None) -> None:
    """Load an adapter; without ``any_base`` a base with random weights is refused, as no adapter was trained on it."""
    if not any_base:
        need_weights(built, "an adapter belongs to the weights that it was trained on")
    load_adapter(built.model, path, check_base=not any_base, prefix=prefix)


def _approximated(report: Approximation, out: Path) -> Answer:
    layers = [asdict(layer) | {"error": layer.error} for layer in report.layers]
    data = {"out": str(out), "error": report.error, "layers": layers, "left_out": list(report.left_out)}
    return Answer(data, [str(report), f"wrote {out}"])


def _save_as_peft(model: nn.Module, folder: Path) -> None:
    try:
        from ..peft import to_peft
    except ImportError as cause:
        raise CommandError(f"{cause} Nothing was written.") from cause
    to_peft(model).save_pretrained(str(folder))


def _check_free(out: Path, force: bool) -> None:
    """Raise CommandError, before any work, if OUT exists and is not empty."""
    if force or not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    raise CommandError(f"{out} exists already; --force writes into it nevertheless. Nothing was written.")


def _fill(out: Path, save: Callable[[nn.Module, Path], object], model: nn.Module) -> None:
    """Save into a temporary folder, then move every file into OUT, the tensors last; an edited card is kept."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as beside:
            made = Path(beside) / out.name
            save(model, made)
            out.mkdir(exist_ok=True)
            has_new_card = is_replaceable(out / CARD)
            for file in sorted(made.iterdir(), key=lambda file: file.name == TENSORS):
                if file.name != CARD or has_new_card:
                    shutil.move(file, out / file.name)
    except (OSError, SafetensorError) as cause:  # safetensors raises its own error for a full disk
        raise CommandError(f"{out} cannot be written ({cause}).") from cause
    if not has_new_card:
        warn_of_old_card(out / CARD)
