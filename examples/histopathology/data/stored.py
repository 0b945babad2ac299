"""Check how an HDF5 array is stored before its numbers are read: a file may come from a stranger.

Only arrays that lie in the file itself are read, and only if their stated size is true. HDF5 allocates as much memory
as a compressed chunk inflates to, whatever the chunk's shape. If it inflates to less, HDF5 returns whatever memory lies
behind it; if it was never written, uninitialised memory. A compressed chunk is therefore inflated here first, to its
own size and no further, and an array without its numbers is refused.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Sequence
from typing import Any

from h5py import h5d, h5l, h5s, h5t, h5z

DEFLATE = 1032
"""The largest compression ratio of gzip; no other filter that is read here compresses more."""
FILTERS = {
    h5z.FILTER_SHUFFLE: "shuffle",
    h5z.FILTER_DEFLATE: "gzip",
    h5z.FILTER_LZF: "lzf",
    h5z.FILTER_FLETCHER32: "fletcher32",
}
"""The filters that are read; others may load a library that someone has put on the machine."""
PLAIN = (
    "Write it again with h5py: arrays of numbers in the file itself, without compression or with gzip, lzf, shuffle or "
    "fletcher32, in chunks of one image."
)
_CHECKSUM = 4
_SLACK = 64  # plus a thousandth of the size: more than gzip, lzf and checksum add to incompressible numbers
_NUMBERS = (h5t.INTEGER, h5t.FLOAT, h5t.ENUM)  # h5py stores truth values as an enumeration


class Unfit(OSError):
    """An array is refused because of how it is stored; the message names the array."""

    remedy = PLAIN


class TextError(Unfit):
    """An array of text where numbers are needed."""

    remedy = (
        "Write numbers in its place, with h5py such as `del file['0/label']; file['0/label'] = 1`: a label is 0 or 1, "
        "metadata begins with the number of the centre, img holds the pixels."
    )


def open_array(group: Any, name: bytes, most: int) -> Any:
    """Open an array that lies in the group itself.

    Args:
        group: low-level id of a file or group.
        name: of the array.
        most: the most bytes of a compressed chunk, which may hold more than is needed.

    Raises:
        Unfit: a link; elements that are not numbers of 1 to 8 bytes; numbers that lie in another file or were never
            written; filters other than `FILTERS`; larger chunks; more numbers than the stored bytes can hold.
        OSError: not an array, or any other error of h5py.
    """
    check_inside(group, name)
    word = name.decode()
    try:
        data = h5d.open(group, name)
    except (KeyError, TypeError, ValueError) as error:  # a group where an array is expected
        raise OSError(f"{word} is not an array") from error
    _check_elements(data, word)
    plist = data.get_create_plist()
    if plist.get_layout() == h5d.VIRTUAL or plist.get_external_count():
        raise Unfit(f"the numbers of {word} lie in another file")
    stored, size = data.get_storage_size(), math.prod(data.shape) * data.dtype.itemsize
    if plist.get_nfilters():
        _check_filters(plist, data.dtype.itemsize, word, most)
        stored *= DEFLATE
    if stored < size:
        raise Unfit(f"{word} has shape {data.shape}, more numbers than were written")
    return data


def check_inside(group: Any, name: bytes) -> None:
    """Raise `Unfit` if a name is a link, which could lead to another file."""
    if group.links.get_info(name).type != h5l.TYPE_HARD:
        raise Unfit(f"{name.decode()} is a link")


def check_chunks(data: Any, name: str, start: Sequence[int], shape: Sequence[int], most: int) -> None:
    """Check the compressed chunks of a part of an array by inflating each, to its own size and no further.

    Args:
        data: an array that `open_array` returned.
        name: the array's name in errors.
        start: first index of the part in each dimension.
        shape: shape of the part.
        most: the most bytes of all these chunks together.

    Raises:
        Unfit: chunks of more bytes than that; a chunk that holds more or fewer bytes than its shape says, or was
            never written.
    """
    plist = data.get_create_plist()
    if not plist.get_nfilters():
        return
    chunk = plist.get_chunk()
    filters = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
    size = math.prod(chunk) * data.dtype.itemsize
    steps = [
        range(first // step * step, first + count, step) for first, count, step in zip(start, shape, chunk, strict=True)
    ]
    together = size * math.prod(map(len, steps))
    if together > most:
        raise Unfit(f"reading a part of {name} inflates chunks of {together:,} bytes; {most:,} are allowed")
    raw = memoryview(bytearray(size + size // 1000 + _SLACK))
    for corner in itertools.product(*steps):
        try:
            skipped, stored = data.read_direct_chunk(corner, None, raw)
        except ValueError as error:  # the buffer is too small; h5py raises it for a missing chunk too
            raise Unfit(f"the chunk of {name} at {corner} is too large or was never written") from error
        used = [kind for i, kind in enumerate(filters) if not skipped >> i & 1]
        if _inflated(stored, used, size + _CHECKSUM) != size:
            raise Unfit(f"the chunk of {name} at {corner} does not hold the {size:,} bytes of its shape")


def _check_elements(data: Any, name: str) -> None:
    kind = data.get_type()
    if kind.get_class() == h5t.STRING:
        raise TextError(f"{name} is text")
    if kind.get_class() not in _NUMBERS or kind.get_size() not in (1, 2, 4, 8):
        raise Unfit(f"{name} holds no numbers of 1 to 8 bytes")
    if data.get_space().get_simple_extent_type() == h5s.NULL:
        raise Unfit(f"{name} is empty")
    if data.dtype.itemsize != kind.get_size():
        raise Unfit(f"the numbers of {name} have a type that numpy does not know")


def _check_filters(plist: Any, itemsize: int, name: str, most: int) -> None:
    filters = [plist.get_filter(i) for i in range(plist.get_nfilters())]
    kinds = [kind for kind, *_ in filters]
    for kind, _, _, label in filters:
        if kind not in FILTERS:
            shown = ascii(label.decode(errors="replace")[:40])
            raise Unfit(f"{name} has filter {kind} {shown}; {', '.join(FILTERS.values())} are read")
    packing = [kind for kind in kinds if kind in (h5z.FILTER_DEFLATE, h5z.FILTER_LZF)]
    shuffled_last = packing and h5z.FILTER_SHUFFLE in kinds[kinds.index(packing[0]) :]
    if len(set(kinds)) < len(kinds) or len(packing) > 1 or shuffled_last:
        shown = ", ".join(FILTERS[kind] for kind in kinds)
        raise Unfit(f"{name} has filters {shown}; each may occur once, and shuffle before gzip or lzf")
    size = math.prod(plist.get_chunk()) * itemsize
    if size > most:
        raise Unfit(f"a chunk of {name} takes {size:,} bytes; {most:,} are read at most")
    # lzf allocates the chunk size that the file states.
    if any(values[2:] and values[2] > size for kind, _, values, _ in filters if kind == h5z.FILTER_LZF):
        raise Unfit(f"the file says that a chunk of {name} takes more than {size:,} bytes")


def _inflated(body: Any, used: list[int], most: int) -> int:
    """The number of bytes that a chunk inflates to; any number above `most` means too many.

    Args:
        body: the chunk as stored.
        used: its filters, in the order in which they were applied.
        most: the most bytes to inflate, checksum included.
    """
    held = len(body)
    for kind in reversed(used):
        if kind == h5z.FILTER_FLETCHER32:
            body, held = body[:-_CHECKSUM], held - _CHECKSUM
        elif kind == h5z.FILTER_DEFLATE:
            stream = zlib.decompressobj()
            try:
                held = len(stream.decompress(body, most + 1))
            except zlib.error as error:
                raise OSError(f"a chunk is not a gzip stream ({error})") from error
            if not stream.eof and held <= most:
                raise OSError("a chunk's gzip stream is cut short")
        elif kind == h5z.FILTER_LZF:
            held = _lzf_size(body, most)
    return held


def _lzf_size(body: Any, most: int) -> int:
    """The number of bytes that an LZF stream inflates to, from its lengths: runs of literals, and copies."""
    at = size = 0
    while at < len(body) and size <= most:
        control = body[at]
        if control < 32:
            at, size = at + control + 2, size + control + 1
        elif control < 224:
            at, size = at + 2, size + (control >> 5) + 2
        else:
            size += (body[at + 1] if at + 1 < len(body) else 0) + 9
            at += 3
    return size
