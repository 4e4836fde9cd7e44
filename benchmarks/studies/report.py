"""Tables and figures of the studies."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.common import format_versions, write_json
from benchmarks.quality.miniature_report import format_interval
from benchmarks.studies.fidelity import Cosines
from benchmarks.studies.runs import Point, StudyResult
from benchmarks.studies.studies import Study
from imgen_common.console import markdown_table
from imgen_common.files import write_atomic
from imgen_common.statistics import Interval, bootstrap_interval, paired_bootstrap_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f7f7f", "#b8860b")
"""Of Okabe and Ito, which color-blind readers tell apart, and two more; markers differ too."""
MARKERS = "os^Dv<>Px"
SCORES = {"verifier": (100, "right by the verifier, percentage points"), "reward": (1, "reward, its own units")}
"""Scores of the figures: factor, and name with unit."""


def change(result: StudyResult, points: Sequence[Point], score: str) -> Interval:
    """The change of a score from the base, paired by prompt after averaging over the points of all seeds."""
    return paired_bootstrap_interval(
        result.base[score], np.mean([point.scores[score] for point in points], axis=0).tolist()
    )


def format_study(study: Study, result: StudyResult) -> str:
    """The table of a study as Markdown: every variant after each part of its seconds."""
    header = [study.axis, "seconds per update", "updates", "right %", "change", "by seed", "reward", "held-out reward"]
    base = {score: float(np.mean(values)) for score, values in result.base.items()}
    rewards = [f"{base[name]:.2f}" for name in ("reward", "heldout")]
    lines = [["base", "-", "0", f"{100 * base['verifier']:.1f}", "-", "-", *rewards]]
    for variant, runs in result.runs.items():
        for number in range(len(study.parts)):
            points = [run[number] for run in runs]
            right = [100 * float(np.mean(point.scores["verifier"])) for point in points]
            lines.append(
                [
                    variant,
                    f"{result.seconds_per_update[variant]:.2f}",
                    f"{np.mean([point.updates for point in points]):.0f}",
                    f"{np.mean(right):.1f}",
                    format_interval(change(result, points, "verifier"), 100, 1),
                    ", ".join(f"{value:.1f}" for value in right),
                    format_interval(change(result, points, "reward"), 1, 2),
                    format_interval(change(result, points, "heldout"), 1, 2),
                ]
            )
    return markdown_table(header, lines)


def format_fidelity(found: Mapping[int, Sequence[Cosines]]) -> str:
    """The table of cosines as Markdown: a line for each variant, a column for each number of updates."""
    lines = []
    for variant in next(iter(found.values()))[0]:
        cells = [_over_seeds(runs, variant) for runs in found.values()]
        lines.append([variant, *(f"{c.mean:.3f} [{c.low:.3f}, {c.high:.3f}]" for c in cells)])
    return markdown_table(["cosine to the exact gradient", *(f"{stop} updates" for stop in found)], lines)


def _over_seeds(runs: Sequence[Cosines], variant: str) -> Interval:
    return bootstrap_interval([np.mean([run[variant] for run in runs], axis=0).tolist()])


def plot_study(study: Study, result: StudyResult) -> str:
    """The changes at the end of the training by variant, or along it where the study evaluates on the way, as SVG."""

    def draw(figure: "Figure") -> None:
        if len(study.parts) > 1:
            _draw_paths(figure.subplots(), result, len(study.parts))
            return
        for axes, (score, (factor, unit)) in zip(figure.subplots(1, 2), SCORES.items(), strict=True):
            found = [change(result, [run[-1] for run in runs], score) for runs in result.runs.values()]
            mean, low, high = (factor * np.array(values) for values in zip(*found, strict=True))
            axes.errorbar(range(len(found)), mean, (mean - low, high - mean), fmt="o", color=COLORS[0], capsize=4)
            for place, runs in enumerate(result.runs.values()):
                of_seeds = [np.mean(run[-1].scores[score]) - np.mean(result.base[score]) for run in runs]
                axes.plot([place + 0.15] * len(runs), factor * np.array(of_seeds), "x", color=COLORS[1])
            axes.axhline(0, color="#777777", linewidth=0.8)
            axes.set_xticks(range(len(found)), list(result.runs))
            axes.set(xlabel=study.axis, ylabel=f"change of {unit}")

    return _svg(draw)


def _draw_paths(axes: "Axes", result: StudyResult, count: int) -> None:
    """The verifier's change over the reward's, a line for each method with a mark for each evaluation."""
    for (variant, runs), color, marker in zip(result.runs.items(), COLORS, MARKERS, strict=True):
        path = [(0.0, 0.0)]
        for number in range(count):
            points = [run[number] for run in runs]
            path.append((change(result, points, "reward").mean, 100 * change(result, points, "verifier").mean))
        x, y = zip(*path, strict=True)
        axes.plot(x, y, color=color, marker=marker, markersize=5, label=variant)
    axes.axhline(0, color="#777777", linewidth=0.8)
    axes.set(xlabel=f"change of {SCORES['reward'][1]}", ylabel=f"change of {SCORES['verifier'][1]}")
    axes.legend(fontsize=8, frameon=False)


def plot_fidelity(found: Mapping[int, Sequence[Cosines]]) -> str:
    """Cosines over updates as SVG."""

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for variant, color, marker in zip(next(iter(found.values()))[0], COLORS, MARKERS, strict=True):
            mean = [_over_seeds(runs, variant).mean for runs in found.values()]
            axes.plot(list(found), mean, color=color, marker=marker, markersize=5, label=variant)
        axes.set(xlabel="updates of the training", ylabel="cosine to the exact gradient", ylim=(0, 1))
        axes.legend(fontsize=8, frameon=False, ncols=2)

    return _svg(draw)


def _svg(draw: Callable[["Figure"], None]) -> str:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "study", "font.family": "sans-serif"}):
        figure = Figure(figsize=(8.4, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def write_study(
    output: Path, title: str, table: str, figure: str, setup: str, environment: Mapping[str, Any], content: object
) -> None:
    """Prints the table; writes it to `output` (Markdown), with the figure (SVG) and the numbers (JSON) beside it."""
    versions = f"{environment['hardware']}, one thread; {format_versions(dict(environment))}."
    text = f"# {title}\n\n{table}\n\n{setup} {versions}\n"
    print(text)
    write_json(output.with_suffix(".json"), {"environment": environment, "result": content})
    write_atomic(output, text)
    write_atomic(output.with_suffix(".svg"), figure)
    print(f"written to {output}")


def study_content(result: StudyResult) -> dict[str, Any]:
    """A study's numbers without those of single prompts."""
    points = {
        variant: [[_without_prompts(point) for point in run] for run in runs] for variant, runs in result.runs.items()
    }
    return {"seconds_per_update": result.seconds_per_update, "points": points}


def _without_prompts(point: Point) -> dict[str, Any]:
    means = {score: float(np.mean(values)) for score, values in point.scores.items()}
    return asdict(point) | {"scores": means}
