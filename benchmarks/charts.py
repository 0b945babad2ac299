"""Charts as SVG files that are legible at 390 px: a row for each subject, with a bar or a point in each panel.

One file serves the light and the dark colour scheme: it asks the browser for the scheme and draws its own background.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, ROW, TOP, GAP = 440, 24, 64, 12
"""Width of the drawing, height of a row, height above the rows, and gap between panels, in px."""
LABELS, FIGURE = 142, 40
"""Width of a row's label, and of the figure behind a bar, in px."""

STYLE = """\
.card { fill: #ffffff } .bar { fill: #b0bec5 } .spread { stroke: #90a4ae; stroke-width: 3 }
.ours.bar { fill: #00897b } .ours.spread { stroke: #80cbc4 }
text { fill: #37474f } .strong { fill: #102027; font-weight: 600 } .axis { stroke: #cfd8dc }
@media (prefers-color-scheme: dark) {
.card { fill: #1e2129 } .bar { fill: #607d8b } .spread { stroke: #546e7a }
.ours.bar { fill: #4db6ac } .ours.spread { stroke: #00695c }
text { fill: #cfd8dc } .strong { fill: #ffffff } .axis { stroke: #455a64 }
}"""


@dataclass(frozen=True)
class Panel:
    """A panel with one figure for each row; for a value of None only the text is shown."""

    heading: str
    values: Sequence[float | None]
    texts: Sequence[str]
    spreads: Sequence[float] = ()
    """Half the length of the line through each point; without it bars from zero are drawn, not points."""
    start: float = 0.0
    """The value at the left edge."""


def chart(
    title: str, labels: Sequence[str], panels: Sequence[Panel], ours: Collection[int] = (), unit: str = ""
) -> str:
    """The SVG text; rows in `ours` have convlora's colour, and `unit` is a line under the title."""
    height = TOP + ROW * len(labels) + 10
    width = (WIDTH - LABELS - GAP * len(panels)) / len(panels)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH * 3 // 2}" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="12.5">',
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}\n</style>",
        f'<rect class="card" width="{WIDTH}" height="{height}" rx="6"/>',
        f'<text class="strong" x="10" y="20" font-size="13.5">{escape(title)}</text>',
        f'<text x="10" y="36" font-size="11">{escape(unit)}</text>',
    ]
    for row, label in enumerate(labels):
        strong = ' class="strong"' if row in ours else ""
        lines.append(f'<text{strong} x="10" y="{TOP + ROW * row + 16}">{escape(label)}</text>')
    for number, panel in enumerate(panels):
        lines += _panel(panel, LABELS + number * (width + GAP), width, height, ours)
    return "\n".join([*lines, "</svg>\n"])


def _panel(panel: Panel, left: float, width: float, height: int, ours: Collection[int]) -> list[str]:
    largest = max(value for value in panel.values if value is not None)
    per_value = (width - FIGURE) / (largest - panel.start)
    lines = [
        f'<text x="{left:.0f}" y="{TOP - 10}" font-size="11">{escape(panel.heading)}</text>',
        f'<path class="axis" d="M{left:.1f} {TOP - 2}V{height - 8}"/>',
    ]
    for row, (value, text) in enumerate(zip(panel.values, panel.texts, strict=True)):
        mine, middle = "ours " if row in ours else "", TOP + ROW * row + 12
        end = left + max(0.0, (panel.start if value is None else value) - panel.start) * per_value
        if value is not None and panel.spreads:
            half = panel.spreads[row] * per_value
            begin, stop = max(left, end - half), min(end + half, left + width - FIGURE)
            lines.append(f'<path class="{mine}spread" d="M{begin:.1f} {middle}H{stop:.1f}"/>')
            lines.append(f'<circle class="{mine}bar" cx="{end:.1f}" cy="{middle}" r="4.5"/>')
        elif value is not None:
            lines.append(
                f'<rect class="{mine}bar" x="{left:.1f}" y="{middle - 7}" width="{end - left:.1f}" height="14"/>'
            )
        beside = left + width - FIGURE + 8 if panel.spreads else end + 5
        strong = ' class="strong"' if row in ours else ""
        lines.append(f'<text{strong} x="{beside:.1f}" y="{middle + 4}">{escape(text)}</text>')
    return lines
