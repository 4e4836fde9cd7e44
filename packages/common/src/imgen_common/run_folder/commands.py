"""The commands `runs list`, `runs compare` and `runs clean`, which both programs have."""

import inspect
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from imgen_common.console import print_table
from imgen_common.errors import one_line

if TYPE_CHECKING:
    from imgen_common.run_folder.cleaning import Removable
    from imgen_common.run_folder.listing import RunSummary

Runs = Annotated[Path, typer.Option("--runs", metavar="DIR", help="Folder that holds the run folders.")]
Json = Annotated[bool, typer.Option("--json", help="Print only JSON.")]
MAX_SHOWN = 60
"""Characters of a value that a table shows."""


class ListByDefault(typer.core.TyperGroup):
    """`PROGRAM runs` with options, or nothing, is `PROGRAM runs list`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The arguments, begun with `list` where no command is named."""
        if not args or (args[0].startswith("-") and args[0] not in ctx.help_option_names):
            args = ["list", *args]
        return super().parse_args(ctx, args)


def build_runs_app(program: str, names: tuple[str, str]) -> typer.Typer:
    """The group `runs` of a program.  names: of two runs, for the examples of its help."""
    app = typer.Typer(
        name="runs",
        cls=ListByDefault,
        rich_markup_mode=None,
        help="List run folders with their state and last scores, compare two of them, and free the disk space that "
        "older checkpoints and images take. Without a command they are listed.\n\n"
        f"Example: {program} runs",
    )
    commands: dict[str, Callable[..., None]] = {"list": list_runs, "compare": compare, "clean": clean}
    for name, command in commands.items():
        text = inspect.cleandoc(command.__doc__ or "")
        for word, given in {"PROGRAM": program, "RUN_A": names[0], "RUN_B": names[1]}.items():
            text = text.replace(word, given)
        app.command(name, help=text)(command)
    return app


def list_runs(runs: Runs = Path("runs"), as_json: Json = False) -> None:
    """List the run folders, that written last first: name, kind, state, last scores, size on disk, and how long ago it
    was last written. A run is running while a process holds its lock. A training that was stopped names the update from
    which --resume goes on. Sizes count everything in a folder.

    Example:

    \b
      PROGRAM runs
      PROGRAM runs list --json
    """
    from imgen_common.run_folder import listing

    found = listing.list_runs(runs)
    if as_json:
        print(json.dumps([run.as_json() for run in found]))
        return
    if not found:
        print(f"no runs in {runs}")
        return
    rows = [_row(run, time.time()) for run in found]
    _print_table(("run", "kind", "state", "last scores", "size", "written"), rows, right=(4, 5))
    _print_origins([run for run in found if run.kind == "train"])
    print(f"\n{len(found)} run{'s' * (len(found) != 1)} in {runs}, {format_bytes(sum(run.size for run in found))}")


def _row(run: "RunSummary", now: float) -> tuple[str, ...]:
    scores = " ".join(f"{name}={_score(value)}" for name, value in run.scores.items()) or "-"
    return run.name, run.kind, run.progress, scores, format_bytes(run.size), format_age(now - run.changed)


def _score(value: float) -> str:
    """Four significant digits, and two decimals of a large number."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.4g}" if abs(value) < 10**4 else f"{value:.2f}"


def compare(
    first: Annotated[str, typer.Argument(metavar="RUN", help="A run folder.")],
    second: Annotated[str, typer.Argument(metavar="OTHER", help="Another one.")],
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Compare two runs: the keys of their configurations that differ, and their last scores side by side. These are
    means without intervals; flowbp eval RUN --against OTHER compares two trainings at equal prompts and seeds.

    Example:

    \b
      PROGRAM runs compare RUN_A RUN_B
      PROGRAM runs compare RUN_A RUN_B --json
    """
    from imgen_common.config import read_yaml
    from imgen_common.run_folder.data import leaves
    from imgen_common.run_folder.find import CONFIG, find_run
    from imgen_common.run_folder.listing import summarize_run

    paths = [find_run(text, runs) for text in (first, second)]
    sides = [leaves(read_yaml(path / CONFIG)) for path in paths]
    summaries = [summarize_run(path) for path in paths]
    differ = {
        key: [side.get(key) for side in sides]
        for key in dict.fromkeys([*sides[0], *sides[1]])
        if sides[0].get(key) != sides[1].get(key)
    }
    if as_json:
        print(json.dumps({"configuration": differ, "runs": [run.as_json() for run in summaries]}))
        return
    _print_comparison(differ, [{key: _text(side, key) for key in differ} for side in sides], summaries)


