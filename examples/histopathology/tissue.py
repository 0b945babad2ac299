"""Tissue of a lymph node, with and without tumour, as concentrations of two stains.

Morphology, at about 1 µm a pixel: lymphocyte nuclei 7-8 µm, round and dense; tumour nuclei 10-20 µm,
pleomorphic, vesicular with nucleoli, in nests with more eosin. Distractors: large pale histiocyte nuclei and
germinal-centre cells in normal tissue; tumour that stays outside the central 32×32, label 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

from .layout import PATCH
from .stain import Floats

# Room around the patch, so that nuclei cut by its border and the blur at it look like any other.
_MARGIN = 12
_CANVAS = PATCH + 2 * _MARGIN
_CENTRE_HALF = 16
# Half the length of the largest tumour nucleus there can be, in pixels: from outside, none reaches the centre.
_CLEARANCE = 18


@dataclass(frozen=True)
class Nucleus:
    """A kind of nucleus. Ranges are (low, high) of a uniform draw per nucleus.

    Attributes:
        diameter: micrometres, of a circle of the same area.
        aspect: length over width.
        irregular: depth of the outline's waves, as a share of the radius.
        density: of haematoxylin.
        vesicular: how much paler the inside is than the membrane, 0 to 1.
        nucleoli: how many at most.
        chromatin: contrast of the texture.
    """

    diameter: tuple[float, float]
    aspect: tuple[float, float]
    irregular: float
    density: tuple[float, float]
    vesicular: float
    nucleoli: int
    chromatin: float


LYMPHOCYTE = Nucleus((6.8, 8.2), (1.0, 1.25), 0.04, (0.68, 0.92), 0.05, 0, 0.22)
CENTROBLAST = Nucleus((9.0, 12.0), (1.0, 1.3), 0.06, (0.42, 0.60), 0.35, 1, 0.25)
HISTIOCYTE = Nucleus((11.0, 15.0), (1.2, 1.8), 0.10, (0.26, 0.38), 0.40, 1, 0.18)
FIBROBLAST = Nucleus((6.5, 9.0), (2.6, 5.0), 0.06, (0.50, 0.75), 0.10, 0, 0.18)
TUMOUR = Nucleus((10.0, 20.0), (1.0, 1.6), 0.10, (0.38, 0.70), 0.45, 2, 0.30)


class Tissue:
    """Concentrations of two stains on a canvas, built up layer by layer.

    Args:
        rng: decides everything.
        microns: per pixel.
        tumour_size: factor on the diameter of tumour nuclei.

    Attributes:
        haematoxylin, eosin: ``(120, 120)`` float32, the patch and a margin of 12 pixels.
    """

    def __init__(self, rng: np.random.Generator, microns: float, tumour_size: float) -> None:
        self.rng = rng
        self.scale = 1.0 / microns
        self.tumour_size = tumour_size
        self.haematoxylin: Floats = np.full((_CANVAS, _CANVAS), 0.03, np.float32)
        self.eosin: Floats = np.zeros((_CANVAS, _CANVAS), np.float32)

    def grow_tumour(self, label: int) -> npt.NDArray[np.bool_]:
        """Nests of tumour, where the label wants them; returns their mask on the canvas."""
        region = self._tumour_region(label)
        if region.any():
            self._cytoplasm(region, eosin=0.28, haematoxylin=0.08, grain=0.20)
            self._cleft_around(region)
            self._nuclei(TUMOUR, region, spacing=self.rng.uniform(17, 23) * self.tumour_size, keep=0.9)
            self._nuclei(LYMPHOCYTE, region, spacing=16, keep=self.rng.uniform(0, 0.25))
        return region

    def grow_normal(self, region: npt.NDArray[np.bool_]) -> None:
        """Lymph node in the rest of the canvas: one kind of tissue, or two side by side."""
        kinds = self.rng.choice(len(_NORMAL), 2, p=_NORMAL_SHARES)
        border = _noise(self.rng, "coarse") > self.rng.uniform(-1.2, 1.2)
        _NORMAL[kinds[0]](self, region & border)
        _NORMAL[kinds[1]](self, region & ~border)
        if self.rng.random() < 0.25:
            self._holes(region, radius=(4, 10), count=2)

    def lymphoid(self, region: npt.NDArray[np.bool_]) -> None:
        """Sheets of lymphocytes with hardly any cytoplasm."""
        self._cytoplasm(region, eosin=0.12, haematoxylin=0.04, grain=0.35)
        self._nuclei(LYMPHOCYTE, region, spacing=self.rng.uniform(9.0, 12.0), keep=self.rng.uniform(0.75, 0.95))
        self._nuclei(HISTIOCYTE, region, spacing=24, keep=0.25)

    def sinus(self, region: npt.NDArray[np.bool_]) -> None:
        """Distractor: large pale histiocytes with foamy cytoplasm, and lymphocytes between them."""
        self._cytoplasm(region, eosin=0.18, haematoxylin=0.02, grain=0.40)
        self._nuclei(HISTIOCYTE, region, spacing=self.rng.uniform(17, 24), keep=0.85)
        self._nuclei(LYMPHOCYTE, region, spacing=11, keep=self.rng.uniform(0.15, 0.5))

    def germinal_centre(self, region: npt.NDArray[np.bool_]) -> None:
        """Distractor: cells between lymphocyte and tumour in size and in paleness."""
        self._cytoplasm(region, eosin=0.15, haematoxylin=0.06, grain=0.30)
        self._nuclei(CENTROBLAST, region, spacing=self.rng.uniform(13, 16.5), keep=0.85)
        self._nuclei(LYMPHOCYTE, region, spacing=12, keep=0.3)

    def stroma(self, region: npt.NDArray[np.bool_]) -> None:
        """Bundles of collagen along one direction, with spindle nuclei in line."""
        name = ("fibre-x", "fibre-y")[self.rng.integers(2)]
        uneven = np.clip(1 + 0.35 * _noise(self.rng, "coarse"), 0.2, None)
        bundles = np.clip(0.24 + 0.11 * _noise(self.rng, name) + 0.03 * _noise(self.rng, "fine"), 0.02, 1) * uneven
        self.eosin[region] = bundles[region]
        lean = 0.0 if name == "fibre-x" else np.pi / 2
        self._nuclei(FIBROBLAST, region, spacing=15, keep=self.rng.uniform(0.4, 0.8), lean=lean)
        self._nuclei(LYMPHOCYTE, region, spacing=12, keep=self.rng.uniform(0.0, 0.35))

    def fat(self, region: npt.NDArray[np.bool_]) -> None:
        """Empty round cells with thin walls, and a few lymphocytes."""
        self.lymphoid(region)
        self._holes(region, radius=(14, 30), count=12)

    def _tumour_region(self, label: int) -> npt.NDArray[np.bool_]:
        y, x = _grid()
        nests = _noise(self.rng, "coarse")
        if label:
            cy, cx = self.rng.uniform(-10, 10, 2)
            distance = (y - cy) ** 2 + (x - cx) ** 2
            field = nests + 3 * np.exp(-distance / (2 * 18.0**2))
            region = field > np.quantile(field, 1 - self.rng.uniform(0.35, 1.0))
            seen: npt.NDArray[np.bool_] = region | (distance < 9**2)
            return seen
        if self.rng.random() > 0.3:
            return np.zeros((_CANVAS, _CANVAS), np.bool_)
        outside = np.maximum(np.abs(x), np.abs(y)) > _CENTRE_HALF + _CLEARANCE
        # A wavy ring inside the square limit: a straight edge would give the label away.
        around = np.sqrt(y**2 + x**2) + 6 * _noise(self.rng, "coarse") > 46
        away: npt.NDArray[np.bool_] = outside & around & (nests > self.rng.uniform(-1.2, 0.4))
        return away

    def _cytoplasm(self, region: npt.NDArray[np.bool_], eosin: float, haematoxylin: float, grain: float) -> None:
        texture = 0.6 * _noise(self.rng, "medium") + 0.4 * _noise(self.rng, "fine")
        pink = eosin * self.rng.uniform(0.8, 1.25) * np.clip(1 + grain * texture, 0.05, None)
        # Crevices between cells let the glass show.
        pink *= np.clip(1.6 + 0.9 * _noise(self.rng, "medium"), 0.08, 1)
        self.eosin[region] = pink[region]
        self.haematoxylin[region] = haematoxylin * np.clip(1 + 0.3 * texture, 0, None)[region]

    def _cleft_around(self, region: npt.NDArray[np.bool_]) -> None:
        # Nests shrink away from the stroma when a block is fixed, on some slides more than on others.
        if self.rng.random() < 0.5:
            soft = gaussian_filter(region.astype(np.float32), 2.0)
            self.eosin *= 1 - 0.5 * np.exp(-(((soft - 0.35) / 0.15) ** 2))

    def _holes(self, region: npt.NDArray[np.bool_], radius: tuple[float, float], count: int) -> None:
        y, x = _grid()
        holes = np.zeros((_CANVAS, _CANVAS), np.float32)
        for cy, cx in self.rng.uniform(-_CANVAS / 2, _CANVAS / 2, (count, 2)):
            wanted = self.rng.uniform(*radius) * self.scale
            distance = np.sqrt((y - cy) ** 2 + (x - cx) ** 2)
            # Cells touch but do not merge: a later one shrinks to fit between earlier ones and the region's edge.
            taken = (holes > 0.5) | ~region
            r = min(wanted, float(np.min(distance[taken], initial=wanted + 1.5)) - 1.5)
            if r > 3:
                holes = np.maximum(holes, np.clip(r - distance + 0.5, 0, 1))
        keep = 1 - holes
        self.eosin *= keep
        self.haematoxylin *= keep

    def _nuclei(
        self, kind: Nucleus, region: npt.NDArray[np.bool_], spacing: float, keep: float, lean: float | None = None
    ) -> None:
        """Scatter nuclei of one kind over a region, `spacing` micrometres apart, a share `keep` of the places."""
        centres = _scatter(self.rng, spacing * self.scale)
        inside = region[centres[:, 0].astype(int), centres[:, 1].astype(int)]
        centres = centres[inside & (self.rng.random(len(centres)) < keep)]
        if len(centres):
            size = self.scale * (self.tumour_size if kind is TUMOUR else 1.0)
            self._paste(centres, *_draw_nuclei(self.rng, kind, centres, size, lean), kind.chromatin)

    def _paste(self, centres: Floats, bodies: Floats, density: Floats, chromatin: float) -> None:
        side = bodies.shape[1]
        layer = np.zeros((_CANVAS + 2 * side, _CANVAS + 2 * side), np.float32)
        solid = np.zeros_like(layer)
        corners = np.floor(centres).astype(int) - side // 2 + side
        for (y, x), body, dense in zip(corners.tolist(), bodies, density, strict=True):
            window = np.s_[y : y + side, x : x + side]
            np.maximum(layer[window], dense, out=layer[window])
            np.maximum(solid[window], body, out=solid[window])
        crop = np.s_[side : side + _CANVAS, side : side + _CANVAS]
        dots = np.clip(1 + chromatin * _noise(self.rng, "fine"), 0.3, 1.8)
        self.haematoxylin = np.maximum(self.haematoxylin * (1 - 0.7 * solid[crop]), layer[crop] * dots)
        self.eosin *= 1 - 0.55 * solid[crop]


_NORMAL = (Tissue.lymphoid, Tissue.sinus, Tissue.germinal_centre, Tissue.stroma, Tissue.fat)
_NORMAL_SHARES = (0.38, 0.17, 0.12, 0.21, 0.12)


def without_margin(canvas: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The patch of a canvas: ``(120, 120, ...)`` to ``(96, 96, ...)``."""
    return canvas[_MARGIN : _MARGIN + PATCH, _MARGIN : _MARGIN + PATCH]


