"""What the commands print on a terminal while stories are made."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from imgen_common.console import count
from imgen_common.errors import one_line, quoted
from imgen_common.hub import BUILTIN
from imgen_common.shapes.vocabulary import find_left_out
from interleave.pages.words import ATTEMPT_STATUS, explain_reasoning
from interleave.records import Attempt, Plan, PlanRecord, Record, Trajectory

if TYPE_CHECKING:
    from interleave.storage.images import ImageStore

STORY_COLORS = {"complete": "green", "steps_not_accepted": "yellow"}
"""Colors of the status of a story; others are red."""
MAX_REASON = 1000
"""Characters of a critic's reason that the terminal shows."""
STATUS_COLORS = {"accepted": "green", "rejected": "yellow", "unjudged": "default"}
"""Colors of the status of an attempt; others are red."""


def open_console(stderr: bool = False) -> Console:
    """Standard output or error; lines are not wrapped unless it is a terminal."""
    out = Console(highlight=False, emoji=False, stderr=stderr)
    return out if out.is_terminal else Console(highlight=False, emoji=False, stderr=stderr, width=200)


def sanitize(text: str) -> str:
    """`text` on one line, without the control and direction characters that could rewrite a terminal."""
    return escape(one_line(text, limit=None))


def print_plan(record: PlanRecord, out: Console) -> None:
    """The steps, one a line, and what a built-in planner left out, as it does above all in long requests."""
    for step in record.plan.steps if record.plan else ():
        what = sanitize(step.prompt) if step.prompt is not None else "[dim](text only)[/]"
        words = f"  [dim]{sanitize(step.words)}[/]" if step.words and step.words != step.prompt else ""
        out.print(f"  {step.index}. {what}{words}")
    _print_left_out(record, out)


def _print_left_out(story: PlanRecord | Trajectory, out: Console) -> None:
    if story.plan and story.planner and story.planner.model.startswith(BUILTIN):
        missing = find_left_out(story.request.text, [step.prompt or "" for step in story.plan.steps])
        if missing:
            out.print(f"  [yellow]the plan leaves out what the request names: {', '.join(missing)}[/]")


class ProgressPrinter:
    """Prints one story as its records come."""

    def __init__(self, out: Console) -> None:
        self._out = out
        self._num_steps = 0

    def __call__(self, record: Record) -> None:
        match record:
            case PlanRecord(plan=Plan() as steps):
                self._num_steps = len(steps.steps)
                self._out.print(f"[bold]plan[/] of {self._num_steps} step{'s' * (self._num_steps != 1)}")
                print_plan(record, self._out)
            case Attempt():
                self._print_attempt(record)

    def _print_attempt(self, attempt: Attempt) -> None:
        status = f"[{STATUS_COLORS.get(attempt.status, 'red')}]{ATTEMPT_STATUS[attempt.status].words}[/]"
        error = f" ({sanitize(attempt.error)})" if attempt.error else ""
        self._out.print(
            f"[bold]step {attempt.step}/{self._num_steps}[/] attempt {attempt.attempt}: {status}{error} "
            f"[dim]{sanitize(attempt.prompt_used)}  {sum(attempt.timings.values()):.1f} s[/]"
        )
        if attempt.status == "rejected":
            why = explain_reasoning(attempt.reasoning or "")
            whole = f" ... ({len(why)} characters; the report has all)" if len(why) > MAX_REASON else ""
            self._out.print(f"     why: {sanitize(why[:MAX_REASON])}{whole}")
            if attempt.refined_prompt != attempt.prompt_used:
                self._out.print(f"     next prompt: {sanitize(attempt.refined_prompt or '')}")


class BatchProgressPrinter:
    """Prints a line for each story that ends."""

    def __init__(self, out: Console, total: int, done: int = 0) -> None:
        self._out, self._total, self._done = out, total, done

    def __call__(self, record: Record) -> None:
        if isinstance(record, Trajectory):
            self._done += 1
            color = STORY_COLORS.get(record.status, "red")
            error = f" ({sanitize(record.error)})" if record.error else ""
            self._out.print(
                f"{self._done}/{self._total}: [{color}]{record.status}[/]{error} "
                f"{sanitize(record.request.text[:80])} [dim]{count(record.spent.generations, 'image')}, "
                f"{record.spent.seconds:.1f} s[/]"
            )
            _print_left_out(record, self._out)


def print_json(record: Record) -> None:
    """Prints a record as one JSON object with its type."""
    print(json.dumps({"type": type(record).__name__} | record.model_dump(mode="json")), flush=True)


def print_story(trajectory: Trajectory, attempts: Sequence[Attempt], images: "ImageStore", out: Console) -> None:
    """Prints the texts of the story and the files of its images."""
    chosen = {a.step: a.image_id for a in attempts if trajectory.selected.get(a.step) == a.attempt}
    for step in trajectory.plan.steps if trajectory.plan else ():
        image_id = chosen.get(step.index)
        where = f"  {sanitize(str(images.path(image_id)))}" if image_id else ""
        out.print(f"{step.index}. {sanitize(step.words or step.prompt or '')}[dim]{where}[/]")


def print_summary(trajectories: Sequence[Trajectory], attempts: Sequence[Attempt], run: Path, out: Console) -> None:
    """Prints how the stories ended, and how to try failed ones again."""
    ends = Counter(trajectory.status for trajectory in trajectories)
    tries = Counter(attempt.status for attempt in attempts)
    out.print(
        f"{len(trajectories)} request{'s' * (len(trajectories) != 1)}: "
        + ", ".join(f"{count} {status}" for status, count in ends.most_common())
        + f"; {len(attempts)} image{'s' * (len(attempts) != 1)}: "
        + ", ".join(f"{count} {status}" for status, count in tries.most_common())
    )
    unscored = [a for a in attempts if a.has_lost_scores]  # they count without the judge's scores
    if unscored:
        out.print(f"  {len(unscored)} of {len(attempts)} images not scored: {sanitize(unscored[0].error or '')}")
    for trajectory in [t for t in trajectories if t.status != "complete"][:5]:
        color = STORY_COLORS.get(trajectory.status, "red")
        out.print(f"  {sanitize(trajectory.id)}: [{color}]{trajectory.status}[/] {sanitize(trajectory.error or '')}")
    again = f"interleave batch --resume {sanitize(quoted(run))} --retry"
    early = {trajectory.status for trajectory in trajectories if not trajectory.is_whole}
    if early and all(trajectory.is_whole or trajectory.error_kind == "refused" for trajectory in trajectories):
        out.print("what was refused would be refused again: change the requests, or in a new run the settings")
    elif early - {"budget_exhausted"}:
        out.print(f"to try the others again: {again}", soft_wrap=True)
    elif early:
        larger = "--set loop.max_generations=N (or loop.max_seconds)"
        out.print(f"to go on with a larger budget: {again} {larger}", soft_wrap=True)
    elif unscored:
        out.print(f"to ask for the scores again: {again}", soft_wrap=True)
