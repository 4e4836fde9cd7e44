"""A plan as a figure; nothing here knows a network."""

import contextlib
import io
import os
import re
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from flowbp.core.plan import Plan
from flowbp.reports.explain import describe_reward_input

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, FAINT = "#1b1f24", "#6b7281", "#d6dae0"
ACTIVE, OPPOSITE, COUPLED, LEG, REWARD = "#2464eb", "#9333eb", "#d97707", "#05966a", "#be133c"
THEME_COLORS = {
    INK: "--ink",
    MUTED: "--muted",
    FAINT: "--line",
    ACTIVE: "--blue",
    OPPOSITE: "--violet",
    COUPLED: "--orange",
    LEG: "--green",
    REWARD: "--red",
}
"""Colors of the figure, each with the variable of the report's style sheet that replaces it in a page."""


LINE = 15
"""Points from one line of a label to the next."""
MAX_RISE = 6 * LINE
"""Points by which labels are raised; where that does not do, a plan is drawn without."""


def plot_plan(plan: Plan, title: str, kind: str = "png") -> bytes:
    """The plan as a PNG, SVG or PDF: stems are weights over noise levels, arcs are legs, the star is the reward."""
    mpl = _import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    plain = {"svg.fonttype": "none", "svg.hashsalt": "plan", "font.size": 10, "font.family": "sans-serif"}
    with mpl.rc_context(plain):
        figure = Figure(figsize=(9, 4.6 if plan.legs else 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        if plan.legs:
            top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1.3])
            _plot_legs(bottom, plan)
            low = bottom
        else:
            top = low = figure.subplots()
        _plot_terms(top, plan)
        _plot_reward(top, plan)
        _style_axes(top, low, plan, title)
        buffer = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(buffer, format=kind, dpi=150, transparent=kind == "svg", metadata=metadata)
    return buffer.getvalue()


def _import_matplotlib() -> ModuleType:
    """matplotlib, whose import an MPLBACKEND of another version would end; no window is opened here."""
    backend = os.environ.pop("MPLBACKEND", None) if "matplotlib" not in sys.modules else None
    try:
        import matplotlib as mpl
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with contextlib.suppress(ValueError):
            mpl.rcParams["backend"] = backend  # as its import does
    return mpl


def plan_svg(plan: Plan, title: str) -> str:
    """The figure as an element for a page whose style sheet defines the variables in `THEME_COLORS`."""
    text = plot_plan(plan, title, "svg").decode()
    text = text[text.index("<svg") :]
    for color, variable in THEME_COLORS.items():
        text = text.replace(color, f"var({variable})")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 width="100%" role="img"', text, count=1)
    # HTML ignores namespaces, and the page must not contain any address
    return re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")


def _plot_terms(axes: "Axes", plan: Plan) -> None:
    axes.vlines(plan.sigmas, 0, 1, transform=axes.get_xaxis_transform(), color=FAINT, linewidth=0.6, zorder=0)
    for row in plan.table():
        step, x, height = int(row["step"]), row["sigma"], abs(row["weight"])
        color = ACTIVE if row["weight"] < 0 else OPPOSITE
        axes.axvspan(x, plan.sigmas[step + 1], color=color, alpha=0.12, linewidth=0, zorder=1)
        axes.vlines(x, 0, height, color=color, linewidth=2.2, zorder=3)
        axes.plot(x, height, "o", color=color, markersize=6, zorder=4)
        if row["coupling"]:
            axes.plot(x, height, "o", mfc="none", mec=COUPLED, mew=1.8, markersize=12, zorder=5)
    for row, rise in zip(plan.table(), _rises(plan), strict=True):
        text = f"{row['weight']:+.3f}\n{row['euler_steps']:.1f} steps"
        text += f"\nalpha {row['coupling']:g}" if row["coupling"] else ""
        if max(_rises(plan)) < MAX_RISE:
            axes.annotate(
                text.replace("-", "\N{MINUS SIGN}"),
                (row["sigma"], abs(row["weight"])),
                xytext=(0, 10 + rise),
                textcoords="offset points",
                ha="right" if rise else "center",  # clear of the stem beside it
                fontsize=8.5,
                color=INK,
            )


