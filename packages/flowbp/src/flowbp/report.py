"""One self-contained HTML page about a run, from nothing but its folder."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from flowbp.charts import Series, chart, smooth, whisker
from flowbp.compare import (
    Change,
    category_changes,
    changes,
    comparable,
    interval,
    number,
    signed,
    title,
)
from flowbp.config import TrainConfig
from flowbp.explain import axes_of, counts, inline_svg, linear_grid, reward_text
from flowbp.plan import Plan
from flowbp.plan import plan as draw_plan
from flowbp.progress import clock, memory
from flowbp.results import Saved, load_evaluations
from imgen_common.config import to_yaml
from imgen_common.images import data_uri
from imgen_common.page import document, fold, section, table
from imgen_common.runs import ENVIRONMENT, RunFolder, write_atomic
from imgen_common.streams import numpy_generator

PAGE = "report.html"
GRID = "grid.json"
THUMBNAIL = 256
"""Longest side of a picture in the page, in pixels."""
FIRST = 24
"""Pairs of pictures that are shown at once; the rest unfolds."""
VERIFIER = "share of pictures that show what the prompt says, by a strict program"


@dataclass(frozen=True)
class Run:
    """Everything the page is made of."""

    name: str
    config: TrainConfig
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: dict[tuple[str, float], Saved]
    sigmas: tuple[float, ...] | None

    @property
    def own(self) -> float:
        """The guidance scale of the training."""
        return self.config.guidance.scale

    @property
    def scales(self) -> list[float]:
        """Guidance scales that were evaluated, the training's own first."""
        found = {scale for _, scale in self.evaluations}
        return sorted(found, key=lambda scale: (scale != self.own, scale))

    def pair(self, scale: float) -> tuple[Saved, Saved] | None:
        """Base and trained at a scale, where both are there and of the same prompts."""
        base, trained = (self.evaluations.get((name, scale)) for name in ("base", "trained"))
        return (base, trained) if base and trained and comparable(base, trained) else None

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Updates and values of a metric, where it was finite."""
        rows = [(line["step"], line[key]) for line in self.metrics if line.get(key) is not None]
        return [float(step) for step, _ in rows], [float(value) for _, value in rows]

    @property
    def updates(self) -> int:
        """Updates made so far."""
        return max((line["step"] for line in self.metrics), default=0)


def read(path: Path) -> Run:
    """The run in a folder.  Raises UserError if it holds none."""
    folder = RunFolder.open(path, is_main=False)
    grid, environment = path / GRID, path / ENVIRONMENT
    return Run(
        name=path.resolve().name,
        config=folder.config(TrainConfig),
        environment=json.loads(environment.read_text(encoding="utf-8")) if environment.exists() else {},
        metrics=folder.metrics(),
        evaluations=load_evaluations(path),
        sigmas=tuple(json.loads(grid.read_text(encoding="utf-8"))["sigmas"]) if grid.exists() else None,
    )


def write(path: Path) -> Path:
    """Writes PATH/report.html anew and returns its path."""
    page = path / PAGE
    write_atomic(page, render(read(path)))
    return page


def render(run: Run) -> str:
    """The page."""
    sections = [_headline(run), _scores(run), _pictures(run), _categories(run), _curves(run), _plan(run), _setup(run)]
    return document(f"{run.name}: reward backpropagation", STYLE, sections)


def _chip(verdict: str) -> str:
    kinds = {"higher": "up", "lower": "down"}
    return f'<span class="chip {kinds.get(verdict, "same")}">{escape(verdict)}</span>'


# --- result ----------------------------------------------------------------------------------------------------------


def _headline(run: Run) -> str:
    config = run.config
    facts = [
        f"method {config.method.name}",
        f"{run.updates} of {config.num_updates} updates of {config.batch_size} pictures",
        f"{config.num_steps} denoising steps",
        f"guidance {run.own:g}",
        f"model {config.model.ref}",
    ]
    head = f"<header><h1>{escape(run.name)}</h1><p class=facts>{escape(' · '.join(facts))}</p></header>"
    pair = run.pair(run.own)
    if pair is None:
        return f'{head}<p class="empty">{_why_no_result(run)}</p>'
    found = changes(*pair)
    num = len(pair[0].prompts)
    cards = "".join(
        _card(name, one, _note(config, name), lead=place == 0) for place, (name, one) in enumerate(found.items())
    )
    note = (
        f"Before and after training at guidance {run.own:g}, the scale it was trained with: {num} prompts of "
        f"{escape(config.eval.prompts)}, the same noise for each, {config.eval.steps} denoising steps. "
        "The interval is a paired bootstrap over prompts (95 %) of the mean difference."
    )
    return f'{head}<div class="cards">{cards}</div><p class="note">{note}</p>{_warning(config, found)}'


def _why_no_result(run: Run) -> str:
    names = {name for name, scale in run.evaluations if scale == run.own}
    if names == {"base", "trained"}:
        return "The evaluations before and after are of different prompts, so they cannot be compared."
    if "base" in names:
        return f"Not finished: {run.updates} of {run.config.num_updates} updates are done, the result comes after."
    return "Nothing has been evaluated yet."


def _card(name: str, one: Change, note: str, lead: bool) -> str:
    change = signed(name, one.difference) + (" points" if name == "verifier" else "")
    means = f"<span>{number(name, one.before)}</span> <span>→</span> <b>{number(name, one.after)}</b>"
    return (
        f'<div class="card{" lead" if lead else ""}"><h3>{escape(title(name))}</h3>'
        f'<p class="big">{means}</p>'
        f'<p class="diff">{change} <span class="ci">95 % interval {interval(name, one)}</span></p>'
        f'<p>{_chip(one.verdict)}</p><p class="what">{escape(note)}</p></div>'
    )


def _note(config: TrainConfig, name: str) -> str:
    """What a score was to the run."""
    if name == "verifier":
        return VERIFIER
    trained = name in {reward.name for reward in config.rewards}
    return "a score that was maximised" if trained else "a score that was only watched"


def _warning(config: TrainConfig, found: Mapping[str, Change]) -> str:
    """What to think of a reward that rises while what it stands for falls."""
    watched = ("verifier", *(scorer.name for scorer in config.heldout))
    fell = [title(name) for name in watched if name in found and found[name].verdict == "lower"]
    rose = [r.name for r in config.rewards if r.name in found and found[r.name].verdict == "higher"]
    if not rose or not fell:
        return ""
    return (
        f'<p class="warn">{escape(", ".join(map(title, rose)))} higher while {escape(" and ".join(fell))} is lower: '
        "the model exploits the reward rather than what it stands for. Fewer updates, a smaller learning rate or a "
        "loss that fades help.</p>"
    )


def _scores(run: Run) -> str:
    rows = []
    for scale in run.scales:
        pair = run.pair(scale)
        label = f"{scale:g}" + (" <small>trained with</small>" if scale == run.own else "")
        if pair is None:
            rows.append([label, "<small>only one of both was evaluated</small>", "", "", "", "", ""])
            continue
        for name, one in changes(*pair).items():
            means = [number(name, one.before), number(name, one.after), signed(name, one.difference)]
            rows.append([label, escape(title(name)), *means, interval(name, one), _chip(one.verdict)])
            label = ""
    if not rows:
        return ""
    note = "Verifier: per cent of pictures; its changes in percentage points. Rewards: in the units of their models."
    head = ["Guidance", "Score", "Before", "After", "Change", "95 % interval", ""]
    return section("Every guidance scale", note, table(head, rows, range(2, 6)), _outcomes(run))


def _outcomes(run: Run) -> str:
    """Which pictures changed sides, at the training's guidance."""
    pair = run.pair(run.own)
    if pair is None or "verifier" not in pair[0].scores or "verifier" not in pair[1].scores:
        return ""
    sides = list(zip(pair[0].scores["verifier"], pair[1].scores["verifier"], strict=True))
    kinds = {(1, 1): "pass before and after", (0, 1): "only after"}
    kinds |= {(1, 0): "only before", (0, 0): "neither"}
    told = ", ".join(f"{sides.count(kind)} {text}" for kind, text in kinds.items())
    return f'<p class="note">Verifier at guidance {run.own:g}, picture by picture: {told}.</p>'


