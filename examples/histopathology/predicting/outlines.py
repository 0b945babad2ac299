"""Regions of a heat map as polygons, and all of it as GeoJSON in the form that QuPath reads.

A region is what cells make that share a side; its outline runs along the sides of its cells, holes included. QuPath's
coordinates are those of the slide's full resolution. Drag the file onto the open slide, or File, Import objects.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Mask = npt.NDArray[np.bool_]
Corner = tuple[int, int]
"""(column, row) of the grid's lines."""
Ring = list[Corner]


def regions(mask: Mask) -> list[Mask]:
    """The parts of a mask whose cells share sides, largest first."""
    numbered, count = ndimage.label(mask)
    parts = [numbered == number for number in range(1, count + 1)]
    return sorted(parts, key=lambda part: -int(part.sum()))


def rings(region: Mask) -> list[Ring]:
    """The outlines of one region: the outer one first, then its holes; each ends where it begins.

    Each ring has the region to its right, as the picture is drawn; only its corners are kept.
    """
    padded = np.pad(region, 1)
    onward: dict[Corner, list[Corner]] = {}
    # The sides of cells behind which there is none, each walked so that the cell lies to the right.
    for (down, across), (start, end) in {
        (-1, 0): ((0, 0), (1, 0)),
        (0, 1): ((1, 0), (1, 1)),
        (1, 0): ((1, 1), (0, 1)),
        (0, -1): ((0, 1), (0, 0)),
    }.items():
        beyond = np.roll(padded, (-down, -across), (0, 1))[1:-1, 1:-1]
        for row, column in np.argwhere(region & ~beyond).tolist():
            begin = (column + start[0], row + start[1])
            onward.setdefault(begin, []).append((column + end[0], row + end[1]))
    found = []
    while onward:
        found.append(_walk(onward, min(onward)))
    return sorted(found, key=lambda ring: min(ring))


def _walk(onward: dict[Corner, list[Corner]], start: Corner) -> Ring:
    ring, here, way = [start], start, (0, 0)
    while True:
        ends = onward[here]
        # Where two cells touch with a corner only, the way turns left, along the same gap: each ring is a simple one.
        ends.sort(key=lambda end: -_turn(way, (end[0] - here[0], end[1] - here[1])))
        end = ends.pop()
        if not ends:
            del onward[here]
        new = (end[0] - here[0], end[1] - here[1])
        if new == way:
            ring.pop()
        ring.append(end)
        here, way = end, new
        if here == start:
            return ring


def _turn(way: Corner, new: Corner) -> int:
    """Above 0 for a turn to the right, as the picture is drawn, rows downwards."""
    return way[0] * new[1] - way[1] * new[0]


def feature(
    polygon: Sequence[Sequence[Sequence[float]]],
    kind: str,
    label: str,
    colour: Sequence[int],
    measurements: dict[str, float],
) -> dict[str, Any]:
    """One object of QuPath's: an "annotation" or a "tile", with its class and what was measured of it."""
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": polygon},
        "properties": {
            "objectType": kind,
            "classification": {"name": label, "color": list(colour)},
            "measurements": measurements,
        },
    }


def scaled(found: Sequence[Ring], corner: Callable[[Corner], tuple[float, float]]) -> list[list[list[float]]]:
    """Rings in the slide's coordinates."""
    return [[list(corner(each)) for each in ring] for ring in found]


def collection(features: Sequence[dict[str, Any]]) -> str:
    """The file."""
    return json.dumps({"type": "FeatureCollection", "features": list(features)}) + "\n"
