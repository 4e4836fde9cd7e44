"""Table and plot of `benchmarks.cross.two_by_two`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.common import format_versions, write_json
from benchmarks.cross.plot import Panel, draw_panels
from benchmarks.quality.interleave_miniature import ArmRow, StoryResult, format_gain, format_percent, summarize_arm
from imgen_common.console import markdown_table
from imgen_common.files import write_atomic
from imgen_common.statistics import Interval, paired_bootstrap_interval

BASE, ALIGNED = "base", "aligned"
SINGLE, PLANNER, SFT, GRPO = "single shot", "planner", "planner + critic SFT", "planner + critic GRPO"
AGENTS = (SINGLE, PLANNER, SFT, GRPO)
KINDS = {"captions": "single images", "stories": "stories", "riddles": "riddles"}
"""Kinds of requests, and what is right or wrong of each."""
COLORS = {BASE: "#7a7a7a", ALIGNED: "#0b6bcb"}

Cell = tuple[str, str, str]
Cells = Mapping[Cell, tuple[Sequence[StoryResult], float]]
"""{(generator, agents, kind of request): (the result of every request, seconds of all)}."""
Effect = tuple[str, str, dict[str, Interval]]
"""(what changes, what stays the same, {kind of request: how many more are right})."""


def summarize_cells(cells: Cells) -> dict[Cell, ArmRow]:
    """The row of every cell; stories and riddles have a gain over the base generator with the planner."""
    rows = {}
    for (generator, agents, kind), (results, seconds) in cells.items():
        base = None if (generator, agents) == (BASE, PLANNER) else cells.get((BASE, PLANNER, kind))
        rows[generator, agents, kind] = summarize_arm(agents, results, seconds, base and base[0])
    return rows


def measure_effects(cells: Cells) -> list[Effect]:
    """The effect of one change at a time, paired by request: of the generator, then of each step of the agents."""
    pairs = [("aligned less base", agents, (BASE, agents), (ALIGNED, agents)) for agents in AGENTS]
    for generator in (BASE, ALIGNED):
        for less, more in pairwise(AGENTS):
            pairs.append((f"{more} less {less}", generator, (generator, less), (generator, more)))
    effects = []
    for what, where, before, after in pairs:
        kinds = [kind for kind in KINDS if (*before, kind) in cells and (*after, kind) in cells]
        gains = {kind: mean_gain(cells[*before, kind][0], cells[*after, kind][0]) for kind in kinds}
        effects.append((what, where, gains))
    return effects


def mean_gain(before: Sequence[StoryResult], after: Sequence[StoryResult]) -> Interval:
    """The change of the share of right results, paired by request."""
    return paired_bootstrap_interval([float(t.right) for t in before], [float(t.right) for t in after])


def format_cells(rows: Mapping[Cell, ArmRow]) -> str:
    """The table of all cells as Markdown, with a line for each generator and agents."""
    header = ["generator, agents", "single images %", "stories %", "over base, planner", "riddles %"]
    header += ["over base, planner", "images per story", "per riddle", "seconds"]
    lines = []
    for generator in (BASE, ALIGNED):
        for agents in AGENTS:
            single = rows.get((generator, agents, "captions"))
            stories, riddles = (rows[generator, agents, kind] for kind in ("stories", "riddles"))
            line = [f"{generator}, {agents}", format_percent(single.right) if single else "-"]
            line += [
                format_percent(stories.right),
                format_gain(stories.gain),
                format_percent(riddles.right),
                format_gain(riddles.gain),
            ]
            line += [f"{stories.images:.2f}", f"{riddles.images:.2f}", f"{stories.seconds + riddles.seconds:.0f}"]
            lines.append(line)
    return markdown_table(header, lines)


def format_effects(effects: Sequence[Effect]) -> str:
    """The table of effects as Markdown."""
    header = ["points more right", *KINDS.values()]
    lines = [[f"{where}: {what}", *(format_gain(by.get(kind)) for kind in KINDS)] for what, where, by in effects]
    return markdown_table(header, lines)


def describe_tables(about: Mapping[str, Any], cells: Cells) -> str:
    """The caption of the tables."""
    config, environment = about["config"], about["environment"]
    trained = [f"{name} {'-' if s is None else f'{s:.0f}'} s" for name, s in about["training_seconds"].items()]
    wall = about["wall_seconds"]
    return (
        f"{config['num_captions']} captions, {config['num_requests']} stories and as many riddles of the test split, "
        f"seed {config['seed']}, the same in every line; the verifier says what is right; up to "
        f"{config['loop']['max_attempts']} images per step. Brackets: 95 % bootstrap over requests; differences are "
        "paired by request; they do not cover the spread over training seeds. Seconds are wall-clock seconds of "
        "stories and riddles together; images that another cell generated come from the cache. "
        f"Trainings: {', '.join(trained) or 'none'}; cells: {sum(seconds for _, seconds in cells.values()):.0f} s; "
        f"the whole command: {'in several runs' if wall is None else f'{wall:.0f} s'}. "
        f"{environment['hardware']}; {format_versions(dict(environment))}."
    )


def write_report(cells: Cells, about: Mapping[str, Any], output: Path) -> str:
    """Writes the report to `output` (JSON) and as Markdown with its plot beside it; returns the Markdown."""
    rows, effects = summarize_cells(cells), measure_effects(cells)
    text = "\n\n".join([format_cells(rows), format_effects(effects), describe_tables(about, cells)]) + "\n"
    content = {
        **about,
        "rows": [{"generator": g, "kind": kind, **asdict(one)} for (g, _, kind), one in rows.items()],
        "effects": [{"what": what, "at": where, **by} for what, where, by in effects],
        "per_request": {"/".join(cell): [asdict(result) for result in results] for cell, (results, _) in cells.items()},
    }
    write_json(output, content)
    write_atomic(output.with_suffix(".svg"), draw_plot(rows))
    write_atomic(output.with_suffix(".md"), f"{text}\n![{output.stem}]({output.stem}.svg)\n")
    return text


def draw_plot(rows: Mapping[Cell, ArmRow]) -> str:
    """The plot as SVG, with a panel for each kind of request: the right share by agents and generator."""
    panels = []
    for kind, name in KINDS.items():
        shown = [agents for agents in AGENTS if (BASE, agents, kind) in rows]
        points = {(agents, generator): rows[generator, agents, kind].right for agents in shown for generator in COLORS}
        panels.append(Panel(f"{name}, right %", shown, points))
    return draw_panels(panels, COLORS)