# --- pictures --------------------------------------------------------------------------------------------------------


def _pictures(run: Run) -> str:
    parts = []
    for scale in run.scales:
        pair = run.pair(scale)
        if pair is None:
            continue
        num = min(len(pair[0].prompts), *(len(one.pictures) for one in pair))
        figures = [_figure(*pair, run.config.rewards[0].name, i) for i in range(num)]
        if not figures:
            continue
        text = f'<div class="pairs">{"".join(figures[:FIRST])}</div>'
        if figures[FIRST:]:
            more = f'<div class="pairs">{"".join(figures[FIRST:])}</div>'
            text += fold(f"{len(figures) - FIRST} more", more)
        if scale != run.own:
            text = fold(f"Guidance {scale:g}", text)
        parts.append(text)
    if not parts:
        return ""
    note = (
        f"Left before, right after, from the same noise; the first prompts in their order, none picked. "
        f"Unfolded at guidance {run.own:g}. ✓ and ✗ are the verifier's verdicts."
    )
    return section("Pictures at equal seeds", note, *parts)


def _figure(base: Saved, trained: Saved, reward: str, i: int) -> str:
    prompt = base.prompts[i]
    sides = "".join(_picture(one, i, when) for one, when in ((base, "before"), (trained, "after")))
    scores = ""
    if reward in base.scores and reward in trained.scores:
        before, after = (number(reward, one.scores[reward][i]) for one in (base, trained))
        scores = f"<small>{escape(title(reward).lower())} {before} → {after}</small>"
    return f'<figure class="pair"><div>{sides}</div><figcaption>{escape(prompt)}{scores}</figcaption></figure>'


