"""Reading files that may come from a stranger, and writing safetensors files.

A safetensors file is 8 bytes of length, a JSON header, and the tensors' values. The header is checked against the
file's size before any value is read, so a false header allocates no memory; safetensors decodes the values. One file
handle serves all reads, so a save that replaces the file meanwhile changes nothing that is read here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from .._layer.functional import is_finite
from ..errors import CheckpointError, listing
from .atomic import replacing

LIMIT = 8 * 2**20
"""The largest JSON text that is read, in bytes; a convolution with its norm takes 1 to 2 KiB."""
VALUES = 2**18
"""The most objects, lists and commas in a JSON text that is read. A convolution with its norm has 60; Python takes up
to 200 bytes for each."""
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
"""The most characters in a tensor's name."""
DIGEST = "convlora_digest"
"""The metadata entry that holds a digest of the header itself."""
_NO_DIGEST = "0" * 16
_LONGEST = 300


@dataclass(frozen=True)
class Entry:
    """One tensor's dtype and shape, as the header states them."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorFile:
    """An open safetensors file whose header is read and checked.

    Attributes:
        path: the file's path.
        metadata: the header's ``__metadata__``, a text by name.
        entries: each tensor's dtype and shape, by key.
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
            raise ValueError(f"its header has {length} bytes; the limit is {LIMIT}")
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
            raise ValueError(f"its tensors take {end} bytes, and it holds {self._size - 8 - length}")
        return texts, {key: entry for key, entry, _, _ in found}

    def outline(self) -> dict[str, Tensor]:
        """Return every tensor by key, without values, on the meta device."""
        return {key: torch.empty(e.shape, dtype=e.dtype, device="meta") for key, e in self.entries.items()}

    def read(self) -> dict[str, Tensor]:
        """Return every tensor by key, with its values.

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
    """Open a safetensors file for the block.

    Raises:
        CheckpointError: the file is missing or damaged, or its header does not match its size.
    """
    if not path.is_file():  # reading a pipe or a device would block
        raise CheckpointError(f"{path} does not exist; give the directory that convlora.save_adapter wrote.")
    try:
        stream = path.open("rb")
    except OSError as cause:
        raise CheckpointError(f"{path} cannot be read ({brief(cause)}).") from cause
    with stream:
        yield TensorFile(path, stream)


def _checked(key: str, claim: Any) -> tuple[str, Entry, int, int]:
    """Return a tensor's key, entry, and first and last offset, after checking what the header states of it."""
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
    """Return a 64-bit hash of a header's length and bytes, computed with zeros in place of the digest itself.

    The hash is of the bytes and not of the parsed JSON, so that it also detects flipped bits that JSON ignores.

    Args:
        text: the header's JSON.
        value: the digest that the header holds now.
    """
    found = hashlib.blake2b(len(text).to_bytes(8, "little"), digest_size=8)
    found.update(text.replace(_field(value), _field(_NO_DIGEST), 1))
    return found.hexdigest()


def _field(value: str) -> bytes:
    return f'"{DIGEST}":"{value}"'.encode()


def sealed(data: bytes) -> list[bytes | memoryview]:
    """Add a digest of the header to the metadata of a safetensors file.

    The metadata are sorted by name, because safetensors writes them in another order each time.

    Args:
        data: the file's bytes.

    Returns:
        The parts of the new file, to be written one after the other.

    Raises:
        CheckpointError: the header is larger than what is read.
    """
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted({**header["__metadata__"], DIGEST: _NO_DIGEST}.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values begin at a multiple of 8
    if len(text) > LIMIT or _values(text) > VALUES:
        raise CheckpointError(
            f"the file's header would have {len(text)} bytes and {_values(text)} values; the limits are {LIMIT} and "
            f"{VALUES}. The adapter has too many tensors: adapt fewer layers (target_modules). Nothing was changed."
        )
    text = text.replace(_field(_NO_DIGEST), _field(header_digest(text, _NO_DIGEST)), 1)
    return [len(text).to_bytes(8, "little"), text, memoryview(data)[8 + length :]]


def for_disk(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor in the form in which safetensors writes it."""
    return tensor.detach().cpu().contiguous().clone()


def write_tensors(file: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all; its directory is made if it is missing.

    Raises:
        CheckpointError: the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            state = {key: for_disk(tensor) for key, tensor in tensors.items()}
            save_file(state, temporary, metadata={"format": "pt", **(texts or {})})
    except (OSError, SafetensorError) as cause:
        raise CheckpointError(f"{file} cannot be written ({cause}). What was there before is still there.") from cause


def read_json(file: Path) -> Any:
    """Read a JSON file as :func:`strict_json` does.

    Raises:
        CheckpointError: the file is missing, too large, or not JSON.
    """
    try:
        if not file.is_file():
            raise ValueError("it is not a file")
        with file.open("rb") as stream:
            text = stream.read(LIMIT + 1)
        if len(text) > LIMIT:
            raise ValueError(f"it has more than {LIMIT} bytes")
        return strict_json(text)
    except (OSError, ValueError, RecursionError) as cause:
        raise CheckpointError(f"{file} cannot be read ({brief(cause)}).") from cause


def strict_json(text: str | bytes) -> Any:
    """Parse JSON; refuse duplicate keys, NaN and Infinity, on which readers disagree.

    The values are counted before parsing, because ``{},`` takes twenty times the memory of its text.

    Raises:
        ValueError, RecursionError: the text is not such JSON.
    """
    if _values(text) > VALUES:
        raise ValueError(f"it has {_values(text)} values; the limit is {VALUES}")
    return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)


def _values(text: str | bytes) -> int:
    """Return an upper bound on the number of values in a JSON text, without parsing it."""
    marks: Any = "{[," if isinstance(text, str) else (b"{", b"[", b",")
    return sum(map(text.count, marks))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} occurs twice")
        found[key] = value
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def plain(text: str) -> str:
    """Return text from a file as an error may show it: ASCII, with escapes for all other characters.

    >>> plain("ѕtem")
    '\\\\u0455tem'
    """
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    shown = shown.encode("ascii", "backslashreplace").decode()
    return shown if len(shown) <= _LONGEST else shown[:_LONGEST] + " ..."


def brief(cause: BaseException) -> str:
    """Return an error's message, as :func:`plain` shows it."""
    return plain(str(cause) if isinstance(cause, (OSError, ValueError)) else repr(cause))


def refusal(title: str, faults: Iterable[str], remedy: str) -> CheckpointError:
    """Return one error that lists faults, which may hold text from a file; see :func:`plain`."""
    return CheckpointError(listing(title, map(plain, faults), remedy))


def finite_faults(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield a line for each tensor that holds NaN or Inf where the base's tensor of that key does not.

    Args:
        tensors: the adapter's tensors, by key.
        own: the base's tensors, by key.
    """
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not is_finite(tensor) and (key not in own or is_finite(own[key])):
            yield f"{key}: holds NaN or Inf"
