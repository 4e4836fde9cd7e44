"""One self-contained HTML page about a run, from nothing but its folder."""

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from flowbp.config import TrainConfig
from flowbp.core.plan import draw_plan
from flowbp.evaluation.compare import Change, describe_change, format_score, paired_changes_by_category, score_title
from flowbp.evaluation.results import SavedEvaluation
from flowbp.reports.charts import TEMPLATES, Series, interval_chart, line_chart, moving_average
from flowbp.reports.explain import describe_axes, describe_reward_input, linear_sigmas, plan_costs
from flowbp.reports.figure import plan_svg
from flowbp.reports.run_data import RunData, read_run
from flowbp.training.progress import format_memory
from flowbp.training.stage_clock import STAGES
from imgen_common import page
from imgen_common.config import to_yaml
from imgen_common.console import format_duration
from imgen_common.files import write_atomic
from imgen_common.images import MAX_OWN_BYTES, data_uri, decode
from imgen_common.streams import numpy_generator

PAGE = "report.html"
THUMBNAIL = 256
"""Longest side of an image in the page, in pixels."""
NUM_UNFOLDED = 24
"""Number of image pairs that are shown at once; the others unfold."""
Values = dict[str, Any]
"""Data for the template."""


def write_report(path: Path, out: Path | None = None) -> Path:
    """Writes the page of a run again, to PATH/report.html unless `out` says otherwise, and returns its path."""
    file = out or path / PAGE
    write_atomic(file, render_report(read_run(path)))
    return file


def render_report(run: RunData) -> str:
    """The page."""
    config = run.config
    facts = [
        f"method {config.method.name}",
        f"{run.updates} of {config.max_train_steps} updates of {config.total_batch_size} images",
        f"{config.num_inference_steps} denoising steps",
        f"guidance {config.guidance_scale:g}",
        f"model {config.model.ref}",
        *([f"evaluated with {config.eval.model}"] if config.eval.model else []),
        *([f"quick evaluations decoded by {config.model.vae.preview}"] if config.model.vae.preview else []),
    ]
    values = {
        "name": run.name,
        "facts": " · ".join(facts),
        "config": config,
        "updates": run.updates,
        "own_scale": f"{run.own_scale:g}",
        "result": _result(run),
        "no_result": _why_no_result(run),
        "alerts": run.alerts,
        "scores": [_scale(run, scale) | {"rows": _score_rows(run, scale)} for scale in run.scales],
        "outcomes": _outcomes(run),
        "images": _images(run),
        "categories": _categories(run),
        "curves": _curves(run),
        "plan": _plan(run),
        "setup": _setup(run),
    }
    return page.render("report.html.jinja", values, TEMPLATES)


def _scale(run: RunData, scale: float) -> Values:
    return {"label": f"{scale:g}", "is_own": scale == run.own_scale}


def _result(run: RunData) -> Values | None:
    """The changes at the guidance scale of the run."""
    own = run.own_scale
    if own not in run.pairs:
        return None
    cards = [
        {
            "title": score_title(name),
            "text": describe_change(name, change),
            "unit": " points" if name == "verifier" else "",
            "note": _score_note(run.config, name),
        }
        for name, change in run.changes[own].items()
    ]
    num = len(run.pairs[own][0].prompts)
    return {"cards": cards, "num": num, "exploited": _exploited(run.config, run.changes[own])}


def _why_no_result(run: RunData) -> str:
    names = {name for name, scale in run.evaluations if scale == run.own_scale}
    if names == {"base", "trained"}:
        return "The evaluations before and after are of different prompts, so they cannot be compared."
    if "base" in names:
        return f"Not finished: {run.updates} of {run.config.max_train_steps} updates are done, the result comes after."
    return "Nothing has been evaluated yet."


def _score_note(config: TrainConfig, name: str) -> str:
    """The role of a score in the run."""
    if name == "verifier":
        return "share of images that show what the prompt says, by a strict program"
    trained = name in {reward.name for reward in config.rewards}
    return "a score that was maximized" if trained else "a score that was only watched"


def _exploited(config: TrainConfig, changes: Mapping[str, Change]) -> Values | None:
    """Rewards that rose while what they stand for fell."""
    watched = ("verifier", *(scorer.name for scorer in config.heldout))
    fell = [score_title(name) for name in watched if name in changes and changes[name].verdict == "lower"]
    rose = [
        score_title(reward.name)
        for reward in config.rewards
        if reward.name in changes and changes[reward.name].verdict == "higher"
    ]
    return {"rose": ", ".join(rose), "fell": " and ".join(fell)} if rose and fell else None


