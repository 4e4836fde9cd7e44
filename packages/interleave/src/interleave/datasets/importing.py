"""Sets from the reference's published formats."""

from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal

from imgen_common.errors import UserError
from imgen_common.files import atomic_folder, write_atomic
from interleave.agents.prompts import load_template
from interleave.datasets.build import write_rows
from interleave.datasets.config import TemplatesConfig
from interleave.datasets.filters import INFO, SetInfo, SetName, file_name
from interleave.datasets.formats.execution import read_execution_record
from interleave.datasets.formats.training import read_rl, read_sft
from interleave.datasets.rows import RlRow, SftRow, Story, critic_rows, planner_row
from interleave.records import PlanRecord
from interleave.storage.images import IMAGES, ImageStore
from interleave.storage.trace import Trace

Format = Literal["sharegpt", "rl", "execution_record"]
Role = Literal["planner", "critic"]
RECORD = "execution_record.json"
TEMPLATES = TemplatesConfig(planner_text="planner_text", planner_images="planner_images", critic="critic")
"""How rows of execution records are worded; `data build` words them otherwise."""


def import_set(form: Format, path: Path, out: Path, root: Path | None = None, role: Role | None = None) -> SetInfo:
    """A set in the new folder `out` of what `path` holds, whole or not at all.

    sharegpt: a JSON list of {messages, images}, of a `role`.  rl: JSON lines.  execution_record: a record, or a folder
    of them; their trajectories are kept beside the rows, for `data build` to score and filter (`trajectories`).
    root: folder out of which no picture may lie; else the one of `path`.
    Raises UserError naming the row that is wrong.
    """
    if (form == "sharegpt") != (role is not None):
        raise UserError("--role planner or --role critic goes with sharegpt, which does not say whose rows they are")
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    inside = root or (path if path.is_dir() else path.parent)
    with atomic_folder(out) as fresh:
        pictures = ImageStore(fresh / IMAGES)
        files: dict[SetName, Callable[[], Iterator[SftRow | RlRow]]]
        if form == "sharegpt":
            name: SetName = "planner_sft" if role == "planner" else "critic_sft"
            files = {name: lambda: read_sft(path, inside, pictures)}
        elif form == "rl":
            files = {"critic_rl": lambda: read_rl(path, inside, pictures)}
        else:
            files = _of_stories(_records(path, inside, pictures, fresh))
        rows = {name: write_rows(fresh / file_name(name, "train"), made()) for name, made in files.items()}
        if not any(rows.values()):
            raise UserError(f"{path}: no rows in it")
        info = SetInfo(
            rows={name: {"train": count} for name, count in rows.items()},
            source=f"{form} {path.name}",
            templates=TEMPLATES.model_dump() if form == "execution_record" else {},
            versions={"interleave": metadata.version("interleave")},
        )
        write_atomic(fresh / INFO, info.model_dump_json(indent=1) + "\n")
    return info


def _records(path: Path, root: Path, pictures: ImageStore, out: Path) -> list[Story]:
    """The stories of the records, which are written to a trace too."""
    files = sorted(path.rglob(RECORD)) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: no {RECORD} in it")
    stories: dict[str, Story] = {}
    with Trace(out) as trace:
        for file in files:
            story = read_execution_record(file, root, pictures)
            trajectory = story.trajectory
            if trajectory.id in stories:
                raise UserError(f"{file}: a record of {trajectory.id} is there already; give every folder its own name")
            stories[trajectory.id] = story
            plan = PlanRecord(
                trajectory_id=trajectory.id,
                request=trajectory.request,
                planner=trajectory.planner,
                plan=trajectory.plan,
            )
            for record in (plan, *story.attempts, trajectory):
                trace.append(record)
    return list(stories.values())


def _of_stories(stories: list[Story]) -> dict[SetName, Callable[[], Iterator[SftRow | RlRow]]]:
    """Every plan and every judged attempt, unfiltered."""
    text, pictured = load_template(TEMPLATES.planner_text), load_template(TEMPLATES.planner_images)
    critic = load_template(TEMPLATES.critic)

    def plans() -> Iterator[SftRow]:
        for story in stories:
            row = planner_row(story, pictured if story.trajectory.request.image_ids else text)
            if row is not None:
                yield row

    def verdicts() -> Iterator[SftRow]:
        for story in stories:
            yield from critic_rows(story, critic)

    return {"planner_sft": plans, "critic_sft": verdicts}
