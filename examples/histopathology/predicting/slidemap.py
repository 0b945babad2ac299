"""Predict a whole slide: the probability of each tile that holds tissue, its position, and the slide's summary.

Threads read a few blocks of tiles ahead while the network predicts. Only the overview and one number a tile stay in
memory.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..augment.transforms import EvalTransform, Normalisation, Normalise
from ..data.layout import PATCH
from ..data.wholeslide import (
    Bytes,
    Grid,
    Mask,
    make_grid,
    microns_per_pixel,
    opened_slide,
    overview,
    read_tiles,
    tissue_mask,
    tissue_tiles,
)
from ..errors import ExampleError
from ..methods.method import Method
from ..runs.experiment import load, open_backbone
from ..training.prediction import ensembled
from ..training.recipe import Recipe, pick_device
from .outlines import regions

TISSUE = 0.25
"""The default of the least share of tissue in a predicted tile."""
_OVERVIEW = 2048
"""The approximate length of the overview's longer side, in pixels."""
_LEAST_CELL = 8

Classifier = Callable[[Tensor], Tensor]
"""Returns logits ``(B,)`` on the CPU for patches ``(B, 3, 96, 96)`` in [0, 1]."""


@dataclass(frozen=True)
class Asked:
    """The settings of a slide's prediction.

    Attributes:
        tile_mpp: microns per pixel of the training patches.
        mpp: microns per pixel of the slide; None reads its metadata.
        stride: distance between tiles in pixels of a tile, at most 96.
        tissue: least share of tissue in a predicted tile; 0 takes all tiles.
        threshold: least probability of tumour.
        batch_size: tiles in a batch.
    """

    tile_mpp: float
    mpp: float | None = None
    stride: int = PATCH
    tissue: float = TISSUE
    threshold: float = 0.5
    batch_size: int = 32


@dataclass(frozen=True)
class SlideMap:
    """The result of a slide's prediction.

    Attributes:
        path: the slide's file.
        size: the slide's width and height at full resolution.
        mpp: the slide's microns per pixel.
        asked: the settings.
        grid: the positions of the tiles.
        probabilities: ``(rows, columns)``; NaN for tiles without tissue.
        overview: a small picture of all that the grid covers, ``(height, width, 3)``.
        cell: pixels of the overview for each stride.
        seconds: time of reading and predicting.
        notes: remarks, a sentence each.
    """

    path: Path
    size: tuple[int, int]
    mpp: float
    asked: Asked
    grid: Grid
    probabilities: npt.NDArray[np.float64]
    overview: Bytes
    cell: int
    seconds: float
    notes: list[str]

    @property
    def tissue(self) -> Mask:
        """The tiles that were predicted."""
        found: Mask = ~np.isnan(self.probabilities)
        return found

    @property
    def tumour(self) -> Mask:
        """The tiles of at least the threshold's probability."""
        return np.nan_to_num(self.probabilities, nan=-1.0) >= self.asked.threshold

    @property
    def cell_area(self) -> float:
        """The area that a tile counts for, a square of one stride, in square millimetres."""
        return float((self.grid.step * self.mpp / 1000) ** 2)

    def cell_corner(self, column: float, row: float) -> tuple[float, float]:
        """The upper left corner, at full resolution, of that square in the middle of a tile."""
        margin = (self.grid.side - self.grid.step) / 2
        return column * self.grid.step + margin, row * self.grid.step + margin


def classifier(folder: Path, recipe: Recipe, method: Method) -> Classifier:
    """A saved adapter as a function of patches.

    Raises:
        ExampleError: a method that uses all images together; as `experiment.load`.
    """
    if method.transductive:
        raise ExampleError(
            f"{method.name} uses all images together (centre, adabn or balanced), which a slide's tiles do not allow. "
            "Give an adapter of another method, or leave these words out of --how."
        )
    model = load(folder, recipe, pick_device())
    return classifier_of(model, recipe.image_size, open_backbone(recipe)[1], method.predict.views)


def classifier_of(model: nn.Module, size: int, normalisation: Normalisation, views: int = 1) -> Classifier:
    """A model as a function of patches, which averages the probability over the views."""
    transform = EvalTransform(size, Normalise(normalisation), range(views))
    device = next(model.parameters()).device
    model.eval()

    def logits(patches: Tensor) -> Tensor:
        with torch.inference_mode():
            images = transform(patches.to(device)).contiguous(memory_format=torch.channels_last)
            each = [model(view).squeeze(1).float().cpu() for view in torch.split(images, len(patches))]
        return ensembled(torch.stack(each)) if views > 1 else each[0]

    return logits