def _rises(plan: Plan) -> list[int]:
    """By how many points the label of each term must be raised to clear those of its neighbors."""
    rises: list[int] = []
    for k, term in enumerate(plan.terms):
        before = plan.terms[k - 1]
        close = k > 0 and plan.sigmas[term.step] - plan.sigmas[before.step] < 0.08
        rises.append(rises[-1] + LINE * (3 if before.coupling else 2) if close else 0)
    return rises


def _plot_reward(axes: "Axes", plan: Plan) -> None:
    label = f"reward: {describe_reward_input(plan)}"
    if plan.reward_step < plan.num_inference_steps:
        axes.plot([plan.sigmas[plan.reward_step], 0], [0, 0], color=REWARD, linewidth=1.6, linestyle=":", zorder=5)
    axes.plot([0], [0], "*", color=REWARD, markersize=13, clip_on=False, zorder=6, label=label)


def _plot_legs(axes: "Axes", plan: Plan) -> None:
    active = {term.step for term in plan.terms}
    for leg in plan.legs:
        start, stop = plan.sigmas[leg.start], plan.sigmas[leg.stop]
        t = np.linspace(0, np.pi, 60)
        axes.plot(start + (stop - start) * (1 - np.cos(t)) / 2, -np.sin(t), color=LEG, linewidth=1.6)
        biggest = max(abs(w) for _, w in leg.nodes)
        for q, w in leg.nodes:
            size = 4 + 7 * abs(w) / biggest
            face = LEG if q in active else "none"
            axes.plot(plan.sigmas[q], 0, "o", mfc=face, mec=LEG, mew=1.4, markersize=size, clip_on=False, zorder=4)
        width = f"leap of {stop - start:+.3f}".replace("-", "\N{MINUS SIGN}")
        is_narrow = start - stop < 0.15  # than its label, which then stands to the left
        place, side = (start + 0.01, "right") if is_narrow else ((start + stop) / 2, "center")
        axes.text(place, -0.55, width, ha=side, va="center", fontsize=8.5, color=MUTED)
    axes.set_ylim(-1.15, 0.35)
    axes.set_yticks([])
    axes.set_ylabel("legs", color=MUTED)


def _style_axes(top: "Axes", low: "Axes", plan: Plan, title: str) -> None:
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], color=ACTIVE, marker="o", label="active step: weight c")]
    if any(term.weight > 0 for term in plan.terms):
        marks.append(Line2D([], [], color=OPPOSITE, marker="o", label="weight of the other sign"))
    if any(term.coupling for term in plan.terms):
        ring: dict[str, Any] = {"mfc": "none", "mec": COUPLED, "mew": 1.8, "markersize": 10, "linestyle": ""}
        marks.append(Line2D([], [], marker="o", label="coupled: gradient passes through the state", **ring))
    if plan.legs:
        node: dict[str, Any] = {"mfc": "none", "mec": LEG, "mew": 1.4, "linestyle": ""}
        marks.append(Line2D([], [], marker="o", label="quadrature node (filled: active)", **node))
    star = [line for line in top.get_lines() if str(line.get_label()).startswith("reward")]
    top.legend(
        handles=[*marks, *star],
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=2,
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
    )
    room = 1.45 + 0.01 * (max(_rises(plan)) if max(_rises(plan)) < MAX_RISE else 0)
    top.set_ylim(0, room * max(abs(term.weight) for term in plan.terms))
    top.set_ylabel("|c|, in units of sigma", color=MUTED)
    low.set_xlim(1.05, -0.03)
    low.set_xlabel("noise level sigma: noise on the left, image on the right", color=MUTED)
    top.set_title(title, color=INK, fontsize=11, loc="left", pad=12 + 16 * ((len(marks) + len(star) + 1) // 2))
    for axes in {top, low}:
        axes.tick_params(colors=MUTED, labelsize=9)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom" or (side == "left" and axes is top))
            spine.set_color(FAINT)
