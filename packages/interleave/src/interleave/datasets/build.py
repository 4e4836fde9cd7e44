"""`interleave data build`: trajectories, their scores, and the sets made of them, in one folder that can go on.

config.yaml  requests.jsonl  trace.jsonl  pictures/  scores/ (the judge's)      only grow; nothing in them is done twice
planner_sft.jsonl  critic_sft.jsonl  critic_rl.jsonl  *.val.jsonl  set.json     made of them anew at the end
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pydantic_core import PydanticSerializationError

from imgen_common.config import to_yaml
from imgen_common.errors import UserError
from imgen_common.files import atomic_file, write_atomic, writing
from imgen_common.run_folder.find import CONFIG
from imgen_common.run_folder.folder import RunFolder
from interleave.agents import scoring
from interleave.agents.prompts import load_template, render_critic, render_planner
from interleave.datasets import requests as prompts
from interleave.datasets.config import DataConfig, ShapesPrompts, TemplatesConfig
from interleave.datasets.filters import INFO, SETS, SPLITS, Chosen, SetInfo, SetName, Split, choose, file_name
from interleave.datasets.rows import RlRow, SftRow, Story, critic_row, pair, planner_row, rl_row
from interleave.loop import requests as request_files
from interleave.loop import run
from interleave.loop.components import Components
from interleave.loop.config import NoCritic, NoPlanner
from interleave.loop.engine import Engine, package_versions
from interleave.models.concurrency import map_concurrently
from interleave.protocols import CriticInput, Judge
from interleave.records import Attempt, Record, Request, Scores, Trajectory
from interleave.storage.images import IMAGES, ImageStore
from interleave.storage.trace import TRACE, Trace, TraceEntry, read_trace

SCORES = "scores"
MAY_DIFFER = (
    *(f"run.{key}" for key in run.MAY_DIFFER),
    *("judge", "max_unscored", "trajectories", "budget", "templates", "filters"),
)
"""What may change between the sessions of a build: nothing that a trajectory depends on."""


@dataclass(frozen=True)
class Telling:
    """Who is told of progress: of every new record, and of pictures scored, of how many."""

    record: Callable[[Record], None] = lambda record: None
    scored: Callable[[int, int], None] = lambda done, total: None


def build(
    out: Path, config: DataConfig, command: Sequence[str], telling: Callable[[int], Telling], retry: bool = False
) -> SetInfo:
    """Begin a build in a new folder, or go on with the one that is there, to its sets.

    telling: given the number of requests that are left.  retry: trajectories that ended early are tried again.
    Raises UserError where a part cannot be had or does not answer, the judge fails too often, or the folder is
    another's; what is done is kept.
    """
    with opened(out, config, command) as requests:
        left = len(unfinished(out, requests, retry))
        parts = make_parts(config) if left else None
        judge = scoring.build_judge(config.judge) if config.judge is not None else None
        return asyncio.run(go_on(out, config, requests, parts, judge, telling(left), retry))


@contextlib.contextmanager
def opened(out: Path, config: DataConfig, command: Sequence[str]) -> Iterator[list[Request]]:
    """The requests of the build in `out`, a new one or one to go on with, while no one else works on it.

    Until something is recorded the configuration may be any other: so a mistake in it is mended by beginning again.
    """
    _check(config.templates)
    begun = is_begun(out)
    folder = (
        RunFolder.open(out, config if begun else None, command, may_differ=MAY_DIFFER)
        if (out / CONFIG).is_file()
        else RunFolder.create(out, config, command)
    )
    with folder:
        write_atomic(out / CONFIG, to_yaml(config))
        if not begun:
            request_files.save_requests(prompts.ask(config.prompts, ImageStore(out / IMAGES)), out)
        yield request_files.load_requests(out)


def is_begun(out: Path) -> bool:
    """Whether anything was recorded in a folder."""
    return (out / TRACE).is_file() and (out / TRACE).stat().st_size > 0


def _check(templates: TemplatesConfig) -> None:
    """Raises UserError if there is no such template, or it is one for another agent."""
    white = scoring.white_image()
    render_planner(load_template(templates.planner_text), scoring.PROBE, ())
    render_planner(load_template(templates.planner_images), scoring.PROBE, (white,))
    render_critic(load_template(templates.critic), CriticInput(white, white, scoring.PROBE, scoring.PROBE))


def unfinished(out: Path, requests: Sequence[Request], retry: bool) -> list[Request]:
    """The requests that have no trajectory yet, or with `retry` none that is complete."""
    recorded = read_trace(out)

    def is_finished(request: Request) -> bool:
        trajectory = recorded.get(request.id, TraceEntry()).trajectory
        return trajectory is not None and (not retry or trajectory.status == "complete")

    return [request for request in requests if not is_finished(request)]


def make_parts(config: DataConfig) -> Components:
    """Teachers and generator, models loaded.  Raises UserError where one cannot be had."""
    if config.teacher == "run":
        return run.build_components(config.run)
    from interleave.datasets.teachers import KnowingCritic, StoryPlanner

    assert isinstance(config.prompts, ShapesPrompts)
    alone = config.run.model_copy(update={"planner": NoPlanner(), "critic": NoCritic()})
    planner = StoryPlanner(prompts.stories(config.prompts).values())
    return replace(run.build_components(alone), planner=planner, critic=KnowingCritic())


async def go_on(
    out: Path,
    config: DataConfig,
    requests: Sequence[Request],
    parts: Components | None,
    judge: Judge | None,
    telling: Telling,
    retry: bool = False,
) -> SetInfo:
    """What is left of a build: trajectories (with `parts`), scores (with `judge`), sets.  Closes both."""
    try:
        if parts is not None:
            if judge is not None:
                await scoring.check_judge(judge)
            await run.check_endpoints(parts)
            await _tell_stories(out, config, requests, parts, telling, retry)
        stories, ends = _gathered(out, config, requests)
        cached = scoring.CachedJudge(judge, out / SCORES) if judge is not None else None
        scored, failed = await _scored(out, config, stories, cached, telling)
    finally:
        for part in (parts, judge):
            if part is not None:
                await part.close()
    chosen = choose(scored, config.filters, config.run.seed)
    rows = _write_sets(out, chosen, config.templates)
    info = _info(config, scored, chosen, rows, ends, failed, judge)
    with writing(out):
        write_atomic(out / INFO, info.model_dump_json(indent=1) + "\n")
    return info


# --- trajectories ----------------------------------------------------------------------------------------------------


async def _tell_stories(
    out: Path, config: DataConfig, requests: Sequence[Request], parts: Components, telling: Telling, retry: bool
) -> None:
    """Trajectories of all requests, several at once, until the budget is spent."""
    budget, began, drawn = config.budget, time.monotonic(), _num_pictures(out)

    def record(new: Record) -> None:
        nonlocal drawn
        drawn += isinstance(new, Attempt) and new.image_id is not None
        telling.record(new)

    def is_spent() -> bool:
        too_many = budget.max_images is not None and drawn >= budget.max_images
        return too_many or (budget.max_seconds is not None and time.monotonic() - began >= budget.max_seconds)

    with Trace(out) as trace:
        pictures = ImageStore(out / IMAGES)
        engine = Engine(parts, config.run.loop, config.run.seed, trace, pictures, record, retry_failed=retry)

        async def one(request: Request) -> None:
            if not is_spent():
                await engine.run(request)

        await map_concurrently(one, requests, config.run.loop.concurrency)


def _num_pictures(out: Path) -> int:
    return sum(a.image_id is not None for recorded in read_trace(out).values() for a in recorded.attempts.values())


def _gathered(out: Path, config: DataConfig, requests: Sequence[Request]) -> tuple[list[Story], Counter[str]]:
    """The finished stories in the order of the requests, then those of other folders with their pictures copied; and
    how the trajectories ended."""
    recorded = read_trace(out)
    own = (recorded.get(request.id, TraceEntry()) for request in requests)
    stories = [story for story in map(_story, own) if story is not None]
    ends = Counter({"not finished": len(requests) - len(stories)})
    taken = {story.trajectory.id for story in stories}
    for folder in map(Path, config.trajectories):
        for story in _of_folder(folder, ImageStore(out / IMAGES)):
            name = story.trajectory.id
            while name in taken:
                name += f"@{folder.name}"
            taken.add(name)
            stories.append(_named(story, name))
    ends.update(story.trajectory.status for story in stories)
    return stories, +ends


def _story(recorded: TraceEntry) -> Story | None:
    """None where the trajectory has not ended."""
    if recorded.trajectory is None:
        return None
    return Story(recorded.trajectory, tuple(recorded.attempts[key] for key in sorted(recorded.attempts)))


def _of_folder(folder: Path, pictures: ImageStore) -> Iterator[Story]:
    """Another folder's stories, once the pictures that rows need are in the store.  Raises UserError."""
    if not (folder / TRACE).is_file():
        raise UserError(f"trajectories: {folder}: no {TRACE} in it; give folders of builds, runs or imported records")
    source = ImageStore(folder / IMAGES)
    for story in filter(None, map(_story, read_trace(folder).values())):
        shown = [image_id for attempt in story.judged() for image_id in pair(attempt)]
        for image_id in (*story.trajectory.request.image_ids, *shown):
            if image_id not in pictures:
                source.copy(image_id, pictures.path(image_id))
        yield story


