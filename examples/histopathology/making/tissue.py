"""Tissue of a lymph node, with and without tumour, as concentrations of two stains.

Morphology, at about 1 µm a pixel: lymphocyte nuclei are 7-8 µm, round and dense; tumour nuclei are 10-20 µm,
pleomorphic and vesicular with nucleoli, in sheets, nests or small groups with more eosin. Patches are difficult for the
same reasons as on glass: reactive cells are as large and as pale as those of a low-grade tumour (histiocytes, also
packed as in a granuloma, germinal-centre cells, immunoblasts, plump endothelium), tumour may fill only a corner of the
central 32×32, and with label 0 it may reach up to its edge.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

from ..data.layout import PATCH
from ..data.stain import Floats
from .nuclei import (
    CENTROBLAST,
    ENDOTHELIUM,
    FIBROBLAST,
    HISTIOCYTE,
    IMMUNOBLAST,
    LYMPHOCYTE,
    PLASMA_CELL,
    Cells,
    Nucleus,
    choose_cells,
    draw,
)

Mask = npt.NDArray[np.bool_]

# A margin around the patch, so that nuclei and blur at its border look like any other.
_MARGIN = 12
_CANVAS = PATCH + 2 * _MARGIN
_CENTRE_HALF = 16
# The share of patches of label 0 that hold tumour outside their centre.
_SHARE_OUTSIDE = 0.35


class Tissue:
    """Concentrations of two stains on a canvas, built up layer by layer.

    Args:
        rng: generator of all random numbers.
        microns: microns per pixel.
        tumour: the kind of nucleus of this slide's tumour.
        tumour_eosin: eosin in the tumour's cytoplasm.

    Attributes:
        haematoxylin, eosin: ``(120, 120)`` float32, the patch and a margin of 12 pixels.
    """

    def __init__(self, rng: np.random.Generator, microns: float, tumour: Nucleus, tumour_eosin: float) -> None:
        self.rng = rng
        self.scale = 1.0 / microns
        self.tumour = tumour
        self.tumour_eosin = tumour_eosin
        self.haematoxylin: Floats = np.full((_CANVAS, _CANVAS), 0.03, np.float32)
        self.eosin: Floats = np.zeros((_CANVAS, _CANVAS), np.float32)

    def grow(self, label: int) -> Mask:
        """Draw tumour as the label demands, and lymph node elsewhere; returns the tumour's mask on the canvas."""
        region, seed = self._tumour_region(label)
        if region.any():
            self._cytoplasm(region, eosin=self.tumour_eosin, haematoxylin=0.07, grain=self.rng.uniform(0.15, 0.35))
            self._cleft_around(region)
            self._tumour_nuclei(region, seed)
            self._nuclei(LYMPHOCYTE, region, spacing=15, keep=self.rng.uniform(0, 0.35))
        self._grow_normal(~region)
        if self.rng.random() < 0.05:
            self._fold()
        return region

    # -- normal tissue ---------------------------------------------------------------------------------------

    def lymphoid(self, region: Mask) -> None:
        """Sheets of lymphocytes with hardly any cytoplasm, and a few large cells among them."""
        self._cytoplasm(region, eosin=0.12, haematoxylin=0.04, grain=0.35)
        self._nuclei(LYMPHOCYTE, region, spacing=self.rng.uniform(8.5, 12.0), keep=self.rng.uniform(0.7, 0.95))
        self._nuclei(HISTIOCYTE, region, spacing=24, keep=self.rng.uniform(0, 0.4))
        self._nuclei(IMMUNOBLAST, region, spacing=26, keep=self.rng.uniform(0, 0.4))

    def sinus(self, region: Mask) -> None:
        """Large pale histiocytes with foamy cytoplasm, and lymphocytes between them."""
        self._cytoplasm(region, eosin=self.rng.uniform(0.14, 0.24), haematoxylin=0.02, grain=0.40)
        self._nuclei(HISTIOCYTE, region, spacing=self.rng.uniform(16, 24), keep=0.85)
        self._nuclei(LYMPHOCYTE, region, spacing=11, keep=self.rng.uniform(0.1, 0.5))

    def granuloma(self, region: Mask) -> None:
        """Packed histiocytes with cytoplasm as pink as a tumour's, even nuclei and hardly any nucleoli."""
        self._cytoplasm(region, eosin=self.rng.uniform(0.20, 0.30), haematoxylin=0.05, grain=0.25)
        self._nuclei(HISTIOCYTE, region, spacing=self.rng.uniform(14, 19), keep=0.9)
        self._nuclei(LYMPHOCYTE, region, spacing=15, keep=self.rng.uniform(0, 0.3))

    def germinal_centre(self, region: Mask) -> None:
        """Cells whose size and paleness lie between those of lymphocytes and tumour."""
        self._cytoplasm(region, eosin=0.15, haematoxylin=0.06, grain=0.30)
        self._nuclei(CENTROBLAST, region, spacing=self.rng.uniform(12.5, 16.5), keep=0.85)
        self._nuclei(LYMPHOCYTE, region, spacing=12, keep=self.rng.uniform(0.15, 0.4))
        self._nuclei(HISTIOCYTE, region, spacing=30, keep=0.3)

    def plasma_cells(self, region: Mask) -> None:
        """Medullary cords: plasma cells with a good deal of cytoplasm, immunoblasts, small vessels."""
        self._cytoplasm(region, eosin=0.19, haematoxylin=0.09, grain=0.30)
        self._nuclei(PLASMA_CELL, region, spacing=self.rng.uniform(11, 14.5), keep=0.85)
        self._nuclei(IMMUNOBLAST, region, spacing=22, keep=self.rng.uniform(0.1, 0.5))

    def stroma(self, region: Mask) -> None:
        """Bundles of collagen along one direction, with spindle nuclei along it."""
        name = ("fibre-x", "fibre-y")[self.rng.integers(2)]
        uneven = np.clip(1 + 0.35 * _noise(self.rng, "coarse"), 0.2, None)
        bundles = np.clip(0.24 + 0.11 * _noise(self.rng, name) + 0.03 * _noise(self.rng, "fine"), 0.02, 1) * uneven
        np.copyto(self.eosin, bundles, where=region)
        lean = 0.0 if name == "fibre-x" else np.pi / 2
        self._nuclei(FIBROBLAST, region, spacing=15, keep=self.rng.uniform(0.4, 0.8), lean=lean)
        self._nuclei(LYMPHOCYTE, region, spacing=12, keep=self.rng.uniform(0.0, 0.35))

    def fat(self, region: Mask) -> None:
        """Empty round cells with thin walls, and a few lymphocytes."""
        self.lymphoid(region)
        self._holes(region, radius=(14, 30), count=12)

    def _grow_normal(self, region: Mask) -> None:
        """One kind of tissue, or two side by side."""
        kinds = self.rng.choice(len(_NORMAL), 2, p=_NORMAL_SHARES)
        border = _noise(self.rng, "coarse") > self.rng.uniform(-1.2, 1.2)
        for kind, part in zip(kinds, (region & border, region & ~border), strict=True):
            if part.any():
                _NORMAL[kind](self, part)
        if self.rng.random() < 0.2:
            self._venule(region)
        if self.rng.random() < 0.2:
            self._holes(region, radius=(4, 10), count=2)

    def _venule(self, region: Mask) -> None:
        """A vessel cut across: a lumen, and a ring of plump nuclei along its wall."""
        y, x = _grid()
        cy, cx = self.rng.uniform(-_CANVAS / 2, _CANVAS / 2, 2)
        lumen = self.rng.uniform(3, 8) * self.scale
        distance = np.sqrt((y - cy) ** 2 + (x - cx) ** 2)
        wall = lumen + 6 * self.scale
        ring = np.clip(wall + 4 - distance, 0, 1) * region
        pale = np.clip(lumen + 0.5 - distance, 0, 1) * region
        self.haematoxylin *= 1 - 0.9 * ring
        self.eosin += ring * (0.22 - self.eosin)
        self.eosin *= 1 - pale
        count = max(4, int(2 * np.pi * wall / (13 * self.scale)))
        turn = np.arange(count) * (2 * np.pi / count) + self.rng.uniform(0, 2 * np.pi)
        turn += self.rng.normal(0, 0.15, count)
        around = np.stack([cy + wall * np.sin(turn), cx + wall * np.cos(turn)], 1) + _CANVAS / 2
        inside = ((around >= 0) & (around < _CANVAS)).all(axis=1)
        centres, turn = around[inside], turn[inside]
        lies = region[centres[:, 0].astype(int), centres[:, 1].astype(int)]
        self._stain(ENDOTHELIUM, choose_cells(self.rng, ENDOTHELIUM, centres[lies], self.scale, turn[lies] + np.pi / 2))

    # -- tumour ----------------------------------------------------------------------------------------------

    def _tumour_region(self, label: int) -> tuple[Mask, Floats | None]:
        """The mask of the tumour, and for label 1 a point in the centre where a tumour nucleus must lie."""
        nests = _noise(self.rng, "coarse")
        if label:
            # Squared, so that small groups are as common as sheets that fill the patch.
            share = 0.06 + 0.94 * self.rng.random() ** 2
            point = self.rng.uniform(1 - _CENTRE_HALF, _CENTRE_HALF - 1, 2)
            y, x = _grid()
            distance = (y - point[0]) ** 2 + (x - point[1]) ** 2
            field = nests + 3 * np.exp(-distance / (2 * 18.0**2))
            seen: Mask = (field > np.quantile(field, 1 - share)) | (distance < 8**2)
            return seen, point + _CANVAS / 2
        if self.rng.random() > _SHARE_OUTSIDE:
            return np.zeros((_CANVAS, _CANVAS), np.bool_), None
        # The edge is wavy with rounded corners: a straight one would reveal the label.
        apart = _from_centre() - np.abs(4 * _noise(self.rng, "coarse")) > 0.5
        away: Mask = apart & (nests > self.rng.uniform(-1.5, 0.6))
        return away, None

    def _tumour_nuclei(self, region: Mask, seed: Floats | None) -> None:
        kind = self.tumour
        mean = sum(kind.diameter) / 2
        centres = self._places(region, spacing=mean * self.rng.uniform(1.1, 1.5), keep=0.92)
        if seed is not None:
            apart = ((centres - seed) ** 2).sum(1) > (0.8 * mean * self.scale) ** 2
            centres = np.concatenate([seed[None], centres[apart]])
        cells = choose_cells(self.rng, kind, centres, self.scale, None)
        if seed is None:  # with label 0 no tumour nucleus may reach into the centre
            gap = _from_centre()[centres[:, 0].astype(int), centres[:, 1].astype(int)]
            cells = cells.keep(gap > cells.reach(kind) + 1)
        self._stain(kind, cells)

    def _cleft_around(self, region: Mask) -> None:
        # Nests shrink away from the stroma during fixation, on some slides more than on others.
        if self.rng.random() < 0.4:
            soft = gaussian_filter(region.astype(np.float32), 2.0, truncate=3)
            self.eosin *= 1 - 0.5 * np.exp(-(((soft - 0.35) / 0.15) ** 2))

    # -- layers ----------------------------------------------------------------------------------------------

    def _cytoplasm(self, region: Mask, eosin: float, haematoxylin: float, grain: float) -> None:
        texture = 0.6 * _noise(self.rng, "medium") + 0.4 * _noise(self.rng, "fine")
        pink = np.maximum(1 + grain * texture, 0.05) * (eosin * self.rng.uniform(0.8, 1.25))
        # Crevices between cells let the glass show.
        pink *= np.clip(1.6 + 0.9 * _noise(self.rng, "medium"), 0.08, 1)
        np.copyto(self.eosin, pink, where=region)
        np.copyto(self.haematoxylin, haematoxylin * np.maximum(1 + 0.3 * texture, 0), where=region)

    def _holes(self, region: Mask, radius: tuple[float, float], count: int) -> None:
        y, x = _grid()
        holes = np.zeros((_CANVAS, _CANVAS), np.float32)
        for cy, cx in self.rng.uniform(-_CANVAS / 2, _CANVAS / 2, (count, 2)).astype(np.float32):
            wanted = self.rng.uniform(*radius) * self.scale
            distance = np.sqrt((y - cy) ** 2 + (x - cx) ** 2)
            # Cells touch but do not merge: a new cell shrinks to fit between earlier ones and the region's edge.
            taken = (holes > 0.5) | ~region
            r = min(wanted, float(np.min(distance[taken], initial=wanted + 1.5)) - 1.5)
            if r > 3:
                holes = np.maximum(holes, np.clip(r - distance + 0.5, 0, 1))
        keep = 1 - holes
        self.eosin *= keep
        self.haematoxylin *= keep

    def _fold(self) -> None:
        """A crease: a band along which the section lies double."""
        y, x = _grid()
        turn = self.rng.uniform(0, np.pi)
        across = np.cos(turn) * y + np.sin(turn) * x + 4 * _noise(self.rng, "coarse")
        band = np.abs(across - self.rng.uniform(-50, 50)) < self.rng.uniform(3, 8)
        double = 1 + 0.8 * gaussian_filter(band.astype(np.float32), 1.0, truncate=3)
        self.haematoxylin *= double
        self.eosin *= double

    def _nuclei(self, kind: Nucleus, region: Mask, spacing: float, keep: float, lean: float | None = None) -> None:
        """Scatter nuclei over a share `keep` of a region's places, which are `spacing` micrometres apart."""
        self._stain(kind, choose_cells(self.rng, kind, self._places(region, spacing, keep), self.scale, lean))

    def _places(self, region: Mask, spacing: float, keep: float) -> Floats:
        centres = _scatter(self.rng, spacing * self.scale)
        inside = region[centres[:, 0].astype(int), centres[:, 1].astype(int)]
        chosen: Floats = centres[inside & (self.rng.random(len(centres)) < keep)]
        return chosen

    def _stain(self, kind: Nucleus, cells: Cells) -> None:
        """Draw nuclei over the tissue; they displace the cytoplasm."""
        if not len(cells.centres):
            return
        windows = draw(self.rng, kind, cells)
        side = windows.shape[-1]
        layer = np.zeros((2, _CANVAS + 2 * side, _CANVAS + 2 * side), np.float32)
        corners = np.floor(cells.centres).astype(int) - side // 2 + side
        for (y, x), window in zip(corners.tolist(), windows, strict=True):
            place = layer[:, y : y + side, x : x + side]
            np.maximum(place, window, out=place)
        solid, dense = layer[:, side : side + _CANVAS, side : side + _CANVAS]
        dots = np.clip(1 + kind.chromatin * _noise(self.rng, "fine"), 0.3, 1.8)
        self.haematoxylin = np.maximum(self.haematoxylin * (1 - 0.7 * solid), dense * dots)
        self.eosin *= 1 - 0.55 * solid