def _score_rows(run: RunData, scale: float) -> list[Values]:
    changes = run.changes.get(scale, {})
    return [{"title": score_title(name), "text": describe_change(name, one)} for name, one in changes.items()]


def _outcomes(run: RunData) -> str:
    """How many images changed sides, at the guidance scale of the training."""
    own = run.own_scale
    if "verifier" not in run.changes.get(own, {}):
        return ""
    sides = list(zip(*(one.scores["verifier"] for one in run.pairs[own]), strict=True))
    kinds = {(1, 1): "pass before and after", (0, 1): "only after", (1, 0): "only before", (0, 0): "neither"}
    return ", ".join(f"{sides.count(kind)} {text}" for kind, text in kinds.items())


def _images(run: RunData) -> list[Values]:
    found = []
    for scale, pair in run.pairs.items():
        if num := min(len(pair[0].prompts), *(len(one.image_files) for one in pair)):
            figures = [_figure(*pair, run.config.rewards[0].name, i) for i in range(num)]
            found.append(_scale(run, scale) | {"figures": figures[:NUM_UNFOLDED], "more": figures[NUM_UNFOLDED:]})
    return found


def _figure(base: SavedEvaluation, trained: SavedEvaluation, reward: str, i: int) -> Values:
    scores = ""
    if reward in base.scores and reward in trained.scores:
        every = base.scores[reward] + trained.scores[reward]  # all images with as many decimals
        before, after = (format_score(reward, one.scores[reward][i], *every) for one in (base, trained))
        scores = f"{score_title(reward).lower()} {before} → {after}"
    prompt = base.prompts[i]
    sides = [_image(file, f"source of: {prompt}", None) for file in base.source_files.get(i, [])]
    for one, when in ((base, "before"), (trained, "after")):
        passes = one.scores["verifier"][i] > 0.5 if "verifier" in one.scores else None
        sides.append(_image(one.image_files[i], f"{when}: {prompt}", passes))
    return {"prompt": prompt, "scores": scores, "sides": sides}


def _image(file: Path, alt: str, passes: bool | None) -> Values:
    image = decode(file, MAX_OWN_BYTES)
    small = max(image.size) <= 128
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return {"uri": data_uri(image), "alt": alt, "small": small, "passes": passes}


def _categories(run: RunData) -> list[Values]:
    found = []
    for scale, pair in run.pairs.items():
        if by_category := paired_changes_by_category(*pair):
            by_category["all"] = run.changes[scale]["verifier"]
            changes = by_category.values()
            span = (min(0.0, *(one.low for one in changes)), max(0.0, *(one.high for one in changes)))
            rows = [
                {
                    "category": category,
                    "is_total": category == "all",
                    "num": one.num,
                    "text": describe_change("verifier", one),
                    "chart": interval_chart(one.low, one.difference, one.high, span),
                }
                for category, one in by_category.items()
            ]
            found.append(_scale(run, scale) | {"rows": rows})
    return found


def _curves(run: RunData) -> Values | None:
    if not run.metrics:
        return None
    peak = Series("", "--blue", *run.series("train/peak_memory_gib"))
    max_norm = run.config.optim.max_grad_norm
    charts = [
        *(_score_chart(run, scorer.name) for scorer in run.config.scorers),
        line_chart("Verifier", "% of images", _quick_series(run, "verifier", 100), run.updates),
        _metric_chart(run, "Gradient norm", "before clipping", "train/grad_norm", max_norm),
        _gap_chart(run),
        *_distance_charts(run),
        _metric_chart(run, "Time", "seconds per update", "train/seconds"),
        line_chart("Peak memory so far", "GiB", [peak], run.updates, from_zero=True),
    ]
    return {"charts": charts, "duration": format_duration(sum(run.series("train/seconds")[1]))}


def _distance_charts(run: RunData) -> list[Markup]:
    if run.config.regularise is None:
        return []
    return [_metric_chart(run, "Distance to the base", "mean squared difference of velocities", "train/regularise")]


def _quick_series(run: RunData, name: str, unit: float = 1) -> list[Series]:
    """A score of the quick evaluations, and apart from it that of images which a tiny decoder made."""
    num = run.config.eval.quick_num_prompts
    label = f"quick evaluation: {num} prompts, averaged weights, guidance {run.own_scale:g}"
    found = []
    for kind, color, mark in (("eval", "--orange", ""), ("eval_preview", "--violet", ", images of a tiny decoder")):
        updates, values = run.series(f"{kind}/{name}")
        found.append(Series(label + mark, color, updates, [unit * value for value in values], "dots"))
    return found


