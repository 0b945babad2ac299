"""Writing an adapter: safetensors and JSON, never pickle.

``adapter_model.safetensors`` is whole in itself: factors, modules trained in full, buffers that moved, and in its
header the manifest (the plan, and a digest of every tensor of the base and of the adapter) and a digest of the header
itself. One file means one atomic rename: a save that is cut short leaves the old adapter readable.
``adapter_config.json`` beside it is for people and for Hugging Face peft, whose key and field names both files use, and
``README.md`` a model card.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from .._layer.places import BASE
from .._model.integrity import check_nothing_outside, refuse_changed
from .._model.keys import base_keys, own_keys, tensors_as
from .._model.merge import unmerged
from .._model.options import check_alpha
from .._model.state import Adapter, Injection, ready_alone, the_adapter
from .._model.written import follow, own_changed
from ..errors import CheckpointError, StateError, few
from .atomic import put_back, replacing, tidy
from .card import CARD, About, card, checked_about, is_replaceable
from .contents import State, adapter_state, moved_buffers
from .digests import digest, sketch
from .files import finite_faults, sealed
from .manifest import CONFIG, FORMAT, TENSORS
from .peft_format import PREFIX, peft_config

FILES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt"}
"""Endings by which a name is told to be a file's."""


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    metrics: Mapping[str, float] | None = None,
    base_model: str | None = None,
) -> Path:
    """Write everything that training changed: factors, head, and norm statistics that moved; a few MB.

    >>> convlora.save_adapter(model, "tumour/")

    The directory is made where missing; an adapter already in it is replaced atomically. Works merged, too. Beside it
    goes a model card, README.md; one that you have edited, or that is another's, is left as it is.

    Args:
        model: an injected model.
        directory: where to write.
        adapter_name: one of the model's adapters; default the active one.
        metrics: what card and file say of how good it is: ``{"accuracy": 0.95}``.
        base_model: the base's name on the Hugging Face Hub, for the card: ``"timm/resnet50.a1_in1k"``.

    Returns:
        The directory.

    Raises:
        StateError: the model holds no adapter, or several injected parts; :func:`convlora.check` finds it changed since
            injection; a factor is pruned or parametrized; or a parameter of the base, or outside of the injected part,
            requires a gradient, so that training it would be lost.
        CheckpointError: the directory cannot be written; what was there before is still there.
        TargetError: a metric is no finite number, or ``base_model`` no name on the hub.

    Warns:
        UserWarning: every lora_B is zero, as when the optimizer was made before the injection; a tensor holds NaN or
            Inf; or README.md was left as it is.
    """
    return write_adapter(model, directory, adapter_name, checked_about(metrics, base_model))


def write_adapter(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str | None, about: About) -> Path:
    """What :func:`save_adapter` does, with a card that says this; a warning names the caller's caller's line."""
    if Path(directory).suffix in FILES and not Path(directory).is_dir():
        raise CheckpointError(
            f"{directory} is a file's name, and an adapter is saved as a directory of three files. Give "
            f"{str(Path(directory).with_suffix(''))!r}, say. Nothing was written."
        )
    root, injection = ready_alone(model)
    adapter = the_adapter(injection, adapter_name)
    adapter.follow()
    for layer in adapter.plan.layers:
        check_alpha(layer.scaling, f"scaling of {layer.name} was changed and")
    refuse_changed(root, injection, adapter)
    check_nothing_outside(model, root)
    _take_in_changed(root, injection, adapter)
    with unmerged(root, injection):
        buffers = moved_buffers(root, injection, adapter)
        own = own_keys(root, adapter.plan, buffers)
        _check_nothing_lost(root, injection)
        tensors = {key: _for_disk(tensor) for key, tensor in adapter_state(root, adapter, own).items()}
        base = tensors_as(root, BASE)
        of_base = base_keys(root, base, own)
        config = peft_config(root, adapter) | {"base_model_name_or_path": about.base_model}
    digests = {key: digest(base[key]) for key in of_base}
    manifest = {
        "format": FORMAT,
        "plan": adapter.plan.to_json(),
        "base": digests,
        "sketches": {key: sketch(base[key]) for key in digests},
        "adapter": {key: digest(tensor) for key, tensor in tensors.items()},
        "buffers": sorted(buffers),
        "metrics": dict(about.metrics),
    }
    _warn_if_untrained(injection, adapter)
    _warn_if_not_finite(tensors, base)
    path = Path(directory)
    texts = {CONFIG: json.dumps(config, indent=2) + "\n"}
    has_new_card = is_replaceable(path / CARD)
    if has_new_card:
        texts[CARD] = card(adapter.plan, digests, tensors, about)
    try:
        _write(path, tensors, manifest, texts)
    except (OSError, SafetensorError) as cause:  # safetensors wraps a full disk in its own
        raise CheckpointError(f"{path} cannot be written ({cause}). What was there before is still there.") from cause
    if not has_new_card:
        warn_of_old_card(path / CARD)
    return path


