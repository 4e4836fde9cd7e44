"""Examples for training planner and critic: made of stories, and the reference's files of them.

planner_sft.json, critic_sft.json: a JSON list of {messages, images}.  Reinforcement: JSON lines.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from PIL import Image
from pydantic import ConfigDict, Field, ValidationError, model_validator

from interleave.agents.prompts import Template, render_critic, render_plan, render_planner, render_verdict
from interleave.protocols import CriticInput, HashedImage, Message
from interleave.records import Attempt, PlanStep, Record, Scores, Trajectory, Verdict
from interleave.storage.images import ImageStore


@dataclass(frozen=True)
class Story:
    """A finished request and its attempts, by step and attempt."""

    trajectory: Trajectory
    attempts: tuple[Attempt, ...]

    def judged(self) -> list[Attempt]:
        """The attempts that have a verdict."""
        return [attempt for attempt in self.attempts if attempt.verdict is not None]

    def chosen(self) -> dict[int, Attempt]:
        """The attempt that the story shows, of each drawn step."""
        selected = self.trajectory.selected
        return {a.step: a for a in self.attempts if selected.get(a.step) == a.attempt}

    def steps(self) -> list[tuple[PlanStep, Attempt | None]]:
        """The steps told, in order, each with its chosen attempt, or None where it is text alone."""
        chosen = self.chosen()
        plan = self.trajectory.plan.steps if self.trajectory.plan is not None else ()
        return [(step, chosen.get(step.index)) for step in plan if step.kind == "text" or step.index in chosen]


def pair(attempt: Attempt) -> tuple[str, str]:
    """The pictures before and after."""
    if attempt.before_id is None or attempt.image_id is None:
        raise ValueError(f"{attempt.trajectory_id}: step {attempt.step}, attempt {attempt.attempt} has no two pictures")
    return attempt.before_id, attempt.image_id


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

    def message(self, pictures: ImageStore) -> Message:
        """The user turn, as it was rendered."""
        parts: list[str | HashedImage] = [self.texts[0]]
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

    original_prompt: str
    prompt_used: str
    before_id: str
    after_id: str
    is_t2i: bool
    evaluation: Evaluation
    extra: Mapping[str, Any] = Field(default_factory=dict)

    def critic_input(self, pictures: ImageStore) -> CriticInput:
        """What `render_critic` is given."""
        before, after = pictures.get(self.before_id), pictures.get(self.after_id)
        return CriticInput(before, after, self.original_prompt, self.prompt_used)

    def named(self) -> CriticInput:
        """The same with pictures that have a name and nothing to see, for who only places them."""
        return CriticInput(named(self.before_id), named(self.after_id), self.original_prompt, self.prompt_used)


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
    look = CriticInput(before, after, attempt.original_prompt, attempt.prompt_used, trajectory.request.text, told)
    verdict = Verdict(success=bool(attempt.verdict), refined_prompt=refined, reasoning=attempt.reasoning or "")
    return SftRow.of(render_critic(template, look), render_verdict(verdict), trajectory.id)


def rl_rows(story: Story) -> Iterator[RlRow]:
    """The critic's reinforcement rows, one for each judged attempt that a judge has scored."""
    return (rl_row(attempt, attempt.scores) for attempt in story.judged() if attempt.scores is not None)


def rl_row(attempt: Attempt, scores: Scores) -> RlRow:
    """The reinforcement row of a judged attempt and its scores."""
    before, after = pair(attempt)
    return RlRow(
        original_prompt=attempt.original_prompt,
        prompt_used=attempt.prompt_used,
        before_id=before,
        after_id=after,
        is_t2i=attempt.op == "t2i",
        evaluation=Evaluation(
            success=bool(attempt.verdict),
            semantics=scores.semantics,
            quality=scores.quality,
            judge_id=scores.judge_id,
            num_samples=scores.num_samples,
        ),
        extra={"trajectory_id": attempt.trajectory_id, "step": attempt.step, "attempt": attempt.attempt},
    )


def named(image_id: str) -> HashedImage:
    """A picture for the renderer, which passes pictures on and never looks at one."""
    return HashedImage(Image.new("RGB", (1, 1)), image_id)
