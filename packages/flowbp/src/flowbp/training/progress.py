"""How a run reports its progress: live on a terminal, as plain lines elsewhere, as JSON lines for machines."""

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from flowbp.evaluation.compare import format_score, score_title
from imgen_common.console import format_duration
from imgen_common.files import finite_or_none

if TYPE_CHECKING:
    from rich.console import Console, Group

WINDOW = 10
"""Updates over which shown numbers are averaged."""
BARS = "▁▂▃▄▅▆▇█"


class NullReporter:
    """How a run reports what it is doing, within a `with` statement: this one is silent, the others override it."""

    def __enter__(self) -> "NullReporter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        pass

    def stage(self, text: str) -> None:
        """A new phase begins."""

    def update(self, update: int, metrics: Mapping[str, float]) -> None:
        """An update is done."""

    def evaluation(self, name: str, done: int, total: int) -> None:
        """So many prompts of an evaluation are done."""

    def alert(self, text: str) -> None:
        """The watchdog raises an alert."""


class JsonLinesReporter(NullReporter):
    """One JSON object for every event, to `write`."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write

    def event(self, event: str, **values: Any) -> None:
        """Write {"event": event, ...}; numbers that are not finite become null."""
        line = {key: finite_or_none(v) if isinstance(v, float) else v for key, v in values.items()}
        self._write(json.dumps({"event": event} | line))

    def stage(self, text: str) -> None:
        self.event("stage", text=text)

    def update(self, update: int, metrics: Mapping[str, float]) -> None:
        self.event("update", update=update, **metrics)

    def evaluation(self, name: str, done: int, total: int) -> None:
        self.event("evaluation", name=name, done=done, total=total)

    def alert(self, text: str) -> None:
        self.event("alert", text=text)


class ProgressState:
    """What the reporters for people remember: recent metrics, and how long is left."""

    def __init__(self, num_updates: int, scores: Sequence[str]) -> None:
        self.num_updates, self.scores = num_updates, scores
        self.recent: deque[Mapping[str, float]] = deque(maxlen=WINDOW)
        self.rewards: list[float] = []
        self.stage = ""
        self._stage_start = time.monotonic()
        self._evaluation_seconds = 0.0
        self._ends: deque[float] = deque(maxlen=WINDOW + 1)

    def begin_stage(self, stage: str) -> float:
        """Begins a stage; returns the seconds that the one before took."""
        now = time.monotonic()
        took = now - self._stage_start
        if self.stage.startswith("evaluating base"):
            self._evaluation_seconds += took
        self.stage, self._stage_start = stage, now
        return took

    def update(self, update: int, metrics: Mapping[str, float]) -> None:
        """Remembers the metrics of an update."""
        if not self._ends:
            self._ends.append(self._stage_start)
        self._ends.append(time.monotonic())
        self.recent.append(metrics)
        self.rewards.append(metrics[self.scores[0]])

    def seconds_left(self, update: int) -> float:
        """About how many seconds are left, at the pace of the last updates and of the first evaluation."""
        pace = (self._ends[-1] - self._ends[0]) / max(1, len(self._ends) - 1)
        return (self.num_updates - update) * pace + self._evaluation_seconds

    def mean(self, name: str) -> float:
        """Mean of a metric over the last updates."""
        return sum(m[name] for m in self.recent) / len(self.recent)

    def labeled_values(self) -> list[tuple[str, str]]:
        """(label, value) of what a person follows."""
        newest = self.recent[-1]
        recent = {name: [metrics[name] for metrics in self.recent] for name in self.scores}
        shown = [(score_title(name).lower(), format_score(name, self.mean(name), *recent[name])) for name in recent]
        shown.append(("gradient norm", f"{self.mean('grad_norm'):.3g}"))
        if gaps := sorted(name for name in newest if name.startswith("gap_")):
            shown.append(("gaps", " ".join(f"{self.mean(name):.3f}" for name in gaps)))
        shown.append(("s/update", f"{self.mean('seconds'):.2f}"))
        if "tflops" in newest:
            share = f" ({self.mean('mfu'):.0%} of peak)" if "mfu" in newest else ""
            shown.append(("TFLOP/s", f"{self.mean('tflops'):.3g}{share}"))
        shown.append(("peak", format_memory(newest["peak_memory_gib"])))
        return shown


class Quarters:
    """Says of a long job when a quarter, half and three quarters of it are done."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write, self._last = write, 0

    def __call__(self, label: str, done: int, total: int) -> None:
        quarter = 4 * min(done, total) // total
        if quarter not in (self._last, 4):
            self._write(f"  {label}: {done} of {total}")
        self._last = quarter


