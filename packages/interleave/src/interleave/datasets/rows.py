"""Examples for training planner and critic, and the stories that they are made from."""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from PIL import Image
from pydantic import ConfigDict, Field, ValidationError, model_validator

from imgen_common.files import byte_lines
from imgen_common.tables import CONTROL_TOKEN
from interleave.agents.prompts import (
    Template,
    render_critic,
    render_plan,
    render_planner,
    render_verdict,
    words_and_images,
)
from interleave.datasets.files import describe_mistake, read_json
from interleave.protocols import CriticInput, HashedImage, Message
from interleave.records import Attempt, PlanStep, Record, Trajectory, Verdict


@dataclass(frozen=True)
class FinishedStory:
    """A finished request and its attempts, by step and attempt."""

    trajectory: Trajectory
    attempts: tuple[Attempt, ...]

    def judged_attempts(self) -> list[Attempt]:
        """The attempts that have a verdict."""
        return [attempt for attempt in self.attempts if attempt.verdict is not None]

    def selected_attempts(self) -> dict[int, Attempt]:
        """The attempt whose image the story shows, by step."""
        selected = self.trajectory.selected
        return {a.step: a for a in self.attempts if selected.get(a.step) == a.attempt}

    def shown_steps(self) -> list[tuple[PlanStep, Attempt | None]]:
        """The steps of the story in order, each with its selected attempt; None where it is text alone."""
        selected = self.selected_attempts()
        plan = self.trajectory.plan.steps if self.trajectory.plan is not None else ()
        return [(step, selected.get(step.index)) for step in plan if step.kind == "text" or step.index in selected]


def before_and_after(attempt: Attempt) -> tuple[str, str]:
    """The images before and after an attempt."""
    if attempt.before_id is None or attempt.image_id is None:
        raise ValueError(f"{attempt.trajectory_id}: step {attempt.step}, attempt {attempt.attempt} has no two images")
    return attempt.before_id, attempt.image_id


class SftRow(Record):
    """A supervised example: one user turn, `texts[0]`, image 0, `texts[1]`, ..., and the answer to learn."""

    texts: tuple[str, ...] = Field(min_length=1)
    image_ids: tuple[str, ...] = ()
    completion: str
    trajectory_id: str | None = None
    extra: Mapping[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _around_images(self) -> Self:
        if len(self.texts) != len(self.image_ids) + 1:
            raise ValueError(f"{len(self.texts) - 1} places for {len(self.image_ids)} images")
        return self

    @classmethod
    def from_message(cls, message: Message, completion: str, trajectory_id: str | None = None) -> "SftRow":
        """The row of a rendered prompt."""
        texts, image_ids = [""], []
        for part in message:
            if isinstance(part, str):
                texts[-1] += part
            else:
                image_ids.append(part.id)
                texts.append("")
        return cls(texts=tuple(texts), image_ids=tuple(image_ids), completion=completion, trajectory_id=trajectory_id)

    def message(self, image_of: Callable[[str], HashedImage]) -> Message:
        """The user turn, as it was rendered.  image_of: `ImageStore.get`, or `placeholder_image` to read no image."""
        parts: list[str | HashedImage] = [self.texts[0]]
        for image_id, text in zip(self.image_ids, self.texts[1:], strict=True):
            parts += [image_of(image_id), text]
        return tuple(part for part in parts if part != "")


class Evaluation(Record):
    """The recorded verdict about an image and a judge's two scores, each in [0, 10]."""

    model_config = ConfigDict(extra="allow")

    success: bool = Field(strict=True)
    semantics: float = Field(ge=0, le=10, strict=True)
    quality: float = Field(ge=0, le=10, strict=True)


class RlRow(Record):
    """An image for the critic to judge: before and after, the step's prompt, the prompt used ("" if the same)."""

    original_prompt: str
    prompt_used: str
    before_id: str
    after_id: str
    is_t2i: bool
    evaluation: Evaluation
    extra: Mapping[str, Any] = Field(default_factory=dict)

    def critic_input(self, image_of: Callable[[str], HashedImage]) -> CriticInput:
        """The input of `render_critic`.  image_of: `ImageStore.get`, or `placeholder_image` to read no image."""
        return CriticInput(image_of(self.before_id), image_of(self.after_id), self.original_prompt, self.prompt_used)


Row = TypeVar("Row", SftRow, RlRow)


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a set's file that are not blank, with their numbers; the items of a JSON array count as lines.

    Raises UserError if the file cannot be read.
    """
    lines = byte_lines(path)
    first = next(lines, None)
    if first is not None and first[1].lstrip().startswith(b"["):
        yield from ((number, json.dumps(item).encode()) for number, item in enumerate(read_json(path), 1))
    elif first is not None:
        yield from itertools.chain([first], lines)


def parse_row(line: bytes, kind: type[Row]) -> Row:
    """The row of a line of a set.  Raises ValueError saying what is wrong."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}; save it as UTF-8") from None
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        given = first["input"] if isinstance(first["input"], int | float | str | None) else None
        shown = "" if given is None or first["type"] == "json_invalid" else f", got {str(given)[:40]!r}"
        raise ValueError(describe_mistake(error) + shown) from None


