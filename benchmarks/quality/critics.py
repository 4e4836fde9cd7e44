"""Critics of the miniature side by side: the share of their verdicts and of the stories that are right.

The first critic is the base.  Gains over it are paired, by image and by story, with 95 % bootstrap intervals.

    pool                    verdicts on the images that the shipped critic was measured on
    first attempts          verdicts on the first image of every step of the stories while the verifier is the critic:
                            what a critic sees at run time, and learns from in reinforcement learning
    , greedy                the most probable answer
    , sampled               one answer at temperature 1, as reinforcement learning samples it
    stories                 `planner + critic` of benchmarks.quality.interleave_miniature with one such answer per image
    stories, as configured  the judgment of `interleave run`: the share of several sampled answers

All requests and images are of the test split, which no critic was trained on, and are the same for every critic.  An
answer that cannot be parsed counts as wrong; it may lack reasoning.  Finished measurements are kept in `--work`; the
same command resumes.

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

from benchmarks.common import choose_device, describe_run, format_versions, read_json, result_file, write_json
from benchmarks.quality.interleave_miniature import format_gain, format_percent, load_stories, run_stories
from benchmarks.quality.miniature_cells import weight_digests
from imgen_common.config import load
from imgen_common.console import markdown_table
from imgen_common.errors import UserError, run_cli
from imgen_common.files import write_atomic
from imgen_common.judging.objects import ParseMode
from imgen_common.shapes.steps import Story
from imgen_common.statistics import Interval, bootstrap_interval, paired_bootstrap_interval
from interleave.agents.miniature import VerifierCritic
from interleave.agents.parsing import parse_verdict
from interleave.agents.prompts import load_template, render_critic
from interleave.datasets.rows import before_and_after
from interleave.datasets.teachers import make_verdict
from interleave.loop.config import LoopConfig, RunConfig
from interleave.loop.run import build_components
from interleave.models.chat.local import LocalChat, LocalChatConfig
from interleave.protocols import Components, CriticInput, Message, Reply
from interleave.records import Verdict
from interleave.storage.images import ImageStore
from interleave.storage.trace import read_trace
from scripts.miniature.agents import pool
from scripts.miniature.agents.cases import to_cases
from scripts.miniature.agents.data import critic_message, read_cases

VERSION = 2
MODULE = "benchmarks.quality.critics"
POOL_SEED = 22
"""As in `python -m scripts.miniature.agents pool`."""
PARSE_MODE: ParseMode = "direct"
"""Reads critics that reason and critics that do not.  Stories are told with it too."""
TEMPERATURES = {"greedy": 0, "sampled": 1}
"""Sampling temperature of a single answer."""
MODES: dict[str, tuple[str, ...]] = {
    **{how: ("critic.num_samples=1", f"critic.model.temperature={t}") for how, t in TEMPERATURES.items()},
    "as configured": (),
}
"""Changes of the configuration of the loop for each way to judge the images of stories."""
Scores = Mapping[str, Sequence[float]]
"""{measurement: 1 for each right verdict or story, 0 for each wrong one}."""
CriticQuestions = Sequence[tuple[Message, bool]]
"""Messages to a critic, each with the true verdict."""


@dataclass(frozen=True)
class CriticSettings:
    """The measurements that all critics have in common.

    modes: how the images of stories are judged, some of `MODES`.  work: the folder of finished measurements.
    """

    stories: int
    attempts: int
    seed: int
    work: Path
    modes: Sequence[str] = tuple(MODES)


@dataclass(frozen=True)
class ScoreCell:
    """A share, and its gain over the base's."""

    share: Interval
    gain: Interval | None


@dataclass(frozen=True)
class CriticScores:
    """Scores of all critics, of the stories with the verifier as critic, and the numbers of images."""

    scores: dict[str, Scores]
    with_verifier: list[float]
    pool_size: int
    num_first_attempts: int


