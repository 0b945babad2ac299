"""Files of a slide's heat map: a figure (PNG), a pyramidal TIFF in the slide's scale, and GeoJSON for QuPath."""

from __future__ import annotations

import io
import json
from pathlib import Path

import matplotlib
import numpy as np
import tifffile
from matplotlib.figure import Figure
from PIL import Image

from ..data.wholeslide import Bytes
from ..files import replacing_file, write_bytes, write_text
from .outlines import collection, feature, regions, rings, scaled
from .slidemap import SlideMap, region_facts, summary, tiles_csv

COLOURS = "inferno"
_OPACITY = 0.65
_TUMOUR, _TISSUE = (200, 0, 0), (120, 120, 180)
_TILE = 256
_MOST_FEATURES = 200_000
"""The most tiles in the GeoJSON; beyond it only regions are written, since no program opens more."""


def write_map(found: SlideMap, table: Path) -> list[Path]:
    """Write all files of a slide's prediction beside the table, named after it.

    Returns:
        The files: ``NAME.csv``, ``NAME-heatmap.png``, ``NAME-heatmap.tif``, ``NAME.geojson``, ``NAME-summary.json``.
    """
    beside = {name: table.with_name(table.stem + name) for name in ENDINGS}
    picture = overlaid(found)
    write_text(table, tiles_csv(found))
    write_bytes(beside["-heatmap.png"], drawn(found, picture))
    with replacing_file(beside["-heatmap.tif"]) as partial:
        write_pyramid(picture, partial, found.grid.step * found.mpp / found.cell)
    write_text(beside[".geojson"], geojson(found))
    write_text(beside["-summary.json"], json.dumps(summary(found), indent=2) + "\n")
    return [table, *beside.values()]


ENDINGS = ("-heatmap.png", "-heatmap.tif", ".geojson", "-summary.json")


def overlaid(found: SlideMap) -> Bytes:
    """The overview with the middle of each tissue tile coloured by its probability."""
    heat = np.repeat(np.repeat(found.probabilities, found.cell, 0), found.cell, 1)
    top = (found.overview.shape[0] - heat.shape[0]) // 2
    left = (found.overview.shape[1] - heat.shape[1]) // 2
    picture: Bytes = found.overview.copy()
    part = picture[top : top + heat.shape[0], left : left + heat.shape[1]]
    tissue = ~np.isnan(heat)
    colour = matplotlib.colormaps[COLOURS](heat[tissue])[:, :3] * 255
    grey = part[tissue].mean(1, keepdims=True)
    part[tissue] = np.rint((1 - _OPACITY) * grey + _OPACITY * colour)
    return picture


def drawn(found: SlideMap, picture: Bytes) -> bytes:
    """A PNG of the slide beside its heat map, with axes in millimetres and a colour bar."""
    width = picture.shape[1] * found.grid.step * found.mpp / found.cell / 1000
    height = width * picture.shape[0] / picture.shape[1]
    figure = Figure(figsize=(12, 1.2 + 5.2 * min(2.0, height / width)), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for each, shown, title in zip(axes, (found.overview, picture), ("slide", "probability of tumour"), strict=True):
        each.imshow(shown, extent=(0, width, height, 0), interpolation="antialiased")
        each.set(title=title, xlabel="mm")
    axes[0].set_ylabel("mm")
    values = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 1), COLOURS)
    bar = figure.colorbar(values, ax=list(axes), shrink=0.8)
    bar.ax.axhline(found.asked.threshold, color="white", lw=1.5)
    figure.suptitle(found.path.name)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150)
    return stream.getvalue()


def write_pyramid(picture: Bytes, path: Path, mpp: float) -> None:
    """Write a tiled TIFF pyramid with its microns per pixel; each level is half the one before, down to one tile."""
    # Offsets of 32 bits end at 4 GB; QuPath and OpenSlide read TIFF and BigTIFF.
    with tifffile.TiffWriter(path, bigtiff=picture.nbytes > 2**31) as tiff:
        level, scale = picture, mpp
        while True:
            tiff.write(
                level,
                photometric="rgb",
                tile=(_TILE, _TILE),
                compression="zlib",
                subfiletype=0 if level is picture else 1,
                resolution=(1e4 / scale, 1e4 / scale),
                resolutionunit="CENTIMETER",
                metadata=None,
            )
            if max(level.shape) <= _TILE:
                return
            level, scale = _halved(level), scale * 2


def _halved(picture: Bytes) -> Bytes:
    height, width = (max(1, side // 2) for side in picture.shape[:2])
    box = (0, 0, 2 * width if picture.shape[1] > 1 else 1, 2 * height if picture.shape[0] > 1 else 1)
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BOX, box))


def geojson(found: SlideMap) -> str:
    """Regions of tumour as annotations, and each tile with its probability, for QuPath."""
    features = []
    for region in regions(found.tumour):
        facts = region_facts(found, region)
        polygon = scaled(rings(region), lambda corner: _rounded(found, corner))
        measured = {"Mean probability": facts["mean_probability"], "Area mm^2": facts["area"]}
        features.append(feature(polygon, "annotation", "Tumor", _TUMOUR, measured))
    places = np.argwhere(found.tissue).tolist()
    for row, column in places if len(places) <= _MOST_FEATURES else ():
        square = _square(found, column, row)
        name, colour = ("Tumor", _TUMOUR) if found.tumour[row, column] else ("Tissue", _TISSUE)
        measured = {"Probability": round(float(found.probabilities[row, column]), 6)}
        features.append(feature([square], "tile", name, colour, measured))
    return collection(features)


def _rounded(found: SlideMap, corner: tuple[int, int]) -> tuple[float, float]:
    x, y = found.cell_corner(*corner)
    return round(x, 1), round(y, 1)


def _square(found: SlideMap, column: int, row: int) -> list[list[float]]:
    corners = ((0, 0), (1, 0), (1, 1), (0, 1), (0, 0))
    return [list(_rounded(found, (column + across, row + down))) for across, down in corners]