def _named(story: Story, name: str) -> Story:
    if name == story.trajectory.id:
        return story
    attempts = tuple(attempt.model_copy(update={"trajectory_id": name}) for attempt in story.attempts)
    return Story(story.trajectory.model_copy(update={"id": name}), attempts)


# --- scores ----------------------------------------------------------------------------------------------------------


async def _scored(
    out: Path, config: DataConfig, stories: Sequence[Story], judge: Judge | None, telling: Telling
) -> tuple[list[Story], Counter[str]]:
    """The stories with the judge's scores on every judged attempt, and why some have none.

    Without a judge they keep the scores they have.  Raises UserError once it failed on more than
    `config.max_unscored` of them; what it scored is kept on disk.
    """
    if judge is None:
        return list(stories), Counter()
    pictures = ImageStore(out / IMAGES)
    judged = [attempt for story in stories for attempt in story.judged()]
    found = {_key(a): a.scores for a in judged if a.scores is not None and a.scores.judge_id == judge.id}
    left = [attempt for attempt in judged if _key(attempt) not in found]
    scores, failed = await scoring.score_all(
        judge,
        [partial(_look, attempt, pictures) for attempt in left],
        config.run.loop.concurrency,
        config.max_unscored,
        telling.scored,
        f"go on with interleave data build --resume {out} when it answers",
    )
    found |= {_key(attempt): one for attempt, one in zip(left, scores, strict=True) if one is not None}
    return [_with_scores(story, found) for story in stories], failed


