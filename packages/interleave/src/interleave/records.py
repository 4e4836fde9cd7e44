"""What a run of the loop records, as plain data: each record is one JSON object, all optional fields written out.

Images are named by the hash of their pixels (`imgen_common.images.content_hash`); their files lie in an `ImageStore`.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, computed_field, model_validator

FailureKind = Literal[
    "unreachable",
    "refused",
    "denied",
    "rate_limited",
    "server_error",
    "timeout",
    "malformed_response",
    "out_of_memory",
    "model_error",
]
"""unreachable: no connection.  refused: the endpoint said no to this request for good.  denied: it takes none at all
(key, credit, address).  rate_limited: it said not now (429), however often it was asked.  server_error: it failed
(5xx).  timeout: it was too slow.  malformed_response: its answer cannot be read.  out_of_memory, model_error: a local
model failed."""

AttemptStatus = Literal["accepted", "rejected", "unjudged", "critic_unparsable", "critic_failed", "generator_failed"]
"""accepted, rejected: the critic's verdict.  unjudged: no critic was asked.  critic_unparsable: none of its answers
could be read.  critic_failed, generator_failed: its model failed (`error_kind`, and `error` in words)."""

TrajectoryStatus = Literal[
    "complete",
    "steps_not_accepted",
    "planner_failed",
    "generator_failed",
    "critic_failed",
    "budget_exhausted",
    "internal_error",
]
"""complete: every step of the plan has its part of the story.  steps_not_accepted: so it has, but the critic accepted
no image of some steps.  Otherwise the story ends at the step that failed, or for which nothing was left;
internal_error: an exception in a part's own code."""


Seconds = Annotated[float, Field(ge=0, le=1e9)]
"""A duration."""


class Record(BaseModel):
    """Base of all records: frozen, no unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Request(Record):
    """What the user asks for: words, and the images given with them.  category: for statistics only.

    texts: where images stand in the middle of the words, the text before, between and after them, one more than there
    are images; `text` then says `[image 1]` in the place of the first.  Empty: the images stand before the text.
    """

    id: str = Field(min_length=1)
    text: str
    image_ids: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    category: str = ""

    @model_validator(mode="after")
    def _around_images(self) -> Self:
        if self.texts and len(self.texts) != len(self.image_ids) + 1:
            raise ValueError(f"texts has {len(self.texts) - 1} places for {len(self.image_ids)} images")
        return self


class PlanStep(Record):
    """One step: an image to make or edit with `prompt`, or, where `prompt` is None, text alone.

    `index` counts from 1 in the order of the story; `text` is the caption or answer shown beside the image.
    """

    index: int = Field(ge=1)
    name: str = ""
    instruction: str | None = None
    prompt: str | None = None
    text: str | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def kind(self) -> Literal["image", "text"]:
        """`text` where there is nothing to generate."""
        return "text" if self.prompt is None else "image"

    @model_validator(mode="before")
    @classmethod
    def _derive_kind(cls, data: Any) -> Any:
        """`kind` is written with a step, for readers, and derived again when it is read."""
        return {key: value for key, value in data.items() if key != "kind"} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if not (self.prompt or self.text or "").strip():
            raise ValueError(f"step {self.index} has neither a prompt nor a text")
        return self

    @property
    def words(self) -> str:
        """What the reader sees beside the image: the text, else the instruction, else nothing."""
        return self.text or self.instruction or ""


class Plan(Record):
    """The planner's answer: at least one step, numbered 1, 2, ... in order; `reasoning` is what it thought before."""

    steps: tuple[PlanStep, ...] = Field(min_length=1)
    reasoning: str = ""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if [step.index for step in self.steps] != list(range(1, len(self.steps) + 1)):
            raise ValueError(f"steps must be numbered 1..{len(self.steps)}, got {[step.index for step in self.steps]}")
        return self


class Verdict(Record):
    """The critic's answer: whether the step succeeded, and the prompt to use next (unchanged on success)."""

    success: bool
    refined_prompt: str
    reasoning: str = ""


