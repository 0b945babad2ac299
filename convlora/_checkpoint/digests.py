"""Short digests of tensors, by which a base and a file are known again."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .._layer.functional import hashed


def digest(tensor: Tensor) -> str:
    """Dtype and a 64-bit hash of a tensor's numbers, wherever it lies."""
    if is_traceable_wrapper_subclass(tensor):  # a quantized weight is several tensors
        inner = "|".join(digest(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        return f"{type(tensor).__name__}:{hashlib.blake2b(inner.encode(), digest_size=8).hexdigest()}"
    return f"{str(tensor.dtype).removeprefix('torch.')}:{hashed(tensor)}"


class Remembered:
    """Digests of tensors that are asked for again and again, computed anew for those that were written meanwhile.

    A tensor is the same while it is the same object, in the same memory, and torch has counted no write to it.
    """

    def __init__(self) -> None:
        self._found: dict[int, tuple[Tensor, int, int, str]] = {}

    def digest(self, tensor: Tensor) -> str:
        """As :func:`digest`."""
        if tensor.is_inference() or is_traceable_wrapper_subclass(tensor):  # nothing is counted
            return digest(tensor)
        now = tensor.data_ptr(), tensor._version
        found = self._found.get(id(tensor))
        if found is None or found[1:3] != now:
            found = self._found[id(tensor)] = tensor, *now, digest(tensor)
        return found[3]


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


def is_other(there: str, near: str, tensor: Tensor, here: str) -> bool:
    """Whether a tensor, of digest ``here``, is neither the one of ``there``, nor near to it by that one's sketch."""
    form = _FORM.fullmatch(there)
    is_of_its_dtype = form is not None and form[1] == here.rpartition(":")[0]
    return differ(there, here) and not (is_of_its_dtype and is_near(near, tensor))


def fingerprint(base: Mapping[str, str]) -> str:
    """One short digest of a base, 16 hex digits, over the digests of its tensors by key; their order is no matter."""
    text = "\n".join(f"{key} {each}" for key, each in sorted(base.items()))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


ROUNDING = 2e-4
"""A base that an average has rounded anew differs by less, against its size: 1e-4 after thousands of fp32 steps."""
_WIDTH, _COUNT = 4096, 4


def sketch(tensor: Tensor) -> str:
    """A tensor's size and four sums of its numbers with fixed signs, by which a tensor near it is known.

    The sums of two tensors lie about as far apart as the tensors themselves do. Empty for what holds no floats, or
    some that are not finite.
    """
    if not tensor.is_floating_point() or is_traceable_wrapper_subclass(tensor):
        return ""
    numbers = tensor.detach().cpu().to(torch.promote_types(tensor.dtype, torch.float32)).flatten()
    rows = F.pad(numbers, (0, -len(numbers) % _WIDTH)).view(-1, _WIDTH)
    columns = _signs(len(rows)).T.to(rows.dtype) @ rows  # in fp32, which is far cheaper: its rounding is far below
    found = torch.cat([numbers.norm()[None].double(), (columns.double() * _signs(_WIDTH).T).sum(1)])
    return " ".join(f"{each:.9g}" for each in found.tolist()) if found.isfinite().all() else ""


def is_near(there: str, tensor: Tensor) -> bool:
    """Whether a tensor of this sketch and another differ by rounding alone."""
    here = [float(each) for each in sketch(tensor).split()]
    try:
        theirs = [float(each) for each in there.split()]
    except ValueError:
        return False
    if not here or len(theirs) != len(here):
        return False
    allowed = here[0] * max(ROUNDING, torch.finfo(tensor.dtype).eps)
    return all(abs(a - b) <= allowed for a, b in zip(theirs, here, strict=True))


@lru_cache(64)
def _signs(count: int) -> Tensor:
    """``(count, 4)`` of ±1, the same on every machine: bits of a multiplicative hash."""
    number = torch.arange(1, count + 1, device="cpu") * 0x9E3779B1 & 0xFFFFFFFF
    number = (number ^ number >> 15) * 0x85EBCA77 & 0xFFFFFFFF
    bits = (number[:, None] ^ number[:, None] >> 13) >> torch.arange(_COUNT, device="cpu") & 1
    return 2.0 * bits.double() - 1
