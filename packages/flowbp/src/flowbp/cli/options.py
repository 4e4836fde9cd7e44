"""Options, checks and progress displays that the commands share."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from imgen_common.devices import launched_process
from imgen_common.errors import UserError

Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the configuration; may be repeated."),
]
Runs = Annotated[Path, typer.Option("--runs", metavar="DIR", help="Folder that holds the run folders.")]
ResumeFrom = Annotated[
    Literal["last", "last-good"],
    typer.Option(help="With --resume: the last checkpoint, or, if that is damaged, the last that is whole."),
]
Steps = Annotated[int | None, typer.Option("--num-inference-steps", help="Denoising steps.", min=1, max=1000)]
Json = Annotated[bool, typer.Option("--json", help="Print only JSON.")]

SECONDS_TO_PRINT = 10.0
"""In which the first process prints what is wrong, while the others wait."""


def checked_sets(sets: Sequence[str] | None, options: Mapping[str, str]) -> list[str]:
    """What `--set` changes.  Raises UserError for a key that a command does not read, having an option in its place."""
    for key in (one.partition("=")[0].strip() for one in sets or ()):
        if key in options:
            raise UserError(f"--set {key}: is not read here; give {options[key]}")
    return list(sets or ())


@contextmanager
def report_error_once() -> Iterator[None]:
    """Lets only the first process print a UserError that all processes raise.

    The others wait until it has, since a launcher ends all processes as soon as one has ended.
    """
    try:
        yield
    except UserError:
        if launched_process(os.environ).rank == 0:
            raise
        time.sleep(SECONDS_TO_PRINT)
        raise typer.Exit(2) from None


def print_notes(notes: Iterable[str]) -> None:
    """Prints notes to standard error, in the first process only."""
    if os.environ.get("RANK", "0") == "0":
        for note in notes:
            print(f"note: {note}", file=sys.stderr)


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """on_progress(label, done, total): a progress bar on standard error, or a line there at each quarter."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    if not sys.stderr.isatty():
        from flowbp.training.progress import Quarters

        yield Quarters(partial(print, file=sys.stderr, flush=True))
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=None)

        def on_progress(label: str, done: int, total: int) -> None:
            bar.update(task, description=escape(label), completed=done, total=total)

        yield on_progress
