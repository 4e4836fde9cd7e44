"""How many stories of the miniature come out right, by the verifier: alone, planned, judged, best of N, with an oracle.

Requests of the test split (no picture, caption or combination of facts of it was seen in training), the same ones, ids
and seeds for every arm, so that the first picture of a step is the same picture in all planned arms:

    single shot         the request itself is the only prompt
    planner             one picture a step
    planner + critic    up to `--attempts` pictures a step, rewritten by the critic
    planner + redraw    the same critic's verdicts, but the prompt stays: what rewriting adds
    planner + chance    accepts by chance as often as the critic does, the prompt stays: what looking adds
    best of N           N pictures a step, the critic's most probable success is taken; N as near as whole numbers come
                        to the pictures a step that planner + critic drew
    planner + oracle    the verifier is the critic, the prompt stays: the upper bound for verdicts

A story is right if every step of it holds, each judged against the accepted picture before; the last picture, if it
shows the last step's things.  Brackets: 95 % percentile bootstrap over stories; differences are paired by story.

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

from benchmarks.common import device_of, result_file, stamp, versions, write_json
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
from interleave.agents.miniature import VerifierCritic
from interleave.agents.random_critic import RandomRewrite
from interleave.loop.components import Components
from interleave.loop.config import LoopConfig, RunConfig
from interleave.loop.engine import Engine
from interleave.loop.run import build_components
from interleave.records import Request
from interleave.storage.images import ImageStore
from interleave.storage.trace import Trace, TraceEntry, read_trace

VERSION = 1
MODULE = "benchmarks.quality.interleave_miniature"
PLANNED = "planner"


@dataclass(frozen=True)
class Told:
    """What became of one story."""

    right: bool
    last_right: bool
    planned_right: bool
    pictures: int
    steps: int
    accepted: int
    judged: int


@dataclass(frozen=True)
class Row:
    """One arm."""

    arm: str
    right: Interval
    gain: Interval | None
    last_right: Interval
    planned_right: float | None
    pictures: float
    seconds: float


def load_stories(count: int, riddle: bool, seed: int) -> list[Story]:
    """Different stories of the test split."""
    found: dict[str, Story] = {}
    for index in range(100 * count):
        story = sample_story(numpy_generator(seed, "benchmark-story", int(riddle), index), "test", riddle=riddle)
        found.setdefault(story.request, story)
        if len(found) == count:
            break
    return list(found.values())


def score(story: Story, recorded: TraceEntry, pictures: ImageStore) -> Told:
    """Read a story's records and pictures."""
    trajectory = recorded.trajectory
    assert trajectory is not None
    attempts = recorded.attempts
    chosen = [attempts[step, number].image_id for step, number in sorted(trajectory.selected.items())]
    shown = [pictures.get(image_id).image for image_id in chosen if image_id]
    images = from_pil(shown) if shown else torch.zeros(0, 3, 32, 32)
    fits = len(shown) == len(story.steps)
    last = Counter(d.thing for d in detect(images[-1:])[0]) if shown else Counter()
    prompts = [step.prompt or "" for step in trajectory.plan.steps] if trajectory.plan else []
    return Told(
        right=fits and trajectory.status == "complete" and all(verify_story(images, story)),
        last_right=last == Counter(story.steps[-1].after),
        planned_right=plan_is_correct(prompts, story),
        pictures=sum(a.image_id is not None for a in attempts.values()),
        steps=len({step for step, _ in attempts}),
        accepted=sum(a.verdict is True for a in attempts.values()),
        judged=sum(a.verdict is not None for a in attempts.values()),
    )


def tell(
    stories: Sequence[Story], parts: Components, loop: LoopConfig, seed: int, folder: Path
) -> tuple[list[Told], float]:
    """Run an arm; what became of every story, and the seconds it took."""
    requests = [Request(id=f"story-{i}", text=story.request) for i, story in enumerate(stories)]
    pictures = ImageStore(folder / "images")
    began = time.perf_counter()

    async def run() -> None:
        with Trace(folder) as trace:
            await Engine(parts, loop, seed, trace, pictures).run_all(requests)

    asyncio.run(run())
    seconds = time.perf_counter() - began
    records = read_trace(folder)
    return [score(story, records[r.id], pictures) for story, r in zip(stories, requests, strict=True)], seconds


def row(arm: str, told: Sequence[Told], seconds: float, base: Sequence[Told] | None) -> Row:
    """The arm's numbers, with its gain over `base`."""
    right = [float(t.right) for t in told]
    gain = None if base is None else paired_bootstrap_interval([float(t.right) for t in base], right)
    planned = None if arm == "single shot" else float(np.mean([t.planned_right for t in told]))
    return Row(
        arm=arm,
        right=bootstrap_interval([right]),
        gain=gain,
        last_right=bootstrap_interval([[float(t.last_right) for t in told]]),
        planned_right=planned,
        pictures=float(np.mean([t.pictures for t in told])),
        seconds=seconds,
    )