def text_problems(row: SftRow) -> Iterator[str]:
    """What no example may hold: a token that ends a turn or stands for an image, or an empty answer."""
    found = (token[0] for text in (*row.texts, row.completion) for token in CONTROL_TOKEN.finditer(text))
    for token in dict.fromkeys(found):
        yield f"the text holds {token}; images stand between texts, which must not hold such a token"
    if not row.completion.strip():
        yield "the answer is empty"


def make_planner_row(story: FinishedStory, text: Template, images: Template) -> SftRow | None:
    """The planner's example, rendered as at run time with its template for text or for images; None without a plan."""
    trajectory = story.trajectory
    if trajectory.plan is None:
        return None
    given = [placeholder_image(image_id) for image_id in trajectory.request.image_ids]
    message = render_planner(images if given else text, *words_and_images(trajectory.request, given))
    return SftRow.from_message(message, render_plan(trajectory.plan), trajectory.id)


def make_critic_row(story: FinishedStory, attempt: Attempt, template: Template) -> SftRow | None:
    """The critic's example of a judged attempt; on success the prompt to answer is the one used.

    None for a failed attempt without a new prompt, which only an imported story has: nothing can be learned from it.
    """
    refined = attempt.drawn_prompt if attempt.verdict else attempt.refined_prompt or ""
    if not attempt.verdict and not refined.strip():
        return None
    before, after = map(placeholder_image, before_and_after(attempt))
    story_so_far = tuple(
        (step.words, placeholder_image(before_and_after(selected)[1]) if selected else None)
        for step, selected in story.shown_steps()
        if step.index < attempt.step
    )
    request = story.trajectory.request
    shown = CriticInput(before, after, attempt.original_prompt, attempt.drawn_prompt, request.text, story_so_far)
    verdict = Verdict(success=bool(attempt.verdict), refined_prompt=refined, reasoning=attempt.reasoning or "")
    return SftRow.from_message(render_critic(template, shown), render_verdict(verdict), story.trajectory.id)


def make_rl_row(attempt: Attempt) -> RlRow | None:
    """The reinforcement row of a judged attempt; None where the judge did not score it."""
    if attempt.scores is None:
        return None
    before, after = before_and_after(attempt)
    return RlRow(
        original_prompt=attempt.original_prompt,
        prompt_used=attempt.drawn_prompt,
        before_id=before,
        after_id=after,
        is_t2i=attempt.op == "t2i",
        evaluation=Evaluation(success=bool(attempt.verdict), **attempt.scores.model_dump()),
        extra={"trajectory_id": attempt.trajectory_id, "step": attempt.step, "attempt": attempt.attempt},
    )


def placeholder_image(image_id: str) -> HashedImage:
    """An image with an id and without content, for the renderer, which only places it."""
    return HashedImage(Image.new("RGB", (1, 1)), image_id)
