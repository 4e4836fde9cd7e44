"""The share of the miniature's stories that come out right by the verifier, for several arms.

The requests are of the test split, no image, caption or combination of facts of which was seen in training.  They are
the same for every arm, with the same ids and seeds, so that the first image of a step is the same in all arms with a
planner:

    single shot         the request itself is the only prompt
    planner             one image per step
    planner + critic    up to `--attempts` images per step, with prompts rewritten by the critic
    planner + redraw    the same critic's verdicts with the same prompt, which shows the effect of rewriting
    planner + chance    accepts by chance as often as the critic, with the same prompt, which shows the effect of
                        looking at the images
    best of N           N images per step, of which the critic's most probable success is taken; N is the rounded number
                        of images per step of planner + critic
    planner + oracle    the verifier is the critic and the prompt stays: the upper bound for verdicts

A story is right if every step holds, each judged against the accepted image before it.  The last image is right if it
shows the things of the last step.  Brackets: 95 % percentile bootstrap over stories; differences are paired by story.

    python -m benchmarks.quality.interleave_miniature
    python -m benchmarks.quality.interleave_miniature --riddles --stories 300
    python -m benchmarks.quality.interleave_miniature --critic runs/critic-grpo/model
"""

import asyncio
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.common import choose_device, describe_run, format_versions, result_file, write_json
from imgen_common.config import load
from imgen_common.console import markdown_table
from imgen_common.errors import run_cli
from imgen_common.files import write_atomic
from imgen_common.images import from_pil
from imgen_common.shapes.steps import Story
from imgen_common.shapes.stories import plan_is_correct, sample_story, verify_story
from imgen_common.shapes.verify import detect
from imgen_common.statistics import Interval, bootstrap_interval, paired_bootstrap_interval
from imgen_common.streams import numpy_generator
from interleave.agents.critic import RandomRewrite
from interleave.agents.miniature import VerifierCritic
from interleave.loop.config import LoopConfig, RunConfig
from interleave.loop.engine import Engine
from interleave.loop.run import build_components
from interleave.protocols import Components
from interleave.records import Request
from interleave.storage.images import ImageStore
from interleave.storage.trace import Trace, TraceEntry, read_trace

VERSION = 2
MODULE = "benchmarks.quality.interleave_miniature"
SINGLE, PLANNED = "single shot", "planner"


@dataclass(frozen=True)
class StoryResult:
    """The result of one story.

    last_right, plan_right: whether the last image and the plan are right.  images, steps: how many were made.
    accepted, judged: how many images.
    """

    right: bool
    last_right: bool
    plan_right: bool
    images: int
    steps: int
    accepted: int
    judged: int


@dataclass(frozen=True)
class ArmRow:
    """The results of one arm, averaged over its stories.  gain: of `right` over the planner alone."""

    arm: str
    right: Interval
    gain: Interval | None
    last_right: Interval
    plan_right: float | None
    images: float
    seconds: float


def load_stories(count: int, riddle: bool, seed: int) -> list[Story]:
    """`count` different stories of the test split."""
    stories: dict[str, Story] = {}
    for index in range(100 * count):
        story = sample_story(numpy_generator(seed, "benchmark-story", int(riddle), index), "test", riddle=riddle)
        stories.setdefault(story.request, story)
        if len(stories) == count:
            break
    return list(stories.values())


def score_story(story: Story, entry: TraceEntry, store: ImageStore) -> StoryResult:
    """The result of a story, from its records and images."""
    trajectory, attempts = entry.trajectory, entry.attempts
    assert trajectory is not None
    selected = [attempts[step, number].image_id for step, number in sorted(trajectory.selected.items())]
    shown = [store.get(image_id).image for image_id in selected if image_id]
    images = from_pil(shown) if shown else torch.zeros(0, 3, 32, 32)
    is_whole = len(shown) == len(story.steps) and trajectory.is_whole
    last = Counter(d.thing for d in detect(images[-1:])[0]) if shown else Counter()
    prompts = [step.prompt or "" for step in trajectory.plan.steps] if trajectory.plan else []
    return StoryResult(
        right=is_whole and all(verify_story(images, story)),
        last_right=last == Counter(story.steps[-1].after),
        plan_right=plan_is_correct(prompts, story),
        images=sum(a.image_id is not None for a in attempts.values()),
        steps=len({step for step, _ in attempts}),
        accepted=sum(a.verdict is True for a in attempts.values()),
        judged=sum(a.verdict is not None for a in attempts.values()),
    )


def run_stories(
    stories: Sequence[Story], parts: Components, loop: LoopConfig, seed: int, folder: Path
) -> tuple[list[StoryResult], float]:
    """Runs an arm; returns the result of every story, and the seconds of all."""
    requests = [Request(id=f"story-{i}", text=story.request) for i, story in enumerate(stories)]
    images = ImageStore(folder / "images")
    start = time.perf_counter()

    async def run() -> None:
        with Trace(folder) as trace:
            await Engine(parts, loop, seed, trace, images).run_all(requests)

    asyncio.run(run())
    seconds = time.perf_counter() - start
    records = read_trace(folder)
    return [score_story(story, records[r.id], images) for story, r in zip(stories, requests, strict=True)], seconds


def summarize_arm(
    arm: str, results: Sequence[StoryResult], seconds: float, base: Sequence[StoryResult] | None
) -> ArmRow:
    """The row of an arm, with its gain over `base`."""
    right = [float(result.right) for result in results]
    return ArmRow(
        arm=arm,
        right=bootstrap_interval([right]),
        gain=None if base is None else paired_bootstrap_interval([float(result.right) for result in base], right),
        last_right=bootstrap_interval([[float(result.last_right) for result in results]]),
        plan_right=None if arm == SINGLE else float(np.mean([result.plan_right for result in results])),
        images=float(np.mean([result.images for result in results])),
        seconds=seconds,
    )