def predict_slide(
    path: Path, classify: Classifier, asked: Asked, progress: Callable[[int, int], None] = lambda done, total: None
) -> SlideMap:
    """Find tissue, cut it into tiles, predict each.

    Args:
        path: the slide.
        classify: see `classifier`.
        asked: the settings.
        progress: called with the number of tiles that are done and of all tiles.

    Raises:
        ExampleError: the slide cannot be read, does not say its microns per pixel, or holds no tissue.
    """
    start = time.perf_counter()
    with opened_slide(path) as slide:
        mpp = microns_per_pixel(slide, asked.mpp)
        grid = make_grid(slide.size, mpp, asked.tile_mpp, asked.stride)
        cell = min(max(_OVERVIEW // max(grid.columns, grid.rows), _LEAST_CELL * asked.stride // PATCH, 1), asked.stride)
        picture = overview(slide, grid, cell)
        chosen = tissue_tiles(tissue_mask(picture), grid, cell, asked.tissue)
        total = int(chosen.sum())
        if not total:
            raise ExampleError(
                f"{path}: none of its {chosen.size:,} tiles holds {asked.tissue:.0%} tissue; --tissue 0 takes all."
            )
        probabilities = np.full(chosen.shape, np.nan)
        done = 0
        for places, tiles in read_tiles(slide, grid, chosen):
            for first in range(0, len(places), asked.batch_size):
                batch = torch.from_numpy(tiles[first : first + asked.batch_size])
                logits = classify(batch.permute(0, 3, 1, 2).float().contiguous() / 255)
                rows, columns = zip(*places[first : first + asked.batch_size], strict=True)
                probabilities[rows, columns] = logits.double().sigmoid().numpy()
            done += len(places)
            progress(done, total)
        notes = _notes(asked, mpp, slide.mpp)
        seconds = time.perf_counter() - start
        return SlideMap(path, slide.size, mpp, asked, grid, probabilities, picture, cell, seconds, notes)


def _notes(asked: Asked, mpp: float, stored: float | None) -> list[str]:
    notes = []
    if stored is not None and abs(mpp / stored - 1) > 0.01:
        notes.append(f"--mpp {mpp:g} overrides the slide's metadata, which say {stored:g}")
    if mpp > asked.tile_mpp * 1.2:
        notes.append(
            f"the slide is coarser ({mpp:g} microns a pixel) than the training patches ({asked.tile_mpp:g}): its tiles "
            "are enlarged, and predictions cannot be trusted"
        )
    return notes


def tiles_csv(found: SlideMap) -> str:
    """``X,Y,Probability,Pred`` lines, one for each tile: its upper left corner at full resolution, its probability."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("X", "Y", "Probability", "Pred"))
    for row, column in np.argwhere(found.tissue).tolist():
        probability = found.probabilities[row, column]
        pred = int(probability >= found.asked.threshold)
        writer.writerow((*found.grid.corner(column, row), f"{probability:.6f}", pred))
    return text.getvalue()


def summary(found: SlideMap) -> dict[str, Any]:
    """The slide in numbers: lengths in pixels at full resolution, areas in square millimetres."""
    probabilities = found.probabilities[found.tissue]
    megapixels = found.size[0] * found.size[1] / 1e6
    tumour = int(found.tumour.sum())
    return {
        "slide": found.path.name,
        "width": found.size[0],
        "height": found.size[1],
        "microns_per_pixel": found.mpp,
        "tile_microns_per_pixel": found.asked.tile_mpp,
        "tile_side": found.grid.side,
        "step": found.grid.step,
        "columns": found.grid.columns,
        "rows": found.grid.rows,
        "tissue_tiles": len(probabilities),
        "tissue_area": len(probabilities) * found.cell_area,
        "threshold": found.asked.threshold,
        "tumour_tiles": tumour,
        "tumour_area": tumour * found.cell_area,
        "tumour_share": tumour / len(probabilities),
        "mean_probability": float(probabilities.mean()),
        "highest_probability": float(probabilities.max()),
        "regions": [region_facts(found, region) for region in regions(found.tumour)],
        "seconds": found.seconds,
        "seconds_per_megapixel": found.seconds / megapixels,
        "notes": found.notes,
    }


def region_facts(found: SlideMap, region: Mask) -> dict[str, Any]:
    """One region of tumour: its bounding box at full resolution, its tiles, its area and its probability."""
    places = np.argwhere(region)
    (top, left), (bottom, right) = places.min(0), places.max(0) + 1
    x, y = found.cell_corner(left, top)
    end_x, end_y = found.cell_corner(right, bottom)
    return {
        "x": round(x),
        "y": round(y),
        "width": round(end_x - x),
        "height": round(end_y - y),
        "tiles": len(places),
        "area": len(places) * found.cell_area,
        "mean_probability": float(found.probabilities[region].mean()),
        "highest_probability": float(found.probabilities[region].max()),
    }


def lines(facts: dict[str, Any]) -> list[str]:
    """The summary as lines for the terminal."""
    most = facts["regions"][0] if facts["regions"] else None
    return [
        f"{facts['slide']}: {facts['width']:,}×{facts['height']:,} pixels of {facts['microns_per_pixel']:g} microns",
        f"{facts['tissue_tiles']:,} of {facts['columns'] * facts['rows']:,} tiles hold tissue, "
        f"{facts['tissue_area']:.2f} mm²; a tile is {facts['tile_side']:.1f} pixels of the slide",
        f"{facts['tumour_tiles']:,} tiles of at least {facts['threshold']:g}, {facts['tumour_area']:.2f} mm² "
        f"({facts['tumour_share']:.1%} of the tissue) in {len(facts['regions'])} regions"
        + (f"; the largest has {most['area']:.2f} mm² at x {most['x']:,}, y {most['y']:,}" if most else ""),
        f"{facts['seconds']:.1f} s, {facts['seconds_per_megapixel']:.2f} s a megapixel of the slide",
        *facts["notes"],
    ]
