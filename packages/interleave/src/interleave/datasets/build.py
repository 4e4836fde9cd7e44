"""`interleave data build`: trajectories, their scores, and the sets made of them, in one folder that can be resumed.

config.yaml  requests.jsonl  trace.jsonl  images/                             only grow; nothing in them is done twice
scores/JUDGE/answers.jsonl                                                    what a judge said; likewise
planner_sft.jsonl  critic_sft.jsonl  critic_rl.jsonl  *.val.jsonl  set.json     made from them at the end
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic_core import PydanticSerializationError

from imgen_common.config import to_yaml
from imgen_common.errors import UserError, quoted
from imgen_common.files import atomic_file, write_atomic, writing
from imgen_common.judging.questions import Question
from imgen_common.run_folder.data import FIRST_CONFIG, moved_models
from imgen_common.run_folder.find import CONFIG
from imgen_common.run_folder.folder import RunFolder
from interleave.agents import scoring
from interleave.agents.prompts import expect_planner, load_template, render_critic
from interleave.datasets import requests as prompts
from interleave.datasets.config import DataConfig, ShapesPrompts, TemplatesConfig
from interleave.datasets.filters import (
    INFO,
    SETS,
    SPLITS,
    SelectedRows,
    SetInfo,
    SetName,
    Split,
    file_name,
    select_rows,
)
from interleave.datasets.rows import (
    FinishedStory,
    RlRow,
    SftRow,
    before_and_after,
    make_critic_row,
    make_planner_row,
    make_rl_row,
)
from interleave.loop import requests as request_files
from interleave.loop import run
from interleave.loop.config import NoCritic, NoPlanner
from interleave.loop.engine import Engine, package_versions
from interleave.loop.shards import Shard
from interleave.models.concurrency import map_concurrently
from interleave.protocols import Components, CriticInput, HashedImage, Judge
from interleave.records import Attempt, Record, Request, Trajectory
from interleave.storage.images import IMAGES, ImageStore
from interleave.storage.trace import TRACE, Trace, TraceEntry, read_trace

MAY_DIFFER = (
    *(f"run.{key}" for key in run.MAY_DIFFER),
    *("judge", "max_unscored", "trajectories", "budget", "templates", "filters"),
    *("prices", "confirm_calls", "confirm_money"),
)
"""Keys that may change when a build is resumed: the trajectories depend on none of them."""


@dataclass(frozen=True)
class BuildProgress:
    """Callbacks of a build: with every new record; with what a chat model will be asked as judge, before it is asked
    (it may raise); and with the number of scored images of how many."""

    on_record: Callable[[Record], None] = lambda record: None
    on_questions: Callable[[Iterable[Question]], None] = lambda questions: None
    on_scored: Callable[[int, int], None] = lambda done, total: None


def build_sets(
    out: Path,
    config: DataConfig,
    command: Sequence[str],
    make_progress: Callable[[int], BuildProgress],
    retry: bool = False,
) -> SetInfo:
    """Starts a build in a new folder or resumes the one that is there, and makes its sets.

    make_progress: called with the number of requests that are left.  retry: failed trajectories are tried again.
    Raises UserError where a component cannot be loaded or does not answer, the judge fails too often, or the folder
    holds another build; finished work is kept.
    """
    with open_build(out, config, command) as requests:
        left = unfinished_requests(out, requests, retry)
        parts = config.run.model_copy(update={"judge": config.run.judge or config.judge})
        for request in left if config.teacher == "run" else ():
            run.check_request(parts, request, section="run.")
        if left:
            prompts.check_models(out, config.run)
        made = make_parts(config) if left else None
        judge = config.judge.build() if config.judge is not None else None
        return asyncio.run(continue_build(out, config, requests, made, judge, make_progress(len(left)), retry))


@contextlib.contextmanager
def open_build(out: Path, config: DataConfig, command: Sequence[str]) -> Iterator[list[Request]]:
    """Opens the build in `out`, new or resumed, for this process alone, and gives its requests.  While nothing is
    recorded the configuration may change, so that a mistake in it can be fixed by starting again."""
    _check_templates(config.templates)
    _check_trajectories(out, config)
    begun = has_records(out)
    moved = moved_models(out, config, {**run.places(config.run, "run."), "prompts.path": "prompts"}) if begun else []
    folder = (
        RunFolder.open(out, config if begun else None, command, may_differ=(*MAY_DIFFER, *moved))
        if (out / CONFIG).is_file()
        else RunFolder.create(out, config, command)
    )
    with folder:
        if moved:
            prompts.check_models(out, config.run)
        write_atomic(out / CONFIG, to_yaml(config))
        if begun:
            prompts.check_same(out, config.prompts)
        else:
            write_atomic(out / FIRST_CONFIG, to_yaml(config))
            requests = prompts.make_requests(config.prompts, ImageStore(out / IMAGES))
            prompts.record(out, requests, config.run)
            request_files.save_requests(Shard.parse(config.shard).of(requests), out)
        yield request_files.load_requests(out)


def has_records(out: Path) -> bool:
    """Whether a folder holds records."""
    return (out / TRACE).is_file() and (out / TRACE).stat().st_size > 0


def _check_templates(templates: TemplatesConfig) -> None:
    """Raises UserError if a template does not exist or is one for another agent."""
    white = HashedImage.white(32, 32)
    expect_planner(load_template(templates.planner_text))
    expect_planner(load_template(templates.planner_images))
    render_critic(load_template(templates.critic), CriticInput(white, white, scoring.PROBE, scoring.PROBE))


def unfinished_requests(out: Path, requests: Sequence[Request], retry: bool) -> list[Request]:
    """The requests that have no trajectory yet, or with `retry` none that is complete."""
    recorded = read_trace(out)

    def is_finished(request: Request) -> bool:
        trajectory = recorded.get(request.id, TraceEntry()).trajectory
        return trajectory is not None and (not retry or trajectory.is_whole)

    return [request for request in requests if not is_finished(request)]


def make_parts(config: DataConfig) -> Components:
    """Teachers and generator, with their models loaded.  Raises UserError where one cannot be loaded."""
    if config.teacher == "run":
        return run.build_components(config.run)
    from interleave.datasets.teachers import StoryPlanner, TeacherCritic

    assert isinstance(config.prompts, ShapesPrompts)
    alone = config.run.model_copy(update={"planner": NoPlanner(), "critic": NoCritic()})
    planner = StoryPlanner(prompts.sample_stories(config.prompts).values())
    return replace(run.build_components(alone), planner=planner, critic=TeacherCritic())


async def continue_build(
    out: Path,
    config: DataConfig,
    requests: Sequence[Request],
    parts: Components | None,
    judge: Judge | None,
    progress: BuildProgress,
    retry: bool = False,
) -> SetInfo:
    """Does what is left of a build: trajectories (with `parts`), scores (with `judge`), sets.  Closes both."""
    try:
        if parts is not None:
            if judge is not None:
                await scoring.check_judge(judge)
            await run.check_endpoints(parts, num_images=run.fewest_images(requests))
            await _run_requests(out, config, requests, parts, progress, retry)
        stories, ends = _collect_stories(out, config, requests)
        scored, failed = await _score_stories(out, config, stories, judge, progress)
    finally:
        for part in (parts, judge):
            if part is not None:
                await part.close()
    selected = select_rows(scored, config.filters, config.run.seed)
    rows = _write_sets(out, selected, config.templates)
    info = _describe_set(config, scored, selected, rows, ends, failed, judge)
    with writing(out):
        write_atomic(out / INFO, info.model_dump_json(indent=1) + "\n")
    return info


# --- trajectories ----------------------------------------------------------------------------------------------------


async def _run_requests(
    out: Path, config: DataConfig, requests: Sequence[Request], parts: Components, progress: BuildProgress, retry: bool
) -> None:
    """Runs all requests, several at once, until the budget is spent."""
    budget, began = config.budget, time.monotonic()
    num_images = sum(len(entry.attempts) + len(entry.replaced) for entry in read_trace(out).values())

    def record(new: Record) -> None:
        nonlocal num_images
        num_images += isinstance(new, Attempt)
        progress.on_record(new)

    def is_spent() -> bool:
        too_many = budget.max_images is not None and num_images >= budget.max_images
        return too_many or (budget.max_seconds is not None and time.monotonic() - began >= budget.max_seconds)

    with Trace(out) as trace:
        images = ImageStore(out / IMAGES)
        engine = Engine(parts, config.run.loop, config.run.seed, trace, images, record, retry_failed=retry)

        async def one(request: Request) -> None:
            if not is_spent():
                await engine.run(request)

        await map_concurrently(one, requests, config.run.loop.concurrency)


def _collect_stories(
    out: Path, config: DataConfig, requests: Sequence[Request]
) -> tuple[list[FinishedStory], Counter[str]]:
    """The finished stories in the order of the requests, then those of other folders, whose images are copied; and how
    the trajectories ended."""
    recorded = read_trace(out)
    own = (recorded.get(request.id, TraceEntry()) for request in requests)
    stories = [story for story in map(_finished_story, own) if story is not None]
    ends = Counter({"not finished": len(requests) - len(stories)})
    taken = {story.trajectory.id for story in stories}
    for folder in map(Path, config.trajectories):
        for story in _load_stories(folder, ImageStore(out / IMAGES)):
            name = story.trajectory.id
            while name in taken:
                name += f"@{folder.name}"
            taken.add(name)
            attempts = tuple(attempt.model_copy(update={"trajectory_id": name}) for attempt in story.attempts)
            stories.append(FinishedStory(story.trajectory.model_copy(update={"id": name}), attempts))
    ends.update(story.trajectory.status for story in stories)
    return stories, +ends


def _finished_story(recorded: TraceEntry) -> FinishedStory | None:
    """The story of a request; None where its trajectory has not ended."""
    if recorded.trajectory is None:
        return None
    return FinishedStory(recorded.trajectory, tuple(recorded.attempts[key] for key in sorted(recorded.attempts)))


def _load_stories(folder: Path, images: ImageStore) -> Iterator[FinishedStory]:
    """The stories of another folder, after the images that rows need are copied to the store.  Raises UserError."""
    source = ImageStore(folder / IMAGES)
    for story in filter(None, map(_finished_story, read_trace(folder).values())):
        shown = [image_id for attempt in story.judged_attempts() for image_id in before_and_after(attempt)]
        for image_id in (*story.trajectory.request.image_ids, *shown):
            if image_id not in images:
                source.copy(image_id, images.path(image_id))
        yield story


def _check_trajectories(out: Path, config: DataConfig) -> None:
    """Raises UserError for a folder without trajectories, and one that would count twice."""
    seen = {out.resolve(): "is the build itself"}
    for folder in map(Path, config.trajectories):
        if (why := seen.setdefault(folder.resolve(), "")) or not (folder / TRACE).is_file():
            what = f"no {TRACE} in it; give folders of builds, runs or imported records"
            what = f"{why}, whose trajectories would count twice; leave it out" if why else what
            raise UserError(f"trajectories: {folder}: {what}")
        seen[folder.resolve()] = "is given twice"


async def _score_stories(
    out: Path, config: DataConfig, stories: Sequence[FinishedStory], judge: Judge | None, progress: BuildProgress
) -> tuple[list[FinishedStory], Counter[str]]:
    """The stories with the judge's scores of every judged attempt, and how often it failed by kind.

    Without a judge they keep the scores they have.  Raises UserError once it failed on more than
    `config.max_unscored` of them; what it scored is kept on disk.
    """
    if judge is None:
        return list(stories), Counter()
    judged = [attempt for story in stories for attempt in story.judged_attempts()]
    found = {_attempt_key(a): a.scores for a in judged if a.scores is not None and a.scores.judge_id == judge.id}
    left = [attempt for attempt in judged if _attempt_key(attempt) not in found]
    work = scoring.ImageScoring(
        judge,
        out,
        config.run.loop.concurrency,
        config.max_unscored,
        f"resume with interleave data build --resume {quoted(out)} when it answers, or with a higher max_unscored",
        progress.on_questions,
        progress.on_scored,
    )
    scores, failed = await work.score_all([(*before_and_after(attempt), attempt.original_prompt) for attempt in left])
    found |= {_attempt_key(attempt): one for attempt, one in zip(left, scores, strict=True) if one is not None}

    def with_score(attempt: Attempt) -> Attempt:
        return attempt.model_copy(update={"scores": found.get(_attempt_key(attempt))})

    return [replace(story, attempts=tuple(map(with_score, story.attempts))) for story in stories], failed


def _attempt_key(attempt: Attempt) -> tuple[str, int, int]:
    return attempt.trajectory_id, attempt.step, attempt.attempt


# --- sets ------------------------------------------------------------------------------------------------------------


def _write_sets(out: Path, selected: SelectedRows, templates: TemplatesConfig) -> dict[SetName, dict[Split, int]]:
    """Writes the files of rows atomically; returns how many rows each has.  A file without rows is not written."""
    (out / INFO).unlink(missing_ok=True)
    text, with_images = load_template(templates.planner_text), load_template(templates.planner_images)
    critic = load_template(templates.critic)
    made: Mapping[SetName, Callable[[Split], Iterator[SftRow | RlRow | None]]] = {
        "planner_sft": lambda split: (make_planner_row(s, text, with_images) for s in selected.planner_sft[split]),
        "critic_sft": lambda split: (
            _with_position(make_critic_row(example.story, example.attempt, critic), example.attempt)
            for example in selected.critic_sft[split]
        ),
        "critic_rl": lambda split: (make_rl_row(example.attempt) for example in selected.critic_rl[split]),
    }
    return {
        name: {split: write_rows(out / file_name(name, split), filter(None, made[name](split))) for split in SPLITS}
        for name in SETS
    }


def _with_position(row: SftRow | None, attempt: Attempt) -> SftRow | None:
    return row and row.model_copy(update={"extra": {"step": attempt.step, "attempt": attempt.attempt}})


def write_rows(path: Path, rows: Iterable[SftRow | RlRow]) -> int:
    """Writes JSON lines atomically, none without rows; returns their number.  Raises UserError if one is not UTF-8."""
    count = 0
    with writing(path):
        with atomic_file(path) as file:
            for count, row in enumerate(rows, 1):
                try:
                    file.write(row.model_dump_json().encode() + b"\n")
                except PydanticSerializationError:
                    what = f"{path.name}: row {count}: holds half of a surrogate pair, which is no text"
                    raise UserError(f"{what}; fix or remove the row") from None
        if not count:
            path.unlink()
    return count


def _describe_set(
    config: DataConfig,
    stories: Sequence[FinishedStory],
    selected: SelectedRows,
    rows: Mapping[SetName, Mapping[Split, int]],
    ends: Mapping[str, int],
    failed: Mapping[str, int],
    judge: Judge | None,
) -> SetInfo:
    attempts = [attempt for story in stories for attempt in story.attempts]
    trajectories = [story.trajectory for story in stories]
    notes = list(selected.notes)
    if waiting := ends.get("not finished"):
        notes.append(f"{waiting} requests have no trajectory yet; continue with --resume, or with a larger budget")
    if early := sum(not trajectory.is_whole for trajectory in trajectories):
        notes.append(f"{early} trajectories ended early; --resume with --retry tries those of this build again")
    if judge is None:
        notes.append("no judge: only scores that the trajectories have already were used")
    return SetInfo(
        rows=rows,
        source="build",
        filters=selected.filters,
        notes=tuple(notes),
        seed=config.run.seed,
        judge=judge.id if judge is not None else None,
        scored=sum(attempt.scores is not None for attempt in attempts),
        unscored=failed,
        trajectories=ends,
        attempts=Counter(attempt.status for attempt in attempts),
        categories=_count_categories(trajectories),
        planners=tuple(sorted({t.planner.model for t in trajectories if t.planner is not None})),
        generators=tuple(sorted({attempt.generator.id for attempt in attempts})),
        folders=config.trajectories,
        templates=dict(config.templates),
        template_hashes={name: load_template(ref).hash for name, ref in config.templates},
        versions=package_versions(),
    )


def _count_categories(trajectories: Iterable[Trajectory]) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {}
    for trajectory in trajectories:
        end = "complete" if trajectory.status == "complete" else "not complete"
        found.setdefault(trajectory.request.category, Counter())[end] += 1
    return dict(sorted(found.items()))
