"""Regions of a heat map as polygons, and GeoJSON that QuPath reads.

A region is a set of cells that are connected by their sides; its outline follows the sides of its cells, holes
included. QuPath's coordinates are those of the slide's full resolution. To open the file in QuPath, drag it onto the
open slide, or choose File, Import objects.
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
"""A corner of cells: (column, row) of the grid's lines."""
Ring = list[Corner]


def regions(mask: Mask) -> list[Mask]:
    """The connected regions of a mask, largest first."""
    numbered, count = ndimage.label(mask)
    parts = [numbered == number for number in range(1, count + 1)]
    return sorted(parts, key=lambda part: -int(part.sum()))


def rings(region: Mask) -> list[Ring]:
    """The outlines of one region: the outer one first, then its holes; each ends where it begins.

    The region lies to the right of each ring as the picture is drawn. Only the ring's corners are kept.
    """
    padded = np.pad(region, 1)
    onward: dict[Corner, list[Corner]] = {}
    # The sides of cells that border on none, each directed so that its cell lies to the right.
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
        # Where two cells touch only at a corner, the path turns left along the same gap, so that each ring is simple.
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
    """Above 0 for a turn to the right as the picture is drawn, with rows downwards."""
    return way[0] * new[1] - way[1] * new[0]


def feature(
    polygon: Sequence[Sequence[Sequence[float]]],
    kind: str,
    label: str,
    colour: Sequence[int],
    measurements: dict[str, float],
) -> dict[str, Any]:
    """An object for QuPath: an "annotation" or a "tile", with its class and measurements."""
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
    """Convert rings to the slide's coordinates."""
    return [[list(corner(each)) for each in ring] for ring in found]


def collection(features: Sequence[dict[str, Any]]) -> str:
    """The file."""
    return json.dumps({"type": "FeatureCollection", "features": list(features)}) + "\n"
