"""What a file says of its adapter, read and checked before a tensor is touched."""

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
FORMAT = 3
"""What is written. A file of format 1 has no digest of its header. Up to format 2 each layer has LoRA and its alpha;
both are read as well."""


@dataclass(frozen=True)
class Form:
    """What a tensor must have to take another's numbers: its shape, and whether it holds floats, integers, ..."""

    shape: tuple[int, ...]
    kind: str

    def __str__(self) -> str:
        return str(self.shape) if self.kind == "float" else f"{self.shape} {self.kind}"


@dataclass(frozen=True)
class Manifest:
    """What a file says of its adapter, read without its tensors."""

    file: Path
    plan: Plan
    base: Mapping[str, str]
    """Digest of every tensor of the base, by state-dict key."""
    adapter: Mapping[str, str]
    """Digest of every tensor in the file, by key without peft's prefix."""
    buffers: frozenset[str]
    """Keys of buffers that training moved, besides those of the modules that the plan names."""
    forms: Mapping[str, Form]
    """Every tensor in the file, by key without peft's prefix."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """How good it is, as whoever saved it said."""
    sketches: Mapping[str, str] = field(default_factory=dict)
    """What a tensor of the base near to it is known by, by state-dict key."""
    without: tuple[str, ...] = ()
    """Modules trained in full whose tensors are not taken: the model's own are trained in their place."""

    def without_heads(self) -> Manifest:
        """The same adapter, of which the modules trained in full are left in the file."""
        whole = replace(self, without=self.plan.modules_to_save)
        forms = {key: form for key, form in self.forms.items() if whole.takes(key)}
        buffers = frozenset(filter(whole.takes, self.buffers))
        return replace(whole, forms=forms, buffers=buffers)

    def takes(self, key: str) -> bool:
        """Whether a tensor of the file is taken."""
        return not any(key.startswith(f"{name}.") for name in self.without)


def is_own(file: TensorFile) -> bool:
    """Whether convlora wrote it."""
    return "convlora" in file.metadata


def read_manifest(file: TensorFile) -> Manifest:
    """The manifest of a saved adapter.

    Raises:
        CheckpointError: damaged, not written by convlora, or written by a newer one.
    """
    if not is_own(file):
        raise CheckpointError(f"{file.path} holds no convlora manifest; it was not written by convlora.save_adapter.")
    strange = [key for key in file.entries if not key.startswith(PREFIX)]
    if strange:
        raise CheckpointError(
            f"{file.path}: tensor '{plain(strange[0])}' belongs to no adapter (its name lacks {PREFIX!r})."
        )
    forms = {key.removeprefix(PREFIX): Form(e.shape, _kind(e.dtype)) for key, e in file.entries.items()}
    return _parse(file.path, file.metadata, forms)


def _check_methods(file: Path, plan: Plan) -> None:
    """Raise where a method is none that is known here: one that the user has registered where it was saved."""
    unknown = sorted({plan.method, *(each.method for each in (*plan.layers, *plan.skipped))} - METHODS.keys())
    if unknown:
        raise CheckpointError(
            f"{file} needs method {plain(repr(unknown[0]))}, which is not known here. Import the code that "
            "registers it (convlora.register_method), or update convlora."
        )


def _parse(file: Path, metadata: Mapping[str, str], forms: Mapping[str, Form]) -> Manifest:
    try:
        data = strict_json(metadata["convlora"])
        version = data["format"]
        if type(version) is int and 0 < version <= FORMAT:
            if version > 1 and DIGEST not in metadata:  # where there is one, it was compared
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
    raise CheckpointError(f"{file} is of format {plain(str(version))}, this convlora reads up to {FORMAT}; update it.")


def form_of(tensor: Tensor) -> Form:
    """The form that a tensor has."""
    return Form(tuple(tensor.shape), _kind(tensor.dtype))


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "float" if dtype.itemsize > 1 else "float8"  # in which nothing is computed
    return "complex" if dtype.is_complex else "bool" if dtype == torch.bool else "integer"
