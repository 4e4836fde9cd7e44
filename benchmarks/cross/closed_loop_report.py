"""Tables and plot of `benchmarks.cross.closed_loop`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common import format_versions, write_json
from benchmarks.cross.plot import Panel, draw_panels
from benchmarks.quality.interleave_miniature import StoryResult, format_gain, format_percent
from imgen_common.console import markdown_table
from imgen_common.files import write_atomic
from imgen_common.statistics import Interval, bootstrap_interval, paired_bootstrap_interval

BASE, TEXT, BY_CLIP, BY_CRITIC, SECOND = "base", "text", "edits, CLIP", "edits, critic", "second round"
PLANNER, CRITIC = "planner", "planner + critic"
STORIES, IMAGES = "stories", "images"
COLORS = {BASE: "#7a7a7a", TEXT: "#0b6bcb", BY_CLIP: "#b45f06", BY_CRITIC: "#6a3d9a", SECOND: "#00706b"}
VERIFIER, TRAINED, HELDOUT = "verifier", "critic", "second_critic"

Scores = Mapping[str, Mapping[str, Sequence[float]]]
"""{captions or edits: {name of a score: its value for each}}."""


class Measured(NamedTuple):
    """What was measured, with one entry of each list for each training seed.

    stories: {(generator, agents): results of all stories}.  images: {generator: scores}.
    """

    stories: dict[tuple[str, str], list[list[StoryResult]]]
    images: dict[str, list[Scores]]
    training_seconds: dict[str, float | None]

    @property
    def generators(self) -> list[str]:
        """The generators in the order of the tables."""
        return [name for name in COLORS if name in self.images]

    def stories_right(self, generator: str, agents: str) -> list[float]:
        """The mean over training seeds for each story."""
        return np.mean([[float(s.right) for s in one] for one in self.stories[generator, agents]], axis=0).tolist()

    def scores(self, generator: str, kind: str, name: str) -> list[float]:
        """The mean over training seeds for each image of a kind."""
        return np.mean([one[kind][name] for one in self.images[generator]], axis=0).tolist()

    def acceptance(self, generator: str, name: str, right: bool) -> float:
        """The share of a critic's answers that accept edits that are right, or wrong, over all training seeds."""
        found = [one["edits"] for one in self.images[generator]]
        pairs = [pair for one in found for pair in zip(one[name], one[VERIFIER], strict=True)]
        return float(np.mean([accepted for accepted, verified in pairs if bool(verified) == right]))


def format_stories(found: Measured) -> str:
    """The table of stories as Markdown."""
    lines = []
    for agents in (PLANNER, CRITIC):
        for generator in found.generators:
            runs = found.stories[generator, agents]
            right, base = found.stories_right(generator, agents), found.stories_right(BASE, agents)
            by_seed = [f"{100 * np.mean([s.right for s in one]):.1f}" for one in runs]
            every = [story for one in runs for story in one]
            lines.append(
                [
                    f"{agents}, {generator}",
                    format_percent(bootstrap_interval([right])),
                    format_gain(None if generator == BASE else paired_bootstrap_interval(base, right)),
                    ", ".join(by_seed),
                    f"{np.mean([s.images for s in every]):.2f}",
                    f"{np.mean([s.judged for s in every]):.2f}",
                ]
            )
    header = ["agents, generator", "stories right %", "minus base", "by training seed"]
    return markdown_table([*header, "images per story", "verdicts per story"], lines)


def format_images(found: Measured) -> str:
    """The table of single images as Markdown."""
    lines = []
    for generator in found.generators:
        line = [generator]
        for kind in ("captions", "edits"):
            right, base = (found.scores(one, kind, VERIFIER) for one in (generator, BASE))
            line += [format_percent(bootstrap_interval([right]))]
            line += [format_gain(None if generator == BASE else paired_bootstrap_interval(base, right))]
        for name in (TRAINED, HELDOUT):
            line += [f"{100 * np.mean(found.scores(generator, 'edits', name)):.1f}"]
            line += [f"{100 * found.acceptance(generator, name, right):.1f}" for right in (True, False)]
        lines.append(line)
    header = ["generator", "captions right %", "minus base", "edits right %", "minus base"]
    for name in ("critic", "second critic"):
        header += [f"{name} accepts %", "of right ones", "of wrong ones"]
    return markdown_table(header, lines)


def describe_tables(found: Measured, about: Mapping[str, Any]) -> str:
    """The caption of the tables."""
    config, environment, wall = about["config"], about["environment"], about["wall_seconds"]
    seconds = [f"{name} {'-' if s is None else f'{s:.0f}'} s" for name, s in found.training_seconds.items()]
    return (
        f"{config['num_stories']} stories, {config['num_images']} captions and as many edits of the test split, seed "
        f"{config['seed']}, the same in every line; the verifier says what is right; up to "
        f"{config['loop']['max_attempts']} images per step. Aligned generators: means over the training seeds "
        f"{', '.join(map(str, config['training_seeds']))}. Brackets: 95 % bootstrap over stories or images after this "
        "mean, differences paired; they do not cover the spread over training seeds, which has its own column. What a "
        "critic accepts is the share of its sampled answers, over all edits and over those that are right or wrong. "
        f"Trainings: {', '.join(seconds)}; the whole command: {'in several runs' if wall is None else f'{wall:.0f} s'}."
        f" {environment['hardware']}; {format_versions(dict(environment))}."
    )


def draw_plot(found: Measured) -> str:
    """The plot as SVG: stories by agents, and edits by who judges them."""
    colors = {name: COLORS[name] for name in found.generators}
    stories = {(a, g): bootstrap_interval([found.stories_right(g, a)]) for a in (PLANNER, CRITIC) for g in colors}
    judges = {"verifier": VERIFIER, "critic": TRAINED, "second + critic": HELDOUT}
    edits = {
        (place, g): bootstrap_interval([found.scores(g, "edits", name)])
        for place, name in judges.items()
        for g in colors
    }
    panels = [Panel("stories right %", (PLANNER, CRITIC), stories), Panel("edits accepted %, by", [*judges], edits)]
    return draw_panels(panels, colors, width=300)


def summary(found: Measured) -> dict[str, dict[str, Interval]]:
    """{generator: {what: interval of the change from the base}}, of what the command is about."""
    changes = {}
    for generator in found.generators[1:]:
        pairs = {f"{STORIES}, {a}": [found.stories_right(g, a) for g in (BASE, generator)] for a in (PLANNER, CRITIC)}
        pairs |= {kind: [found.scores(g, kind, VERIFIER) for g in (BASE, generator)] for kind in ("captions", "edits")}
        changes[generator] = {what: paired_bootstrap_interval(*pair) for what, pair in pairs.items()}
    return changes


def write_report(found: Measured, about: Mapping[str, Any], output: Path) -> str:
    """Writes the report to `output` (JSON) and as Markdown with its plot beside it; returns the Markdown."""
    text = "\n\n".join([format_stories(found), format_images(found), describe_tables(found, about)]) + "\n"
    stories = {f"{g}/{a}": [[asdict(s) for s in one] for one in runs] for (g, a), runs in found.stories.items()}
    content = {**about, "training_seconds": found.training_seconds, "changes": summary(found)}
    write_json(output, content | {"per_story": stories, "per_image": found.images})
    write_atomic(output.with_suffix(".svg"), draw_plot(found))
    write_atomic(output.with_suffix(".md"), f"{text}\n![{output.stem}]({output.stem}.svg)\n")
    return text