def _print_comparison(
    differ: Mapping[str, Any], texts: Sequence[Mapping[str, str]], runs: Sequence["RunSummary"]
) -> None:
    names = [run.name if runs[0].name != runs[1].name else run.path for run in runs]
    if differ:
        _print_table(("configuration", *names), [(key, *(side[key] for side in texts)) for key in differ])
    else:
        print("their configurations are equal")
    print()
    rows = [("kind", *(run.kind for run in runs)), ("state", *(run.progress for run in runs))]
    for name in dict.fromkeys(name for run in runs for name in run.scores):
        rows.append((name, *(_score(run.scores[name]) if name in run.scores else "-" for run in runs)))
    _print_table(("", *names), rows, right=(1, 2))
    _print_origins([replace(run, name=name) for name, run in zip(names, runs, strict=True)])


def _print_origins(runs: "Sequence[RunSummary]") -> None:
    """What the scores of runs are those of."""
    for of in dict.fromkeys(run.scores_of for run in runs if run.scores_of):
        print(f"scores of {', '.join(one_line(run.name) for run in runs if run.scores_of == of)}: {of}")


def _text(side: Mapping[str, Any], key: str) -> str:
    return one_line(json.dumps(side[key], ensure_ascii=False), MAX_SHOWN) if key in side else "-"


def clean(
    names: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders.")],
    images: Annotated[
        bool, typer.Option("--images", help="Also the images of finished runs: logged, of evaluations, of stories.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
    runs: Runs = Path("runs"),
) -> None:
    """Free disk space: show what can be removed from runs, and remove it once that is confirmed. These are the
    checkpoints before the last one and, with --images, the images of finished runs, which pages made before keep only
    if they are in the page itself. The last checkpoint, the last one before the watchdog's first alert, that which
    trl.load_best_model_at_end will load, scores, records, metrics and exported models stay, and a run in use is
    refused. Where standard input is not a terminal nothing is removed without --yes.

    Example:

    \b
      PROGRAM runs clean RUN_A
      PROGRAM runs clean RUN_A RUN_B --images --yes
    """
    from imgen_common.run_folder import cleaning
    from imgen_common.run_folder.find import find_run

    paths = list(dict.fromkeys(find_run(text, runs) for text in names))
    found = {path: cleaning.find_removable(path, images) for path in paths}
    total = sum(one.size for removable in found.values() for one in removable)
    if not total:
        print("nothing to remove")
        return
    _print_removable(found, total)
    if not yes and not (sys.stdin and sys.stdin.isatty()):
        print("nothing was removed; --yes removes it")
    elif yes or typer.confirm("remove it?"):
        print(f"freed {format_bytes(sum(cleaning.remove(path, images) for path in paths))}")
    else:
        print("nothing was removed")


def _print_removable(found: Mapping[Path, Sequence["Removable"]], total: int) -> None:
    rows = [(str(path), one.what, str(len(one.files)), format_bytes(one.size)) for path in found for one in found[path]]
    _print_table(("run", "what", "files", "size"), [*rows, ("", "in all", "", format_bytes(total))], right=(2, 3))


def format_bytes(size: float) -> str:
    """Bytes in the unit that suits them, with three significant digits."""
    for unit in ("B", "KiB", "MiB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:,.3g} GiB" if size < 999.5 else f"{size:,.0f} GiB"


def format_age(seconds: float) -> str:
    """A time that has passed, in its largest unit."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit} ago"
    return "just now"


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """A table; its text is shown as it is, without control characters.  Not on a terminal it is as wide as it needs."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for index, title in enumerate(header):
        table.add_column(escape(one_line(title)), justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(one_line(cell)) for cell in row))
    out = Console(highlight=False, emoji=False)
    if not out.is_terminal:
        out = Console(highlight=False, emoji=False, width=Console(width=10**4).measure(table).maximum)
    print_table(out, table)
