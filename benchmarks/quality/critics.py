"""Critics of the miniature side by side: how many of their verdicts are right, how many stories come out right.

The first one named is the base; gains over it are paired, by picture and by story, with 95 % bootstrap intervals.

    greedy      the most probable answer to a picture
    sampled     one answer at temperature 1, which is what reinforcement works on
    stories     `planner + critic` of benchmarks.quality.interleave_miniature, with one greedy answer a picture
    loop        the same as `interleave run` judges: a share of several sampled answers

Pictures of the test split are drawn once for all critics: those that the shipped critic was measured on, which none was
trained on.  An answer that cannot be read counts as wrong.  What is done is kept in `--work`; a run that was killed
goes on there.

    python -m benchmarks.quality.critics sft=builtin:shapes/critic grpo=runs/grpo_critic/model
"""

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.common import Interval, device_of, result_file, stamp, table, versions, write_json
from benchmarks.quality.interleave_miniature import load_stories, percent, signed, tell
from benchmarks.quality.miniature_cells import digests, read
from flowbp.evaluate import interval, paired_interval
from imgen_common.config import load
from imgen_common.errors import UserError, run_cli
from imgen_common.runs import write_atomic
from imgen_common.shapes.stories import Story
from interleave.chat import LocalChat, LocalChatConfig
from interleave.config import RunConfig
from interleave.miniature import pool
from interleave.miniature.cases import to_cases
from interleave.miniature.data import Case, critic_message, judge, readings
from interleave.parsing import parse_verdict
from interleave.parts import Reply
from interleave.records import Verdict
from interleave.session import make_parts

VERSION = 1
MODULE = "benchmarks.quality.critics"
POOL_SEED = 22
"""As in `python -m interleave.miniature pool`."""
ONE_ANSWER = ("critic.num_samples=1", "critic.model.temperature=0")
Marks = Mapping[str, Sequence[float]]
"""1 for right and 0 for wrong, by column."""


@dataclass(frozen=True)
class Cell:
    """A share, and what it gains over the base's."""

    share: Interval
    gain: Interval | None


def verdicts(ref: str, cases: Sequence[Case], truths: Sequence[bool], temperature: float) -> list[float]:
    """Whether each verdict of the critic `ref` is the true one."""
    chat = LocalChat(LocalChatConfig(ref=ref, temperature=temperature, max_batch=64, top_logprobs=0))
    replies = chat.answer([(critic_message(case), number) for number, case in enumerate(cases)])
    return [float(_success(reply) is truth) for reply, truth in zip(replies, truths, strict=True)]


def _success(reply: Reply | BaseException) -> bool | None:
    read = parse_verdict(reply.text) if isinstance(reply, Reply) else None
    return read.success if isinstance(read, Verdict) else None


def told(ref: str, stories: Sequence[Story], sets: Sequence[str], seed: int, folder: Path, cache: Path) -> list[float]:
    """Whether each story comes out right with the critic `ref`."""
    config = load(RunConfig, [], [f"cache={cache}", f"critic.model.ref={ref}", *sets])
    found, _ = tell(stories, make_parts(config), config.loop, seed, folder)
    return [float(one.right) for one in found]


def cells(marks: Mapping[str, Marks]) -> dict[str, dict[str, Cell]]:
    """The table: critics, the base first, by columns."""
    base = next(iter(marks.values()))
    return {
        name: {
            column: Cell(
                Interval(*interval([right])),
                None if columns is base else Interval(*paired_interval(base[column], right)),
            )
            for column, right in columns.items()
        }
        for name, columns in marks.items()
    }


def markdown(found: Mapping[str, Mapping[str, Cell]]) -> str:
    """The table."""
    columns = list(next(iter(found.values())))
    header = ["critic", *(name for column in columns for name in (f"{column} %", "gain"))]
    rows = [
        [critic, *(text for cell in row.values() for text in (percent(cell.share), signed(cell.gain)))]
        for critic, row in found.items()
    ]
    return table(header, rows)


def measure(critics: Mapping[str, str], num_stories: int, attempts: int, seed: int, folder: Path) -> dict[str, Marks]:
    """Every critic on the same pictures and stories; those with a file in `folder` are done.

    Raises UserError for a file of other weights or numbers.
    """
    pool.generate(folder / "pool", "test", pool.TEST, POOL_SEED)
    cases = to_cases(pool.load(folder / "pool", "test"))
    truths = [judge(*f, c.original, c.used).success for c, f in zip(cases, readings(cases), strict=True)]
    stories = load_stories(num_stories, False, seed)
    limit = f"loop.max_attempts={attempts}"
    marks: dict[str, Marks] = {}
    for critic, ref in critics.items():
        file = folder / f"{critic}.json"
        about = {"weights": digests([ref])[ref], "stories": num_stories, "attempts": attempts, "seed": seed}
        if not file.exists():
            print(f"{critic} ...", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory() as name:
                place = Path(name)
                columns = {
                    "greedy": verdicts(ref, cases, truths, 0.0),
                    "sampled": verdicts(ref, cases, truths, 1.0),
                    "stories": told(ref, stories, (limit, *ONE_ANSWER), seed, place / "one", folder / "cache"),
                    "loop": told(ref, stories, (limit,), seed, place / "loop", folder / "cache"),
                }
            write_json(file, {"about": about, "marks": columns})
        found = read(file)
        if found["about"] != about:
            raise UserError(f"{file}: of another critic or other numbers ({found['about']}); give another --work")
        marks[critic] = found["marks"]
    return marks


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
    device = device_of("auto")
    torch.set_num_threads(1)
    marks = measure(named, stories, attempts, seed, work)
    found = cells(marks)
    environment = stamp(MODULE, sys.argv[1:], device)
    pictures = len(next(iter(marks.values()))["greedy"])
    text = (
        f"{markdown(found)}\n\n{pictures} pictures and {stories} stories of the test split, seed {seed}, up to "
        f"{attempts} pictures a step; brackets: 95 % bootstrap over pictures or stories, gains paired. "
        f"{environment['hardware']}; {versions(environment)}.\n"
    )
    print(text)
    file = output or result_file("critics", device, "json")
    rows = {critic: {column: asdict(cell) for column, cell in row.items()} for critic, row in found.items()}
    write_json(file, {"version": VERSION, "environment": environment, "rows": rows, "marks": marks})
    write_atomic(file.with_suffix(".md"), text)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    run_cli(app, MODULE)
