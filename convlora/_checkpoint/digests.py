"""Short digests of tensors, by which a base and a file are known again."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def digest(tensor: Tensor) -> str:
    """Dtype and a 64-bit hash of a tensor's numbers, wherever it lies."""
    if is_traceable_wrapper_subclass(tensor):  # a quantized weight is several tensors
        inner = "|".join(digest(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        return f"{type(tensor).__name__}:{hashlib.blake2b(inner.encode(), digest_size=8).hexdigest()}"
    host = tensor.detach().cpu().contiguous()
    size = host.numel() * host.element_size()
    data = (ctypes.c_char * size).from_address(host.data_ptr()) if size else b""
    return f"{str(tensor.dtype).removeprefix('torch.')}:{hashlib.blake2b(data, digest_size=8).hexdigest()}"


def fingerprint(base: Mapping[str, str]) -> str:
    """One short digest of a base, 16 hex digits, over the digests of its tensors by key; their order is no matter."""
    text = "\n".join(f"{key} {each}" for key, each in sorted(base.items()))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
