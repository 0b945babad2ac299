"""Trained parameters of a half-precision base. Adapters keep them in fp32; the module reads them in the base's dtype.

In bf16, updates of 1e-5 are rounded away, and a GradScaler refuses gradients in fp16. The optimizer, the state dict and
the file contain the fp32 parameter. The module's forward and all other code that reads the attribute get it rounded to
the base's dtype, so that a fresh head gives the base's output bit for bit.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..errors import warn
from .swap import Swapped, is_swapped, restore, swap

DTYPES = "_convlora_dtypes"
"""The module's attribute that holds the base's dtype of each such parameter, by parameter name."""


class Mastered(Swapped):
    """A module with parameters in fp32 whose attributes are in the base's dtype."""

    _convlora_prefix: ClassVar[str] = "Mastered"

    def __getattr__(self, name: str) -> Any:
        return as_read(cast(nn.Module, self), name, super().__getattr__(name))  # type: ignore[misc]

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        dtypes = vars(self).get(DTYPES, {})  # they follow half(), float() and to() as the base's own tensors would
        vars(self)[DTYPES] = {name: fn(torch.empty(0, dtype=dtype)).dtype for name, dtype in dtypes.items()}
        return cast(Any, super())._apply(fn, *args, **kwargs)


def is_half(tensor: Tensor) -> bool:
    """Return whether a tensor is in half precision, where small updates are rounded away."""
    return tensor.is_floating_point() and tensor.dtype.itemsize < 4


def keep_in_fp32(module: nn.Module, name: str, base: Tensor, is_norm: bool) -> bool:
    """Return whether an adapter is to keep this parameter in fp32, and make the module read it in the base's dtype.

    Args:
        module: the module that holds the parameter.
        name: the parameter's name.
        base: the base's parameter.
        is_norm: whether the module is a norm, whose class the norm policy sets.
    """
    if not is_half(base):
        return False
    if isinstance(module, Swapped) and not (is_norm or isinstance(module, Mastered)):
        warn(
            f"A {type(module).__name__} that another adapter adapts is to be trained in full: its {name} stays "
            f"{str(base.dtype).removeprefix('torch.')}, and small steps are lost. Inject the adapter that trains it in "
            "full first.",
        )
        return False
    vars(module).setdefault(DTYPES, {})[name] = base.dtype
    if not is_norm and not isinstance(module, Mastered):
        swap(module, Mastered)
    return True


def base_dtype(module: nn.Module, name: str) -> torch.dtype | None:
    """Return the base's dtype of a parameter that adapters keep in fp32; None for all others."""
    return cast("dict[str, torch.dtype]", vars(module).get(DTYPES, {})).get(name)


def as_read(module: nn.Module, name: str, found: Any) -> Any:
    """Return an attribute's value as the module's forward reads it: in the base's dtype."""
    dtype = base_dtype(module, name)
    return found if dtype is None or not isinstance(found, Tensor) or found.dtype == dtype else found.to(dtype)


def restore_dtypes(module: nn.Module, rounded: dict[int, nn.Parameter]) -> None:
    """Restore the module's class and the base's dtype of its parameters. May be run again.

    Args:
        module: any module.
        rounded: the parameters rounded so far, by the id of the original, so that shared parameters stay shared.
    """
    for name, dtype in vars(module).get(DTYPES, {}).items():
        now = module._parameters.get(name)
        if now is not None and now.dtype != dtype:
            whole = nn.Parameter(now.detach().to(dtype), requires_grad=now.requires_grad)
            module._parameters[name] = rounded.setdefault(id(now), whole)
    vars(module).pop(DTYPES, None)
    if isinstance(module, Mastered) and is_swapped(module):
        restore(cast(nn.Module, module))
