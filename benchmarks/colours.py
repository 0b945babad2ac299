"""Compare the synthetic data set's colours with the challenge's, and fit its parameters to them.

    python -m benchmarks.colours                    # means and standard deviations of 500 patches a split
    python -m benchmarks.colours --fit              # the amounts and spreads that fit the published figures best

No label is read and no model is run: the parameters in `examples.histopathology.making.hospitals` come from published
colour statistics alone. The fit finds six numbers from the patches' stains: the two spreads between patches, and
factors on haematoxylin and eosin for the training hospitals and for validation. It blurs the stains in place of the
light, and omits noise and compression.
"""

from __future__ import annotations

import argparse

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter
from scipy.optimize import least_squares

from examples.histopathology.data.layout import SPLITS
from examples.histopathology.data.stain import Floats, intensity
from examples.histopathology.making import hospitals
from examples.histopathology.making.hospitals import PUBLISHED, Slide, choose_slide
from examples.histopathology.making.synthetic import render_patch
from examples.histopathology.making.tissue import Tissue, without_margin

PATCHES = 500
_STEP = 4  # every fourth row and column: enough for the statistics of a patch
# Bounds within which patches look like tissue: they may vary by a quarter in thickness and by half in eosin. The fit
# reaches both bounds, which keep the standard deviation of green a little below the published one.
_THICKNESS, _UPTAKE = (0.1, 0.25), (0.1, 0.5)


def show(seed: int) -> None:
    """Print the colour statistics of 500 rendered patches of each split."""
    for split in SPLITS:
        images = np.stack([render_patch(seed, split, index).image for index in range(PATCHES)]) / 255
        mean, std = images.mean(axis=(0, 2, 3)), images.std(axis=(0, 2, 3))
        print(f"seed {seed} {split:6s} mean {_row(mean)}  std {_row(std)}", end="")
        print(f"   published {_row(PUBLISHED[split][0])} / {_row(PUBLISHED[split][1])}" if split in PUBLISHED else "")


def fit(seed: int) -> None:
    """Print the six parameters of the best fit, and the statistics that they reach."""
    drawn = {split: _draw(seed, split) for split in PUBLISHED}
    start = np.log([hospitals.THICKNESS, hospitals.EOSIN_UPTAKE, 1, 1, 1, 1])
    bounds = np.log([_THICKNESS, _UPTAKE, *[(0.1, 10)] * 4]).T
    found = np.exp(least_squares(lambda knobs: _misfit(np.exp(knobs), drawn), start, bounds=bounds).x)
    print(f"THICKNESS {found[0]:.3f}, EOSIN_UPTAKE {found[1]:.3f}")
    for k, split in enumerate(PUBLISHED):
        mean, std = _statistics(found[:2], found[2 + 2 * k : 4 + 2 * k], *drawn[split])
        factors = _row(found[2 + 2 * k : 4 + 2 * k])
        print(f"{split:6s} factors on the amounts {factors}: mean {_row(mean)}  std {_row(std)}")


def _draw(seed: int, split: str) -> tuple[Floats, list[Slide], Floats]:
    """Concentrations ``(n, pixels, 2)``, slides, and two standard normal numbers for each patch."""
    amounts, slides = [], []
    for index in range(PATCHES):
        rng = np.random.default_rng([seed, SPLITS.index(split), index, 0])
        slide = choose_slide(rng, seed, split)
        tissue = Tissue(rng, slide.microns, slide.tumour, slide.tumour_eosin)
        tissue.grow(index % 2)
        both = np.stack([tissue.haematoxylin, tissue.eosin])
        soft = without_margin(gaussian_filter(both, (0, slide.blur, slide.blur)))[:, ::_STEP, ::_STEP]
        amounts.append(soft.reshape(2, -1).T)
        slides.append(slide)
    return np.stack(amounts), slides, np.random.default_rng(seed).standard_normal((PATCHES, 2))


def _statistics(spreads: Floats, factors: Floats, amounts: Floats, slides: list[Slide], normal: Floats) -> Floats:
    thickness, uptake = (spreads * normal).T
    own = np.exp(np.stack([thickness, thickness + uptake], 1)) * factors
    density = (amounts * own[:, None]) @ np.stack([slide.stains for slide in slides])
    light = intensity(density, np.stack([slide.white for slide in slides])[:, None])
    return np.stack([light.mean(axis=(0, 1)), light.std(axis=(0, 1))])


def _misfit(knobs: Floats, drawn: dict[str, tuple[Floats, list[Slide], Floats]]) -> Floats:
    rows = [
        _statistics(knobs[:2], knobs[2 + 2 * k : 4 + 2 * k], *drawn[split]) - np.array(PUBLISHED[split])
        for k, split in enumerate(PUBLISHED)
    ]
    return np.concatenate([(row * [[2], [1]]).ravel() for row in rows])  # a mean counts twice


def _row(values: npt.ArrayLike) -> str:
    return " ".join(f"{value:.3f}" for value in np.asarray(values))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fit", action="store_true")
    options = parser.parse_args()
    (fit if options.fit else show)(options.seed)


if __name__ == "__main__":
    main()
