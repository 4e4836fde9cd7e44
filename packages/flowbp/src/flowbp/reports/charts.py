"""Small line charts and interval plots as inline SVG, in the colors of the page's style sheet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from imgen_common.page import environment

TEMPLATES = Path(__file__).parent / "templates"
FRAME = {"width": 380, "height": 190, "left": 46, "right": 12, "top": 10, "bottom": 26}


@dataclass(frozen=True)
class Series:
    """One line of a chart.  style: `line`, `faint` (thin and pale), `dots` (line with points) or `rule` (dashed)."""

    label: str
    color: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: str = "line"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers from at most `low` to at least `high`."""
    size = max(abs(low), abs(high))
    span = high - low if high - low > 1e-9 * size else size or 1.0  # what differs by rounding alone is flat
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = max(first + 1, math.ceil(high / step - 1e-9))
    return [round(step * k, 12 - math.floor(math.log10(step))) for k in range(first, last + 1)]


def moving_average(values: Sequence[float], window: int = 10) -> list[float]:
    """Mean of each value and the up to `window` - 1 before it."""
    runs = [values[max(0, i + 1 - window) : i + 1] for i in range(len(values))]
    return [sum(run) / len(run) for run in runs]


def format_tick(value: float) -> str:
    """A number on an axis, short."""
    return f"{value:.3g}".replace("-", "\N{MINUS SIGN}") if abs(value) < 1e4 else f"{value:.1e}"


def line_chart(title: str, unit: str, series: Sequence[Series], stop: float, *, from_zero: bool = False) -> Markup:
    """A chart over 0 to `stop` updates with a heading and a legend; "" without data."""
    shown = [one for one in series if len(one.ys)]
    if not shown:
        return Markup("")
    values = [y for one in shown for y in one.ys] + ([0.0] if from_zero else [])
    levels = ticks(min(values), max(values))
    stop = max(stop, 1)

    def place(x: float, y: float) -> tuple[float, float]:
        across = FRAME["left"] + x / stop * (FRAME["width"] - FRAME["left"] - FRAME["right"])
        share = (levels[-1] - y) / (levels[-1] - levels[0])
        return round(across, 1), round(FRAME["top"] + share * (FRAME["height"] - FRAME["top"] - FRAME["bottom"]), 1)

    return _render(
        "line_chart",
        title=title,
        unit=unit,
        frame=FRAME,
        levels=[(place(0, value)[1], format_tick(value)) for value in levels],
        marks=[(place(value, levels[0])[0], format_tick(value)) for value in ticks(0, stop) if value <= stop],
        lines=[_line(one, [place(x, y) for x, y in zip(one.xs, one.ys, strict=True)]) for one in shown],
    )


def _line(one: Series, places: Sequence[tuple[float, float]]) -> dict[str, Any]:
    has_points = one.style == "dots" or len(places) == 1
    points = zip(places, one.xs, one.ys, strict=True) if has_points else ()
    return {
        "label": one.label,
        "color": one.color,
        "style": one.style,
        "path": " ".join(f"{x},{y}" for x, y in places),
        "points": [{"x": x, "y": y, "label": f"update {at:g}: {value:.4g}"} for (x, y), at, value in points],
    }


def interval_chart(low: float, mean: float, high: float, span: tuple[float, float]) -> Markup:
    """An interval with its mean on a scale that all rows of a table share; zero is marked."""
    start, stop = span

    def place(value: float) -> float:
        return round(4 + 172 * (value - start) / ((stop - start) or 1), 1)

    return _render("interval_chart", zero=place(0), low=place(low), mean=place(mean), high=place(high))


def _render(macro: str, **values: Any) -> Markup:
    template = environment(TEMPLATES).get_template("charts.html.jinja")
    return Markup(getattr(template.module, macro)(**values))