class Scores(Record):
    """A judge's two numbers, each in [0, 10], larger better: semantics and perceptual quality."""

    semantics: float = Field(ge=0, le=10)
    quality: float = Field(ge=0, le=10)
    judge_id: str
    num_samples: int = Field(default=1, ge=1)

    @property
    def overall(self) -> float:
        """sqrt(semantics * quality), in [0, 10]."""
        return math.sqrt(self.semantics * self.quality)


class GeneratorInfo(Record):
    """Which generator made an image, and with which parameters."""

    id: str
    params: Mapping[str, Any] = Field(default_factory=dict)


class Attempt(Record):
    """One generation for one step, and the critic's verdict on it.

    `step` and `attempt` count from 1.  `source_ids` are the images the generator was given (none for text to image),
    `before_id` the one the critic compared with.  Times in seconds.  `success_probability`: how much of the critic's
    probability mass lay on success, in [0, 1], where its model gives it.  `critic_tries`: how often it was asked,
    because an answer could not be read.  `prompt_used` was sent to the generator; `revised_prompt` is what it says that
    it drew instead.  `finish_reason`: why the critic's answer ended, as its endpoint says.
    """

    trajectory_id: str
    step: int = Field(ge=1)
    attempt: int = Field(ge=1)
    op: Literal["t2i", "edit"]
    source_ids: tuple[str, ...] = ()
    before_id: str | None = None
    original_prompt: str
    prompt_used: str
    revised_prompt: str | None = None
    seed: int
    generator: GeneratorInfo
    image_id: str | None = None
    verdict: bool | None = None
    refined_prompt: str | None = None
    reasoning: str | None = None
    success_probability: float | None = Field(default=None, ge=0, le=1)
    raw: str = ""
    finish_reason: str | None = None
    critic_tries: int = Field(default=0, ge=0)
    error: str | None = None
    error_kind: FailureKind | None = None
    scores: Scores | None = None
    timings: Mapping[str, Seconds] = Field(default_factory=dict)
    status: AttemptStatus

    @property
    def has_lost_scores(self) -> bool:
        """Whether a judge was asked, and gave no scores."""
        return "judge" in self.timings and self.scores is None

    def with_scores(self, scores: Scores, seconds: float) -> "Attempt":
        """The same attempt, scored later.  seconds: that the judge took in all."""
        error = None if self.status in ("accepted", "rejected", "unjudged") else self.error  # else the judge's alone
        return self.model_copy(update={"scores": scores, "error": error, "timings": {**self.timings, "judge": seconds}})

    @property
    def drawn_prompt(self) -> str:
        """What was drawn, in words: what the critic sees, and what it is taught."""
        return self.revised_prompt or self.prompt_used


class PlannerRecord(Record):
    """Which planner wrote the plan, from which template, and its words as they came."""

    model: str
    template: str
    template_hash: str
    raw: str = ""
    finish_reason: str | None = None
    num_tries: int = Field(default=1, ge=0)
    error: str | None = None
    error_kind: FailureKind | None = None


class PlanRecord(Record):
    """The first record of a trajectory: its request and, unless the planner failed, the plan."""

    trajectory_id: str
    request: Request
    planner: PlannerRecord | None
    plan: Plan | None


class Spent(Record):
    """What a trajectory cost in all its sessions, also what was made again: images asked for, calls of critic and
    planner, seconds."""

    generations: int = 0
    critic_calls: int = 0
    planner_calls: int = 0
    seconds: Seconds = 0.0


class Trajectory(Record):
    """One finished request.  `selected` maps each step with an image to the attempt whose image the story shows."""

    id: str
    request: Request
    planner: PlannerRecord | None
    plan: Plan | None
    selected: Mapping[int, int] = Field(default_factory=dict)
    status: TrajectoryStatus
    error: str | None = None
    error_kind: FailureKind | None = None
    spent: Spent = Spent()
    versions: Mapping[str, str] = Field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether every step has its part of the story, accepted or not."""
        return self.status in ("complete", "steps_not_accepted")