def _scatter(rng: np.random.Generator, spacing: float) -> Floats:
    """Points ``(n, 2)`` on the canvas, from a turned and jittered hexagonal grid: spread, but not in rows."""
    reach = int(np.ceil(_CANVAS / spacing)) + 1
    i, j = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1)
    points = spacing * np.stack([i * np.sqrt(0.75), j + 0.5 * (i % 2)], 1)
    turn = rng.uniform(0, np.pi)
    points = points @ np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    points += _CANVAS / 2 + rng.uniform(-spacing, spacing, 2) + rng.normal(0, 0.2 * spacing, points.shape)
    inside: Floats = points[((points >= 0) & (points < _CANVAS)).all(axis=1)]
    return inside


def _draw_nuclei(
    rng: np.random.Generator, kind: Nucleus, centres: Floats, scale: float, lean: float | None
) -> tuple[Floats, Floats]:
    """Bodies in [0, 1] and haematoxylin densities, each ``(n, side, side)``, of n nuclei at once.

    The outline is an ellipse whose radius waves with the angle; each nucleus lies in its own small window,
    so the cost goes with the nuclei's area and not with the canvas.
    """
    n = len(centres)
    radius = rng.uniform(*kind.diameter, n) * scale / 2
    stretch = np.sqrt(rng.uniform(*kind.aspect, n))
    angle = rng.uniform(0, np.pi, n) if lean is None else lean + rng.normal(0, 0.25, n)
    side = 2 * int(np.ceil((radius * stretch).max() * (1 + 2 * kind.irregular) + 1)) + 1
    across, along = _own_axes(centres - np.floor(centres), angle, side)
    z = (along / stretch[:, None, None] + 1j * across * stretch[:, None, None]) / radius[:, None, None]
    distance = np.abs(z) + 1e-6
    reach = distance / _outline(rng, z / distance, kind.irregular)
    body = np.clip((1 - reach) * radius[:, None, None] + 0.5, 0, 1)
    pale = kind.vesicular * np.clip((0.95 - reach) / 0.3, 0, 1)
    density = rng.uniform(*kind.density, n)[:, None, None] * (1 - pale)
    for _ in range(kind.nucleoli):
        density = density + _nucleolus(rng, z, radius)
    return body.astype(np.float32), (body * density).astype(np.float32)


