"""One story as HTML: its words and images as a reader wants them, and folded under each step how it came about."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from imgen_common.console import count
from imgen_common.page import environment
from interleave.loop.attempts import select_attempt
from interleave.pages import TEMPLATES
from interleave.pages.attempts import AttemptView, compared_images
from interleave.pages.images import PageImages
from interleave.pages.words import (
    ATTEMPT_STATUS,
    IN_PROGRESS,
    STORY_STATUS,
    describe_error,
    format_seconds,
    shorten,
)
from interleave.records import Attempt, Plan, PlannerRecord, PlanStep, Request, Trajectory
from interleave.storage.trace import TraceEntry

STYLE = (TEMPLATES / "story.css").read_text(encoding="utf-8")


@dataclass(frozen=True)
class StepView:
    """What a page shows of a step.  note: why it has no image yet; "" for a step that has its part of the story.

    label: describes its image.  state, color: what became of its attempts.
    """

    index: int
    words: str
    note: str = ""
    attempts: tuple[AttemptView, ...] = ()
    image_id: str | None = None
    label: str = ""
    state: str = ""
    color: str = ""


@dataclass(frozen=True)
class StoryView:
    """All that is known of one request, whether it is finished or not.  attempts: by step and number."""

    request: Request
    planner: PlannerRecord | None = None
    plan: Plan | None = None
    attempts: tuple[Attempt, ...] = ()
    trajectory: Trajectory | None = None

    @classmethod
    def of(cls, request: Request, recorded: TraceEntry) -> "StoryView":
        """From the records of a run."""
        known = recorded.trajectory or recorded.plan
        return cls(
            request,
            known.planner if known else None,
            known.plan if known else None,
            tuple(recorded.attempts[key] for key in sorted(recorded.attempts)),
            recorded.trajectory,
        )

    @property
    def title(self) -> str:
        """The beginning of the request."""
        return shorten(self.request.text)

    @property
    def status(self) -> str:
        """A key of `STORY_STATUS`."""
        if self.trajectory is not None:
            return self.trajectory.status
        return "unfinished" if self.planner or self.plan or self.attempts else "waiting"

    def status_words(self, live: bool = False) -> str:
        """The status in words.  live: while the story is made."""
        return IN_PROGRESS if live and self.trajectory is None else STORY_STATUS[self.status]

    @property
    def color(self) -> str:
        colors = {"complete": "up", "steps_not_accepted": "mixed", "unfinished": "same", "waiting": "same"}
        return colors.get(self.status, "down")

    @property
    def has_failed(self) -> bool:
        """Whether it ended early."""
        return self.trajectory is not None and not self.trajectory.is_whole

    @property
    def error(self) -> str:
        """Why it ended, in plain words; "" where there is nothing to say."""
        return describe_error(self.trajectory.error if self.trajectory else None)

    @property
    def facts(self) -> list[str]:
        """How many steps and images it has, and how long it took."""
        images = count(sum(one.image_id is not None for one in self.attempts), "image")
        return [
            *([count(len(self.plan.steps), "step")] if self.plan else []),
            *([images] if self.attempts else []),
            *([format_seconds(self.trajectory.spent.seconds)] if self.trajectory else []),
        ]

    @property
    def planner_facts(self) -> Mapping[str, str]:
        """Who planned, and how often it was asked."""
        if self.planner is None:
            return {}
        return {
            "model": self.planner.model,
            "template": f"{self.planner.template} ({self.planner.template_hash[:12]})",
            "asked": count(self.planner.num_tries, "time"),
            "error": describe_error(self.planner.error),
        }

    @property
    def costs(self) -> Mapping[str, str]:
        """What a finished story took."""
        if self.trajectory is None:
            return {}
        spent = self.trajectory.spent
        return {
            "images": str(spent.generations),
            "planner calls": str(spent.planner_calls),
            "critic calls": str(spent.critic_calls),
            "time": format_seconds(spent.seconds),
            **self.trajectory.versions,
            "request": self.request.id,
        }

    def steps(self, live: bool = False) -> list[StepView]:
        """What the page shows of each step of the plan."""
        return [self._step(step, live) for step in (self.plan.steps if self.plan else ())]

    def _step(self, step: PlanStep, live: bool) -> StepView:
        attempts, shown = self._attempts_of(step), self._shown(step)
        if not self._is_reached(step):
            return StepView(step.index, step.words, "not reached" + " yet" * live)
        if step.kind == "text":
            return StepView(step.index, step.words)
        if not attempts:
            return StepView(step.index, step.words, "not generated" if self.trajectory else "in progress")
        last = shown or attempts[-1]
        _, color, words = ATTEMPT_STATUS[last.status]
        state = words + (f" at attempt {last.attempt} of {len(attempts)}" if len(attempts) > 1 else "")
        if self.trajectory is not None and shown is not None and shown.status == "rejected":
            state = f"never accepted; attempt {last.attempt} of {len(attempts)} is shown"
        return StepView(
            step.index,
            step.words,
            attempts=tuple(AttemptView(one, one is shown and len(attempts) > 1) for one in attempts),
            image_id=shown.image_id if shown else None,
            label=step.words or last.prompt_used,
            state=state,
            color=color,
        )

    def _attempts_of(self, step: PlanStep) -> list[Attempt]:
        return [attempt for attempt in self.attempts if attempt.step == step.index]

    def _shown(self, step: PlanStep) -> Attempt | None:
        """The attempt whose image stands for a step: the selected one, or so far the last."""
        attempts = self._attempts_of(step)
        if self.trajectory is None:
            return select_attempt("last", attempts)
        selected = self.trajectory.selected.get(step.index)
        return next((attempt for attempt in attempts if attempt.attempt == selected), None)

    def _is_reached(self, step: PlanStep) -> bool:
        """Whether the story came as far as a step: all images before it are there, and the critic did not fail."""
        if self.status == "critic_failed" and step.index > max((one.step for one in self.attempts), default=0):
            return False
        before = [earlier for earlier in (self.plan.steps if self.plan else ()) if earlier.index < step.index]
        shown = [self._shown(earlier) for earlier in before if earlier.kind == "image"]
        return all(one is not None and one.image_id is not None for one in shown)

    def shown_images(self) -> list[tuple[str, str]]:
        """The image of each step that has one, and its label."""
        shown = [(step, self._shown(step)) for step in (self.plan.steps if self.plan else ())]
        return [(one.image_id, step.words or one.prompt_used) for step, one in shown if one and one.image_id]

    def image_ids(self) -> Iterable[str]:
        """Images given, generated and compared with."""
        yield from self.request.image_ids
        for attempt in self.attempts:
            yield from filter(None, (attempt.image_id, *compared_images(attempt)))


def render_story(story: StoryView, images: PageImages, *, live: bool = False) -> str:
    """One story as HTML, without a page around it.  live: while it is made, without what unfolds."""
    macros: Any = environment(TEMPLATES).get_template("story.html.jinja").module
    return str(macros.article(story, images, live))
