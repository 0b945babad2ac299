"""Read pictures from strangers: four formats only, and nothing is decoded before its size is checked.

The format is recognised from the file's first bytes, so no other decoder of Pillow is tried. Some decoders allocate
memory before Pillow reports the picture's size; what they would allocate is checked here first: WebP's canvas, TIFF's
tiles and lists of numbers.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image

READ = "PNG, JPEG, WebP and TIFF are read"
_SIGNATURES = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
}
_MOST_SCANS = 100
"""The most scans of a JPEG, each of which passes over every pixel; encoders write ten."""
_MOST_NUMBERS = 65_536
"""The most numbers of one TIFF tag: Pillow makes an object of each."""
_PLAIN_TYPES = (1, 2, 7)
"""TIFF types of bytes and text, of which Pillow makes one object."""
_TILE = (322, 323)

# Up to twice its limit Pillow only warns. The filter is set once: catch_warnings is not safe in threads.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


class PictureError(ValueError):
    """A file that is broken, or too expensive to decode."""


class UnknownFormatError(PictureError):
    """A file of another format."""


class TooLargeError(PictureError):
    """A picture of too many pixels."""


@contextmanager
def opened(file: BinaryIO, most: int | None = None) -> Iterator[Image.Image]:
    """The first picture of a file, to be decoded inside the block.

    Args:
        file: the file, at its start.
        most: the most pixels; by default Pillow's ``MAX_IMAGE_PIXELS``.

    Raises:
        PictureError: any error inside the block; `UnknownFormatError` and `TooLargeError` are such errors.
    """
    most = most or Image.MAX_IMAGE_PIXELS or 2**31
    try:
        kind = _format(file.read(16))
        _check_before_opening(file, kind, most)
        file.seek(0)
        with Image.open(file, formats=[kind]) as image:
            _check_size(image.size, most)
            yield image
    except PictureError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise TooLargeError(f"more than {most:,} pixels") from error
    except Exception as error:  # a broken file can make a decoder raise anything
        raise PictureError(str(error) or type(error).__name__) from error


@contextmanager
def opened_path(path: Path, most: int | None = None) -> Iterator[Image.Image]:
    """`opened` for a path."""
    with path.open("rb") as file, opened(file, most) as image:
        yield image


def _format(start: bytes) -> str:
    for signature, kind in _SIGNATURES.items():
        if start.startswith(signature):
            return kind
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "WEBP"
    raise UnknownFormatError(f"not a picture of a known format: {READ}")


def _check_size(size: tuple[int, int], most: int) -> None:
    if size[0] * size[1] > most:
        raise TooLargeError(f"{size[0]}×{size[1]} pixels; {most:,} are read at most")


def _check_before_opening(file: BinaryIO, kind: str, most: int) -> None:
    """Check what Pillow, or the library below it, would allocate before it reports the picture's size."""
    file.seek(0)
    if kind == "WEBP":
        _check_size(_webp_canvas(file.read(30)), most)
    elif kind == "TIFF":
        _check_tiff(file, most)
    elif kind == "JPEG":
        scans, last = 0, b""
        while block := file.read(2**20):
            scans += (last + block).count(b"\xff\xda")
            last = block[-1:]
        if scans > _MOST_SCANS:
            raise PictureError(f"a JPEG of {scans:,} scans; {_MOST_SCANS} are read at most")


def _webp_canvas(start: bytes) -> tuple[int, int]:
    """Width and height from the first chunk: extended, lossless, or lossy."""
    kind = start[12:16]
    if len(start) < 30 or kind not in (b"VP8X", b"VP8L", b"VP8 "):
        raise PictureError("a WebP without its header")
    if kind == b"VP8X":
        return 1 + int.from_bytes(start[24:27], "little"), 1 + int.from_bytes(start[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(start[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(start[26:28], "little") & 0x3FFF, int.from_bytes(start[28:30], "little") & 0x3FFF


def _check_tiff(file: BinaryIO, most: int) -> None:
    """Check the first directory's counts, and the tile size, which libtiff allocates however small the picture is."""
    start = file.read(16)
    order = "<" if start[:2] == b"II" else ">"
    big = 43 in start[2:4]
    number, entry = (f"{order}Q", f"{order}HHQ") if big else (f"{order}H", f"{order}HHI")
    file.seek(struct.unpack_from(f"{order}Q" if big else f"{order}I", start, 8 if big else 4)[0])
    count = struct.unpack(number, file.read(struct.calcsize(number)))[0]
    if count > _MOST_NUMBERS:
        raise PictureError(f"a TIFF of {count:,} tags")
    tile = []
    for _ in range(count):
        field = file.read(20 if big else 12)
        tag, kind, values = struct.unpack_from(entry, field)
        if values > _MOST_NUMBERS and kind not in _PLAIN_TYPES:
            raise PictureError(f"a TIFF with {values:,} numbers in tag {tag}; {_MOST_NUMBERS:,} are read at most")
        if tag in _TILE:
            form = {3: "H", 4: "I", 16: "Q"}.get(kind, "I")
            tile.append(struct.unpack_from(order + form, field, 12 if big else 8)[0])
    if len(tile) > 1:
        _check_size((max(tile), sorted(tile)[-2]), most)
