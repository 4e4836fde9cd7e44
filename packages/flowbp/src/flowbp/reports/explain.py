"""Methods and plans in words, and a plan in characters for a terminal; nothing here knows a network."""

import ast
import importlib
import inspect
import re
from typing import Any

import numpy as np

from flowbp.core.axes.grid import Leg
from flowbp.core.plan import Plan
from flowbp.methods import METHODS, Method
from imgen_common.config import Config

WIDTHS = ((25, 3), (38, 2), (80, 1))
"""(largest number of steps, characters per step) of `plan_strip`."""
BARS = "▁▂▃▄▅▆▇█"


def describe_method(name: str) -> tuple[str, str]:
    """The first sentence, and the source, of the docstring under the constant of a named method."""
    tree = ast.parse(inspect.getsource(importlib.import_module(f"flowbp.methods.{name}")))
    texts = [n.value.value for n in tree.body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    text = " ".join(str(texts[-1]).split()) if texts else ""
    text, _, source = text.partition("Source: ")
    sentence = re.split(r"(?<=\.)\s", text.strip())[0]
    return sentence, source.rstrip(". ") or "the chain rule"


def describe_choice(value: Config | None) -> str:
    """A choice on an axis with its numbers: `late_biased: num_active_steps 3, bias 2`; `-` for none."""
    if value is None:
        return "-"
    fields = {key: one for key, one in value if key != "kind" and one is not None}
    if fields.get("refill") == "none":
        fields = {key: one for key, one in fields.items() if key not in ("refill", "gamma", "rho_max")}
    inner = ", ".join(f"{key} {_describe_value(one)}" for key, one in fields.items())
    kind = dict(value).get("kind", type(value).__name__)
    return f"{kind}: {inner}" if inner else str(kind)


def _describe_value(value: Any) -> str:
    if isinstance(value, Config):
        kind, colon, inner = describe_choice(value).partition(": ")
        return f"{kind} ({inner})" if colon else kind
    return f"{value:g}" if isinstance(value, float) else str(value)


def describe_axes(method: Method) -> dict[str, str]:
    """The choice of a method on each axis."""
    return {
        "reward sees": describe_choice(method.reward_input),
        "active steps": describe_choice(method.active),
        "weights": describe_choice(method.quadrature),
        "coupling": describe_choice(method.coupling),
        "gap floor": "-" if method.gap_floor is None else f"{method.gap_floor:g}",
        "tail": f"{method.tail:g}",
    }


def methods_table() -> list[dict[str, str]]:
    """One row per named method: name, axes, a sentence about it, its source."""
    return [
        {"name": name} | describe_axes(method) | dict(zip(("about", "source"), describe_method(name), strict=True))
        for name, method in METHODS.items()
    ]


def describe_reward_input(plan: Plan) -> str:
    """What the reward sees, in words."""
    if plan.reward_step < plan.num_inference_steps:
        return f"the one-step estimate x - sigma v at step {plan.reward_step}, where the rollout stops"
    copies = f", and {plan.copies} renoised copies of it restored in one step" if plan.copies else ""
    return f"the sampled image x_{plan.num_inference_steps}{copies}"


def plan_costs(plan: Plan, keep_graphs: int = 0) -> list[tuple[str, str]]:
    """What the plan costs per sample, as (label, value).  keep_graphs: as in the configuration of a training."""
    jacobians = sum(term.coupling > 0 for term in plan.terms)
    kept = len(plan.keep_graphs(keep_graphs).graphs)
    with_gradient = str(plan.num_gradient_forwards) + (f", {kept} of them in the rollout" if kept else "")
    rows = [
        ("network evaluations with gradient", with_gradient),
        ("network evaluations without gradient", str(plan.num_plain_forwards - kept)),
        ("Jacobian products (couplings)", str(jacobians)),
        (
            "sum of weights",
            f"{sum(term.weight for term in plan.terms):+.4f} (the whole trajectory: {-plan.sigmas[0]:g})",
        ),
    ]
    if plan.gap_floor is not None:
        rows.append(("sample weight", f"1 / sum over legs of max(gap, {plan.gap_floor:g})"))
    return rows


def linear_sigmas(steps: int, shift: float = 1.0) -> tuple[float, ...]:
    """Noise levels from 1 to 0: sigma_i = shift s / (1 + (shift - 1) s) with s = 1 - i / steps."""
    s = 1 - np.arange(steps + 1) / steps
    return tuple(float(value) for value in shift * s / (1 + (shift - 1) * s))


def plan_strip(plan: Plan) -> list[tuple[str, str]]:
    """The plan in characters as (label, line), noise on the left; [] if it has too many steps."""
    width = next((w for steps, w in WIDTHS if plan.num_inference_steps <= steps), 0)
    if not width:
        return []
    steps = range(plan.num_inference_steps)
    marks = ["·" if i <= plan.reward_step else " " for i in steps]
    bars = [" " for _ in steps]
    largest = max(abs(term.weight) for term in plan.terms)
    for term in plan.terms:
        marks[term.step] = "◉" if term.coupling else "●"
        bars[term.step] = BARS[round(7 * abs(term.weight) / largest)]
    cells = {
        "step": [str(i).ljust(5 * width) for i in steps[::5]],
        "sigma": [f"{plan.sigmas[i]:.2f}".ljust(5 * width) for i in steps[::5]],
        "active": [mark.ljust(width) for mark in marks],
        "weight": [bar.ljust(width) for bar in bars],
    }
    rows = [(label, "".join(line)) for label, line in cells.items()]
    rows += [(f"leg {k}", _leg_line(leg, width)) for k, leg in enumerate(plan.legs, 1)]
    return [*rows, ("reward", " " * (width * min(plan.reward_step, plan.num_inference_steps)) + "▲")]


def _leg_line(leg: Leg, width: int) -> str:
    line = ["─"] * (width * (leg.stop - leg.start))
    line[0] = "├"
    for q, _ in leg.nodes:
        line[width * (q - leg.start)] = "○"
    return " " * (width * leg.start) + "".join(line) + "┤"
