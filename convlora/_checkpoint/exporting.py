"""Writing an adapter's factors for other libraries, into one ``.safetensors`` file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from .._model.integrity import check_nothing_outside, refuse_changed
from .._model.merge import unmerged
from .._model.state import ready_alone, the_adapter
from .._plan import Plan
from ..errors import CheckpointError, TargetError, few
from .atomic import replacing
from .contents import adapter_tensors
from .diffusers import to_diffusers_tensors
from .files import plain
from .lycoris import to_lycoris_tensors

Format = Literal["diffusers", "lycoris"]
"""Whose files are written."""


def export_adapter(
    model: nn.Module,
    file: str | os.PathLike[str],
    to: Format,
    adapter_name: str | None = None,
    *,
    prefix: str | None = None,
) -> Path:
    """Write an adapter's factors as a LoRA file that another library loads, to the same predictions.

    >>> convlora.export_adapter(unet, "style.safetensors", "diffusers", prefix="unet")
    >>> pipeline.load_lora_weights("style.safetensors")             # in diffusers

    ``"diffusers"`` is what ``save_lora_adapter`` and a pipeline's ``save_lora_weights`` write, ``"lycoris"`` a LoCon
    file, as kohya's scripts write it, too. They hold LoRA and the whole differences of small layers; LoCon has DoRA,
    too. :func:`convlora.load_adapter` reads both. Stock peft reads what :func:`convlora.save_adapter` writes.

    Args:
        model: an injected model, merged or not.
        file: the ``.safetensors`` file to write; its directory is made where missing.
        to: whose file it is to be.
        adapter_name: one of the model's adapters; default the active one.
        prefix: how the layers' names begin: for diffusers what a pipeline calls the model, ``"unet"``, default nothing;
            else ``"lora_unet"`` or ``"lora_te1"`` as in kohya's files, default ``"lycoris"``.

    Returns:
        The file.

    Raises:
        CheckpointError: the file has no place for something that the adapter has, such as a head, or the other library
            would predict another thing; each is named. Or it cannot be written.
        StateError: as from :func:`convlora.save_adapter`.
        TargetError: there is no such format, or the file's name does not end in ``.safetensors``.
    """
    path = Path(file)
    if to not in ("diffusers", "lycoris"):
        raise TargetError(f"to={to!r}; 'diffusers' and 'lycoris' are written. Nothing was written.")
    if path.suffix != ".safetensors":
        raise TargetError(f"{path}: give the name of a .safetensors file. Nothing was written.")
    root, injection = ready_alone(model)
    adapter = the_adapter(injection, adapter_name)
    adapter.follow()
    refuse_changed(root, injection, adapter)
    check_nothing_outside(model, root)
    with unmerged(root, injection):
        tensors, buffers = adapter_tensors(root, injection, adapter)
        faults = [*_beside(adapter.plan), *(f"{key}: a buffer that moved" for key in sorted(buffers))]
        texts: dict[str, str] = {}
        if not faults and to == "diffusers":
            tensors, texts, faults = to_diffusers_tensors(root, adapter, tensors, prefix or "")
        elif not faults:
            tensors, faults = to_lycoris_tensors(adapter.plan, tensors, root, (prefix or "lycoris").rstrip("_"))
    if faults:
        lines = few([f"  {plain(fault)}" for fault in dict.fromkeys(faults)])
        remedy = "convlora.save_adapter writes all of it; convlora.merge gives the plain network. Nothing was written."
        raise CheckpointError("\n".join([f"{path}: a file of {to} has no place for this adapter:", *lines, remedy]))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            state = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
            save_file(state, temporary, metadata={"format": "pt", **texts})
    except (OSError, SafetensorError) as cause:
        raise CheckpointError(f"{path} cannot be written ({cause}). What was there before is still there.") from cause
    return path


def _beside(plan: Plan) -> Iterator[str]:
    """What an adapter has besides factors."""
    for name in plan.modules_to_save:
        yield f"{name}: trained in full; inject with modules_to_save=None to have it adapted as the others"
    if plan.norm == "track" and plan.norms:
        yield f"{plan.norms[0]}: its statistics are tracked; inject with norm='freeze'"
    for name in plan.biases:
        yield f"{name}: its bias is trained by itself"
    for name in plan.written:
        yield f"{name}: the model's own forward writes to it, so the adapter has it, too"
    if not plan.layers:
        yield "no layer is adapted"