def _own_axes(fraction: Floats, angle: npt.ArrayLike, side: int) -> tuple[Floats, Floats]:
    """Pixel coordinates across and along each nucleus, ``(n, side, side)``, from its sub-pixel centre."""
    steps = np.arange(side) - side // 2 + 0.5
    y = (steps - fraction[:, :1])[:, :, None]
    x = (steps - fraction[:, 1:])[:, None, :]
    cos, sin = (np.asarray(f(angle))[:, None, None] for f in (np.cos, np.sin))
    return cos * y - sin * x, sin * y + cos * x


def _outline(rng: np.random.Generator, direction: npt.NDArray[Any], depth: float) -> Floats:
    """Radius by direction (unit complex numbers), about 1, with two and three bumps."""
    phase = np.exp(1j * rng.uniform(0, 2 * np.pi, (2, len(direction), 1, 1)))
    square = direction * direction
    waves: Floats = ((square * phase[0]).real + (square * direction * phase[1]).real) * depth
    return 1 + waves


def _nucleolus(rng: np.random.Generator, z: npt.NDArray[Any], radius: Floats) -> Floats:
    """A dark dot within half the radius of each nucleus's centre; about a third of the nuclei go without."""
    n = len(z)
    place = 0.5 * np.sqrt(rng.random(n)) * np.exp(1j * rng.uniform(0, 2 * np.pi, n))
    strength = 0.6 * rng.uniform(0.5, 1.0, n) * (rng.random(n) < 0.67)
    # 1.1 pixels wide in every nucleus, so relatively larger in small ones.
    width = 1.1 / radius
    away = np.abs(z - place[:, None, None]) / width[:, None, None]
    dot: Floats = strength[:, None, None] * np.exp(-0.5 * away**2)
    return dot