_NORMAL = (
    Tissue.lymphoid,
    Tissue.sinus,
    Tissue.granuloma,
    Tissue.germinal_centre,
    Tissue.plasma_cells,
    Tissue.stroma,
    Tissue.fat,
)
_NORMAL_SHARES = (0.28, 0.15, 0.10, 0.15, 0.08, 0.16, 0.08)


def without_margin(canvas: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Crop the patch from a canvas: ``(..., 120, 120)`` to ``(..., 96, 96)``."""
    return canvas[..., _MARGIN : _MARGIN + PATCH, _MARGIN : _MARGIN + PATCH]


def _scatter(rng: np.random.Generator, spacing: float) -> Floats:
    """Points ``(n, 2)`` on the canvas, from a rotated and jittered hexagonal grid: evenly spread, but not in rows."""
    grid = _hexagons(int(np.ceil(0.75 * _CANVAS / spacing)) + 1)
    turn = rng.uniform(0, np.pi)
    cos, sin = np.cos(turn) * spacing, np.sin(turn) * spacing
    points = np.stack([cos * grid[:, 0] + sin * grid[:, 1], cos * grid[:, 1] - sin * grid[:, 0]], 1)
    points += _CANVAS / 2 + rng.uniform(-spacing / 2, spacing / 2, 2)
    points += rng.normal(0, 0.2 * spacing, points.shape)
    inside: Floats = points[((points >= 0) & (points < _CANVAS)).all(axis=1)]
    return inside


@cache
def _hexagons(reach: int) -> Floats:
    """Points of a hexagonal grid of spacing 1 within `reach` of the origin."""
    i, j = np.mgrid[-2 * reach : 2 * reach + 1, -2 * reach : 2 * reach + 1].reshape(2, -1)
    points = np.stack([i * np.sqrt(0.75), j + 0.5 * (i % 2)], 1)
    near: Floats = points[np.hypot(*points.T) <= reach]
    return near


@cache
def _grid() -> tuple[Floats, Floats]:
    """Rows and columns, ``(120, 1)`` and ``(1, 120)``, in pixels from the canvas's middle."""
    steps = np.arange(_CANVAS, dtype=np.float32) - np.float32((_CANVAS - 1) / 2)
    return steps[:, None], steps[None, :]


@cache
def _from_centre() -> Floats:
    """Each pixel's distance from the central 32×32, ``(120, 120)``; 0 or less inside it."""
    y, x = (np.abs(steps) - _CENTRE_HALF for steps in _grid())
    outside = np.hypot(np.maximum(y, 0), np.maximum(x, 0))
    distance: Floats = np.where(outside > 0, outside, np.maximum(y, x))
    return distance


_NOISE_SIDE = 512
_NOISE_WIDTHS: dict[str, tuple[float, float]] = {
    "fine": (0.8, 0.8),
    "medium": (2.2, 2.2),
    "coarse": (11.0, 11.0),
    "fibre-x": (1.5, 12.0),
    "fibre-y": (12.0, 1.5),
}


def _noise(rng: np.random.Generator, name: str) -> Floats:
    """A random window, ``(120, 120)``, of a sheet that is made once: filtering each time would dominate the cost."""
    y, x = rng.integers(0, 2 * _NOISE_SIDE, 2).tolist()
    window = _noise_sheet(name)[y // 2 : y // 2 + _CANVAS, x // 2 : x // 2 + _CANVAS]
    return window[:: 1 - 2 * (y % 2), :: 1 - 2 * (x % 2)]


@cache
def _noise_sheet(name: str) -> Floats:
    """Smooth periodic noise, ``(512, 512)``, with mean 0 and standard deviation 1."""
    rng = np.random.default_rng([3, list(_NOISE_WIDTHS).index(name)])
    white = rng.standard_normal((_NOISE_SIDE, _NOISE_SIDE)).astype(np.float32)
    sheet = gaussian_filter(white, _NOISE_WIDTHS[name], mode="wrap")
    if name.startswith("fibre"):
        sheet = _wavy(sheet, vertical=name == "fibre-y")
    sheet = (sheet - sheet.mean()) / sheet.std()
    # Repeated, so that a window at any offset is a plain slice.
    return np.pad(sheet, ((0, _CANVAS), (0, _CANVAS)), mode="wrap")


def _wavy(sheet: Floats, vertical: bool) -> Floats:
    """Shift rows against each other along a sine, as the crimp of collagen; the sheet stays periodic."""
    rows = sheet.T if vertical else sheet
    turns = np.arange(_NOISE_SIDE) * 2 * np.pi / _NOISE_SIDE
    shift = np.rint(6 * np.sin(5 * turns) + 4 * np.sin(9 * turns + 1)).astype(int)
    wavy = np.stack([np.roll(column, s) for column, s in zip(rows.T, shift, strict=True)], 1)
    return wavy.T if vertical else wavy
