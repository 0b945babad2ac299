"""What is read of a file that may come from a stranger: bounded, checked before it is believed, opened once.

A safetensors file is 8 bytes of length, a JSON header, and the tensors' numbers. The header is checked here before any
of the numbers is read, so that what it merely claims takes no memory; the numbers are decoded by safetensors. One
handle serves all reads: a save that replaces the file meanwhile changes nothing of what is read here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from .._layer.functional import is_finite
from ..errors import CheckpointError

LIMIT = 8 * 2**20
"""Bytes of JSON that are read at most; a convolution with its norm takes 1 to 2 KiB."""
VALUES = 2**18
"""Objects, lists and commas in it; a convolution with its norm has 60. Python takes up to 200 bytes for each."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (64, 32, 16, 8)},
    **{f"U{bits}": getattr(torch, f"uint{bits}") for bits in (64, 32, 16, 8)},
    "BOOL": torch.bool,
}
"""Dtypes by their names in the header."""
LONGEST_NAME = 1024
"""Letters in a tensor's name."""
DIGEST = "convlora_digest"
"""Name of the header's text that holds a digest of the header itself."""
_NO_DIGEST = "0" * 16
_LONGEST = 300


@dataclass(frozen=True)
class Entry:
    """What the header says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorFile:
    """A safetensors file, open, its header read and checked.

    Attributes:
        path: of the file.
        metadata: the header's texts.
        entries: what the header says of each tensor, by key.
    """

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.path = path
        self._stream = stream
        self._size = os.fstat(stream.fileno()).st_size
        try:
            self.metadata, self.entries = self._header()
        except (ValueError, OSError, RecursionError) as cause:
            raise CheckpointError(f"{path} is damaged or no safetensors file ({brief(cause)}).") from cause

    def _header(self) -> tuple[dict[str, str], dict[str, Entry]]:
        first = self._stream.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > self._size - 8:
            raise ValueError(f"it has {self._size} bytes, its header would have {length}")
        if length > LIMIT:
            raise ValueError(f"its header has {length} bytes; {LIMIT} are read at most")
        text = self._stream.read(length)
        header = strict_json(text)
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        texts = header.pop("__metadata__", {})
        if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
            raise ValueError("its metadata are no texts")
        if DIGEST in texts and texts[DIGEST] != header_digest(text, texts[DIGEST]):
            raise ValueError("its header is not what was saved")
        found = sorted((_checked(key, claim) for key, claim in header.items()), key=lambda each: each[2:])
        end = 0
        for key, _, begin, stop in found:
            if begin != end:
                raise ValueError(f"{key!r} does not begin where the tensor before it ends")
            end = stop
        if end != self._size - 8 - length:
            raise ValueError(f"its tensors take {end} bytes, and there are {self._size - 8 - length}")
        return texts, {key: entry for key, entry, _, _ in found}

    def outline(self) -> dict[str, Tensor]:
        """Every tensor without its numbers, on the meta device."""
        return {key: torch.empty(e.shape, dtype=e.dtype, device="meta") for key, e in self.entries.items()}

    def read(self) -> dict[str, Tensor]:
        """Every tensor with its numbers.

        Raises:
            CheckpointError: the file cannot be read to the end.
        """
        try:
            self._stream.seek(0)
            data = self._stream.read(self._size)
            if len(data) != self._size:
                raise ValueError(f"it had {self._size} bytes and has {len(data)}")
            return load(data)
        except (SafetensorError, OSError, ValueError, KeyError) as cause:
            raise CheckpointError(f"{self.path} is damaged ({brief(cause)}); get it again.") from cause


@contextmanager
def opened(path: Path) -> Iterator[TensorFile]:
    """The file, for the time of the block.

    Raises:
        CheckpointError: it is missing, damaged, or claims what it does not hold.
    """
    if not path.is_file():  # a pipe or a device would be waited for
        raise CheckpointError(f"{path} does not exist; give the directory that convlora.save_adapter wrote.")
    try:
        stream = path.open("rb")
    except OSError as cause:
        raise CheckpointError(f"{path} cannot be read ({brief(cause)}).") from cause
    with stream:
        yield TensorFile(path, stream)


def _checked(key: str, claim: Any) -> tuple[str, Entry, int, int]:
    """Name, form and place of a tensor of which the header claims this."""
    if not key.isprintable() or len(key) > LONGEST_NAME:
        raise ValueError(f"{key[:60]!r} is no name of a tensor")
    if not isinstance(claim, dict) or claim.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{key!r} has no dtype, shape and data_offsets")
    dtype, shape, offsets = claim["dtype"], claim["shape"], claim["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{key!r} is of dtype {dtype!r}; {', '.join(DTYPES)} are read")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(shape) > 16 or len(offsets) != 2:
        raise ValueError(f"{key!r} has shape {shape!r} and data_offsets {offsets!r}")
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if math.prod(max(n, 1) for n in shape) >= 2**59 or offsets[1] - offsets[0] != size:
        raise ValueError(f"{key!r} has shape {shape!r} and data_offsets {offsets!r}, which do not go together")
    return key, Entry(DTYPES[dtype], tuple(shape)), offsets[0], offsets[1]


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def header_digest(text: bytes, value: str) -> str:
    """A 64-bit hash of a header, of its length too, with zeros where the digest itself stands.

    It is of the bytes, not of what they mean: a flipped bit that changes no meaning is a flipped bit all the same.

    Args:
        text: the header's JSON.
        value: what stands as its digest now.
    """
    found = hashlib.blake2b(len(text).to_bytes(8, "little"), digest_size=8)
    found.update(text.replace(_field(value), _field(_NO_DIGEST), 1))
    return found.hexdigest()


def _field(value: str) -> bytes:
    return f'"{DIGEST}":"{value}"'.encode()


def sealed(data: bytes) -> list[bytes | memoryview]:
    """A safetensors file with a digest of its header among the header's texts.

    The texts are in their order: safetensors writes them in another one each time.

    Returns:
        What to write, one after the other.

    Raises:
        CheckpointError: its header is longer than what is read.
    """
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted({**header["__metadata__"], DIGEST: _NO_DIGEST}.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8
    if len(text) > LIMIT or _values(text) > VALUES:
        raise CheckpointError(
            f"the file's header would have {len(text)} bytes and {_values(text)} values, and {LIMIT} and {VALUES} are "
            "read at most: too many tensors for one adapter. Adapt fewer layers (target_modules). Nothing was changed."
        )
    text = text.replace(_field(_NO_DIGEST), _field(header_digest(text, _NO_DIGEST)), 1)
    return [len(text).to_bytes(8, "little"), text, memoryview(data)[8 + length :]]


def read_json(file: Path) -> Any:
    """A JSON file, strictly read.

    Raises:
        CheckpointError: it is missing, too large, or no JSON.
    """
    try:
        if not file.is_file():
            raise ValueError("it is no file")
        with file.open("rb") as stream:
            text = stream.read(LIMIT + 1)
        if len(text) > LIMIT:
            raise ValueError(f"it has more than {LIMIT} bytes")
        return strict_json(text)
    except (OSError, ValueError, RecursionError) as cause:
        raise CheckpointError(f"{file} cannot be read ({brief(cause)}).") from cause


def strict_json(text: str | bytes) -> Any:
    """JSON in which each key of an object stands once, and each number is one; raises ValueError or RecursionError.

    Readers disagree on what else there is: which of two values of a key counts, what NaN is. Its values are counted
    before it is parsed, since ``{},`` takes twenty times the memory of its text.
    """
    if _values(text) > VALUES:
        raise ValueError(f"it has {_values(text)} values; {VALUES} are read at most")
    return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)


def _values(text: str | bytes) -> int:
    """At least as many as there are objects, lists and what stands in them; of a JSON text that is not parsed."""
    marks: Any = "{[," if isinstance(text, str) else (b"{", b"[", b",")
    return sum(map(text.count, marks))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is there twice")
        found[key] = value
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


def plain(text: str) -> str:
    """Text from a file as an error may show it: what looks like another letter, or like nothing, as its code.

    >>> plain("ѕtem")
    '\\\\u0455tem'
    """
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    shown = shown.encode("ascii", "backslashreplace").decode()
    return shown if len(shown) <= _LONGEST else shown[:_LONGEST] + " ..."


def brief(cause: BaseException) -> str:
    """An error's own words, as :func:`plain` shows them."""
    return plain(str(cause) if isinstance(cause, (OSError, ValueError)) else repr(cause))


def finite_faults(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Iterator[str]:
    """What holds NaN or Inf, where the base's own tensor of that key does not.

    Args:
        tensors: an adapter's, by key.
        own: the base's.
    """
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not is_finite(tensor) and (key not in own or is_finite(own[key])):
            yield f"{key}: holds NaN or Inf"
