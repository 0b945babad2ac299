"""Reads an adapter's file without a model, and checks that it is undamaged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .._checkpoint.files import opened, read_json
from .._checkpoint.foreign import file_in
from .._checkpoint.hub import local_directory
from .._checkpoint.loading import read_tensors
from .._checkpoint.manifest import CONFIG, TENSORS, Manifest, is_own, read_manifest
from .answers import CommandError


@dataclass(frozen=True)
class Saved:
    """A saved adapter: its manifest, its tensors by key without peft's prefix, and adapter_config.json."""

    manifest: Manifest
    tensors: dict[str, Tensor]
    config: dict[str, Any]


def located(source: str) -> Path:
    """Return a local path, or the cached download of a repository on the hub.

    Raises:
        CommandError: the path does not exist.
    """
    path = local_directory(source, None, None)
    if not path.exists():
        raise CommandError(f"{path} does not exist. Nothing was changed.")
    return path


def is_foreign(path: Path) -> bool:
    """Return whether another library wrote the adapter.

    Raises:
        CheckpointError: the file is missing or damaged, or the directory holds several.
    """
    with opened(file_in(path)) as file:
        return not is_own(file)


def read_saved(path: Path) -> Saved:
    """Read a saved adapter and compare every tensor with its digest.

    Raises:
        CheckpointError: the file is missing, damaged, or not convlora's.
    """
    with opened(file_in(path)) as file:
        manifest = read_manifest(file)
        tensors = read_tensors(file, manifest)
    return Saved(manifest, tensors, read_fields(manifest.file.parent / CONFIG))


def read_fields(file: Path) -> dict[str, Any]:
    """Return the fields of a JSON file; none if it is missing, since no prediction depends on it."""
    found = read_json(file) if file.exists() else {}
    return found if isinstance(found, dict) else {}


def is_stock_peft(file: Path) -> bool:
    """Return whether this is peft's file of tensors, with its configuration in the same directory."""
    return file.name == TENSORS and (file.parent / CONFIG).is_file()
