"""Loads weights from a file: safetensors, or a state dict that torch reads with ``weights_only=True``."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import typer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .._model.planner import plan
from ..errors import ConvLoraError, listing
from .answers import CommandError

State = dict[str, Tensor]
INSIDE = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts save the state dict."""
PREFIXES = ("module.", "_orig_mod.")
"""The prefixes that DDP and torch.compile put before every key."""
PICKLED = (b"PK", b"\x80")
"""The first bytes of a file of torch.save: a ZIP file, or a pickle."""


def load_weights(
    model: nn.Module, source: Path | Mapping[str, Tensor], name: str | None = None, *, head: bool = True
) -> None:
    """Load a file or a state dict, which must have every key of the model, in the same shape.

    Args:
        model: the model, changed in place.
        source: the file, or the state dict.
        name: the name of the source in errors.
        head: whether a head with another number of classes is allowed. It keeps its initial weights, and a line on
            stderr says so. A head that the file lacks is an error like any other missing key.

    Raises:
        CommandError: the file cannot be read or does not fit; every difference is named.
    """
    name = name or str(source)
    state = read_weights(source) if isinstance(source, Path) else dict(source)
    here = model.state_dict()
    others: tuple[str, ...] = ()
    if head:
        state, others = _without_other_heads(model, state, here, name)
    faults = [
        f"{key}: {tuple(state[key].shape)} in the file, {tuple(here[key].shape)} in the model"
        for key in here
        if key in state and isinstance(here[key], Tensor) and state[key].shape != here[key].shape
    ]
    if not faults:
        answer = model.load_state_dict(state, strict=False)
        faults = [f"{key}: not in the file" for key in answer.missing_keys if not _inside(key, others)]
        faults += [f"{key}: not in the model" for key in answer.unexpected_keys]
    if faults:
        title, remedy = f"{name} holds the weights of another model:", "Give the name of that model."
        raise CommandError(listing(title, faults, f"{remedy} Nothing was changed."))


def read_weights(file: Path) -> State:
    """Return the state dict in a file.

    Raises:
        CommandError: the file is missing, damaged, or holds more than tensors.
    """
    try:
        found: Any = load_file(file) if file.suffix == ".safetensors" else _unpickled(file)
    except CommandError:
        raise
    except (SafetensorError, OSError, RuntimeError, ValueError) as cause:
        raise CommandError(f"{file} cannot be read ({str(cause).splitlines()[0]}). Nothing was changed.") from cause
    found = next((found[key] for key in INSIDE if isinstance(found, dict) and isinstance(found.get(key), dict)), found)
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise CommandError(f"{file} holds no state dict of tensors. Nothing was changed.")
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in found):
            found = {key.removeprefix(prefix): tensor for key, tensor in found.items()}
    return dict(found)


def _unpickled(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError):
        raise
    except Exception as cause:  # torch unpickles any file, so a file of another format can raise anything
        with file.open("rb") as stream:
            is_pickle = stream.read(4).startswith(PICKLED)
        if not (is_pickle and isinstance(cause, pickle.UnpicklingError)):
            raise CommandError(
                f"{file} is damaged, or torch.save did not write it ({type(cause).__name__}). Nothing was changed."
            ) from cause
        raise CommandError(
            f"{file} holds more than tensors, and reading it could run any code; torch.load(…, weights_only=True) "
            "refuses it. If you trust it, save its state dict with safetensors.torch.save_file. Nothing was changed."
        ) from cause


def _without_other_heads(
    model: nn.Module, state: State, here: Mapping[str, Any], name: str
) -> tuple[State, tuple[str, ...]]:
    """Return the state dict without heads of another shape, and the names of those heads."""
    other = [key for key in state if key in here and state[key].shape != here[key].shape]
    heads = tuple(head for head in _heads(model) if any(_inside(key, (head,)) for key in other)) if other else ()
    if not other or not all(_inside(key, heads) for key in other):
        return state, ()
    for head in heads:
        key = next(key for key in other if _inside(key, (head,)))
        shape = tuple(state[key].shape)
        typer.echo(f"{name}: {key} has the shape {shape} of another head; the model's head is not loaded.", err=True)
    return {key: tensor for key, tensor in state.items() if not _inside(key, heads)}, heads


def _heads(model: nn.Module) -> tuple[str, ...]:
    try:
        return plan(model, 1).modules_to_save
    except ConvLoraError:  # the command itself raises this error for a model that cannot be adapted
        return ()


def _inside(key: str, modules: tuple[str, ...]) -> bool:
    return any(key.startswith(f"{name}.") for name in modules)