def _score_chart(run: RunData, name: str) -> Markup:
    updates, values = run.series(f"train/{name}")
    lines = [
        Series("training batches", "--blue", updates, values, "faint"),
        Series("mean of the last 10", "--blue", updates, moving_average(values)),
        *_quick_series(run, name),
    ]
    return line_chart(score_title(name), "score", lines, run.updates)


def _metric_chart(run: RunData, title: str, unit: str, key: str, limit: float | None = None) -> Markup:
    updates, values = run.series(key)
    lines = [
        Series("each update", "--blue", updates, values, "faint"),
        Series("mean of the last 10", "--blue", updates, moving_average(values)),
    ]
    if limit is not None and values and max(values) > 0.3 * limit:
        lines.append(Series(f"clipped above {limit:g}", "--muted", [updates[0], updates[-1]], [limit, limit], "rule"))
    return line_chart(title, unit, lines, run.updates, from_zero=True)


def _gap_chart(run: RunData) -> Markup:
    keys = sorted({key for line in run.metrics for key in line if key.startswith("train/gap_")})
    colors = ("--blue", "--green", "--violet")
    lines = [
        Series(f"leg {k + 1}", colors[k % 3], updates, moving_average(values))
        for k, (updates, values) in enumerate(map(run.series, keys))
    ]
    unit = "mean |x̂ − x| at the end of a leg, mean of 10 updates"
    return line_chart("Gaps", unit, lines, run.updates, from_zero=True)


def _plan(run: RunData) -> Values:
    config = run.config
    sigmas = run.sigmas or linear_sigmas(config.num_inference_steps)
    noise_levels = "the noise levels of the model" if run.sigmas else "linear noise levels (the run recorded none)"
    plan = draw_plan(config.method, sigmas, numpy_generator(config.seed, "plan", 0))
    terms = [
        [
            str(row["step"]),
            f"{row['sigma']:.4f}",
            f"{row['weight']:+.4f}".replace("-", "\N{MINUS SIGN}"),
            f"{row['euler_steps']:.2f}",
            f"{row['coupling']:g}" if row["coupling"] else "–",
        ]
        for row in plan.table()
    ]
    return {
        "noise_levels": noise_levels,
        "reward_input": describe_reward_input(plan),
        "figure": Markup(plan_svg(plan, f"{config.method.name}, {config.num_inference_steps} steps")),
        "axes": describe_axes(config.method),
        "costs": plan_costs(plan, config.keep_graphs),
        "terms": terms,
    }


def _speed(run: RunData) -> dict[str, str]:
    """What the updates reached, and what their time went to; nothing of runs that did not record it."""

    def total(name: str) -> float:
        return sum(run.series(f"train/{name}")[1])

    updates, tflops = run.series("train/tflops")
    shares, rows = run.series("train/mfu")[1], {}
    if updates:
        reached = f"{sum(tflops) / len(tflops):.3g} TFLOP/s per process"
        peak = f", {sum(shares) / len(shares):.1%} of the peak in bfloat16 (MFU)" if shares else ""
        rows["speed"] = f"{reached}{peak}, mean of {len(updates)} updates"
    spent = {stage: total(f"seconds_{stage}") for stage in STAGES}
    if whole := sum(spent.values()):
        rows["time of updates"] = ", ".join(f"{stage} {seconds / whole:.0%}" for stage, seconds in spent.items())
    return rows


def _setup(run: RunData) -> Values:
    environment = run.environment
    git = environment.get("git") or {}
    commands = [*(one.get("command", []) for one in environment.get("earlier", [])), environment.get("command", [])]
    peak = max(run.series("train/peak_memory_gib")[1], default=math.nan)
    device = {
        key: " ".join(map(str, value)) if isinstance(value, list) else value
        for key, value in environment.get("device", {}).items()
    }
    rows = {
        "device": ", ".join(f"{key} {value}" for key, value in device.items()),
        **_speed(run),
        "peak memory": format_memory(peak) if math.isfinite(peak) else "–",
        "python": str(environment.get("python", "unknown")),
        "platform": str(environment.get("platform", "unknown")),
        "code": git.get("revision", "unknown") + (" with changes" if git.get("dirty") else ""),
    }
    return {
        "commands": [shlex.join(command) for command in commands],
        "rows": list(rows.items()),
        "config": to_yaml(run.config),
        "earlier_configs": run.earlier_configs,
        "packages": "\n".join(f"{name} {version}" for name, version in environment.get("packages", {}).items()),
    }
