"""Small line charts and interval plots as inline SVG, coloured by the page's style sheet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 380, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 26


@dataclass(frozen=True)
class Series:
    """One line of a chart.  style: `line`, `faint` (thin and pale), `dots` (line with points) or `rule` (dashed)."""

    label: str
    colour: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: str = "line"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers from at most `low` to at least `high`."""
    span = (high - low) or abs(high) or 1.0
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = max(first + 1, math.ceil(high / step - 1e-9))
    return [round(step * k, 12) for k in range(first, last + 1)]


def smooth(values: Sequence[float], window: int = 10) -> list[float]:
    """Mean of each value and the up to `window` - 1 before it."""
    runs = [values[max(0, i + 1 - window) : i + 1] for i in range(len(values))]
    return [sum(run) / len(run) for run in runs]


def text_of(value: float) -> str:
    """A number on an axis, short."""
    return f"{value:.3g}".replace("-", "\N{MINUS SIGN}") if abs(value) < 1e4 else f"{value:.1e}"


def chart(title: str, unit: str, series: Sequence[Series], stop: float, *, from_zero: bool = False) -> str:
    """A figure over 0 to `stop` updates with a heading and a legend; "" without data."""
    drawn = [one for one in series if len(one.ys)]
    if not drawn:
        return ""
    values = [y for one in drawn for y in one.ys] + ([0.0] if from_zero else [])
    levels = ticks(min(values), max(values))
    stop = max(stop, 1)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + x / stop * (WIDTH - LEFT - RIGHT)
        down = TOP + (levels[-1] - y) / (levels[-1] - levels[0]) * (HEIGHT - TOP - BOTTOM)
        return round(across, 1), round(down, 1)

    parts = []
    for value in levels:
        _, y = place(0, value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5}" text-anchor="end">{text_of(value)}</text>')
    for value in (v for v in ticks(0, stop) if v <= stop):
        x, _ = place(value, levels[0])
        parts.append(f'<text class="tick" x="{x}" y="{HEIGHT - 8}" text-anchor="middle">{text_of(value)}</text>')
    parts += [_line(one, [place(x, y) for x, y in zip(one.xs, one.ys, strict=True)]) for one in drawn]
    legend = "".join(
        f'<span><i class="{one.style}" style="background:var({one.colour})"></i>{escape(one.label)}</span>'
        for one in drawn
        if one.label
    )
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b> <small>{escape(unit)}</small></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} by update">{"".join(parts)}</svg>'
        f'<div class="legend">{legend}</div></figure>'
    )


def _line(one: Series, points: Sequence[tuple[float, float]]) -> str:
    path = " ".join(f"{x},{y}" for x, y in points)
    looks = {
        "line": 'stroke-width="2"',
        "faint": 'stroke-width="1" opacity="0.35"',
        "dots": 'stroke-width="1.5"',
        "rule": 'stroke-width="1" stroke-dasharray="4 3"',
    }
    text = f'<polyline points="{path}" fill="none" stroke="var({one.colour})" {looks[one.style]}/>'
    if one.style == "dots" or len(points) == 1:
        for (x, y), at, value in zip(points, one.xs, one.ys, strict=True):
            told = f"update {at:g}: {value:.4g}"
            text += f'<circle cx="{x}" cy="{y}" r="3" fill="var({one.colour})"><title>{told}</title></circle>'
    return text


def whisker(low: float, mean: float, high: float, span: tuple[float, float]) -> str:
    """An interval with its mean on a scale shared by all rows of a table, zero marked."""
    start, stop = span

    def place(value: float) -> float:
        return round(4 + 172 * (value - start) / ((stop - start) or 1), 1)

    return (
        '<svg class="whisker" viewBox="0 0 180 16" aria-hidden="true">'
        f'<line class="zero" x1="{place(0)}" x2="{place(0)}" y1="0" y2="16"/>'
        f'<line class="bar" x1="{place(low)}" x2="{place(high)}" y1="8" y2="8"/>'
        f'<circle class="mean" cx="{place(mean)}" cy="8" r="3.5"/></svg>'
    )
