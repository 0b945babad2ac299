"""Adapters that convlora did not write: which file it is, and who reads it."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from ._locon import from_locon_tensors, is_locon
from ._manifest import TENSORS, Manifest
from ._peft_reader import from_peft_tensors, read_config
from ._rebuilt import State, read_tensors, rebuild
from .errors import CheckpointError

CONFIG = "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def read_foreign(path: Path, root: nn.Module, adapter_name: str) -> tuple[Manifest, State] | None:
    """The adapter that Hugging Face peft, kohya's scripts or LyCORIS wrote there, made to fit this model.

    Args:
        path: a directory, or a safetensors file.
        root: the base, plain or with adapters.
        adapter_name: what it will be called.

    Returns:
        Its manifest and tensors; None where the path is convlora's own, or nothing is there.

    Raises:
        CheckpointError: it cannot be read, or not exactly, or does not fit the model.
    """
    file = foreign_file(path)
    if file is None:
        return None
    if (file.parent / CONFIG).is_file() and file.name == TENSORS:
        config, tensors = read_config(file.parent / CONFIG), read_tensors(file)
        return rebuild(from_peft_tensors(config, tensors, root, str(file)), root, adapter_name)
    tensors = read_tensors(file)
    if is_locon(tensors):
        return rebuild(from_locon_tensors(tensors, root, str(file)), root, adapter_name)
    raise CheckpointError(
        f"{file} holds no convlora manifest, no {CONFIG} of peft lies beside it, and its tensors are not named as in "
        "kohya's and LyCORIS' LoRA files. Nothing was changed."
    )


def foreign_file(path: Path) -> Path | None:
    """The file to read at a path, a directory's or itself; None where it is convlora's own, damaged, or missing.

    Raises:
        CheckpointError: there are several, or a pickle alone.
    """
    if path.suffix in PICKLES and path.is_file():
        raise _pickled(path)
    if path.is_dir() and not (path / TENSORS).is_file():
        files = sorted(path.glob("*.safetensors"))
        pickles = [file for file in sorted(path.iterdir()) if file.suffix in PICKLES]
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise CheckpointError(f"{path} holds several files ({names}); give one of them. Nothing was changed.")
        if not files and pickles:
            raise _pickled(pickles[0])
        file = files[0] if files else path / TENSORS
    else:
        file = path / TENSORS if path.is_dir() else path
    return file if file.is_file() and not _is_own(file) else None


def _is_own(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt") as opened:
            return "convlora" in (opened.metadata() or {})
    except (SafetensorError, OSError):
        return file.name == TENSORS  # damaged: the reader of convlora's files will say so


def _pickled(file: Path) -> CheckpointError:
    return CheckpointError(
        f"{file} is a pickle, which could run any code when it is read. Where you trust it, write it anew: "
        f"safetensors.torch.save_file(torch.load({file.name!r}, weights_only=True), {TENSORS!r}). Nothing was changed."
    )
