"""``export_adapter``: writes an adapter's factors into one ``.safetensors`` file that another library reads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from torch import nn

from .._layer.places import BASE
from .._model.keys import tensors_as
from .._model.merge import unmerged
from .._plan import Plan
from ..errors import TargetError
from .contents import adapter_tensors
from .diffusers import to_diffusers_tensors
from .files import refusal, write_tensors
from .lycoris import to_lycoris_tensors
from .saving import adapter_to_write, check_nothing_lost, warn_of_training

Format = Literal["diffusers", "lycoris"]
"""The library whose file is written."""


def export_adapter(
    model: nn.Module,
    file: str | os.PathLike[str],
    to: Format,
    adapter_name: str | None = None,
    *,
    prefix: str | None = None,
) -> Path:
    """Write an adapter's factors as a LoRA file; the library that loads it predicts the same.

    >>> convlora.export_adapter(unet, "style.safetensors", "diffusers", prefix="unet")
    >>> pipeline.load_lora_weights("style.safetensors")             # in diffusers

    ``"diffusers"`` is the format of diffusers' ``save_lora_adapter`` and ``save_lora_weights``. ``"lycoris"`` is a
    LoCon file, the format of LyCORIS and of kohya's scripts. Both formats hold LoRA and the dense differences of small
    layers; LoCon also holds DoRA. :func:`convlora.load_adapter` reads both. Stock peft reads what
    :func:`convlora.save_adapter` writes.

    Args:
        model: an injected model, merged or not.
        file: the ``.safetensors`` file to write; its directory is made if it is missing.
        to: the format.
        adapter_name: one of the model's adapters; default the active one.
        prefix: the beginning of every layer's name in the file. In ``"diffusers"`` it is what a pipeline calls the
            model, such as ``"unet"``; default none. In ``"lycoris"`` it is ``"lora_unet"`` or ``"lora_te1"`` for
            kohya's scripts; default ``"lycoris"``.

    Returns:
        The file's path.

    Raises:
        CheckpointError: the format cannot hold a part of the adapter, such as a head; or the other library would
            predict something else; or the file cannot be written. Every such part is named.
        StateError: as from :func:`convlora.save_adapter`.
        TargetError: the format is unknown, or the file's name does not end in ``.safetensors``.

    Warns:
        UserWarning: as from :func:`convlora.save_adapter`: nothing was trained, a tensor holds NaN or Inf, or a
            parameter of the base changed without a gradient.
    """
    path = Path(file)
    if to not in ("diffusers", "lycoris"):
        raise TargetError(f"to={to!r}; it must be 'diffusers' or 'lycoris'. Nothing was written.")
    if path.suffix != ".safetensors":
        raise TargetError(f"{path}: give the name of a .safetensors file. Nothing was written.")
    root, injection, adapter = adapter_to_write(model, adapter_name)
    with unmerged(root, injection):
        check_nothing_lost(root, injection)
        factors, buffers = adapter_tensors(root, injection, adapter)
        base = tensors_as(root, BASE)
        faults = [*_other_parts(adapter.plan), *(f"{key}: a buffer that changed" for key in sorted(buffers))]
        tensors, texts = factors, dict[str, str]()
        if not faults and to == "diffusers":
            tensors, texts, faults = to_diffusers_tensors(root, adapter, factors, prefix or "")
        elif not faults:
            tensors, faults = to_lycoris_tensors(adapter.plan, factors, root, (prefix or "lycoris").rstrip("_"))
    if faults:
        remedy = "convlora.save_adapter writes all of it; convlora.merge gives the plain network. Nothing was written."
        raise refusal(f"{path}: a {to} file cannot hold this adapter:", faults, remedy)
    warn_of_training(injection, adapter, factors, base)
    write_tensors(path, tensors, texts)
    return path


def _other_parts(plan: Plan) -> Iterator[str]:
    """Yield what an adapter has besides factors."""
    for name in plan.modules_to_save:
        yield f"{name}: trained in full; inject with modules_to_save=None to adapt it like the other layers"
    if plan.norm == "track" and plan.norms:
        yield f"{plan.norms[0]}: its statistics are tracked; inject with norm='freeze'"
    for name in plan.biases:
        yield f"{name}: its bias is trained"
    for name in plan.written:
        yield f"{name}: it changes without a gradient, as where the model's own forward writes to it"
    if not plan.layers:
        yield "no layer is adapted"
