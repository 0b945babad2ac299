"""``save_adapter``: writes an adapter as safetensors and JSON, never pickle.

``adapter_model.safetensors`` alone is enough to load the adapter. It holds factors, modules trained in full and changed
buffers. Its header holds the manifest (the plan, and a digest of every tensor of the base and of the adapter) and a
digest of the header itself. One file means one atomic rename, so an interrupted save leaves the old adapter readable.
``adapter_config.json`` is for people and for Hugging Face peft; both files use peft's names. ``README.md`` is a model
card.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save
from torch import nn

from .._layer.places import BASE
from .._model.integrity import check_nothing_outside, refuse_changed
from .._model.keys import base_keys, own_keys, tensors_as
from .._model.merge import unmerged
from .._model.options import check_alpha
from .._model.state import Adapter, Injection, ready_alone, the_adapter
from .._model.written import follow, make_places_of_changed
from ..errors import CheckpointError, StateError, few, warn
from .atomic import put_back, replacing, tidy
from .card import CARD, About, card, checked_about, is_replaceable
from .contents import State, adapter_state, moved_buffers
from .digests import digest, sketch
from .files import finite_faults, for_disk, sealed
from .manifest import CONFIG, FORMAT, PICKLES, TENSORS
from .peft_format import PREFIX, peft_config


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    metrics: Mapping[str, float] | None = None,
    base_model: str | None = None,
) -> Path:
    """Write everything that training changed: factors, head, and running statistics that changed; a few MB.

    >>> convlora.save_adapter(model, "tumour/")

    The directory is made if it is missing; an adapter in it is replaced atomically. The model may be merged. A model
    card, README.md, is written too, unless the directory has a card that was edited or not written by convlora.

    Args:
        model: an injected model, merged or not.
        directory: the directory to write to.
        adapter_name: one of the model's adapters; default the active one.
        metrics: metrics for the card and the file: ``{"accuracy": 0.95}``.
        base_model: the base's name on the Hugging Face Hub, for the card: ``"timm/resnet50.a1_in1k"``.

    Returns:
        The directory.

    Raises:
        StateError: the model holds no adapter, or several injected parts; :func:`convlora.check` finds it changed since
            injection; a factor is pruned or parametrized; or a parameter outside the adapter requires a gradient, so
            that its training would be lost.
        CheckpointError: the directory cannot be written; the files in it are unchanged.
        TargetError: a metric is not a finite number, or ``base_model`` is not a name on the hub.

    Warns:
        UserWarning: every lora_B is zero, as when the optimizer was made before the injection; a tensor holds NaN or
            Inf; a parameter of the base changed without a gradient; or README.md was kept.
    """
    return write_adapter(model, directory, adapter_name, checked_about(metrics, base_model))


def write_adapter(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str | None, about: About) -> Path:
    """Do what :func:`save_adapter` does, with this in the model card."""
    if Path(directory).suffix in (".safetensors", *PICKLES) and not Path(directory).is_dir():
        raise CheckpointError(
            f"{directory} is a file's name, and an adapter is saved as a directory of three files. Give a directory, "
            f"such as {str(Path(directory).with_suffix(''))!r}. Nothing was written."
        )
    root, injection, adapter = adapter_to_write(model, adapter_name)
    with unmerged(root, injection):
        check_nothing_lost(root, injection)
        buffers = moved_buffers(root, injection, adapter)
        own = own_keys(root, adapter.plan, buffers)
        tensors = {key: for_disk(tensor) for key, tensor in adapter_state(root, adapter, own).items()}
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
    warn_of_training(injection, adapter, tensors, base)
    path = Path(directory)
    texts = {CONFIG: json.dumps(config, indent=2) + "\n"}
    has_new_card = is_replaceable(path / CARD)
    if has_new_card:
        texts[CARD] = card(adapter.plan, digests, tensors, about)
    try:
        _write(path, tensors, manifest, texts)
    except (OSError, SafetensorError) as cause:  # safetensors raises its own error for a full disk
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
        # Not save_file, whose own temporary file would stay behind when the process is killed.
        data = sealed(save({PREFIX + key: tensor for key, tensor in tensors.items()}, metadata=header))
        with first.open("wb") as stream:
            stream.writelines(data)
        for name, text in texts.items():
            files.enter_context(replacing(path / name)).write_bytes(text.encode())


def adapter_to_write(model: nn.Module, adapter_name: str | None) -> tuple[nn.Module, Injection, Adapter]:
    """Return the injected module, its record and the adapter to write, after the checks that need no base in place.

    The adapter's plan then has the scalings and strengths that the user set by hand, and the parameters that changed
    without a gradient.

    Raises:
        StateError: as from :func:`save_adapter`.
    """
    root, injection = ready_alone(model)
    adapter = the_adapter(injection, adapter_name)
    adapter.follow()
    for layer in adapter.plan.layers:
        check_alpha(layer.scaling, f"scaling of {layer.name} was changed and")
    refuse_changed(root, injection, adapter)
    check_nothing_outside(model, root)
    _take_in_changed(root, injection, adapter)
    return root, injection, adapter


def warn_of_training(injection: Injection, adapter: Adapter, tensors: State, base: State) -> None:
    """Warn if an adapter that is about to be written was not trained, or its training has diverged."""
    biases = {adapter.modules[name] for name in adapter.plan.biases}  # a training may change only biases
    places = (place for place in injection.places if place.module in biases and place.name == "bias")
    moved = any(place.has_moved(adapter.plan.adapter_name) for place in places)
    if adapter.changes and not moved and all(change.is_fresh() for change in adapter.changes):
        what = {planned.change.fresh for planned in adapter.plan.layers}
        warn(
            f"every {' and every '.join(sorted(what))}: nothing was trained. Was the optimizer made before "
            "convlora.inject? Make it after, from convlora.trainable_parameters(model)."
        )
    if faults := list(finite_faults(tensors, base)):
        warn(
            f"{' '.join(few(faults, 'and {} more', shown=1))}: the training has diverged. The adapter is written "
            "nevertheless; convlora.load_adapter reads it only with check_finite=False."
        )


def _take_in_changed(root: nn.Module, injection: Injection, adapter: Adapter) -> None:
    changed = make_places_of_changed(root, injection)
    follow(root, injection, [adapter])
    if changed:
        warn(
            f"{', '.join(few(changed, 'and {} more'))}: changed since convlora.inject without a gradient. The new "
            "values are saved with the adapter, so that it predicts the same when it is loaded. The old values are "
            "lost: convlora.remove leaves the new ones in the base.",
        )


def warn_of_old_card(file: Path) -> None:
    """Warn that a model card was not written."""
    warn(
        f"{file} was edited, or not written by convlora, and is kept: it may not describe this adapter. Delete it to "
        "get a new one.",
    )


def check_nothing_lost(root: nn.Module, injection: Injection) -> None:
    """Raise StateError if a parameter of the unmerged model requires a gradient and is not the adapter's."""
    own = own_keys(root, injection.adapters[injection.active].plan, ())
    factors = {id(p) for adapter in injection.adapters.values() for p in adapter.parameters()}
    for name, parameter in root.named_parameters():
        if parameter.requires_grad and name not in own and id(parameter) not in factors:
            raise StateError(
                f"{name} requires a gradient but belongs to the base, which is not saved. Name its module in "
                "modules_to_save when you inject, or freeze it with requires_grad_(False). Nothing was written."
            )
