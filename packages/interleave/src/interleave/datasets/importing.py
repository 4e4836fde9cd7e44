"""Sets from the published formats of the reference code."""

from collections.abc import Container, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Literal

from imgen_common.errors import UserError
from imgen_common.files import atomic_folder, files_below, write_atomic
from interleave.agents.prompts import load_template
from interleave.datasets.build import write_rows
from interleave.datasets.config import TemplatesConfig
from interleave.datasets.files import read_each
from interleave.datasets.filters import INFO, SetInfo, SetName, file_name
from interleave.datasets.formats.execution import read_execution_record
from interleave.datasets.formats.training import read_rl, read_sft
from interleave.datasets.rows import FinishedStory, RlRow, SftRow, make_critic_row, make_planner_row
from interleave.records import PlanRecord
from interleave.storage.images import IMAGES, ImageStore
from interleave.storage.trace import Trace

Format = Literal["sharegpt", "rl", "execution_record"]
Role = Literal["planner", "critic"]
RECORD = "execution_record.json"
MAX_REASONS = 10
TEMPLATES = TemplatesConfig(planner_text="planner_text", planner_images="planner_images", critic="critic")
"""Templates of the rows from execution records; `data build` has settings for them."""


def import_set(form: Format, path: Path, out: Path, root: Path | None = None, role: Role | None = None) -> SetInfo:
    """Makes a set in the new folder `out` from the files in `path`, completely or not at all.

    sharegpt: a JSON list of {messages, images}, of a `role`.  rl: JSON lines.  execution_record: a record, or a folder
    of them; their trajectories are kept beside the rows, for `data build` to score and filter (`trajectories`).
    root: folder that holds all images; by default that of `path`.
    Rows and records that cannot be read are left out, and the set's notes say why.  Raises UserError if none is left.
    """
    if (form == "sharegpt") != (role is not None):
        raise UserError("--role planner or --role critic goes with sharegpt, which does not name the agent of its rows")
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    inside = root or (path if path.is_dir() else path.parent)
    with atomic_folder(out) as fresh:
        images, left_out = ImageStore(fresh / IMAGES), list[str]()
        files: dict[SetName, Iterator[SftRow | RlRow]]
        if form == "sharegpt":
            name: SetName = "planner_sft" if role == "planner" else "critic_sft"
            files = {name: read_sft(path, inside, images, left_out)}
        elif form == "rl":
            files = {"critic_rl": read_rl(path, inside, images, left_out)}
        else:
            files = _story_rows(_import_stories(path, inside, images, fresh, left_out))
        rows = {name: write_rows(fresh / file_name(name, "train"), made) for name, made in files.items()}
        if not any(rows.values()):
            raise UserError(f"{path}: no rows in it" + (f" that can be read; {left_out[0]}" if left_out else ""))
        info = SetInfo(
            rows={name: {"train": count} for name, count in rows.items()},
            source=f"{form} {path.name}",
            notes=_describe_left_out(form, left_out),
            templates=TEMPLATES.model_dump() if form == "execution_record" else {},
            versions={"interleave": metadata.version("interleave")},
        )
        write_atomic(fresh / INFO, info.model_dump_json(indent=1) + "\n")
    return info


def _describe_left_out(form: Format, left_out: Sequence[str]) -> tuple[str, ...]:
    if not left_out:
        return ()
    what = "records" if form == "execution_record" else "rows"
    more = (f"... and {len(left_out) - MAX_REASONS} more",) if len(left_out) > MAX_REASONS else ()
    return (f"{what} left out, since they cannot be read: {len(left_out)}", *left_out[:MAX_REASONS], *more)


def _import_stories(path: Path, root: Path, images: ImageStore, out: Path, left_out: list[str]) -> list[FinishedStory]:
    """The stories of the records; they are written to a trace too."""
    files = files_below(path, RECORD) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: no {RECORD} in it")
    stories: dict[str, FinishedStory] = {}
    records = ((str(file), file) for file in files)
    with Trace(out) as trace:
        for story in read_each(records, lambda _, file: _import_story(file, path, root, images, stories), left_out):
            trajectory = story.trajectory
            stories[trajectory.id] = story
            shared = {name: getattr(trajectory, name) for name in ("request", "planner", "plan")}
            plan = PlanRecord(trajectory_id=trajectory.id, **shared)
            for record in (plan, *story.attempts, trajectory):
                trace.append(record)
    return list(stories.values())


def _import_story(file: Path, path: Path, root: Path, images: ImageStore, others: Container[str]) -> FinishedStory:
    """The story of a record; where another has its id already, the path of its folder is its id."""
    story = read_execution_record(file, root, images)
    if story.trajectory.id not in others:
        return story
    name = file.parent.relative_to(path).as_posix()
    request = story.trajectory.request.model_copy(update={"id": name})
    trajectory = story.trajectory.model_copy(update={"id": name, "request": request})
    return FinishedStory(trajectory, tuple(a.model_copy(update={"trajectory_id": name}) for a in story.attempts))


def _story_rows(stories: list[FinishedStory]) -> dict[SetName, Iterator[SftRow | RlRow]]:
    """The rows of every plan and of every judged attempt, unfiltered."""
    text, with_images = load_template(TEMPLATES.planner_text), load_template(TEMPLATES.planner_images)
    critic = load_template(TEMPLATES.critic)
    plans = (make_planner_row(story, text, with_images) for story in stories)
    verdicts = (make_critic_row(story, attempt, critic) for story in stories for attempt in story.judged_attempts())
    return {"planner_sft": filter(None, plans), "critic_sft": filter(None, verdicts)}
