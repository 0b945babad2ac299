"""An adapter's file, read without a model and proved undamaged."""

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
    """Whether another library wrote it.

    Raises:
        CheckpointError: missing or damaged, or there are several.
    """
    with opened(file_in(path)) as file:
        return not is_own(file)


def read_saved(path: Path) -> Saved:
    """A saved adapter, every tensor compared with its digest.

    Raises:
        CheckpointError: missing, damaged, or not convlora's.
    """
    with opened(file_in(path)) as file:
        manifest = read_manifest(file)
        tensors = read_tensors(file, manifest)
    return Saved(manifest, tensors, read_fields(manifest.file.parent / CONFIG))


def read_fields(file: Path) -> dict[str, Any]:
    """What a JSON file beside the tensors says; nothing where it is missing, since no prediction depends on it."""
    found = read_json(file) if file.exists() else {}
    return found if isinstance(found, dict) else {}


def is_stock_peft(file: Path) -> bool:
    """Whether the tensors are peft's: its configuration lies beside them."""
    return file.name == TENSORS and (file.parent / CONFIG).is_file()
