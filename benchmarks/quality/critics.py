"""Critics of the miniature side by side: how many of their verdicts are right, how many stories come out right.

The first one named is the base; gains over it are paired, by picture and by story, with 95 % bootstrap intervals.

    pool              verdicts on the pictures that the shipped critic was measured on
    looks             verdicts on the first picture of every step of the stories, while the verifier is the critic:
                      what a critic sees at run time, and learns from in reinforcement
    , greedy          the most probable answer
    , sampled         one answer at temperature 1, which is what reinforcement works on
    stories           `planner + critic` of benchmarks.quality.interleave_miniature with one such answer a picture
    stories, asked    the same as `interleave run` judges: a share of several sampled answers

All is of the test split, which no critic was trained on, and the same for every critic.  An answer that cannot be read
counts as wrong.  What is done is kept in `--work`; a run that was killed goes on there.

    python -m benchmarks.quality.critics sft=builtin:shapes/critic grpo=runs/grpo_critic/model
"""

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import device_of, result_file, stamp, versions, write_json
from benchmarks.quality.interleave_miniature import load_stories, percent, signed, tell
from benchmarks.quality.miniature_cells import digests, read
from imgen_common.config import load
from imgen_common.console import markdown_table
from imgen_common.errors import UserError, run_cli
from imgen_common.files import write_atomic
from imgen_common.shapes.steps import Story
from imgen_common.statistics import Interval, bootstrap_interval, paired_bootstrap_interval
from interleave.agents.miniature import VerifierCritic
from interleave.agents.parsing import parse_verdict
from interleave.agents.prompts import load_template, render_critic
from interleave.datasets.rows import pair
from interleave.datasets.teachers import judge
from interleave.loop.components import Components
from interleave.loop.config import LoopConfig, RunConfig
from interleave.loop.run import build_components
from interleave.models.chat.local import LocalChat, LocalChatConfig
from interleave.protocols import CriticInput, Message, Reply
from interleave.records import Verdict
from interleave.storage.images import ImageStore
from interleave.storage.trace import read_trace
from scripts.miniature.agents import pool
from scripts.miniature.agents.cases import to_cases
from scripts.miniature.agents.data import critic_message, readings

VERSION = 1
MODULE = "benchmarks.quality.critics"
POOL_SEED = 22
"""As in `python -m scripts.miniature.agents pool`."""
TEMPERATURES = {"greedy": 0, "sampled": 1}
"""How a critic answers once."""
MODES: dict[str, tuple[str, ...]] = {
    **{how: ("critic.num_samples=1", f"critic.model.temperature={t}") for how, t in TEMPERATURES.items()},
    "asked": (),
}
"""How it answers in the loop: changes of the configuration."""
Marks = Mapping[str, Sequence[float]]
"""1 for right and 0 for wrong, by what is measured."""
Asked = Sequence[tuple[Message, bool]]
"""Questions to a critic, each with the true verdict."""


@dataclass(frozen=True)
class Cell:
    """A share, and what it gains over the base's."""

    share: Interval
    gain: Interval | None


@dataclass(frozen=True)
class Measured:
    """Marks of all critics, the stories right with the verifier as critic, and how many pictures there were."""

    marks: dict[str, Marks]
    oracle: list[float]
    pool: int
    looks: int


def verdicts(ref: str, asked: Asked, temperature: float) -> list[float]:
    """Whether each verdict of the critic `ref` is the true one."""
    chat = LocalChat(LocalChatConfig(ref=ref, temperature=temperature, max_batch=64, top_logprobs=0))
    replies = chat.answer([(message, number) for number, (message, _) in enumerate(asked)])
    return [float(_success(reply) is truth) for reply, (_, truth) in zip(replies, asked, strict=True)]


def _success(reply: Reply | BaseException) -> bool | None:
    read = parse_verdict(reply.text) if isinstance(reply, Reply) else None
    return read.success if isinstance(read, Verdict) else None


def pool_of(folder: Path) -> Asked:
    """The pictures that the shipped critic was measured on, drawn in `folder` unless they are there."""
    pool.generate(folder, "test", pool.TEST, POOL_SEED)
    cases = to_cases(pool.load(folder, "test"))
    found = zip(cases, readings(cases), strict=True)
    return [(critic_message(case), judge(*seen, case.original, case.used).success) for case, seen in found]


def told(parts: Components, stories: Sequence[Story], loop: LoopConfig, seed: int) -> list[float]:
    """Whether each story comes out right."""
    with tempfile.TemporaryDirectory() as folder:
        found, _ = tell(stories, parts, loop, seed, Path(folder))
    return [float(one.right) for one in found]