def _picture(one: Saved, i: int, when: str) -> str:
    with Image.open(one.pictures[i]) as opened:
        picture = opened.convert("RGB")
    small = max(picture.size) <= 128
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    mark = ""
    if "verifier" in one.scores:
        passed = one.scores["verifier"][i] > 0.5
        word = "passes" if passed else "fails"
        mark = f'<span class="mark {word}" title="{word}">{"✓" if passed else "✗"}</span>'
    alt = escape(f"{when}: {one.prompts[i]}")
    return (
        f'<span class="shot"><img{" class=pixels" if small else ""} src="{data_uri(picture)}" alt="{alt}">{mark}</span>'
    )


# --- categories ------------------------------------------------------------------------------------------------------


def _categories(run: Run) -> str:
    parts = []
    for scale in run.scales:
        pair = run.pair(scale)
        if pair is None or not pair[1].groups or "verifier" not in pair[0].scores or "verifier" not in pair[1].scores:
            continue
        found = category_changes(*pair, "verifier") | {"all": changes(*pair)["verifier"]}
        rows = _category_table(found)
        parts.append(rows if scale == run.own else fold(f"Guidance {scale:g}", rows))
    note = (
        "Verifier accuracy by kind of prompt, with the paired 95 % bootstrap interval of the change in percentage "
        "points; single categories have few prompts, so their intervals are wide."
    )
    return section("Categories", note, *parts) if parts else ""


def _category_table(found: Mapping[str, Change]) -> str:
    span = (min(0.0, *(one.low for one in found.values())), max(0.0, *(one.high for one in found.values())))
    rows = []
    for group, one in found.items():
        means = [number("verifier", one.before), number("verifier", one.after), signed("verifier", one.difference)]
        drawn = whisker(one.low, one.difference, one.high, span)
        label = "<b>all</b>" if group == "all" else escape(group)
        rows.append([label, str(one.num), *means, interval("verifier", one), drawn, _chip(one.verdict)])
    head = ["Category", "Prompts", "Before", "After", "Change", "95 % interval", "(dotted: 0)", ""]
    return table(head, rows, range(1, 6))


# --- curves ----------------------------------------------------------------------------------------------------------


