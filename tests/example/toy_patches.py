"""Splits whose label anyone can see: the centre of a patch with label 1 is brighter in red."""

from pathlib import Path

import numpy as np

from examples.histopathology.making.writing import SplitWriter

SIZES = {"train": 48, "val": 24, "test": 24}


def write_toy(folder: Path, sizes: dict[str, int] = SIZES, *, test_labels: bool = True, source: str = "") -> Path:
    rng = np.random.default_rng(0)
    for centre, (name, size) in enumerate(sizes.items()):
        with SplitWriter(folder, name, source=source) as split:
            for i in range(size):
                image = rng.uniform(0.3, 0.7, (3, 96, 96)).astype(np.float32)
                image[0, 32:64, 32:64] += 0.25 * (i % 2)
                label = i % 2 if test_labels or name != "test" else None
                split.add(image, label, [centre, 0, 0, 0])
    return folder
