"""An adapter's file, read without a model and proved undamaged."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .._foreign import foreign_file
from .._hub import local_directory
from .._manifest import CONFIG, TENSORS, Manifest, digest, read_manifest
from .._peft_format import PREFIX
from .._rebuilt import read_tensors
from ..errors import CheckpointError
from .answers import CommandError


@dataclass(frozen=True)
class Saved:
    """What :func:`convlora.save_adapter` wrote: its manifest, its tensors without peft's prefix, and the config."""

    manifest: Manifest
    tensors: dict[str, Tensor]
    config: dict[str, Any]


def located(source: str) -> Path:
    """A path here, or the cache's copy of a repository on the hub.

    Raises:
        CommandError: nothing is there.
    """
    path = local_directory(source, None, None)
    if not path.exists():
        raise CommandError(f"{path} does not exist. Nothing was changed.")
    return path


def is_foreign(path: Path) -> bool:
    """Whether another library wrote it."""
    return foreign_file(path) is not None


def read_saved(path: Path) -> Saved:
    """A saved adapter, every tensor compared with its digest.

    Raises:
        CheckpointError: missing, damaged, or not convlora's.
    """
    manifest = read_manifest(path)
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in read_tensors(manifest.file).items()}
    damaged = [key for key, tensor in tensors.items() if digest(tensor) != manifest.adapter.get(key)]
    if damaged:
        raise CheckpointError(f"{manifest.file} is damaged: {damaged[0]} is not what was saved; get the file again.")
    return Saved(manifest, tensors, read_fields(path / CONFIG))


def read_fields(file: Path) -> dict[str, Any]:
    """What a JSON file beside the tensors says; nothing where it is missing, since no prediction depends on it."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as cause:
        raise CheckpointError(f"{file} cannot be read ({cause}).") from cause
    return found if isinstance(found, dict) else {}


def is_stock_peft(file: Path) -> bool:
    """Whether the tensors are peft's: its configuration lies beside them."""
    return file.name == TENSORS and (file.parent / CONFIG).is_file()