def _curves(run: Run) -> str:
    if not run.metrics:
        return ""
    charts = [_score_chart(run, scorer.name) for scorer in run.config.scorers]
    verifier = run.series("eval/verifier")
    points = [100 * value for value in verifier[1]]
    charts.append(
        chart("Verifier", "% of pictures", [Series(_quick(run), "--orange", verifier[0], points, "dots")], run.updates)
    )
    charts.append(
        _metric_chart(run, "Gradient norm", "before clipping", "train/grad_norm", run.config.optim.max_grad_norm)
    )
    charts.append(_gap_chart(run))
    charts.append(_metric_chart(run, "Time", "seconds per update", "train/seconds"))
    updates, megabytes = run.series("train/peak_memory_mb")
    lines = [Series("", "--blue", updates, [m / 1000 for m in megabytes])]
    charts.append(chart("Peak memory so far", "GB (10⁹ bytes)", lines, run.updates, from_zero=True))
    seconds = sum(run.series("train/seconds")[1])
    note = f"By update. {run.updates} updates took {clock(seconds)} in all, evaluations not counted."
    return section("Curves", escape(note), f'<div class="charts">{"".join(charts)}</div>')


def _quick(run: Run) -> str:
    return f"quick evaluation: {run.config.eval.quick_num_prompts} prompts, averaged weights, guidance {run.own:g}"


def _score_chart(run: Run, name: str) -> str:
    updates, values = run.series(f"train/{name}")
    quick = run.series(f"eval/{name}")
    lines = [
        Series("training batches", "--blue", updates, values, "faint"),
        Series("mean of the last 10", "--blue", updates, smooth(values)),
        Series(_quick(run), "--orange", *quick, "dots"),
    ]
    return chart(title(name), "score", lines, run.updates)


def _metric_chart(run: Run, title: str, unit: str, key: str, rule: float | None = None) -> str:
    updates, values = run.series(key)
    lines = [
        Series("each update", "--blue", updates, values, "faint"),
        Series("mean of the last 10", "--blue", updates, smooth(values)),
    ]
    if rule is not None and values and max(values) > 0.3 * rule:
        lines.append(Series(f"clipped above {rule:g}", "--muted", [updates[0], updates[-1]], [rule, rule], "rule"))
    return chart(title, unit, lines, run.updates, from_zero=True)


def _gap_chart(run: Run) -> str:
    keys = sorted({key for line in run.metrics for key in line if key.startswith("train/gap_")})
    lines = []
    for place, key in enumerate(keys):
        updates, values = run.series(key)
        lines.append(Series(f"leg {place + 1}", ("--blue", "--green", "--violet")[place % 3], updates, smooth(values)))
    return chart("Gaps", "mean |x̂ − x| at the end of a leg, mean of 10 updates", lines, run.updates, from_zero=True)


# --- plan and set-up -------------------------------------------------------------------------------------------------


def _plan(run: Run) -> str:
    config = run.config
    sigmas = run.sigmas or linear_grid(config.num_steps)
    drawn = draw_plan(config.method, sigmas, numpy_generator(config.seed, "plan", 0))
    where = "the noise levels of the model" if run.sigmas else "linear noise levels (the run recorded none)"
    note = (
        f"The plan of the first update, on {where}. Every update draws its own. Gradient starts from what the reward "
        f"sees ({escape(reward_text(drawn))}) and is handed to each active step with its weight c; shaded: the "
        "step itself."
    )
    svg = f'<div class="plan">{inline_svg(drawn, f"{config.method.name}, {config.num_steps} steps")}</div>'
    axes = [[escape(name), f"<code>{escape(text)}</code>"] for name, text in axes_of(config.method).items()]
    cost = [[escape(name), escape(text)] for name, text in counts(drawn)]
    tables = f'<div class="columns">{table(["Axis", "Choice"], axes)}{table(["Per picture", ""], cost)}</div>'
    return section("The method", note, svg, tables, _terms(drawn))


def _terms(drawn: Plan) -> str:
    rows = [
        [
            str(row["step"]),
            f"{row['sigma']:.4f}",
            f"{row['weight']:+.4f}".replace("-", "\N{MINUS SIGN}"),
            f"{row['euler_steps']:.2f}",
            f"{row['coupling']:g}" if row["coupling"] else "–",
        ]
        for row in drawn.table()
    ]
    head = ["Step", "Sigma", "Weight c", "In Euler steps", "Coupling alpha"]
    return fold("Its numbers", table(head, rows, range(5)))