def told_by_verifier(
    parts: Components, stories: Sequence[Story], loop: LoopConfig, seed: int
) -> tuple[list[float], Asked]:
    """Whether each story comes out right with the verifier as critic, and what is asked of the first picture of every
    step, so that a step that fails again and again does not count as often."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found, _ = tell(stories, replace(parts, critic=VerifierCritic()), loop, seed, folder)
        pictures, asked = ImageStore(folder / "images"), []
        for _, recorded in sorted(read_trace(folder).items()):
            for (_, number), attempt in sorted(recorded.attempts.items()):
                if number == 1 and attempt.verdict is not None:
                    before, after = map(pictures.get, pair(attempt))
                    look = CriticInput(before, after, attempt.original_prompt, attempt.prompt_used)
                    asked.append((render_critic(load_template("shapes_critic"), look), attempt.verdict))
    return [float(one.right) for one in found], asked


def cells(marks: Mapping[str, Marks]) -> dict[str, dict[str, Cell]]:
    """The table: critics, the base first, by what is measured."""
    base = next(iter(marks.values()))
    return {
        name: {
            column: Cell(
                bootstrap_interval([right]),
                None if columns is base else paired_bootstrap_interval(base[column], right),
            )
            for column, right in columns.items()
        }
        for name, columns in marks.items()
    }


def markdown(found: Mapping[str, Mapping[str, Cell]]) -> str:
    """The table: what is measured down, critics across."""
    base, *others = found
    header = ["right %", base, *(name for other in others for name in (other, f"{other} - {base}"))]
    rows = [
        [
            what,
            percent(cell.share),
            *(t for o in others for t in (percent(found[o][what].share), signed(found[o][what].gain))),
        ]
        for what, cell in found[base].items()
    ]
    return markdown_table(header, rows)


def measure(
    critics: Mapping[str, str],
    num_stories: int,
    attempts: int,
    seed: int,
    folder: Path,
    modes: Sequence[str] = tuple(MODES),
) -> Measured:
    """Every critic on the same pictures and stories; what has a mark in `folder` is done.

    modes: how stories are judged, some of `MODES`.  Raises UserError for a file of other weights or numbers.
    """
    stories = load_stories(num_stories, False, seed)
    settings = [f"cache={folder / 'cache'}", f"loop.max_attempts={attempts}"]
    config = load(RunConfig, [], settings)
    print("the verifier ...", file=sys.stderr, flush=True)
    keep = config.loop.model_copy(update={"rewrite": False})
    oracle, looks = told_by_verifier(build_components(config), stories, keep, seed)
    pooled = pool_of(folder / "pool")

    def marked(ref: str, what: str, how: str) -> list[float]:
        if what == "stories":
            config = load(RunConfig, [], [*settings, f"critic.model.ref={ref}", *MODES[how]])
            return told(build_components(config), stories, config.loop, seed)
        return verdicts(ref, {"pool": pooled, "looks": looks}[what], TEMPERATURES[how])

    columns = [(what, how) for what in ("pool", "looks") for how in TEMPERATURES]
    columns += [("stories", how) for how in modes]
    marks: dict[str, Marks] = {}
    for critic, ref in critics.items():
        about = {"weights": digests([ref])[ref], "stories": num_stories, "attempts": attempts, "seed": seed}
        file = folder / f"{critic}.json"
        found: dict[str, Any] = read(file) if file.exists() else {"about": about, "marks": {}}
        if found["about"] != about:
            raise UserError(f"{file}: of another critic or other numbers ({found['about']}); give another --work")
        for what, how in columns:
            if f"{what}, {how}" not in found["marks"]:
                print(f"{critic}: {what}, {how} ...", file=sys.stderr, flush=True)
                found["marks"][f"{what}, {how}"] = marked(ref, what, how)
                write_json(file, found)
        marks[critic] = {f"{what}, {how}": found["marks"][f"{what}, {how}"] for what, how in columns}
    return Measured(marks, oracle, len(pooled), len(looks))


def report(
    critics: Mapping[str, str],
    stories: int,
    attempts: int,
    seed: int,
    work: Path,
    output: Path,
    module: str,
    modes: Sequence[str] = tuple(MODES),
    seconds: Mapping[str, float | None] | None = None,
) -> str:
    """Measure, write `output` and its Markdown, print and give the latter.

    seconds: of what was done before, by name, None where they are not known.
    """
    device = device_of("auto")
    torch.set_num_threads(1)
    found = measure(critics, stories, attempts, seed, work, modes)
    rows = cells(found.marks)
    environment = stamp(module, sys.argv[1:], device)
    oracle = percent(bootstrap_interval([found.oracle]))
    text = (
        f"{markdown(rows)}\n\n{found.pool} pictures of the pool, {found.looks} looks, {stories} stories of the test "
        f"split, seed {seed}, up to {attempts} pictures a step; with the verifier as critic {oracle} of the stories "
        "are right; brackets: 95 % bootstrap over pictures or stories, differences paired. "
        f"{environment['hardware']}; {versions(environment)}.\n"
    )
    if seconds:
        took = ", ".join(f"{name} {'unknown' if s is None else format(s, '.0f')}" for name, s in seconds.items())
        text += f"\nSeconds by the wall: {took}.\n"
    print(text)
    cooked = {critic: {what: asdict(cell) for what, cell in row.items()} for critic, row in rows.items()}
    write_json(
        output, {"version": VERSION, "environment": environment, "seconds": seconds, "rows": cooked, **asdict(found)}
    )
    write_atomic(output.with_suffix(".md"), text)
    return text


def main(
    critics: Annotated[list[str], typer.Argument(metavar="NAME=MODEL...", help="Critics, the base first.")],
    stories: Annotated[int, typer.Option(help="How many stories.")] = 300,
    attempts: Annotated[int, typer.Option(help="Pictures of a step, at most.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the stories.")] = 0,
    work: Annotated[Path, typer.Option(metavar="DIR", help="What is done already is there.")] = Path("runs/critics"),
    output: Annotated[Path | None, typer.Option(help="JSON file; by default named by the hardware.")] = None,
) -> None:
    """Critics of the miniature side by side, by the verifier.

    Example:

    \b
      python -m benchmarks.quality.critics sft=builtin:shapes/critic grpo=runs/grpo_critic/model
    """
    named = dict(pair.partition("=")[::2] for pair in critics)
    if len(named) < len(critics) or not all(named.values()):
        raise UserError(f"{' '.join(critics)}: write NAME=MODEL for every critic, each with a name of its own")
    report(named, stories, attempts, seed, work, output or result_file("critics", device_of("auto"), "json"), MODULE)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    run_cli(app, MODULE)
