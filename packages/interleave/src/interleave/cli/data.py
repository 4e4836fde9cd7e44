"""The commands `interleave data ...`.  Nothing heavy is imported before one runs."""

import json
import sys
from collections import Counter
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imgen_common.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from interleave.datasets.filters import SetInfo

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Training sets of planner and critic: build them from trajectories, import, check and show them.\n\n"
    "Example: interleave data build configs/interleave/data_miniature.yaml --out sets/miniature",
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines, and nothing else.")]
Out = typer.Option("--out", metavar="DIR", help="New folder that becomes the set.")


class Format(StrEnum):
    """Of the reference's files."""

    sharegpt = "sharegpt"
    rl = "rl"
    execution_record = "execution_record"


class Role(StrEnum):
    """Whose rows they are."""

    planner = "planner"
    critic = "critic"


class Policy(StrEnum):
    """How answers are read."""

    strict = "strict"
    tolerant = "tolerant"


def build(
    configs: Annotated[
        list[Path] | None, typer.Argument(metavar="CONFIG...", help="YAML files, later ones over earlier ones.")
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the configuration; may be given again."),
    ] = None,
    out: Annotated[Path | None, Out] = None,
    resume: Annotated[Path | None, typer.Option(metavar="DIR", help="Go on with a build, or filter it anew.")] = None,
    retry: Annotated[
        bool, typer.Option("--retry", help="With --resume: try trajectories again that ended early.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make training sets: trajectories of the loop with teachers as planner and critic, a judge's scores on their
    pictures, and of those planner_sft, critic_sft and critic_rl, filtered, balanced and split, with a page of
    statistics. A killed build goes on with --resume and ends as one that was not; with other filters it makes the sets
    anew and calls nobody.

    Example:

    \b
      interleave data build configs/interleave/data_miniature.yaml --out sets/miniature
      interleave data build --resume sets/miniature
      interleave data build --resume sets/miniature --set filters.rl_share=0.5 --set filters.val=0.1
    """
    if (out is None) == (resume is None):
        raise UserError("give --out DIR to begin, or --resume DIR to go on (one of the two)")
    if retry and resume is None:
        raise UserError("--retry goes with --resume DIR: it tries the failed trajectories of that build again")
    folder = out or resume
    assert folder is not None
    from imgen_common.config import load
    from imgen_common.run_folder.find import CONFIG
    from interleave.cli import console as show
    from interleave.datasets.build import Telling, is_begun
    from interleave.datasets.build import build as make
    from interleave.datasets.config import DataConfig
    from interleave.pages.dataset import write_page

    recorded = folder / CONFIG
    if resume is not None and not recorded.is_file():
        raise UserError(f"{folder}: no build in it (no {CONFIG}); begin one with --out {folder}")
    if out is not None and is_begun(out):
        raise UserError(f"{folder}: holds a build already; go on with --resume {folder}, or give another folder")
    config = load(DataConfig, [*([recorded] if resume else []), *(configs or [])], sets or [])
    console = show.console(stderr=True)

    def telling(total: int) -> Telling:
        return Telling() if as_json else Telling(show.Counting(console, total), _judging(console))

    try:
        info = make(folder, config, sys.argv, telling, retry)
    except KeyboardInterrupt:
        print(f"stopped; go on with: interleave data build --resume {folder}", file=sys.stderr)
        raise
    page = write_page(folder) if any(sum(one.values()) for one in info.rows.values()) else None
    _done(info, folder, page, as_json)


def import_(
    form: Annotated[Format, typer.Argument(metavar="FORMAT", help="sharegpt, rl or execution_record.")],
    path: Annotated[Path, typer.Argument(metavar="PATH", help="File, or folder of execution records.")],
    out: Annotated[Path, Out],
    role: Annotated[Role | None, typer.Option(help="Of sharegpt: whose rows they are.")] = None,
    root: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder that holds all pictures; else that of PATH.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a set of files in the formats of the reference: sharegpt lists of planner or critic, JSON lines for
    reinforcement, execution records of data construction. The trajectories of execution records are kept too, for
    `data build --set trajectories='[DIR]'` to score and filter them.

    Example:

    \b
      interleave data import sharegpt critic_sft.json --role critic --out sets/released_critic
      interleave data import rl critic_rl.jsonl --root . --out sets/released_rl
      interleave data import execution_record trajectories/ --out sets/released
    """
    from interleave.datasets.importing import import_set
    from interleave.pages.dataset import write_page

    info = import_set(form.value, path, out, root, role.value if role else None)
    _done(info, out, write_page(out), as_json)


def check(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A set's folder, or one of its files.")],
    policy: Annotated[Policy, typer.Option(help="How answers are read: strict JSON, or also Python-style.")] = (
        Policy.strict
    ),
    most: Annotated[int, typer.Option(min=1, metavar="N", help="Problems printed, at most; all are counted.")] = 100,
    as_json: Json = False,
) -> None:
    """Read every row and every picture of a set and say which row is wrong and why. The exit code is 1 if one is.

    Example: interleave data check sets/miniature
    """
    from interleave.cli import console as show
    from interleave.datasets.check import Checker

    checker, console, count = Checker(path, policy.value), show.console(), 0
    for count, problem in enumerate(checker.problems(), 1):
        if as_json:
            print(json.dumps({"file": str(problem.file), "line": problem.line, "why": problem.why}))
        elif count <= most:
            console.print(show.plain(str(problem)))
    if as_json:
        print(json.dumps({"problems": count, "files": {name: vars(one) for name, one in checker.counts.items()}}))
    else:
        if count > most:
            console.print(f"... and {count - most} more problems")
        for name, one in checker.counts.items():
            console.print(f"{name}: {one.rows} rows, {one.wrong} wrong")
        console.print("no problems" if not count else f"{count} problem{'s' * (count != 1)}")
    if count:
        raise typer.Exit(1)


def show_(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A file of a set, such as DIR/critic_sft.jsonl.")],
    number: Annotated[int, typer.Argument(metavar="N", min=1, help="Which row, counted from 1.")],
    template: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of critic_rl: the critic's template; else the build's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print a row: what the model reads, with the paths of its pictures in their places, and what it is to answer or
    what is known of the picture.

    Example: interleave data show sets/miniature/critic_sft.jsonl 3
    """
    from interleave.cli import console as show
    from interleave.datasets.inspect import shown

    seen = shown(path, number, template)
    if as_json:
        print(json.dumps(seen.as_json()))
        return
    console = show.console()
    for part in seen.lines():
        console.print(part, markup=False, soft_wrap=True)


def agreement(
    path: Annotated[Path, typer.Argument(metavar="SET", help="A set's folder, or one of its files of critic_rl.")],
    configs: Annotated[
        list[Path] | None, typer.Argument(metavar="CONFIG...", help="YAML files over the set's own; `judge` counts.")
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the configuration; may be given again."),
    ] = None,
    most: Annotated[int, typer.Option(min=0, metavar="N", help="Rows shown on which they are furthest apart.")] = 5,
    as_json: Json = False,
) -> None:
    """Let another judge score the pictures of critic_rl and say how far it agrees with the scores that are there:
    differences, correlations, how many pairs of pictures both order alike, and the rows on which they are furthest
    apart. What it said is kept in the set's folder and not asked again.

    Example:

    \b
      interleave data agreement sets/mine --set judge.kind=model --set judge.model.model=Qwen/Qwen3-VL-32B-Instruct
    """
    from imgen_common.config import load
    from imgen_common.run_folder.find import CONFIG
    from interleave.agents import scoring
    from interleave.cli import console as show
    from interleave.datasets.agreement import compare
    from interleave.datasets.config import DataConfig

    recorded = (path if path.is_dir() else path.parent) / CONFIG
    config = load(DataConfig, [*([recorded] if recorded.is_file() else []), *(configs or [])], sets or [])
    if config.judge is None or (not recorded.is_file() and "judge" not in config.model_fields_set):
        raise UserError("judge: none is given; name the one to compare with, such as --set judge.kind=model")
    told = (lambda done, total: None) if as_json else _judging(show.console(stderr=True))
    found = compare(path, config, scoring.build_judge(config.judge), told, most)
    if as_json:
        print(json.dumps(found.as_json()))
        return
    console = show.console()
    for line in found.lines():
        console.print(show.plain(line), soft_wrap=True)


# --- common ----------------------------------------------------------------------------------------------------------


def _judging(console: "Console") -> Callable[[int, int], None]:
    """Tells of pictures scored, now and then."""

    def tell(done: int, total: int) -> None:
        if done == total or done % 200 == 0:
            console.print(f"scored {done}/{total} pictures")

    return tell


def _done(info: "SetInfo", folder: Path, page: Path | None, as_json: bool) -> None:
    """Say what was made; exit code 1 if nothing was."""
    if as_json:
        print(json.dumps({"path": str(folder), "page": str(page) if page else None, **info.model_dump(mode="json")}))
    else:
        for name, splits in info.rows.items():
            print(f"{name}: " + ", ".join(f"{count} {split}" for split, count in splits.items()))
        dropped = Counter({f"{one.filter} ({one.of})": one.dropped for one in info.filters if one.dropped})
        if dropped:
            print("left out: " + ", ".join(f"{count} {name}" for name, count in dropped.items()))
        for note in info.notes:
            print(f"note: {note}")
        print(f"statistics: {page}" if page else f"{folder}: no rows")
    if page is None:
        raise typer.Exit(1)


COMMANDS: dict[str, Callable[..., None]] = {
    "build": build,
    "import": import_,
    "check": check,
    "show": show_,
    "agreement": agreement,
}
for name, command in COMMANDS.items():
    app.command(name)(command)
