"""What the commands print on a terminal while a story is told."""

import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from interleave.records import Attempt, Plan, PlanRecord, Record, Trajectory

if TYPE_CHECKING:
    from interleave.storage.images import ImageStore

MARKS = {
    "accepted": "[green]accepted[/]",
    "rejected": "[yellow]rejected[/]",
    "unjudged": "drawn",
    "critic_unparsable": "[red]the critic's answers could not be read[/]",
    "critic_failed": "[red]the critic failed[/]",
    "generator_failed": "[red]the generator failed[/]",
}


def console(stderr: bool = False) -> Console:
    """Standard output (or error); lines are not broken where it is no terminal."""
    out = Console(highlight=False, stderr=stderr)
    return out if out.is_terminal else Console(highlight=False, stderr=stderr, width=200)


def plain(text: str) -> str:
    """`text` on one line, without the control and direction characters that could rewrite a terminal."""
    shown = "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") else c for c in text)
    return escape(" ".join(shown.split()))


def plan(plan: Plan, out: Console) -> None:
    """The steps, one a line."""
    for step in plan.steps:
        what = plain(step.prompt) if step.prompt is not None else "[dim](text only)[/]"
        words = f"  [dim]{plain(step.words)}[/]" if step.words and step.words != step.prompt else ""
        out.print(f"  {step.index}. {what}{words}")


class Telling:
    """Tells of one story as its records come."""

    def __init__(self, out: Console) -> None:
        self._out = out
        self._num_steps = 0

    def __call__(self, record: Record) -> None:
        """A new record."""
        match record:
            case PlanRecord(plan=Plan() as steps):
                self._num_steps = len(steps.steps)
                self._out.print(f"[bold]plan[/] of {self._num_steps} step{'s' * (self._num_steps != 1)}")
                plan(steps, self._out)
            case Attempt():
                self._out.print(self._line(record))
                if record.status == "rejected" and record.refined_prompt != record.prompt_used:
                    self._out.print(f"     next prompt: {plain(record.refined_prompt or '')}")

    def _line(self, attempt: Attempt) -> str:
        seconds = sum(attempt.timings.values())
        head = f"[bold]step {attempt.step}/{self._num_steps}[/] attempt {attempt.attempt}: {MARKS[attempt.status]}"
        error = f" ({plain(attempt.error)})" if attempt.error else ""
        return f"{head}{error} [dim]{plain(attempt.prompt_used)}  {seconds:.1f} s[/]"


class Counting:
    """Tells of many stories: one line for each that ends."""

    def __init__(self, out: Console, total: int, done: int = 0) -> None:
        self._out, self._total, self._done = out, total, done

    def __call__(self, record: Record) -> None:
        """A new record."""
        if isinstance(record, Trajectory):
            self._done += 1
            colour = "green" if record.status == "complete" else "red"
            error = f" ({plain(record.error)})" if record.error else ""
            self._out.print(
                f"{self._done}/{self._total} [{colour}]{record.status}[/]{error} "
                f"{plain(record.request.text[:80])} [dim]{record.spent.generations} pictures, "
                f"{record.spent.seconds:.1f} s[/]"
            )


def json_lines(write: Callable[[str], object]) -> Callable[[Record], None]:
    """Every record as one JSON object with its type."""

    def tell(record: Record) -> None:
        write(json.dumps({"type": type(record).__name__} | record.model_dump(mode="json")))

    return tell


def story(trajectory: Trajectory, attempts: Sequence[Attempt], pictures: "ImageStore", out: Console) -> None:
    """The story's words, and where its pictures lie."""
    chosen = {a.step: a.image_id for a in attempts if trajectory.selected.get(a.step) == a.attempt}
    for step in trajectory.plan.steps if trajectory.plan else ():
        image_id = chosen.get(step.index)
        where = f"  {pictures.path(image_id)}" if image_id else ""
        out.print(f"{step.index}. {plain(step.words or step.prompt or '')}[dim]{where}[/]")


def summary(trajectories: Sequence[Trajectory], attempts: Sequence[Attempt], run: Path, out: Console) -> None:
    """How it went, and how to go on where something is missing."""
    ends = Counter(trajectory.status for trajectory in trajectories)
    tries = Counter(attempt.status for attempt in attempts)
    out.print(
        f"{len(trajectories)} request{'s' * (len(trajectories) != 1)}: "
        + ", ".join(f"{count} {status}" for status, count in ends.most_common())
        + f"; {len(attempts)} pictures: "
        + ", ".join(f"{count} {status}" for status, count in tries.most_common())
    )
    for trajectory in [t for t in trajectories if t.status != "complete"][:5]:
        out.print(f"  {plain(trajectory.id)}: [red]{trajectory.status}[/] {plain(trajectory.error or '')}")
    if ends["complete"] < len(trajectories):
        out.print(f"try the others again: interleave batch --resume {run} --retry")
