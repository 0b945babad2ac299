"""Short digests of tensors, by which a base and a file are known again."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .._layer.functional import hashed


def digest(tensor: Tensor) -> str:
    """Dtype and a 64-bit hash of a tensor's numbers, wherever it lies."""
    if is_traceable_wrapper_subclass(tensor):  # a quantized weight is several tensors
        inner = "|".join(digest(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        return f"{type(tensor).__name__}:{hashlib.blake2b(inner.encode(), digest_size=8).hexdigest()}"
    return f"{str(tensor.dtype).removeprefix('torch.')}:{hashed(tensor)}"


def differ(there: str, here: str) -> bool:
    """Whether a file's digest is not that of the model's own tensor.

    Numbers in two precisions are not compared, nor are those that were quantized since. A digest of a form that is not
    known is another one.
    """
    form, own = _FORM.fullmatch(there), _FORM.fullmatch(here)
    if there == here or form is None or own is None or form[1] == own[1]:
        return there != here
    dtype = getattr(torch, own[1], None)
    is_float_or_quantized = not isinstance(dtype, torch.dtype) or dtype.is_floating_point
    return not (_is_float(form[1]) and is_float_or_quantized)


def _is_float(name: str) -> bool:
    dtype = getattr(torch, name, None)
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


_FORM = re.compile(r"(\w+):[0-9a-f]{16}")


def fingerprint(base: Mapping[str, str]) -> str:
    """One short digest of a base, 16 hex digits, over the digests of its tensors by key; their order is no matter."""
    text = "\n".join(f"{key} {each}" for key, each in sorted(base.items()))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
