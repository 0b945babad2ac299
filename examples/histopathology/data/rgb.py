"""Read any picture as RGB, and resize a square of any size to a patch.

Pillow reads pictures, except TIFFs of more than 8 bits or unusual compression, which `tifffile` reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image, UnidentifiedImageError

from ..errors import ExampleError
from .layout import PATCH
from .pictures import PictureError, TooLargeError, opened_path

Bytes = npt.NDArray[np.uint8]


def read_picture(path: Path) -> Bytes:
    """Read a PNG, JPEG, WebP or TIFF as RGB: ``(H, W, 3)`` uint8.

    Transparent pixels become white, gray and palettes become RGB, 16 bits become 8.

    Raises:
        ExampleError: the picture cannot be read, or has more pixels than Pillow considers safe.
    """
    if not path.is_file():
        raise ExampleError(f"{path}: no such picture.")
    with _naming(path):
        try:
            with opened_path(path) as image:
                if not _is_deep_tiff(image):
                    return _to_rgb(image)
        except PictureError as error:
            if isinstance(error.__cause__, UnidentifiedImageError) and path.suffix.lower() in (".tif", ".tiff", ".svs"):
                return _read_tiff(path)
            raise
        return _read_tiff(path)


def resized(pixels: Bytes) -> Bytes:
    """Resize a square to 96×96; each pixel is the mean of the area that it covers."""
    if pixels.shape[0] == PATCH:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((PATCH, PATCH), Image.Resampling.BOX))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn the errors of Pillow and tifffile into an ExampleError that names the picture."""
    try:
        yield
    except TooLargeError as error:
        raise ExampleError(
            f"{path}: more than {Image.MAX_IMAGE_PIXELS:,} pixels. Export a region of it, or a lower magnification."
        ) from error
    except (OSError, ValueError, SyntaxError, KeyError, tifffile.TiffFileError) as error:
        raise ExampleError(f"{path}: cannot be read as a picture ({error}). Save it as PNG or JPEG.") from error


def _to_rgb(image: Image.Image) -> Bytes:
    if image.mode.startswith(("I", "F")):
        return _scale_to_bytes(np.asarray(image))
    if "A" in image.mode.upper() or "transparency" in image.info:
        colour = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour)
    return np.asarray(image.convert("RGB"))


def _is_deep_tiff(image: Image.Image) -> bool:
    # Pillow opens 16-bit colour in separate planes without an error, and mixes up its pixels.
    bits_per_sample = getattr(image, "tag_v2", {}).get(258, (8,))
    return image.format == "TIFF" and max(bits_per_sample) > 8


def _read_tiff(path: Path) -> Bytes:
    """The first series of a TIFF of more than 8 bits or unusual compression, which Pillow cannot read correctly."""
    with tifffile.TiffFile(path) as tiff:
        series = tiff.series[0]
        if Image.MAX_IMAGE_PIXELS is not None and series.size > 3 * Image.MAX_IMAGE_PIXELS:
            raise TooLargeError
        return _scale_to_bytes(series.asarray())


def _scale_to_bytes(values: npt.NDArray[Any]) -> Bytes:
    """Scale gray or colour to ``(H, W, 3)`` uint8: integers from their type's range, floats from [0, 1]."""
    if values.ndim == 3 and values.shape[0] in (3, 4) and values.shape[2] not in (3, 4):
        values = np.moveaxis(values, 0, 2)
    if values.ndim == 2:
        values = np.repeat(values[:, :, None], 3, axis=2)
    if values.ndim != 3 or values.shape[2] not in (3, 4):
        raise ValueError(f"an array of shape {values.shape} is neither gray nor RGB")
    # Pillow returns 16-bit gray as int32 in mode I.
    wide = values.dtype.kind in "iu" and values.dtype.itemsize > 1
    top = 65535 if wide else 255 if values.dtype == np.uint8 else 1
    share = values.astype(np.float32) / top
    if share.shape[2] == 4:
        share = share[:, :, :3] * share[:, :, 3:] + 1 - share[:, :, 3:]
    return np.rint(np.clip(share[:, :, :3], 0, 1) * 255).astype(np.uint8)
