"""Stains as optical density: Beer-Lambert's law, published stain vectors, and those estimated from a slide.

Arrays are channel last, ``(..., 3)`` in R, G, B; a stain matrix is ``(2, 3)``, haematoxylin first, each row
of length 1. Sources:

- A. C. Ruifrok, D. A. Johnston. Quantification of histochemical staining by color deconvolution.
  Analytical and Quantitative Cytology and Histology 23(4), 2001.
- M. Macenko et al. A method for normalizing histology slides for quantitative analysis. ISBI 2009.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]

# Ruifrok & Johnston 2001, measured on slides of one stain each; normalised to length 1 below.
HAEMATOXYLIN = (0.65, 0.70, 0.29)
EOSIN = (0.07, 0.99, 0.11)
DAB = (0.27, 0.57, 0.78)

_LN10 = math.log(10)
# Half a step of an 8-bit picture, so that a black pixel has a finite density, 2.7.
_DARKEST = 0.5 / 255
# Below this number the percentiles depend on single pixels.
_FEWEST_PIXELS = 50
# Haematoxylin and eosin are 25 to 40 degrees apart; compression noise alone spreads a gray by a few degrees.
_SMALLEST_ANGLE = np.deg2rad(5.0)


def unit_rows(vectors: npt.ArrayLike) -> Floats:
    """Each row divided by its length: ``(n, 3)`` to ``(n, 3)``."""
    rows = np.asarray(vectors, np.float64)
    unit: Floats = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return unit


RUIFROK: Floats = unit_rows([HAEMATOXYLIN, EOSIN])


def optical_density(intensity: Floats, white: npt.ArrayLike = 1.0) -> Floats:
    """Beer-Lambert: ``OD = -log10(I / I0)``, no unit.

    >>> optical_density(np.array([1.0, 0.1, 0.01])).round(6).tolist()
    [-0.0, 1.0, 2.0]

    Args:
        intensity: ``(..., 3)`` in [0, 1]; values below half a step of 8 bits are raised to that.
        white: I0, a number or ``(3,)``, the intensity where there is no tissue.
    """
    density: Floats = -np.log10(np.maximum(intensity, _DARKEST) / white)
    return density


def intensity(density: Floats, white: npt.ArrayLike = 1.0) -> Floats:
    """Intensity from optical density: ``I = I0 · 10^-OD``, ``(..., 3)`` to ``(..., 3)``."""
    # numpy's power takes ten times as long as its vectorised exp.
    light: Floats = np.asarray(white) * np.exp(density * -_LN10)
    return light


def concentrations(density: Floats, stains: Floats) -> Floats:
    """The amounts of each stain that best explain a density, by least squares.

    >>> amounts = np.array([[0.3, 0.1]])
    >>> concentrations(amounts @ RUIFROK, RUIFROK).round(6).tolist()
    [[0.3, 0.1]]

    Args:
        density: optical density, ``(..., 3)``.
        stains: ``(n, 3)``, n at most 3, rows independent.

    Returns:
        ``(..., n)`` in the stains' order; noise can make amounts slightly negative.
    """
    # lstsq needs one column a pixel; the pseudo-inverse of the 2×3 matrix gives the same in one product.
    amounts: Floats = density @ np.linalg.pinv(stains).astype(density.dtype)
    return amounts


def macenko_stains(density: Floats, threshold: float = 0.15, percentile: float = 1.0) -> Floats:
    """Estimate a slide's two stain vectors by the method of Macenko et al. 2009.

    Stained pixels lie in the plane of the first two singular vectors of their densities; the stains are
    the extreme directions in that plane, taken at a percentile of the angle so that noise has little effect.

    Args:
        density: optical density, ``(..., 3)``.
        threshold: pixels whose density vector is no longer than this are ignored: they are too pale to have a hue.
        percentile: percentile of the angle, from either end, in percent.

    Returns:
        ``(2, 3)``, rows of length 1; first haematoxylin, which is the one that absorbs more red.

    Raises:
        ValueError: too few stained pixels, or all of one hue (a gray picture, a single stain).
    """
    pixels = density.reshape(-1, 3)
    # The length, not each channel: pale haematoxylin hardly absorbs blue, and would be ignored first.
    stained = pixels[np.linalg.norm(pixels, axis=1) > threshold].astype(np.float64)
    if len(stained) < _FEWEST_PIXELS:
        raise ValueError(f"only {len(stained)} pixels are stained; {_FEWEST_PIXELS} are needed")
    plane = _principal_plane(stained)
    along = stained @ plane
    angles = np.arctan2(along[:, 1], along[:, 0])
    low, high = np.percentile(angles, [percentile, 100 - percentile])
    if high - low < _SMALLEST_ANGLE:
        raise ValueError("all stained pixels are of one hue; two stains cannot be told apart")
    ends = np.array([[np.cos(low), np.sin(low)], [np.cos(high), np.sin(high)]])
    # A direction with a negative component would emit light; the percentile can overshoot by a little.
    stains = unit_rows(np.maximum(ends @ plane.T, 0.0))
    first = int(np.argmax(stains[:, 0]))
    return stains[[first, 1 - first]]


def _principal_plane(stained: Floats) -> Floats:
    """The first two right singular vectors, ``(3, 2)``, the first pointing into the positive octant."""
    # Eigenvectors of the 3×3 product are the same vectors as an SVD of all pixels gives, with less memory.
    _, vectors = np.linalg.eigh(stained.T @ stained)
    plane: Floats = vectors[:, [2, 1]]
    return plane * np.where(plane.sum(axis=0) < 0, -1.0, 1.0)
