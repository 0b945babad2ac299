"""The hospitals of the synthetic data set: the stains, scanner and slides of each.

Each hospital has its own stain vectors, amounts of stain, white point, blur, JPEG quality and magnification. Each slide
varies a little around its hospital and has its patient's tumour; no slide is in two splits. Stains are as in `stain`.

The amounts and the two spreads were fitted to the challenge's colour statistics alone, before any classifier saw a
patch; ``python -m benchmarks.colours --fit`` repeats the fit. Means and standard deviations of R, G, B over 500
patches a split, seed 0:

======  ===========================  ===========================
split   challenge                    synthetic
======  ===========================  ===========================
train   .74 .59 .72 / .18 .21 .17    .74 .60 .72 / .18 .20 .17
val     .61 .46 .59 / .19 .22 .18    .62 .47 .60 / .18 .20 .18
test    not published                .67 .55 .72 / .19 .20 .16
======  ===========================  ===========================

Centre 2, the test set, was chosen: paler than validation, bluer than both others, at another magnification.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from ..data.stain import Floats, unit_rows
from .nuclei import Nucleus, tumour_kind


@dataclass(frozen=True)
class Hospital:
    """How a laboratory and its scanner change the look of tissue.

    Attributes:
        share: its share of the patches of its split.
        haematoxylin, eosin: directions of optical density in R, G, B.
        amounts: factors on the two stains' concentrations.
        white: intensity of empty glass in R, G, B.
        blur: standard deviation in pixels.
        jpeg: quality, 1 to 95.
        microns: microns per pixel.
        slides: number of slides.
    """

    split: str
    share: float
    haematoxylin: tuple[float, float, float]
    eosin: tuple[float, float, float]
    amounts: tuple[float, float]
    white: tuple[float, float, float]
    blur: float
    jpeg: int
    microns: float
    slides: int = 10


# The challenge's means and standard deviations of R, G, B over 500 images; those of the test set are not published.
PUBLISHED = {
    "train": ((0.74, 0.59, 0.72), (0.18, 0.21, 0.17)),
    "val": ((0.61, 0.46, 0.59), (0.19, 0.22, 0.18)),
}

# Variation between patches, as standard deviations of logarithms: of a section's thickness, and of the eosin in a spot.
THICKNESS = 0.25
EOSIN_UPTAKE = 0.50

HOSPITALS: dict[int, Hospital] = {
    0: Hospital(
        "train", 0.178, (0.51, 0.71, 0.49), (0.19, 0.87, 0.45), (1.09, 0.44), (0.952, 0.944, 0.946), 0.55, 80, 1.00
    ),
    3: Hospital(
        "train", 0.387, (0.49, 0.75, 0.44), (0.11, 0.94, 0.32), (1.10, 0.395), (0.950, 0.945, 0.955), 0.70, 70, 1.05
    ),
    4: Hospital(
        "train", 0.435, (0.48, 0.75, 0.45), (0.13, 0.92, 0.36), (1.06, 0.305), (0.965, 0.955, 0.955), 0.45, 85, 0.95
    ),
    1: Hospital(
        "val", 1.0, (0.51, 0.72, 0.47), (0.28, 0.85, 0.45), (1.57, 0.83), (0.940, 0.946, 0.943), 0.85, 75, 1.00
    ),
    2: Hospital(
        "test", 1.0, (0.56, 0.74, 0.36), (0.15, 0.93, 0.32), (1.25, 0.49), (0.935, 0.950, 0.945), 0.60, 60, 1.10
    ),
}


@dataclass(frozen=True)
class Slide:
    """One slide of a hospital: its stains, its scan, and its patient's tumour.

    Attributes:
        stains: ``(2, 3)``, rows of length 1 times the slide's amounts.
        white: ``(3,)``.
        blur, jpeg, microns: the hospital's, slightly changed.
        tumour: the tumour's kind of nucleus.
        tumour_eosin: eosin in the tumour's cytoplasm.
    """

    number: int
    centre: int
    stains: Floats
    white: Floats
    blur: float
    jpeg: int
    microns: float
    tumour: Nucleus
    tumour_eosin: float


def choose_slide(rng: np.random.Generator, seed: int, split: str) -> Slide:
    """Draw a slide for a patch: the hospital by the split's shares, then any of its slides."""
    centres = [centre for centre, hospital in HOSPITALS.items() if hospital.split == split]
    shares = np.array([HOSPITALS[centre].share for centre in centres])
    centre = int(rng.choice(centres, p=shares / shares.sum()))
    return _slide(seed, centre, int(rng.integers(HOSPITALS[centre].slides)))


def spread(rng: np.random.Generator) -> Floats:
    """Draw a patch's factors on its two stains, ``(2,)``."""
    thickness, uptake = rng.normal(0, (THICKNESS, EOSIN_UPTAKE))
    factors: Floats = np.exp([thickness, thickness + uptake])
    return factors


@cache
def _slide(seed: int, centre: int, number: int) -> Slide:
    """Draw a slide's variation around its hospital; slides of different centres never share a seed."""
    hospital = HOSPITALS[centre]
    number += 100 * centre
    rng = np.random.default_rng([seed, number, 2])
    directions = unit_rows([hospital.haematoxylin, hospital.eosin])
    directions = unit_rows(np.maximum(directions + rng.normal(0, 0.025, (2, 3)), 0.01))
    amounts = np.array(hospital.amounts) * np.exp(rng.normal(0, [0.12, 0.22]))
    return Slide(
        number=number,
        centre=centre,
        stains=directions * amounts[:, None],
        white=np.clip(hospital.white + rng.normal(0, 0.008, 3), 0, 1),
        blur=hospital.blur * float(rng.uniform(0.9, 1.15)),
        jpeg=hospital.jpeg + int(rng.integers(-6, 7)),
        microns=hospital.microns * float(rng.uniform(0.96, 1.04)),
        tumour=tumour_kind(float(rng.uniform(0.2, 1.0))),
        tumour_eosin=float(rng.uniform(0.16, 0.30)),
    )
