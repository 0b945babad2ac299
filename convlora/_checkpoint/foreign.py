"""Adapters that other libraries wrote: finds the format of a file and calls its reader."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ..errors import CheckpointError
from .contents import State
from .diffusers import from_diffusers_tensors, is_diffusers
from .files import TensorFile
from .lycoris import from_lycoris_tensors, is_lycoris
from .manifest import CONFIG, PICKLES, TENSORS, Manifest
from .peft_reader import from_peft_tensors, read_config
from .rebuilt import Found, rebuild


def read_foreign(
    file: TensorFile, root: nn.Module, adapter_name: str, prefix: str | None = None
) -> tuple[Manifest, State]:
    """Read an adapter that Hugging Face peft, diffusers, kohya's scripts or LyCORIS wrote.

    Args:
        file: the open file.
        root: the base, plain or with adapters.
        adapter_name: the adapter's name in the model.
        prefix: chooses one model's adapter from a file that holds several; None for the only one.

    Returns:
        The adapter's manifest and tensors. The tensors' values are read after names and shapes have been checked.

    Raises:
        CheckpointError: the file cannot be read, the adapter would predict something else here, or it does not fit the
            model.
    """
    origin, beside = str(file.path), file.path.parent / CONFIG
    config = read_config(beside) if file.path.name == TENSORS and beside.is_file() else None
    of_lycoris = is_lycoris(file.entries, prefix)
    if config is None and not of_lycoris and not is_diffusers(file):
        raise CheckpointError(
            f"{origin} holds no convlora manifest, peft's {CONFIG} is not beside it, and its tensors are not named as "
            "in files of diffusers, kohya's scripts and LyCORIS. Nothing was changed."
        )
    if config is not None and prefix is not None:
        raise no_prefix(origin)

    def found(tensors: Mapping[str, Tensor]) -> Found:
        if config is not None:
            return from_peft_tensors(config, tensors, root, origin)
        if of_lycoris:
            return from_lycoris_tensors(tensors, root, origin, prefix)
        return from_diffusers_tensors(file.metadata, tensors, root, origin, prefix)

    rebuild(found(file.outline()), root, adapter_name)
    return rebuild(found(file.read()), root, adapter_name)


def no_prefix(origin: object) -> CheckpointError:
    """Return the error for a prefix that was given for a format that holds one model's adapter."""
    return CheckpointError(
        f"{origin} holds the adapter of one model; prefix is for files of diffusers, kohya's scripts and LyCORIS, "
        "which may hold several. Leave it out. Nothing was changed."
    )


def file_in(path: Path) -> Path:
    """Return the path of the adapter's file, which may not exist.

    Raises:
        CheckpointError: the directory holds several files, or only pickles.
    """
    try:
        return _file_in(path)
    except OSError as cause:
        raise CheckpointError(f"{path} cannot be read ({cause}). Nothing was changed.") from cause


def _file_in(path: Path) -> Path:
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
        return files[0] if files else path / TENSORS
    return path if path.is_file() else path / TENSORS


def _pickled(file: Path) -> CheckpointError:
    return CheckpointError(
        f"{file} is a pickle, which can run any code when it is read. If you trust it, convert it: "
        f"safetensors.torch.save_file(torch.load({file.name!r}, weights_only=True), {TENSORS!r}). Nothing was changed."
    )