def _write(path: Path, tensors: State, manifest: dict[str, Any], texts: Mapping[str, str]) -> None:
    header = {"format": "pt", "convlora": json.dumps(manifest)}
    path.mkdir(parents=True, exist_ok=True)
    tidy(path, (TENSORS, CONFIG, CARD))
    with ExitStack() as files:
        files.enter_context(put_back([path / name for name in texts]))
        first = files.enter_context(replacing(path / TENSORS))
        # Not save_file, which makes a temporary file of its own, under a name that nobody could clear away later.
        data = sealed(save({PREFIX + key: tensor for key, tensor in tensors.items()}, metadata=header))
        with first.open("wb") as stream:
            stream.writelines(data)
        for name, text in texts.items():
            files.enter_context(replacing(path / name)).write_bytes(text.encode())


def _warn_if_untrained(injection: Injection, adapter: Adapter) -> None:
    biases = {adapter.modules[name] for name in adapter.plan.biases}  # which may be all that was trained
    places = (place for place in injection.places if place.module in biases and place.name == "bias")
    moved = any(place.has_moved(adapter.plan.adapter_name) for place in places)
    if adapter.changes and not moved and all(change.is_fresh() for change in adapter.changes):
        what = {planned.change.fresh for planned in adapter.plan.layers}
        warnings.warn(
            f"every {' and every '.join(sorted(what))}: nothing was trained. Was the optimizer made before "
            "convlora.inject? Make it after, from convlora.trainable_parameters(model).",
            stacklevel=4,
        )


def _take_in_changed(root: nn.Module, injection: Injection, adapter: Adapter) -> None:
    changed = own_changed(root, injection)
    follow(root, injection, adapter)
    if changed:
        warnings.warn(
            f"{', '.join(few(changed, 'and {} more'))}: changed since convlora.inject, and no gradient did it. It is "
            "saved with the adapter, which so predicts the same when it is loaded; convlora.remove gives the base "
            "these numbers, since those of before are lost.",
            stacklevel=4,
        )


def _warn_if_not_finite(tensors: State, base: State) -> None:
    faults = list(finite_faults(tensors, base))
    if faults:
        first = " ".join(few(faults, "and {} more", shown=1))
        warnings.warn(
            f"{first}: the training has diverged. It is saved as it is, and convlora.load_adapter reads it "
            "with check_finite=False alone.",
            stacklevel=4,
        )


def warn_of_old_card(file: Path) -> None:
    """Say that a card was not written; of the caller's caller's caller's line."""
    warnings.warn(
        f"{file} was edited, or not written by convlora, and is left as it is: it may not describe this adapter. "
        "Delete it to have a new one.",
        stacklevel=4,
    )


def _check_nothing_lost(root: nn.Module, injection: Injection) -> None:
    own = own_keys(root, injection.adapters[injection.active].plan, ())
    factors = {id(p) for adapter in injection.adapters.values() for p in adapter.parameters()}
    for name, parameter in root.named_parameters():
        if parameter.requires_grad and name not in own and id(parameter) not in factors:
            raise StateError(
                f"{name} requires a gradient but belongs to the base, which is not saved. Name its module in "
                "modules_to_save when you inject, or freeze it with requires_grad_(False). Nothing was written."
            )


def _for_disk(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()
