"""What a method does, in words, in a terminal and as a picture; nothing here knows a network."""

import ast
import importlib
import inspect
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flowbp.methods import METHODS, Method
from flowbp.plan import Leg, Plan
from imgen_common.config import Config

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTHS = ((25, 3), (38, 2), (80, 1))
"""(steps up to, characters per step) of the strip in the terminal; more steps have none."""
BARS = "▁▂▃▄▅▆▇█"
INK, MUTED, FAINT = "#1b1f24", "#6b7281", "#d6dae0"
ACTIVE, OPPOSITE, COUPLED, LEG, REWARD = "#2464eb", "#9333eb", "#d97707", "#05966a", "#be133c"
COLOURS = {
    INK: "--ink",
    MUTED: "--muted",
    FAINT: "--line",
    ACTIVE: "--blue",
    OPPOSITE: "--violet",
    COUPLED: "--orange",
    LEG: "--green",
    REWARD: "--red",
}
"""Colours of the picture, and the variables of the report's style sheet that stand for them in an SVG."""


# --- words -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class About:
    """What the source file of a method says of it."""

    line: str
    source: str


def about(name: str) -> About:
    """The sentence and the source under the constant of a named method."""
    tree = ast.parse(inspect.getsource(importlib.import_module(f"flowbp.methods.{name}")))
    texts = [n.value.value for n in tree.body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    text = " ".join(str(texts[-1]).split()) if texts else ""
    text, _, source = text.partition("Source: ")
    source = re.sub(r"\s*\(facts[^)]*\)", "", source).rstrip(". ")
    line = re.split(r"(?<=\.)\s", text.strip())[0]
    return About(line, source or "the chain rule")


def brief(value: Config | None) -> str:
    """A choice on an axis with its numbers: `late_biased: num_steps 3, bias 2`; `-` for none."""
    if value is None:
        return "-"
    fields = {key: one for key, one in value if key != "kind" and one is not None}
    if fields.get("refill") == "none":
        fields = {key: one for key, one in fields.items() if key not in ("refill", "gamma", "rho_max")}
    inner = ", ".join(f"{key} {_brief_value(one)}" for key, one in fields.items())
    kind = dict(value).get("kind", type(value).__name__)
    return f"{kind}: {inner}" if inner else str(kind)


def _brief_value(value: Any) -> str:
    if isinstance(value, Config):
        kind, colon, inner = brief(value).partition(": ")
        return f"{kind} ({inner})" if colon else kind
    return f"{value:g}" if isinstance(value, float) else str(value)


def axes_of(method: Method) -> dict[str, str]:
    """The method on its axes, for tables."""
    return {
        "reward sees": brief(method.reward_input),
        "active steps": brief(method.active),
        "weights": brief(method.weights),
        "coupling": brief(method.coupling),
        "gap floor": "-" if method.gap_floor is None else f"{method.gap_floor:g}",
        "tail": f"{method.tail:g}",
    }


def methods_table() -> list[dict[str, str]]:
    """One row per named method: name, axes, a line on it, its source."""
    rows = []
    for name, method in METHODS.items():
        told = about(name)
        rows.append({"name": name} | axes_of(method) | {"about": told.line, "source": told.source})
    return rows


def reward_text(plan: Plan) -> str:
    """What the reward sees, in words."""
    if plan.reward_step < plan.num_steps:
        return f"the one-step estimate x - sigma v at step {plan.reward_step}, where the rollout stops"
    copies = f", and {plan.copies} renoised copies of it restored in one step" if plan.copies else ""
    return f"the sampled picture x_{plan.num_steps}{copies}"


def counts(plan: Plan) -> list[tuple[str, str]]:
    """What the plan costs per sample, in words."""
    jacobians = sum(term.coupling > 0 for term in plan.terms)
    rows = [
        ("network evaluations with gradient", str(plan.num_gradient_forwards)),
        ("network evaluations without gradient", str(plan.num_plain_forwards)),
        ("Jacobian products (couplings)", str(jacobians)),
        (
            "sum of weights",
            f"{sum(term.weight for term in plan.terms):+.4f} (the whole trajectory: {-plan.sigmas[0]:g})",
        ),
    ]
    if plan.gap_floor is not None:
        rows.append(("sample weight", f"1 / sum over legs of max(gap, {plan.gap_floor:g})"))
    return rows


def linear_grid(steps: int, shift: float = 1.0) -> tuple[float, ...]:
    """sigma_i = shift s / (1 + (shift - 1) s) with s = 1 - i / steps: noise levels from 1 to 0."""
    s = 1 - np.arange(steps + 1) / steps
    return tuple(float(value) for value in shift * s / (1 + (shift - 1) * s))


# --- terminal --------------------------------------------------------------------------------------------------------


def strip(plan: Plan) -> list[tuple[str, str]]:
    """The plan drawn in characters, (label, line), noise on the left; [] if it has too many steps."""
    width = next((w for steps, w in WIDTHS if plan.num_steps <= steps), 0)
    if not width:
        return []
    terms = {term.step: term for term in plan.terms}
    largest = max(abs(term.weight) for term in plan.terms)
    every = 5
    marks, bars = [], []
    for i in range(plan.num_steps):
        term = terms.get(i)
        dead = i > plan.reward_step
        marks.append((" " if dead else "·") if term is None else "◉" if term.coupling else "●")
        bars.append(" " if term is None else BARS[round(7 * abs(term.weight) / largest)])
    numbers = "".join(str(i).ljust(width * every) for i in range(0, plan.num_steps, every))
    levels = "".join(f"{plan.sigmas[i]:.2f}".ljust(width * every) for i in range(0, plan.num_steps, every))
    rows = [("step", numbers), ("sigma", levels), ("active", _cells(marks, width)), ("weight", _cells(bars, width))]
    rows += [(f"leg {k}", _leg_line(leg, width)) for k, leg in enumerate(plan.legs, 1)]
    return [*rows, ("reward", " " * (width * min(plan.reward_step, plan.num_steps)) + "▲")]


def _cells(marks: Sequence[str], width: int) -> str:
    return "".join(mark.ljust(width) for mark in marks)


def _leg_line(leg: Leg, width: int) -> str:
    line = ["─"] * (width * (leg.stop - leg.start))
    line[0] = "├"
    for q, _ in leg.nodes:
        line[width * (q - leg.start)] = "○"
    return " " * (width * leg.start) + "".join(line) + "┤"


# --- picture ---------------------------------------------------------------------------------------------------------


def picture(plan: Plan, title: str, kind: str = "png") -> bytes:
    """The plan as a PNG, SVG or PDF: weights as stems over the noise levels, legs as arcs below, the reward at the end.

    An SVG takes its colours from the variables in `COLOURS`, its paper is transparent and its text is text.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    plain = {"svg.fonttype": "none", "svg.hashsalt": "plan", "font.size": 10, "font.family": "sans-serif"}
    with mpl.rc_context(plain):
        figure = Figure(figsize=(9, 4.6 if plan.legs else 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        if plan.legs:
            top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1.3])
            _draw_legs(bottom, plan)
            low = bottom
        else:
            top = low = figure.subplots()
        _draw_terms(top, plan)
        _draw_reward(top, plan)
        _dress(top, low, plan, title)
        buffer = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(buffer, format=kind, dpi=150, transparent=kind == "svg", metadata=metadata)
    return buffer.getvalue()


def inline_svg(plan: Plan, title: str) -> str:
    """The picture as an element for a page whose style sheet defines the variables in `COLOURS`."""
    text = picture(plan, title, "svg").decode()
    text = text[text.index("<svg") :]
    for colour, variable in COLOURS.items():
        text = text.replace(colour, f"var({variable})")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 width="100%" role="img"', text, count=1)
    # namespaces mean nothing inside HTML, and the page shall hold no address at all
    return re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")


def _draw_terms(axes: "Axes", plan: Plan) -> None:
    axes.vlines(plan.sigmas, 0, 1, transform=axes.get_xaxis_transform(), color=FAINT, linewidth=0.6, zorder=0)
    for row in plan.table():
        step, x, height = int(row["step"]), row["sigma"], abs(row["weight"])
        colour = ACTIVE if row["weight"] < 0 else OPPOSITE
        axes.axvspan(x, plan.sigmas[step + 1], color=colour, alpha=0.12, linewidth=0, zorder=1)
        axes.vlines(x, 0, height, color=colour, linewidth=2.2, zorder=3)
        axes.plot(x, height, "o", color=colour, markersize=6, zorder=4)
        if row["coupling"]:
            axes.plot(x, height, "o", mfc="none", mec=COUPLED, mew=1.8, markersize=12, zorder=5)
    for row, rise in zip(plan.table(), _rises(plan), strict=True):
        text = f"{row['weight']:+.3f}\n{row['euler_steps']:.1f} steps"
        text += f"\nalpha {row['coupling']:g}" if row["coupling"] else ""
        if max(_rises(plan)) < 3:
            axes.annotate(
                text.replace("-", "\N{MINUS SIGN}"),
                (row["sigma"], abs(row["weight"])),
                xytext=(0, 10 + 30 * rise),
                textcoords="offset points",
                ha="center",
                fontsize=8.5,
                color=INK,
            )


def _rises(plan: Plan) -> list[int]:
    """How many lines of labels each term's own must be lifted by to clear its neighbours."""
    rises: list[int] = []
    for k, term in enumerate(plan.terms):
        close = k > 0 and plan.sigmas[term.step] - plan.sigmas[plan.terms[k - 1].step] < 0.08
        rises.append(rises[-1] + 1 if close else 0)
    return rises


def _draw_reward(axes: "Axes", plan: Plan) -> None:
    label = f"reward: {reward_text(plan)}"
    if plan.reward_step < plan.num_steps:
        axes.plot([plan.sigmas[plan.reward_step], 0], [0, 0], color=REWARD, linewidth=1.6, linestyle=":", zorder=5)
    axes.plot([0], [0], "*", color=REWARD, markersize=13, clip_on=False, zorder=6, label=label)


def _draw_legs(axes: "Axes", plan: Plan) -> None:
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
        axes.text((start + stop) / 2, -0.55, width, ha="center", va="center", fontsize=8.5, color=MUTED)
    axes.set_ylim(-1.15, 0.35)
    axes.set_yticks([])
    axes.set_ylabel("legs", color=MUTED)


def _dress(top: "Axes", low: "Axes", plan: Plan, title: str) -> None:
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
    room = 1.45 + 0.3 * (max(_rises(plan)) if max(_rises(plan)) < 3 else 0)
    top.set_ylim(0, room * max(abs(term.weight) for term in plan.terms))
    top.set_ylabel("|c|, in units of sigma", color=MUTED)
    low.set_xlim(1.05, -0.03)
    low.set_xlabel("noise level sigma: noise on the left, picture on the right", color=MUTED)
    top.set_title(title, color=INK, fontsize=11, loc="left", pad=12 + 16 * ((len(marks) + len(star) + 1) // 2))
    for axes in {top, low}:
        axes.tick_params(colors=MUTED, labelsize=9)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom" or (side == "left" and axes is top))
            spine.set_color(FAINT)