@cache
def _grid() -> tuple[Floats, Floats]:
    """Rows and columns, ``(120, 1)`` and ``(1, 120)``, in pixels from the canvas's middle."""
    steps = np.arange(_CANVAS, dtype=np.float32) - (_CANVAS - 1) / 2
    return steps[:, None], steps[None, :]


_NOISE_SIDE = 512
_NOISE_WIDTHS: dict[str, tuple[float, float]] = {
    "fine": (0.8, 0.8),
    "medium": (2.2, 2.2),
    "coarse": (11.0, 11.0),
    "fibre-x": (1.5, 12.0),
    "fibre-y": (12.0, 1.5),
}


def _noise(rng: np.random.Generator, name: str) -> Floats:
    """A random window, ``(120, 120)``, of a sheet made once: filtering anew would take most of the time."""
    y, x = rng.integers(0, _NOISE_SIDE, 2)
    window = _noise_sheet(name)[y : y + _CANVAS, x : x + _CANVAS]
    return window[:: 1 - 2 * int(rng.integers(2)), :: 1 - 2 * int(rng.integers(2))]


@cache
def _noise_sheet(name: str) -> Floats:
    """Smooth noise, ``(512, 512)``, mean 0 and standard deviation 1, that tiles."""
    rng = np.random.default_rng([3, list(_NOISE_WIDTHS).index(name)])
    white = rng.standard_normal((_NOISE_SIDE, _NOISE_SIDE)).astype(np.float32)
    sheet = gaussian_filter(white, _NOISE_WIDTHS[name], mode="wrap")
    if name.startswith("fibre"):
        sheet = _wavy(sheet, vertical=name == "fibre-y")
    sheet = (sheet - sheet.mean()) / sheet.std()
    # Tiled once more, so that a window at any offset is a plain slice.
    return np.pad(sheet, ((0, _CANVAS), (0, _CANVAS)), mode="wrap")


def _wavy(sheet: Floats, vertical: bool) -> Floats:
    """Shift rows against each other along a sine, the crimp of collagen; keeps the tiling."""
    rows = sheet.T if vertical else sheet
    turns = np.arange(_NOISE_SIDE) * 2 * np.pi / _NOISE_SIDE
    shift = np.rint(6 * np.sin(5 * turns) + 4 * np.sin(9 * turns + 1)).astype(int)
    wavy = np.stack([np.roll(column, s) for column, s in zip(rows.T, shift, strict=True)], 1)
    return wavy.T if vertical else wavy
