"""Panels of percentages with intervals, as SVG."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from imgen_common.statistics import Interval

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, GAP = 230, 250, 44, 46, 64, 26


class Panel(NamedTuple):
    """One panel.  points: the share of each (place on the axis, series)."""

    title: str
    places: Sequence[str]
    points: Mapping[tuple[str, str], Interval]


def draw_panels(panels: Sequence[Panel], colors: Mapping[str, str], width: int = WIDTH) -> str:
    """The panels side by side, under a legend of {series: color}; ` + ` breaks the name of a place."""
    legend = "".join(
        f'<circle cx="{LEFT + 6 + width * i // 2}" cy="14" r="4" fill="{color}"/>'
        f'<text x="{LEFT + 16 + width * i // 2}" y="18">{name}</text>'
        for i, (name, color) in enumerate(colors.items())
    )
    drawn = "".join(_draw(panel, LEFT + number * (width + GAP), width, colors) for number, panel in enumerate(panels))
    right, bottom = LEFT + len(panels) * (width + GAP), TOP + HEIGHT + BOTTOM
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right} {bottom}" font-family="sans-serif" '
        f'font-size="12"><rect width="{right}" height="{bottom}" fill="white"/>{legend}{drawn}</svg>\n'
    )


def _draw(panel: Panel, left: float, width: int, colors: Mapping[str, str]) -> str:
    """A panel whose left edge is at `left`."""

    def vertical(share: float) -> float:
        return round(TOP + (1 - share) * HEIGHT, 1)

    parts = [f'<text x="{left}" y="{TOP - 10}" font-weight="bold">{panel.title}</text>']
    for mark in range(0, 101, 20):
        y = vertical(mark / 100)
        parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 4}" y="{y + 4}" text-anchor="end" font-size="10" fill="#555">{mark}</text>')
    for number, place in enumerate(panel.places):
        middle = left + width * (number + 0.5) / len(panel.places)
        for line, words in enumerate(place.split(" + ")):
            y = TOP + HEIGHT + 18 + 14 * line
            parts.append(f'<text x="{middle}" y="{y}" text-anchor="middle" font-size="10">{words}</text>')
        for offset, (series, color) in enumerate(colors.items()):
            mean, low, high = panel.points[place, series]
            x = middle + 14 * (offset - (len(colors) - 1) / 2)
            parts.append(f'<line x1="{x}" x2="{x}" y1="{vertical(low)}" y2="{vertical(high)}" stroke="{color}"/>')
            title = f"{series}, {place}: {100 * mean:.1f} %"
            parts.append(f'<circle cx="{x}" cy="{vertical(mean)}" r="4" fill="{color}"><title>{title}</title></circle>')
    return "".join(parts)