class TextReporter(NullReporter):
    """Plain lines: every stage, quarters of evaluations, the first update, every tenth and the last."""

    def __init__(self, num_updates: int, scores: Sequence[str], write: Callable[[str], None]) -> None:
        self._track, self._write = ProgressState(num_updates, scores), write
        self._quarters = Quarters(write)

    def stage(self, text: str) -> None:
        self._track.begin_stage(text)
        self._write(f"{text} ...")

    def update(self, update: int, metrics: Mapping[str, float]) -> None:
        track = self._track
        track.update(update, metrics)
        if len(track.rewards) == 1 or update % WINDOW == 0 or update == track.num_updates:
            numbers = "  ".join(f"{name} {value}" for name, value in track.labeled_values())
            self._write(
                f"update {update}/{track.num_updates}  {numbers}  left {format_duration(track.seconds_left(update))}"
            )

    def evaluation(self, name: str, done: int, total: int) -> None:
        self._quarters(name, done, total)

    def alert(self, text: str) -> None:
        self._write(f"ALERT {text}")


class LiveReporter(NullReporter):
    """A bar, the numbers of the last updates and the reward so far as a strip, redrawn in place."""

    def __init__(self, num_updates: int, scores: Sequence[str], console: "Console") -> None:
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._track, self._console = ProgressState(num_updates, scores), console
        self._bar = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}")
        )
        self._task = self._bar.add_task("starting", total=None, left="")
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=5, transient=True)

    def __enter__(self) -> "LiveReporter":
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.stage("")
        self._live.stop()

    def _render(self) -> "Group":
        from rich.console import Group
        from rich.text import Text

        if not self._track.recent:
            return Group(self._bar)
        text = Text("  ").join(Text.assemble((f"{n} ", "dim"), v) for n, v in self._track.labeled_values())
        strip = Text.assemble((f"{self._track.scores[0]} ", "dim"), (sparkline(self._track.rewards, 40), "cyan"))
        return Group(self._bar, text, strip)

    def stage(self, text: str) -> None:
        before, took = self._track.stage, self._track.begin_stage(text)
        if before:
            self._console.print(f"[green]✓[/] {before} [dim]{format_duration(took)}[/]", highlight=False)
        self._bar.reset(self._task, total=None, description=text or "done", left="")

    def update(self, update: int, metrics: Mapping[str, float]) -> None:
        self._track.update(update, metrics)
        total = self._track.num_updates
        left = f"left {format_duration(self._track.seconds_left(update))}"
        self._bar.update(self._task, description="training", completed=update, total=total, left=left)

    def alert(self, text: str) -> None:
        from rich.text import Text

        self._console.print(Text.assemble(("!", "bold red"), f" {text}"), highlight=False)

    def evaluation(self, name: str, done: int, total: int) -> None:
        description = "quick evaluation" if name == "quick" else f"evaluating {name}"
        self._bar.update(self._task, description=description, completed=done, total=total)


def make_reporter(num_updates: int, scores: Sequence[str], *, is_main: bool, as_json: bool) -> NullReporter:
    """The reporter that fits this process and its output.  scores: the rewards to show, the first one as a strip."""
    if not is_main:
        return NullReporter()
    if as_json:
        return JsonLinesReporter(partial(print, flush=True))
    from rich.console import Console

    console = Console()
    if sys.stdout.isatty() and console.is_terminal and not console.is_dumb_terminal:  # rich believes FORCE_COLOR
        return LiveReporter(num_updates, scores, console)
    return TextReporter(num_updates, scores, lambda text: print(text, flush=True))


def sparkline(values: list[float], width: int) -> str:
    """Values as a strip of at most `width` bars, each the mean of a run of them."""
    count = min(width, len(values))
    parts = [values[len(values) * i // count : len(values) * (i + 1) // count] for i in range(count)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    return "".join(BARS[round((m - low) / (high - low) * 7) if high > low else 0] for m in means)


def format_memory(gib: float) -> str:
    """`1.02 GiB`."""
    return f"{gib:.2f} GiB"
