"""Kinds of nuclei in a lymph node and in a metastasis, and a function that draws many of one kind at once.

A nucleus is an ellipse whose radius varies with the angle. Each is drawn in its own small window, all windows of a
kind in one array, so the cost depends on the nuclei's area and not on the canvas. The kinds' sizes overlap on purpose,
so that size alone does not distinguish tumour from reactive cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..data.stain import Floats

# Nucleoli have this width in pixels in every nucleus, so they are relatively larger in small nuclei.
_NUCLEOLUS = 1.1


@dataclass(frozen=True)
class Nucleus:
    """A kind of nucleus. Ranges are (low, high) of a uniform distribution, drawn for each nucleus.

    Attributes:
        diameter: diameter of a circle of the same area, in micrometres.
        aspect: length over width.
        irregular: depth of the outline's waves, as a share of the radius.
        density: density of haematoxylin.
        vesicular: how much paler the inside is than the membrane, 0 to 1.
        nucleoli: the most nucleoli.
        chromatin: contrast of the texture.
    """

    diameter: tuple[float, float]
    aspect: tuple[float, float]
    irregular: float
    density: tuple[float, float]
    vesicular: float
    nucleoli: int
    chromatin: float


LYMPHOCYTE = Nucleus((6.6, 8.4), (1.0, 1.25), 0.04, (0.64, 0.92), 0.05, 0, 0.22)
PLASMA_CELL = Nucleus((7.5, 9.5), (1.0, 1.3), 0.04, (0.55, 0.80), 0.20, 0, 0.34)
CENTROBLAST = Nucleus((9.0, 13.0), (1.0, 1.35), 0.07, (0.42, 0.64), 0.38, 2, 0.26)
IMMUNOBLAST = Nucleus((11.0, 16.0), (1.0, 1.4), 0.08, (0.40, 0.62), 0.45, 1, 0.28)
HISTIOCYTE = Nucleus((10.5, 16.0), (1.1, 1.9), 0.10, (0.26, 0.48), 0.42, 1, 0.22)
ENDOTHELIUM = Nucleus((8.5, 12.0), (1.2, 2.2), 0.07, (0.40, 0.66), 0.30, 1, 0.24)
FIBROBLAST = Nucleus((6.5, 9.5), (2.4, 5.0), 0.06, (0.48, 0.75), 0.12, 0, 0.18)


def tumour_kind(grade: float) -> Nucleus:
    """The kind of a tumour's nuclei, from small and regular (grade 0) to large and pleomorphic (grade 1).

    >>> tumour_kind(0.0).diameter, tumour_kind(1.0).diameter
    ((10.0, 14.0), (11.0, 20.0))
    """
    return Nucleus(
        diameter=(10.0 + grade, 14.0 + 6 * grade),
        aspect=(1.0, 1.4 + 0.3 * grade),
        irregular=0.07 + 0.05 * grade,
        density=(0.36, 0.62 + 0.12 * grade),
        vesicular=0.45,
        nucleoli=1 + round(grade),
        chromatin=0.24 + 0.10 * grade,
    )


@dataclass(frozen=True)
class Cells:
    """Position and size of nuclei of one kind, in pixels; all ``(n,)`` except the centres, ``(n, 2)``.

    ``radius`` is that of the circle of the same area, ``stretch`` the factor on the long half axis, ``angle`` its
    direction.
    """

    centres: Floats
    radius: Floats
    stretch: Floats
    angle: Floats

    def reach(self, kind: Nucleus) -> Floats:
        """The largest distance of each outline from its centre, ``(n,)``."""
        extent: Floats = self.radius * self.stretch * (1 + 2 * kind.irregular) + 1
        return extent

    def keep(self, chosen: Floats) -> Cells:
        """The cells that a mask ``(n,)`` selects."""
        return Cells(self.centres[chosen], self.radius[chosen], self.stretch[chosen], self.angle[chosen])


def choose_cells(
    rng: np.random.Generator, kind: Nucleus, centres: Floats, scale: float, lean: float | Floats | None
) -> Cells:
    """Draw sizes and directions for nuclei at these centres.

    Args:
        rng: generator of all random numbers.
        kind: kind of nucleus.
        centres: ``(n, 2)``, pixels.
        scale: pixels per micrometre.
        lean: direction of the long axis in radians, one for all or ``(n,)``; None for random directions.
    """
    n = len(centres)
    radius = rng.uniform(*kind.diameter, n) * (scale / 2)
    stretch = np.sqrt(rng.uniform(*kind.aspect, n))
    angle = rng.uniform(0, np.pi, n) if lean is None else lean + rng.normal(0, 0.25, n)
    return Cells(centres, radius, stretch, angle)


def draw(rng: np.random.Generator, kind: Nucleus, cells: Cells) -> Floats:
    """Draw nuclei as masks in [0, 1] and haematoxylin densities: ``(n, 2, side, side)`` float32."""
    n = len(cells.centres)
    side = 2 * int(np.ceil(cells.reach(kind).max())) + 1
    u, v = _own_axes(cells, side)
    distance = np.sqrt(u * u + v * v) + np.float32(1e-6)
    inside = 1 - distance / _outline(rng, u / distance, v / distance, kind.irregular)
    out = np.empty((n, 2, side, side), np.float32)
    np.clip(inside * _column(cells.radius) + np.float32(0.5), 0, 1, out=out[:, 0])
    density = np.clip((inside - np.float32(0.05)) * np.float32(1 / 0.3), 0, 1)
    density *= -kind.vesicular
    density += 1
    density *= _column(rng.uniform(*kind.density, n))
    for _ in range(kind.nucleoli):
        density += _nucleolus(rng, u, v, cells.radius)
    np.multiply(out[:, 0], density, out=out[:, 1])
    return out


def _column(values: Floats) -> Floats:
    """One number for each nucleus, as ``(n, 1, 1)`` float32."""
    column: Floats = np.asarray(values, np.float32)[:, None, None]
    return column


def _own_axes(cells: Cells, side: int) -> tuple[Floats, Floats]:
    """Coordinates along and across each nucleus from its sub-pixel centre, ``(n, side, side)``; 1 at its outline."""
    steps = np.arange(side, dtype=np.float32) - np.float32(side // 2 - 0.5)
    fraction = (cells.centres - np.floor(cells.centres)).astype(np.float32)
    y = (steps - fraction[:, :1])[:, :, None]
    x = (steps - fraction[:, 1:])[:, None, :]
    long, short = cells.radius * cells.stretch, cells.radius / cells.stretch
    cos, sin = np.cos(cells.angle), np.sin(cells.angle)
    along = _column(sin / long) * y + _column(cos / long) * x
    across = _column(cos / short) * y - _column(sin / short) * x
    return along, across


def _outline(rng: np.random.Generator, cos: Floats, sin: Floats, depth: float) -> Floats:
    """The radius in each direction: 1 plus waves of two and three periods with random phases."""
    phase = rng.uniform(0, 2 * np.pi, (2, len(cos)))
    a, b = depth * np.cos(phase), depth * np.sin(phase)
    cos2, sin2 = 2 * cos * cos - 1, 2 * cos * sin
    waves: Floats = cos2 * _column(a[0]) - sin2 * _column(b[0])
    waves += (cos2 * cos - sin2 * sin) * _column(a[1]) - (sin2 * cos + cos2 * sin) * _column(b[1])
    waves += 1
    return waves


def _nucleolus(rng: np.random.Generator, u: Floats, v: Floats, radius: Floats) -> Floats:
    """A dark dot within half the radius of each nucleus's centre; about a third of the nuclei have none."""
    n = len(u)
    away, turn = 0.5 * np.sqrt(rng.random(n)), rng.uniform(0, 2 * np.pi, n)
    strength = 0.6 * rng.uniform(0.5, 1.0, n) * (rng.random(n) < 0.67)
    du, dv = u - _column(away * np.cos(turn)), v - _column(away * np.sin(turn))
    # A bell curve of finite support: as wide at half its height as a Gaussian of that width, and cheaper.
    bell = np.maximum(1 - (du * du + dv * dv) * _column((radius / (2.2 * _NUCLEOLUS)) ** 2), 0)
    bell *= bell
    bell *= _column(strength)
    dot: Floats = bell
    return dot
