"""Examples for training planner and critic: made of stories, and the reference's files of them.

planner_sft.json, critic_sft.json: a JSON list of {messages, images}.  Reinforcement: JSON lines.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from imgen_common.errors import UserError
from imgen_common.runs import write_atomic
from interleave.formats.files import Reader, beside, checked, json_lines, json_list, json_text, write_json
from interleave.formats.stories import Story, pair
from interleave.parts import Look, Message, Picture
from interleave.prompts import IMAGE_MARKER, Template, render_critic, render_plan, render_planner, render_verdict
from interleave.records import Attempt, Record, Scores, Verdict
from interleave.store import PictureStore, writing

WHITE_PATH = "data/interleave/white.png"
"""A reinforcement row is a picture made from nothing if its first path has this in it."""


class SftRow(Record):
    """A supervised example: one user turn, `texts[0]`, picture 0, `texts[1]`, ..., and the answer to learn."""

    texts: tuple[str, ...] = Field(min_length=1)
    image_ids: tuple[str, ...] = ()
    completion: str
    trajectory_id: str | None = None
    extra: Mapping[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _around_pictures(self) -> Self:
        if len(self.texts) != len(self.image_ids) + 1:
            raise ValueError(f"{len(self.texts) - 1} places for {len(self.image_ids)} pictures")
        return self

    @classmethod
    def of(cls, message: Message, completion: str, trajectory_id: str | None = None) -> "SftRow":
        """The row of a rendered prompt."""
        texts, image_ids = [""], []
        for part in message:
            if isinstance(part, str):
                texts[-1] += part
            else:
                image_ids.append(part.id)
                texts.append("")
        return cls(texts=tuple(texts), image_ids=tuple(image_ids), completion=completion, trajectory_id=trajectory_id)

    def message(self, pictures: PictureStore) -> Message:
        """The user turn, as it was rendered."""
        parts: list[str | Picture] = [self.texts[0]]
        for image_id, text in zip(self.image_ids, self.texts[1:], strict=True):
            parts += [pictures.get(image_id), text]
        return tuple(part for part in parts if part != "")


class Evaluation(Record):
    """What is known of a judged picture: the critic's truth and a judge's two scores, each in [0, 10]."""

    model_config = ConfigDict(extra="allow")

    success: bool = Field(strict=True)
    semantics: float = Field(ge=0, le=10, strict=True)
    quality: float = Field(ge=0, le=10, strict=True)


class RlRow(Record):
    """A picture for the critic to judge: before and after, the step's prompt, the prompt used ("" if the same)."""

    origin_prompt: str
    rewritten_prompt: str
    before_id: str
    after_id: str
    is_t2i: bool
    evaluation: Evaluation
    extra: Mapping[str, Any] = Field(default_factory=dict)

    def look(self, pictures: PictureStore) -> Look:
        """What `render_critic` is given."""
        before, after = pictures.get(self.before_id), pictures.get(self.after_id)
        return Look(before, after, self.origin_prompt, self.rewritten_prompt)

    def named(self) -> Look:
        """The same with pictures that have a name and nothing to see, for who only places them."""
        return Look(named(self.before_id), named(self.after_id), self.origin_prompt, self.rewritten_prompt)


Row = TypeVar("Row", SftRow, RlRow)


def parsed(line: bytes, kind: type[Row]) -> Row:
    """The row of a line of a set.  Raises ValueError saying what is wrong."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}; save it as UTF-8") from None
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        given = first["input"] if isinstance(first["input"], int | float | str | None) else None
        shown = "" if given is None or first["type"] == "json_invalid" else f", got {str(given)[:40]!r}"
        raise ValueError(f"{f'{place}: ' if place else ''}{first['msg']}{shown}") from None


def planner_row(story: Story, template: Template) -> SftRow | None:
    """The planner's example, rendered as at run time; None without a plan."""
    trajectory = story.trajectory
    if trajectory.plan is None:
        return None
    given = [named(image_id) for image_id in trajectory.request.image_ids]
    message = render_planner(template, trajectory.request.text, given)
    return SftRow.of(message, render_plan(trajectory.plan), trajectory.id)


def critic_rows(story: Story, template: Template) -> Iterator[SftRow]:
    """The critic's examples, one for each judged attempt that teaches something."""
    rows = (critic_row(story, attempt, template) for attempt in story.judged())
    return (row for row in rows if row is not None)


def critic_row(story: Story, attempt: Attempt, template: Template) -> SftRow | None:
    """The critic's example of a judged attempt; on success the prompt to give back is the one used.

    None for a failed attempt without a new prompt, which only an imported story has: it teaches nothing.
    """
    refined = attempt.prompt_used if attempt.verdict else attempt.refined_prompt or ""
    if not attempt.verdict and not refined.strip():
        return None
    before, after = map(named, pair(attempt))
    told = tuple(
        (step.words, named(pair(chosen)[1]) if chosen else None)
        for step, chosen in story.steps()
        if step.index < attempt.step
    )
    trajectory = story.trajectory
    look = Look(before, after, attempt.original_prompt, attempt.prompt_used, trajectory.request.text, told)
    verdict = Verdict(success=bool(attempt.verdict), refined_prompt=refined, reasoning=attempt.reasoning or "")
    return SftRow.of(render_critic(template, look), render_verdict(verdict), trajectory.id)