def score_verdicts(ref: str, questions: CriticQuestions, temperature: float) -> list[float]:
    """Whether each verdict of the critic `ref` is the true one."""
    chat = LocalChat(LocalChatConfig(ref=ref, temperature=temperature, max_batch=64, top_logprobs=0))
    replies = chat.answer([(message, number) for number, (message, _) in enumerate(questions)])
    return [float(_success(reply) is truth) for reply, (_, truth) in zip(replies, questions, strict=True)]


def _success(reply: Reply | BaseException) -> bool | None:
    verdict = parse_verdict(reply.text, PARSE_MODE) if isinstance(reply, Reply) else None
    return verdict.success if isinstance(verdict, Verdict) else None


def load_pool_questions(folder: Path) -> CriticQuestions:
    """The images that the shipped critic was measured on, generated in `folder` unless they are there."""
    pool.generate_pool(folder, "test", pool.TEST, POOL_SEED)
    cases = to_cases(pool.load_pool(folder, "test"))
    readings = zip(cases, read_cases(cases), strict=True)
    return [
        (critic_message(case), make_verdict(*reading, case.original, case.used).success) for case, reading in readings
    ]


def score_stories(parts: Components, stories: Sequence[Story], loop: LoopConfig, seed: int) -> list[float]:
    """Whether each story comes out right."""
    with tempfile.TemporaryDirectory() as folder:
        results, _ = run_stories(stories, parts, loop, seed, Path(folder))
    return [float(result.right) for result in results]