def arms(
    stories: Sequence[Story], config: RunConfig, attempts: int, seed: int, folder: Path
) -> dict[str, tuple[list[Told], float]]:
    """All arms, in order; the later ones take their numbers from planner + critic."""
    parts = build_components(config)
    judged = config.loop.model_copy(update={"max_attempts": attempts})
    keep = judged.model_copy(update={"rewrite": False})
    found: dict[str, tuple[list[Told], float]] = {}

    def arm(name: str, made: Components, loop: LoopConfig) -> list[Told]:
        print(f"{name} ...", file=sys.stderr, flush=True)
        found[name] = tell(stories, made, loop, seed, folder / name.replace(" ", "-"))
        return found[name][0]

    arm("single shot", replace(parts, planner=None, critic=None), judged)
    arm(PLANNED, replace(parts, critic=None), judged)
    told = arm("planner + critic", parts, judged)
    arm("planner + redraw", parts, keep)
    accepted = sum(t.accepted for t in told) / max(1, sum(t.judged for t in told))
    arm("planner + chance", replace(parts, critic=RandomRewrite(accepted, ("",))), keep)
    drawn = sum(t.pictures for t in told) / max(1, sum(t.steps for t in told))
    number = max(1, round(drawn))
    best = keep.model_copy(
        update={"max_attempts": number, "stop_on_success": False, "select": "best_by_verdict_probability"}
    )
    arm(f"best of {number}", parts, best)
    arm("planner + oracle", replace(parts, critic=VerifierCritic()), keep)
    return found


def percent(value: Interval) -> str:
    """`41.3 [36.0, 47.0]`."""
    return f"{100 * value.mean:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def signed(value: Interval | None) -> str:
    """`+1.3 [-0.4, +3.0]`."""
    return "-" if value is None else f"{100 * value.mean:+.1f} [{100 * value.low:+.1f}, {100 * value.high:+.1f}]"


def markdown(rows: Sequence[Row]) -> str:
    """The table."""
    cells = [
        (
            r.arm,
            percent(r.right),
            signed(r.gain),
            percent(r.last_right),
            "-" if r.planned_right is None else f"{100 * r.planned_right:.1f}",
            f"{r.pictures:.2f}",
            f"{r.seconds:.0f}",
        )
        for r in rows
    ]
    header = (
        "arm",
        "stories right %",
        "over planner",
        "last picture %",
        "plans right %",
        "pictures a story",
        "seconds",
    )
    return markdown_table(header, cells)


def run(
    num_stories: int, riddles: bool, config: RunConfig, attempts: int, seed: int, device: torch.device, output: Path
) -> list[Row]:
    """Measure, print, write `output` (JSON) and the same as Markdown beside it."""
    stories = load_stories(num_stories, riddles, seed)
    with tempfile.TemporaryDirectory() as folder:
        cached = config.model_copy(update={"cache": str(Path(folder) / "cache")})
        found = arms(stories, cached, attempts, seed, Path(folder))
    base = found[PLANNED][0]
    rows = [row(name, told, secs, None if name == PLANNED else base) for name, (told, secs) in found.items()]
    environment = stamp(MODULE, sys.argv[1:], device)
    text = f"{markdown(rows)}\n\n{caption(config, len(stories), riddles, attempts, seed, environment)}\n"
    print(text)
    content: dict[str, Any] = {"version": VERSION, "environment": environment, "rows": [asdict(r) for r in rows]}
    content |= {"config": config.model_dump(mode="json"), "seed": seed}
    content["per_story"] = {name: [asdict(t) for t in told] for name, (told, _) in found.items()}
    write_json(output, content)
    write_atomic(output.with_suffix(".md"), text)
    return rows


def caption(
    config: RunConfig, count: int, riddles: bool, attempts: int, seed: int, environment: Mapping[str, Any]
) -> str:
    """What the numbers are of."""
    kind = "riddles" if riddles else "plain requests"
    return (
        f"{count} {kind} of the test split, seed {seed}, up to {attempts} pictures a step; brackets: 95 % bootstrap "
        "over stories, differences paired. Pictures: drawn for a story, in the mean. Seconds by the wall; what an "
        "earlier arm drew comes from the cache. "
        f"{environment['hardware']}; {versions(dict(environment))}."
    )


def main(
    stories: Annotated[int, typer.Option(help="How many stories.")] = 300,
    riddles: Annotated[bool, typer.Option("--riddles", help="Riddles instead of plain requests.")] = False,
    attempts: Annotated[int, typer.Option(help="Pictures of a step, at most.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of stories and pictures.")] = 0,
    planner: Annotated[str | None, typer.Option(help="Another planner's folder.")] = None,
    critic: Annotated[str | None, typer.Option(help="Another critic's folder.")] = None,
    config: Annotated[list[Path] | None, typer.Option(help="YAML file for the loop and its parts.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="A key of it.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file; by default named by the hardware.")] = None,
) -> None:
    """Stories of the miniature that come out right, by the verifier."""
    changes = [f"planner.model.ref={planner}"] * bool(planner) + [f"critic.model.ref={critic}"] * bool(critic)
    device = device_of("auto")
    name = "interleave_miniature_riddles" if riddles else "interleave_miniature"
    file = output or result_file(name, device, "json")
    run(stories, riddles, load(RunConfig, config or [], [*changes, *(sets or [])]), attempts, seed, device, file)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    run_cli(app, MODULE)
