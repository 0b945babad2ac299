"""Short digests of tensors, by which a base and a file are recognised."""

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
from .._model.written import ROUNDING


def digest(tensor: Tensor) -> str:
    """Return the tensor's dtype and a 64-bit hash of its values, on any device: ``"float32:9c3f…"``."""
    if is_traceable_wrapper_subclass(tensor):  # a quantized weight consists of several tensors
        inner = "|".join(digest(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        return f"{type(tensor).__name__}:{hashlib.blake2b(inner.encode(), digest_size=8).hexdigest()}"
    return f"{str(tensor.dtype).removeprefix('torch.')}:{hashed(tensor)}"


class Remembered:
    """Digests of tensors, cached until the tensor is written to.

    A digest is computed again if the tensor is another object, is at another address, or has another version counter.
    """

    def __init__(self) -> None:
        self._found: dict[int, tuple[Tensor, int, int, str]] = {}

    def digest(self, tensor: Tensor) -> str:
        """Return what :func:`digest` returns."""
        if tensor.is_inference() or is_traceable_wrapper_subclass(tensor):  # these have no version counter
            return digest(tensor)
        now = tensor.data_ptr(), tensor._version
        found = self._found.get(id(tensor))
        if found is None or found[1:3] != now:
            found = self._found[id(tensor)] = tensor, *now, digest(tensor)
        return found[3]


def differ(there: str, here: str) -> bool:
    """Return whether the digest in a file (``there``) differs from that of the model's tensor (``here``).

    Floats in two precisions are not compared, nor floats with their quantized form: both count as equal. A digest of
    an unknown form counts as different.
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
    """Return whether a tensor differs from the one that a file describes by more than rounding.

    Args:
        there: the digest in the file.
        near: the :func:`sketch` in the file.
        tensor: the model's tensor.
        here: the digest of that tensor.
    """
    form = _FORM.fullmatch(there)
    is_of_its_dtype = form is not None and form[1] == here.rpartition(":")[0]
    return differ(there, here) and not (is_of_its_dtype and is_near(near, tensor))


def fingerprint(base: Mapping[str, str]) -> str:
    """Return one digest of a base, 16 hex digits, from the digests of its tensors by key, in any order."""
    text = "\n".join(f"{key} {each}" for key, each in sorted(base.items()))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


_WIDTH, _COUNT = 4096, 4


def sketch(tensor: Tensor) -> str:
    """Return a tensor's norm and four sums of its values with fixed signs, from which :func:`is_near` compares tensors.

    The sums of two tensors differ by about the norm of the tensors' difference. The sketch is empty if the tensor is
    not of a floating-point dtype, or is not finite.
    """
    if not tensor.is_floating_point() or is_traceable_wrapper_subclass(tensor):
        return ""
    numbers = tensor.detach().cpu().to(torch.promote_types(tensor.dtype, torch.float32)).flatten()
    rows = F.pad(numbers, (0, -len(numbers) % _WIDTH)).view(-1, _WIDTH)
    columns = _signs(len(rows)).T.to(rows.dtype) @ rows  # fp32 is far cheaper than fp64, and its rounding is small
    found = torch.cat([numbers.norm()[None].double(), (columns.double() * _signs(_WIDTH).T).sum(1)])
    return " ".join(f"{each:.9g}" for each in found.tolist()) if found.isfinite().all() else ""


def is_near(there: str, tensor: Tensor) -> bool:
    """Return whether a tensor differs only by rounding from the one whose sketch is ``there``."""
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
    """Return ±1 of shape ``(count, 4)``, the same on every machine: bits of a multiplicative hash."""
    number = torch.arange(1, count + 1, device="cpu") * 0x9E3779B1 & 0xFFFFFFFF
    number = (number ^ number >> 15) * 0x85EBCA77 & 0xFFFFFFFF
    bits = (number[:, None] ^ number[:, None] >> 13) >> torch.arange(_COUNT, device="cpu") & 1
    return 2.0 * bits.double() - 1