def _setup(run: Run) -> str:
    environment = run.environment
    device = environment.get("device", {})
    git = environment.get("git") or {}
    revision = git.get("revision", "unknown") + (" with changes" if git.get("dirty") else "")
    commands = [*(one.get("command", []) for one in environment.get("earlier", [])), environment.get("command", [])]
    peak = max(run.series("train/peak_memory_mb")[1], default=math.nan)
    rows = [
        *(["command" if k == 0 else "resumed by", f"<code>{_shell(c)}</code>"] for k, c in enumerate(commands)),
        ["device", escape(", ".join(f"{key} {_plain(value)}" for key, value in device.items()))],
        ["peak memory", memory(peak) if math.isfinite(peak) else "–"],
        ["python", escape(str(environment.get("python", "unknown")))],
        ["platform", escape(str(environment.get("platform", "unknown")))],
        ["code", escape(revision)],
    ]
    packages = "\n".join(f"{name} {version}" for name, version in environment.get("packages", {}).items())
    return section(
        "Configuration and environment",
        "",
        table(["", ""], rows),
        fold("Resolved configuration", f"<pre>{escape(to_yaml(run.config))}</pre>"),
        fold("Package versions", f"<pre>{escape(packages)}</pre>"),
    )


def _shell(command: Sequence[str]) -> str:
    import shlex

    return escape(shlex.join(command))


def _plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


STYLE = """
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(250px, 1fr)); gap: .9rem; margin-bottom: .9rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1rem 1.15rem; }
.big { font-size: 1.55rem; margin: .2rem 0; font-variant-numeric: tabular-nums; letter-spacing: -.01em;
  white-space: nowrap; }
.lead .big { font-size: 1.9rem; } .big span { color: var(--muted); }
.diff { font-weight: 600; font-variant-numeric: tabular-nums; }
.ci { display: block; font-weight: 400; color: var(--muted); font-size: .9rem; }
.what { font-size: .85rem; margin-bottom: 0; }
td:first-child, td:nth-child(2), td small { white-space: nowrap; } td code { white-space: normal; }
.whisker { width: 180px; height: 16px; display: block; }
.whisker .zero { stroke: var(--muted); stroke-dasharray: 2 2; } .whisker .bar { stroke: var(--blue); stroke-width: 2; }
.whisker .mean { fill: var(--blue); }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(228px, 1fr)); gap: 1.1rem; margin: .5rem 0; }
.pair { margin: 0; } .pair > div { display: grid; grid-template-columns: 1fr 1fr; gap: 4px; }
.shot { position: relative; display: block; }
.shot img { display: block; width: 100%; border-radius: 4px; background: var(--card); }
.shot img.pixels { image-rendering: pixelated; }
.mark { position: absolute; right: 4px; bottom: 4px; width: 1.35rem; height: 1.35rem; border-radius: 50%; color: #fff;
  font-size: .8rem; font-weight: 700; line-height: 1.35rem; text-align: center; }
.mark.passes { background: #047a55; } .mark.fails { background: #be123c; }
.pair figcaption { font-size: .85rem; line-height: 1.35; margin-top: .35rem; overflow-wrap: anywhere; }
.pair small { display: block; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 1.4rem; }
.chart { margin: 0; } .chart svg { width: 100%; height: auto; display: block; }
.chart .grid { stroke: var(--line); stroke-width: 1; } .chart .tick { fill: var(--muted); font-size: 11px; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem .9rem; font-size: .78rem; color: var(--muted); }
.legend i.faint { opacity: .35; }
.legend i { display: inline-block; width: .8rem; height: .2rem; border-radius: 2px; margin-right: .35rem;
  vertical-align: middle; }
.plan { overflow-x: auto; } .plan svg { width: 100%; min-width: 620px; max-width: 900px; height: auto; display: block;
  color: var(--ink); font-family: inherit; }
.plan svg text { font-family: inherit !important; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 0 2.5rem; }
.columns table { width: 100%; }
@media (max-width: 520px) { main { padding-top: 1.25rem; } h1 { font-size: 1.6rem; }
  .pairs { grid-template-columns: repeat(auto-fill, minmax(158px, 1fr)); gap: .9rem; } }
"""