def rl_rows(story: Story) -> Iterator[RlRow]:
    """The critic's reinforcement rows, one for each judged attempt that a judge has scored."""
    return (rl_row(attempt, attempt.scores) for attempt in story.judged() if attempt.scores is not None)


def rl_row(attempt: Attempt, scores: Scores) -> RlRow:
    """The reinforcement row of a judged attempt and its scores."""
    before, after = pair(attempt)
    return RlRow(
        origin_prompt=attempt.original_prompt,
        rewritten_prompt=attempt.prompt_used,
        before_id=before,
        after_id=after,
        is_t2i=attempt.op == "t2i",
        evaluation=Evaluation(
            success=bool(attempt.verdict),
            semantics=scores.sc,
            quality=scores.pq,
            judge_id=scores.judge_id,
            num_samples=scores.num_samples,
        ),
        extra={"trajectory_id": attempt.trajectory_id, "step": attempt.step, "attempt": attempt.attempt},
    )


def named(image_id: str) -> Picture:
    """A picture for the renderer, which passes pictures on and never looks at one."""
    return Picture(Image.new("RGB", (1, 1)), image_id)


# --- supervised rows -------------------------------------------------------------------------------------------------


class _Turn(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["user", "assistant"]
    content: str


class _SharegptItem(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    messages: list[_Turn]
    images: list[str] = []
    trajectory_id: str | None = None


def read_sft(file: Path, root: Path, pictures: PictureStore) -> Iterator[SftRow]:
    """Rows of planner_sft.json or critic_sft.json.  Raises UserError naming the row."""
    reader = Reader(root, pictures)
    for where, value in json_list(file):
        item = checked(_SharegptItem, value, where)
        if [turn.role for turn in item.messages] != ["user", "assistant"]:
            raise UserError(f"{where}: messages must be one of the user and one of the assistant")
        user, assistant = item.messages
        texts = tuple(user.content.split(IMAGE_MARKER))
        if len(texts) != len(item.images) + 1:
            raise UserError(f"{where}: {len(texts) - 1} {IMAGE_MARKER} markers for {len(item.images)} images")
        yield SftRow(
            texts=texts,
            image_ids=tuple(reader.take(path, where) for path in item.images),
            completion=assistant.content,
            trajectory_id=item.trajectory_id,
            extra=item.model_extra or {},
        )


def write_sft(rows: Iterable[SftRow], file: Path, pictures: PictureStore) -> None:
    """Write the rows, and their pictures to `images/` beside the file."""
    items = [
        {
            **row.extra,
            **({"trajectory_id": row.trajectory_id} if row.trajectory_id is not None else {}),
            "messages": [
                {"role": "user", "content": IMAGE_MARKER.join(row.texts)},
                {"role": "assistant", "content": row.completion},
            ],
            "images": [beside(file, f"images/{image_id}.png", image_id, pictures) for image_id in row.image_ids],
        }
        for row in rows
    ]
    write_json(file, items)


# --- reinforcement rows ----------------------------------------------------------------------------------------------


class _RlLine(BaseModel):
    model_config = ConfigDict(extra="allow")
    origin_prompt: str
    rewritten_prompt: str
    origin_image_path: str
    edited_image_path: str
    evaluation: Evaluation


def read_rl(file: Path, root: Path, pictures: PictureStore) -> Iterator[RlRow]:
    """Rows for the critic's reinforcement learning.  Raises UserError naming the line."""
    reader = Reader(root, pictures)
    for where, value in json_lines(file):
        line = checked(_RlLine, value, where)
        yield RlRow(
            origin_prompt=line.origin_prompt,
            rewritten_prompt=line.rewritten_prompt,
            before_id=reader.take(line.origin_image_path, where),
            after_id=reader.take(line.edited_image_path, where),
            is_t2i=WHITE_PATH in line.origin_image_path,
            evaluation=line.evaluation,
            extra=line.model_extra or {},
        )


def write_rl(rows: Iterable[RlRow], file: Path, pictures: PictureStore) -> None:
    """Write the rows, and their pictures to `images/` beside the file."""
    lines = []
    for row in rows:
        before = f"images/{row.before_id}/{WHITE_PATH}" if row.is_t2i else f"images/{row.before_id}.png"
        line = {
            **row.extra,
            "origin_prompt": row.origin_prompt,
            "rewritten_prompt": row.rewritten_prompt,
            "origin_image_path": beside(file, before, row.before_id, pictures),
            "edited_image_path": beside(file, f"images/{row.after_id}.png", row.after_id, pictures),
            "evaluation": row.evaluation.model_dump(mode="json"),
        }
        lines.append(json_text(line))
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, "".join(lines))
