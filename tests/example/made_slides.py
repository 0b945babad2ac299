"""Slides drawn for tests: two stains, tiled and pyramidal, with Aperio's description."""

from pathlib import Path

import numpy as np
import tifffile
from scipy.ndimage import gaussian_filter

from examples.histopathology.data.stain import RUIFROK, intensity
from examples.histopathology.making.writing import SplitWriter

TILE = 96


def tissue(height: int, width: int, seed: int = 0, tumour: bool = False) -> np.ndarray:
    """``(height, width, 3)`` uint8: smooth eosin with a little haematoxylin, or fine dense haematoxylin."""
    rng = np.random.default_rng(seed)
    blur, plain, varied = (1.5, (0.4, 0.1), 0.5) if tumour else (6, (0.1, 0.4), 0.2)
    smooth = gaussian_filter(rng.standard_normal((2, height, width)), (0, blur, blur))
    blobs = np.moveaxis(np.clip(smooth / smooth.std(), 0, None), 0, -1)
    amounts = np.array(plain) + varied * blobs
    return np.rint(intensity(amounts @ RUIFROK) * 255).astype(np.uint8)


def drawn_slide(columns: int, rows: int, tumour: tuple[slice, slice], glass: int = 0) -> np.ndarray:
    """Tissue of so many tiles with a rectangle (rows, columns of tiles) of tumour; that many columns of glass first."""
    picture = tissue(rows * TILE, columns * TILE)
    down, across = (slice(each.start * TILE, each.stop * TILE) for each in tumour)
    shape = picture[down, across].shape
    picture[down, across] = tissue(shape[0], shape[1], 1, tumour=True)
    picture[:, : glass * TILE] = 243
    return picture


def write_svs(path: Path, picture: np.ndarray, mpp: float | None = None, levels: int = 1, power: int | None = None):
    """A slide whose every level is half of the one before."""
    said = [f"AppMag = {power}"] * (power is not None) + [f"MPP = {mpp}"] * (mpp is not None)
    height, width = picture.shape[:2]
    text = "|".join([f"Aperio Image Library v11.2.1\r\n{width}x{height} (256x256) RAW", *said])
    with tifffile.TiffWriter(path) as tiff:
        for _ in range(levels):
            tiff.write(picture, photometric="rgb", tile=(256, 256), compression="zlib", description=text, metadata=None)
            height, width = picture.shape[0] // 2, picture.shape[1] // 2
            picture = picture[: 2 * height, : 2 * width].reshape(height, 2, width, 2, 3).mean((1, 3))
            picture = np.rint(picture).astype(np.uint8)
    return path


def write_patches(folder: Path, sizes: dict[str, int]) -> Path:
    """Splits in the challenge's layout: label 1 is tumour."""
    for centre, (name, size) in enumerate(sizes.items()):
        with SplitWriter(folder, name, "uint8") as split:
            for i in range(size):
                image = tissue(TILE, TILE, 1000 * (centre + 1) + i, tumour=bool(i % 2))
                split.add(image.transpose(2, 0, 1), i % 2, [centre, 0, 0, 0])
    return folder
