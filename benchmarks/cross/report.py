"""Table and plot of `benchmarks.cross.two_by_two`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.common import versions, write_json
from benchmarks.quality.interleave_miniature import Row, Told, percent, row, signed
from imgen_common.console import markdown_table
from imgen_common.files import write_atomic
from imgen_common.statistics import Interval, paired_bootstrap_interval

BASE, ALIGNED = "base", "aligned"
SINGLE, PLANNER, SFT, GRPO = "single shot", "planner", "planner + critic SFT", "planner + critic GRPO"
AGENTS = (SINGLE, PLANNER, SFT, GRPO)
KINDS = {"captions": "single pictures", "stories": "stories", "riddles": "riddles"}
"""Of requests, and what is right or wrong of them."""
COLOURS = {BASE: "#7a7a7a", ALIGNED: "#0b6bcb"}

Cell = tuple[str, str, str]
Cells = Mapping[Cell, tuple[Sequence[Told], float]]
"""Generator, agents, kind of request: what became of every request, and the seconds it took."""
Effect = tuple[str, str, dict[str, Interval]]
"""What changes, where all else stays, and how many more requests of each kind are right for it."""


def rows_of(cells: Cells) -> dict[Cell, Row]:
    """The numbers of every cell; stories and riddles have a gain over the base generator with the planner."""
    found = {}
    for (generator, agents, kind), (told, seconds) in cells.items():
        base = None if (generator, agents) == (BASE, PLANNER) else cells.get((BASE, PLANNER, kind))
        found[generator, agents, kind] = row(agents, told, seconds, base and base[0])
    return found


def effects_of(cells: Cells) -> list[Effect]:
    """One thing changed at a time, paired by request: the generator, then each rung of the agents."""
    pairs = [("aligned less base", agents, (BASE, agents), (ALIGNED, agents)) for agents in AGENTS]
    for generator in (BASE, ALIGNED):
        for less, more in pairwise(AGENTS):
            pairs.append((f"{more} less {less}", generator, (generator, less), (generator, more)))
    found = []
    for what, where, before, after in pairs:
        kinds = [kind for kind in KINDS if (*before, kind) in cells and (*after, kind) in cells]
        found.append((what, where, {kind: gain(cells[*before, kind][0], cells[*after, kind][0]) for kind in kinds}))
    return found


def gain(before: Sequence[Told], after: Sequence[Told]) -> Interval:
    """How many more are right, in the mean."""
    return paired_bootstrap_interval([float(t.right) for t in before], [float(t.right) for t in after])


def main_table(rows: Mapping[Cell, Row]) -> str:
    """A line for each generator with each of the agents."""
    header = ["generator, agents", "single pictures %", "stories %", "over base, planner", "riddles %"]
    header += ["over base, planner", "pictures a story", "a riddle", "seconds"]
    lines = []
    for generator in (BASE, ALIGNED):
        for agents in AGENTS:
            single = rows.get((generator, agents, "captions"))
            stories, riddles = (rows[generator, agents, kind] for kind in ("stories", "riddles"))
            line = [f"{generator}, {agents}", percent(single.right) if single else "-"]
            line += [percent(stories.right), signed(stories.gain), percent(riddles.right), signed(riddles.gain)]
            line += [f"{stories.pictures:.2f}", f"{riddles.pictures:.2f}", f"{stories.seconds + riddles.seconds:.0f}"]
            lines.append(line)
    return markdown_table(header, lines)


def effects_table(effects: Sequence[Effect]) -> str:
    """A line an effect."""
    header = ["points more right", *KINDS.values()]
    lines = [[f"{where}: {what}", *(signed(by.get(kind)) for kind in KINDS)] for what, where, by in effects]
    return markdown_table(header, lines)


def caption(about: Mapping[str, Any], cells: Cells) -> str:
    """What the numbers are of."""
    config, environment = about["config"], about["environment"]
    trained = [f"{name} {'-' if s is None else f'{s:.0f}'} s" for name, s in about["training_seconds"].items()]
    wall = about["wall_seconds"]
    return (
        f"{config['num_captions']} captions, {config['num_requests']} stories and as many riddles of the test split, "
        f"seed {config['seed']}, the same in every line; right by the verifier; up to "
        f"{config['loop']['max_attempts']} pictures a step. Brackets: 95 % bootstrap over requests, differences "
        "paired by request; they do not cover the spread over training seeds. Seconds by the wall, of stories and "
        "riddles together; what was drawn before comes from the cache. "
        f"Trainings: {', '.join(trained) or 'none'}; cells: {sum(seconds for _, seconds in cells.values()):.0f} s; "
        f"the whole command: {'in several sittings' if wall is None else f'{wall:.0f} s'}. "
        f"{environment['hardware']}; {versions(dict(environment))}."
    )


def write_report(cells: Cells, about: Mapping[str, Any], output: Path) -> str:
    """The report in words; written to `output` (JSON), and as Markdown with its plot beside it."""
    rows, effects = rows_of(cells), effects_of(cells)
    text = "\n\n".join([main_table(rows), effects_table(effects), caption(about, cells)]) + "\n"
    content = {
        **about,
        "rows": [{"generator": g, "kind": kind, **asdict(one)} for (g, _, kind), one in rows.items()],
        "effects": [{"what": what, "at": where, **by} for what, where, by in effects],
        "per_request": {"/".join(cell): [asdict(one) for one in told] for cell, (told, _) in cells.items()},
    }
    write_json(output, content)
    write_atomic(output.with_suffix(".svg"), plot(rows))
    write_atomic(output.with_suffix(".md"), f"{text}\n![{output.stem}]({output.stem}.svg)\n")
    return text


# --- the plot --------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, GAP = 230, 250, 44, 46, 64, 26


def plot(rows: Mapping[Cell, Row]) -> str:
    """A panel for each kind of request: what is right in %, with its interval, by agents and generator."""
    panels = "".join(panel(rows, kind, LEFT + number * (WIDTH + GAP)) for number, kind in enumerate(KINDS))
    legend = "".join(
        f'<circle cx="{LEFT + 6 + 90 * i}" cy="14" r="4" fill="{colour}"/>'
        f'<text x="{LEFT + 16 + 90 * i}" y="18">{name}</text>'
        for i, (name, colour) in enumerate(COLOURS.items())
    )
    width, height = LEFT + len(KINDS) * (WIDTH + GAP), TOP + HEIGHT + BOTTOM
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{width}" height="{height}" fill="white"/>{legend}{panels}</svg>\n'
    )


def panel(rows: Mapping[Cell, Row], kind: str, left: float) -> str:
    """One panel, its left edge at `left`."""

    def down(share: float) -> float:
        return round(TOP + (1 - share) * HEIGHT, 1)

    parts = [f'<text x="{left}" y="{TOP - 10}" font-weight="bold">{KINDS[kind]}, right %</text>']
    for mark in range(0, 101, 20):
        y = down(mark / 100)
        parts.append(f'<line x1="{left}" x2="{left + WIDTH}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 4}" y="{y + 4}" text-anchor="end" font-size="10" fill="#555">{mark}</text>')
    shown = [agents for agents in AGENTS if (BASE, agents, kind) in rows]
    for place, agents in enumerate(shown):
        middle = left + WIDTH * (place + 0.5) / len(shown)
        for line, words in enumerate(agents.split(" + ")):
            y = TOP + HEIGHT + 18 + 14 * line
            parts.append(f'<text x="{middle}" y="{y}" text-anchor="middle" font-size="10">{words}</text>')
        for offset, (generator, colour) in zip((-7, 7), COLOURS.items(), strict=True):
            mean, low, high = rows[generator, agents, kind].right
            x = middle + offset
            parts.append(f'<line x1="{x}" x2="{x}" y1="{down(low)}" y2="{down(high)}" stroke="{colour}"/>')
            about = f"{generator}, {agents}: {100 * mean:.1f} %"
            parts.append(f'<circle cx="{x}" cy="{down(mean)}" r="4" fill="{colour}"><title>{about}</title></circle>')
    return "".join(parts)