def run_arms(
    stories: Sequence[Story], config: RunConfig, attempts: int, seed: int, folder: Path
) -> dict[str, tuple[list[StoryResult], float]]:
    """{arm: (results, seconds)} in order; the later arms take their numbers from planner + critic."""
    parts = build_components(config)
    rewriting = config.loop.model_copy(update={"max_attempts": attempts})
    retrying = rewriting.model_copy(update={"rewrite": False})
    arms: dict[str, tuple[list[StoryResult], float]] = {}

    def run_arm(name: str, changed: Components, loop: LoopConfig) -> list[StoryResult]:
        print(f"{name} ...", file=sys.stderr, flush=True)
        arms[name] = run_stories(stories, changed, loop, seed, folder / name.replace(" ", "-"))
        return arms[name][0]

    run_arm(SINGLE, replace(parts, planner=None, critic=None), rewriting)
    run_arm(PLANNED, replace(parts, critic=None), rewriting)
    results = run_arm("planner + critic", parts, rewriting)
    run_arm("planner + redraw", parts, retrying)
    accepted = sum(r.accepted for r in results) / max(1, sum(r.judged for r in results))
    run_arm("planner + chance", replace(parts, critic=RandomRewrite(accepted, ("",))), retrying)
    number = max(1, round(sum(r.images for r in results) / max(1, sum(r.steps for r in results))))
    best = retrying.model_copy(
        update={"max_attempts": number, "stop_on_success": False, "select": "best_by_verdict_probability"}
    )
    run_arm(f"best of {number}", parts, best)
    run_arm("planner + oracle", replace(parts, critic=VerifierCritic()), retrying)
    return arms


def format_percent(value: Interval) -> str:
    """`41.3 [36.0, 47.0]`."""
    return f"{100 * value.mean:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def format_gain(value: Interval | None) -> str:
    """`+1.3 [-0.4, +3.0]`."""
    return "-" if value is None else f"{100 * value.mean:+.1f} [{100 * value.low:+.1f}, {100 * value.high:+.1f}]"


def format_table(rows: Sequence[ArmRow]) -> str:
    """The table as Markdown."""
    cells = [
        (
            r.arm,
            format_percent(r.right),
            format_gain(r.gain),
            format_percent(r.last_right),
            "-" if r.plan_right is None else f"{100 * r.plan_right:.1f}",
            f"{r.images:.2f}",
            f"{r.seconds:.0f}",
        )
        for r in rows
    ]
    header = ["arm", "stories right %", "minus planner", "last image right %", "plans right %", "images per story"]
    return markdown_table([*header, "seconds"], cells)


def run_interleave_miniature(
    num_stories: int, riddles: bool, config: RunConfig, attempts: int, seed: int, device: torch.device, output: Path
) -> list[ArmRow]:
    """Measures, prints and writes `output` (JSON) and the same as Markdown beside it."""
    stories = load_stories(num_stories, riddles, seed)
    with tempfile.TemporaryDirectory() as folder:
        cached = config.model_copy(update={"cache": str(Path(folder) / "cache")})
        arms = run_arms(stories, cached, attempts, seed, Path(folder))
    base = arms[PLANNED][0]
    rows = [
        summarize_arm(name, results, seconds, None if name == PLANNED else base)
        for name, (results, seconds) in arms.items()
    ]
    environment = describe_run(MODULE, sys.argv[1:], device)
    text = f"{format_table(rows)}\n\n{describe_arms(len(stories), riddles, attempts, seed, environment)}\n"
    print(text)
    content: dict[str, Any] = {"version": VERSION, "environment": environment, "rows": [asdict(r) for r in rows]}
    content |= {"config": config.model_dump(mode="json"), "seed": seed}
    content["per_story"] = {name: [asdict(result) for result in results] for name, (results, _) in arms.items()}
    write_json(output, content)
    write_atomic(output.with_suffix(".md"), text)
    return rows


def describe_arms(count: int, riddles: bool, attempts: int, seed: int, environment: Mapping[str, Any]) -> str:
    """The caption of the table."""
    kind = "riddles" if riddles else "plain requests"
    return (
        f"{count} {kind} of the test split, seed {seed}, up to {attempts} images per step. Brackets: 95 % bootstrap "
        "over stories; differences are paired. Images: mean number of generated images per story. Seconds are "
        "wall-clock seconds; images that an earlier arm generated come from the cache. "
        f"{environment['hardware']}; {format_versions(dict(environment))}."
    )


def main(
    stories: Annotated[int, typer.Option(help="How many stories.")] = 300,
    riddles: Annotated[bool, typer.Option("--riddles", help="Riddles instead of plain requests.")] = False,
    attempts: Annotated[int, typer.Option(help="Most images per step.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of stories and images.")] = 0,
    planner: Annotated[str | None, typer.Option(help="Another planner's folder.")] = None,
    critic: Annotated[str | None, typer.Option(help="Another critic's folder.")] = None,
    config: Annotated[list[Path] | None, typer.Option(help="YAML file with the configuration of the loop.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of the configuration.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file; by default named by the hardware.")] = None,
) -> None:
    """The share of the miniature's stories that come out right by the verifier."""
    changes = [f"planner.model.ref={planner}"] * bool(planner) + [f"critic.model.ref={critic}"] * bool(critic)
    device = choose_device("auto")
    file = output or result_file(f"interleave_miniature{'_riddles' if riddles else ''}", device, "json")
    recipe = load(RunConfig, config or [], [*changes, *(sets or [])])
    run_interleave_miniature(stories, riddles, recipe, attempts, seed, device, file)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    run_cli(app, MODULE)