def run_verifier(
    parts: Components, stories: Sequence[Story], loop: LoopConfig, seed: int
) -> tuple[list[float], CriticQuestions]:
    """Whether each story comes out right with the verifier as critic, and the questions about its first attempts.

    Only the first attempt of a step gives a question, so that a step that fails repeatedly does not weigh more.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results, _ = run_stories(stories, replace(parts, critic=VerifierCritic()), loop, seed, folder)
        images, questions = ImageStore(folder / "images"), []
        for _, entry in sorted(read_trace(folder).items()):
            for (_, number), attempt in sorted(entry.attempts.items()):
                if number == 1 and attempt.verdict is not None:
                    before, after = map(images.get, before_and_after(attempt))
                    shown = CriticInput(before, after, attempt.original_prompt, attempt.prompt_used)
                    questions.append((render_critic(load_template("shapes_critic"), shown), attempt.verdict))
    return [float(result.right) for result in results], questions


def compare_scores(scores: Mapping[str, Scores]) -> dict[str, dict[str, ScoreCell]]:
    """{critic: {measurement: share and gain}}, the base first."""
    base = next(iter(scores.values()))
    return {
        critic: {
            column: ScoreCell(
                bootstrap_interval([right]),
                None if columns is base else paired_bootstrap_interval(base[column], right),
            )
            for column, right in columns.items()
        }
        for critic, columns in scores.items()
    }


def format_table(cells: Mapping[str, Mapping[str, ScoreCell]]) -> str:
    """The table as Markdown, with a row for each measurement and columns for each critic."""
    base, *others = cells
    header = ["right %", base, *(name for other in others for name in (other, f"{other} - {base}"))]
    rows = [
        [
            what,
            format_percent(cell.share),
            *(t for o in others for t in (format_percent(cells[o][what].share), format_gain(cells[o][what].gain))),
        ]
        for what, cell in cells[base].items()
    ]
    return markdown_table(header, rows)


def measure_critics(critics: Mapping[str, str], settings: CriticSettings) -> CriticScores:
    """Measures every critic on the same images and stories, except what is finished in `settings.work`.

    critics: {name: model}.  Raises UserError for a file of other weights or other numbers.
    """
    stories = load_stories(settings.stories, False, settings.seed)
    sets = [f"cache={settings.work / 'cache'}", f"loop.max_attempts={settings.attempts}"]
    config = load(RunConfig, [], sets)
    print("the verifier ...", file=sys.stderr, flush=True)
    loop = config.loop.model_copy(update={"rewrite": False})
    with_verifier, first_attempts = run_verifier(build_components(config), stories, loop, settings.seed)
    questions = {"pool": load_pool_questions(settings.work / "pool"), "first attempts": first_attempts}

    def measure(ref: str, what: str, how: str) -> list[float]:
        if what in questions:
            return score_verdicts(ref, questions[what], TEMPERATURES[how])
        config = load(RunConfig, [], [*sets, f"critic.model.ref={ref}", f"critic.parse_mode={PARSE_MODE}", *MODES[how]])
        return score_stories(build_components(config), stories, config.loop, settings.seed)

    columns = [(what, how) for what in questions for how in TEMPERATURES]
    columns += [("stories", how) for how in settings.modes]
    scores: dict[str, Scores] = {}
    for critic, ref in critics.items():
        file, about = settings.work / f"{critic}.json", _describe(ref, settings)
        content: dict[str, Any] = read_json(file) if file.exists() else {"about": about, "scores": {}}
        if content["about"] != about:
            raise UserError(f"{file}: of another critic or other numbers ({content['about']}); give another --work")
        for what, how in columns:
            if f"{what}, {how}" not in content["scores"]:
                print(f"{critic}: {what}, {how} ...", file=sys.stderr, flush=True)
                content["scores"][f"{what}, {how}"] = measure(ref, what, how)
                write_json(file, content)
        scores[critic] = {f"{what}, {how}": content["scores"][f"{what}, {how}"] for what, how in columns}
    return CriticScores(scores, with_verifier, len(questions["pool"]), len(first_attempts))


def _describe(ref: str, settings: CriticSettings) -> dict[str, Any]:
    """What the scores of a critic depend on."""
    numbers = {"stories": settings.stories, "attempts": settings.attempts, "seed": settings.seed}
    return {"version": VERSION, "weights": weight_digests([ref])[ref], **numbers}


def report_critics(
    critics: Mapping[str, str],
    settings: CriticSettings,
    output: Path,
    module: str,
    seconds: Mapping[str, float | None] | None = None,
) -> str:
    """Measures, writes `output` (JSON) and its Markdown, prints and returns the latter.

    seconds: of what was done before, by name, None where they are not known.
    """
    torch.set_num_threads(1)
    found = measure_critics(critics, settings)
    cells = compare_scores(found.scores)
    environment = describe_run(module, sys.argv[1:], choose_device("auto"))
    text = (
        f"{format_table(cells)}\n\n{found.pool_size} images of the pool, {found.num_first_attempts} first attempts, "
        f"{settings.stories} stories of the test split, seed {settings.seed}, up to {settings.attempts} images per "
        f"step; with the verifier as critic {format_percent(bootstrap_interval([found.with_verifier]))} of the stories "
        "are right. Brackets: 95 % bootstrap over images or stories; differences are paired. "
        f"{environment['hardware']}; {format_versions(environment)}.\n"
    )
    if seconds:
        times = ", ".join(f"{name} {'unknown' if s is None else format(s, '.0f')}" for name, s in seconds.items())
        text += f"\nWall-clock seconds: {times}.\n"
    print(text)
    rows = {critic: {what: asdict(cell) for what, cell in row.items()} for critic, row in cells.items()}
    content = {"version": VERSION, "environment": environment, "seconds": seconds, "rows": rows}
    write_json(output, content | asdict(found))
    write_atomic(output.with_suffix(".md"), text)
    return text


def main(
    critics: Annotated[list[str], typer.Argument(metavar="NAME=MODEL...", help="Critics, the base first.")],
    stories: Annotated[int, typer.Option(help="How many stories.")] = 300,
    attempts: Annotated[int, typer.Option(help="Most images per step.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the stories.")] = 0,
    work: Annotated[Path, typer.Option(metavar="DIR", help="Folder of finished measurements.")] = Path("runs/critics"),
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
    file = output or result_file("critics", choose_device("auto"), "json")
    report_critics(named, CriticSettings(stories, attempts, seed, work), file, MODULE)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    run_cli(app, MODULE)