def _look(attempt: Attempt, pictures: ImageStore) -> CriticInput:
    before, after = map(pictures.get, pair(attempt))
    return CriticInput(before, after, attempt.original_prompt, attempt.prompt_used)


def _key(attempt: Attempt) -> tuple[str, int, int]:
    return attempt.trajectory_id, attempt.step, attempt.attempt


def _with_scores(story: Story, found: Mapping[tuple[str, int, int], Scores]) -> Story:
    return Story(
        story.trajectory,
        tuple(attempt.model_copy(update={"scores": found.get(_key(attempt))}) for attempt in story.attempts),
    )


# --- sets ------------------------------------------------------------------------------------------------------------


def _write_sets(out: Path, chosen: Chosen, templates: TemplatesConfig) -> dict[SetName, dict[Split, int]]:
    """Write the files of rows, each whole; how many rows each has.  A file without rows is not there."""
    (out / INFO).unlink(missing_ok=True)
    text, pictured = load_template(templates.planner_text), load_template(templates.planner_images)
    critic = load_template(templates.critic)
    made: Mapping[SetName, Callable[[Split], Iterator[SftRow | RlRow | None]]] = {
        "planner_sft": lambda split: (
            planner_row(story, pictured if story.trajectory.request.image_ids else text)
            for story in chosen.planner_sft[split]
        ),
        "critic_sft": lambda split: (
            _placed(critic_row(example.story, example.attempt, critic), example.attempt)
            for example in chosen.critic_sft[split]
        ),
        "critic_rl": lambda split: (
            rl_row(example.attempt, example.attempt.scores)
            for example in chosen.critic_rl[split]
            if example.attempt.scores is not None
        ),
    }
    return {
        name: {split: write_rows(out / file_name(name, split), filter(None, made[name](split))) for split in SPLITS}
        for name in SETS
    }


def _placed(row: SftRow | None, attempt: Attempt) -> SftRow | None:
    """The row with its place in the trajectory."""
    return row and row.model_copy(update={"extra": {"step": attempt.step, "attempt": attempt.attempt}})


def write_rows(path: Path, rows: Iterable[SftRow | RlRow]) -> int:
    """Write JSON lines, whole or not at all, or no file where there are no rows; how many rows.

    Raises UserError for a row that no UTF-8 text can hold.
    """
    count = 0
    with writing(path):
        with atomic_file(path) as file:
            for count, row in enumerate(rows, 1):
                file.write(_line(row, f"{path.name}: row {count}").encode())
        if not count:
            path.unlink()
    return count


def _line(row: SftRow | RlRow, where: str) -> str:
    try:
        return row.model_dump_json() + "\n"
    except PydanticSerializationError:
        raise UserError(f"{where}: holds half of a surrogate pair, which is no text; mend or remove the row") from None


def _info(
    config: DataConfig,
    stories: Sequence[Story],
    chosen: Chosen,
    rows: Mapping[SetName, Mapping[Split, int]],
    ends: Mapping[str, int],
    failed: Mapping[str, int],
    judge: Judge | None,
) -> SetInfo:
    attempts = [attempt for story in stories for attempt in story.attempts]
    trajectories = [story.trajectory for story in stories]
    notes = list(chosen.notes)
    if waiting := ends.get("not finished"):
        notes.append(f"{waiting} requests have no trajectory yet; go on with --resume, or a larger budget")
    if judge is None:
        notes.append("no judge: only scores that the trajectories brought with them were used")
    templates = config.templates.model_dump()
    return SetInfo(
        rows=rows,
        source="build",
        filters=chosen.filters,
        notes=tuple(notes),
        seed=config.run.seed,
        judge=judge.id if judge is not None else None,
        scored=sum(attempt.scores is not None for attempt in attempts),
        unscored=failed,
        trajectories=ends,
        attempts=Counter(attempt.status for attempt in attempts),
        categories=_categories(trajectories),
        planners=tuple(sorted({t.planner.model for t in trajectories if t.planner is not None})),
        generators=tuple(sorted({attempt.generator.id for attempt in attempts})),
        folders=config.trajectories,
        templates=templates,
        template_hashes={name: load_template(ref).hash for name, ref in templates.items()},
        versions=package_versions(),
    )


def _categories(trajectories: Iterable[Trajectory]) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {}
    for trajectory in trajectories:
        end = "complete" if trajectory.status == "complete" else "ended early"
        found.setdefault(trajectory.request.category, Counter())[end] += 1
    return dict(sorted(found.items()))
