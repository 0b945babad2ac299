"""The manifest: the description of an adapter in its file's header, checked before any tensor is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from .._methods.registry import METHODS
from .._model.checks import check_plan
from .._plan import Plan
from ..errors import CheckpointError, TargetError
from .files import DIGEST, TensorFile, plain, strict_json
from .peft_format import PREFIX

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
"""The file endings of pickles."""
FORMAT = 3
"""The format that is written. Older formats are read too: format 1 has no digest of the header, and up to format 2
every layer has LoRA and an alpha."""


@dataclass(frozen=True)
class Form:
    """A tensor's shape and kind of dtype (float, integer, ...): tensors of equal form can take each other's values."""

    shape: tuple[int, ...]
    kind: str

    def __str__(self) -> str:
        return str(self.shape) if self.kind == "float" else f"{self.shape} {self.kind}"


@dataclass(frozen=True)
class Manifest:
    """The description of an adapter in its file, read without the tensors' values."""

    file: Path
    plan: Plan
    base: Mapping[str, str]
    """The digest of every tensor of the base, by state-dict key."""
    adapter: Mapping[str, str]
    """The digest of every tensor in the file, by key without peft's prefix."""
    buffers: frozenset[str]
    """Keys of buffers that training changed, without those of the modules that the plan names."""
    forms: Mapping[str, Form]
    """The form of every tensor in the file, by key without peft's prefix."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The metrics that the user gave to ``save_adapter``."""
    sketches: Mapping[str, str] = field(default_factory=dict)
    """The sketch of every tensor of the base, by state-dict key; see :func:`digests.sketch`."""
    without: tuple[str, ...] = ()
    """Modules trained in full whose tensors are not loaded; the model's own modules are trained instead."""

    def without_heads(self) -> Manifest:
        """Return the manifest of the same adapter without the tensors of the modules trained in full."""
        whole = replace(self, without=self.plan.modules_to_save)
        forms = {key: form for key, form in self.forms.items() if whole.takes(key)}
        buffers = frozenset(filter(whole.takes, self.buffers))
        return replace(whole, forms=forms, buffers=buffers)

    def takes(self, key: str) -> bool:
        """Return whether the file's tensor of this key is loaded."""
        return not any(key.startswith(f"{name}.") for name in self.without)


def is_own(file: TensorFile) -> bool:
    """Return whether convlora wrote the file."""
    return "convlora" in file.metadata


def read_manifest(file: TensorFile) -> Manifest:
    """Return the manifest of a saved adapter.

    Raises:
        CheckpointError: the manifest is damaged, or was not written by convlora, or by a newer version.
    """
    if not is_own(file):
        raise CheckpointError(f"{file.path} holds no convlora manifest; it was not written by convlora.save_adapter.")
    strange = [key for key in file.entries if not key.startswith(PREFIX)]
    if strange:
        raise CheckpointError(
            f"{file.path}: tensor '{plain(strange[0])}' belongs to no adapter (its key does not begin with {PREFIX!r})."
        )
    forms = {key.removeprefix(PREFIX): Form(e.shape, _kind(e.dtype)) for key, e in file.entries.items()}
    return _parse(file.path, file.metadata, forms)


def _check_methods(file: Path, plan: Plan) -> None:
    """Raise CheckpointError for an unknown method, such as one that was registered only where the file was saved."""
    unknown = sorted({plan.method, *(each.method for each in (*plan.layers, *plan.skipped))} - METHODS.keys())
    if unknown:
        raise CheckpointError(
            f"{file} needs method {plain(repr(unknown[0]))}, which is not registered. Import the code that registers "
            "it (convlora.register_method), or update convlora."
        )


def _parse(file: Path, metadata: Mapping[str, str], forms: Mapping[str, Form]) -> Manifest:
    try:
        data = strict_json(metadata["convlora"])
        version = data["format"]
        if type(version) is int and 0 < version <= FORMAT:
            if version > 1 and DIGEST not in metadata:  # TensorFile has compared the digest if there is one
                raise ValueError("its header has no digest")
            plan = Plan.from_json(data["plan"])
            _check_methods(file, plan)
            check_plan(plan)
            base, adapter, sketches = (
                {str(key): str(value) for key, value in texts.items()}
                for texts in (data["base"], data["adapter"], data.get("sketches", {}))
            )
            metrics = {str(name): float(value) for name, value in data.get("metrics", {}).items()}
            return Manifest(file, plan, base, adapter, frozenset(map(str, data["buffers"])), forms, metrics, sketches)
    except CheckpointError:
        raise
    except TargetError as cause:
        raise CheckpointError(f"{file}: its manifest is damaged: {plain(str(cause))}") from cause
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as cause:
        raise CheckpointError(f"{file}: its manifest cannot be read ({plain(repr(cause))}).") from cause
    raise CheckpointError(
        f"{file} is of format {plain(str(version))}, and this convlora reads formats up to {FORMAT}: update convlora."
    )


def form_of(tensor: Tensor) -> Form:
    """Return a tensor's form."""
    return Form(tuple(tensor.shape), _kind(tensor.dtype))


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "float" if dtype.itemsize > 1 else "float8"  # torch does not compute with float8
    return "complex" if dtype.is_complex else "bool" if dtype == torch.bool else "integer"
