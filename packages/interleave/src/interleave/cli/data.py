"""The commands `interleave data ...`.  Nothing heavy is imported before one runs."""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from imgen_common.errors import UserError, one_line, quoted
from imgen_common.judging.objects import ParseMode
from imgen_common.shutdown import message_when_stopped
from interleave.cli.options import Json, MiniatureConfigs, Sets, Shard, Yes

if TYPE_CHECKING:
    from imgen_common.judging.questions import Question
    from interleave.datasets.build import BuildProgress
    from interleave.datasets.config import DataConfig
    from interleave.datasets.filters import SetInfo

app = typer.Typer(
    name="data",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Make training sets of planner and critic: build them from trajectories, import, check and show them.\n\n"
    "Example: interleave data build configs/interleave/data_miniature.yaml --out sets/miniature",
)
RECIPES = Path(__file__).parent / "recipes"
"""What is run without a CONFIG: the miniature's recipes, equal to those of the same names in `configs/interleave`."""
MINIATURE_SET = Path("sets/miniature")
MINIATURE_COST = (
    "400 requests of the miniature's world, with their images and scores; about 6 minutes on one core of a CPU"
)
Out = typer.Option("--out", metavar="DIR", help="New folder that becomes the set.")


@app.command()
def build(
    configs: MiniatureConfigs = None,
    sets: Sets = None,
    out: Annotated[Path | None, Out] = None,
    resume: Annotated[Path | None, typer.Option(metavar="DIR", help="Resume a build, or filter it again.")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="With --resume: try failed trajectories again.")] = False,
    shard: Shard = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Build training sets: run the loop with teachers as planner and critic, score the images with a judge, and make
    planner_sft, critic_sft and critic_rl from them, filtered, balanced and split, with a page of statistics. Without
    CONFIG it builds the miniature's sets on the CPU, by default in sets/miniature. --resume continues a killed build,
    which ends with the same sets; with other filters it makes the sets again without calling a model. What a chat model
    as judge will cost is printed before it is asked, and needs --yes above confirm_calls or confirm_money.

    Example:

    \b
      interleave data build
      interleave data build configs/interleave/data_miniature.yaml --out sets/miniature
      interleave data build --resume sets/miniature
      interleave data build --resume sets/miniature --set filters.rl_share=0.5 --set filters.val=0.1
      interleave data build --out sets/part-2 --shard 2/2
    """
    if out is None and resume is None and not configs:
        out = MINIATURE_SET
    if (out is None) == (resume is None):
        raise UserError("give --out DIR to start a build, or --resume DIR to continue one (one of the two)")
    if retry and resume is None:
        raise UserError("--retry goes with --resume DIR: it tries the failed trajectories of that build again")
    from imgen_common.run_folder.find import CONFIG, check_maker
    from interleave.datasets.build import has_records
    from interleave.loop.shards import Shard as Shard_

    files = configs or []
    if resume is not None:
        folder, files = resume, [resume / CONFIG, *files]
        if not files[0].is_file():
            raise UserError(f"{folder}: no build in it (no {CONFIG}); start one with --out {quoted(folder)}")
        check_maker(folder, "interleave data")
    else:
        assert out is not None
        folder, files = out, files or [RECIPES / "data_miniature.yaml"]
        if has_records(folder):
            raise UserError(
                f"{folder}: holds a build already; continue it with --resume {quoted(folder)}, or give another folder"
            )
    if shard is not None:
        Shard_.parse(shard)  # before torch is imported
    changes = [*(sets or []), *([f"shard={shard}"] if shard is not None else [])]
    info, page = _build(folder, files, changes, as_json, retry, yes)
    _print_set(info, folder, page, as_json)


def lacks_miniature_set(folder: Path) -> bool:
    """Whether it is the folder of the set that the miniature's recipes read, and has none."""
    from interleave.datasets.filters import INFO

    return folder == MINIATURE_SET and not (folder / INFO).is_file()


def build_miniature_set(folder: Path, as_json: bool, may_build: bool) -> None:
    """Builds the set that the miniature's recipes read, or goes on with it.  Raises UserError unless `may_build`."""
    if not may_build:
        raise UserError(f"{folder}: not there; make it first ({MINIATURE_COST}) with: interleave data build")
    print(f"{folder}: not there; building it, once ({MINIATURE_COST})", file=sys.stderr)
    _build(folder, [RECIPES / "data_miniature.yaml"], [], as_json)


def _build(
    folder: Path, files: Sequence[Path], sets: Sequence[str], as_json: bool, retry: bool = False, yes: bool = False
) -> "tuple[SetInfo, Path | None]":
    """The set, built or built further, and its page; None without rows."""
    from imgen_common.config import load
    from interleave.cli import console as show
    from interleave.datasets.build import BuildProgress, build_sets
    from interleave.datasets.config import DataConfig
    from interleave.pages.dataset import write_page

    config = load(DataConfig, files, sets)
    scoring = _scoring_progress(config, as_json, yes, f"add --yes to interleave data build --resume {quoted(folder)}")

    def report_progress(total: int) -> BuildProgress:
        printer = show.BatchProgressPrinter(show.open_console(stderr=True), total)
        return scoring if as_json else replace(scoring, on_record=printer)

    again = " --retry" if retry else ""
    with message_when_stopped(
        lambda: f"stopped; continue with: interleave data build --resume {quoted(folder)}{again}"
    ):
        info = build_sets(folder, config, sys.argv, report_progress, retry)
    return info, write_page(folder) if any(sum(one.values()) for one in info.rows.values()) else None


@app.command("import")
def import_(
    form: Annotated[
        Literal["sharegpt", "rl", "execution_record"],
        typer.Argument(metavar="FORMAT", help="sharegpt, rl or execution_record."),
    ],
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="File, or folder of parquet files or of execution records.")
    ],
    out: Annotated[Path, Out],
    role: Annotated[
        Literal["planner", "critic"] | None, typer.Option(help="With sharegpt: the agent that the rows train.")
    ] = None,
    root: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder that holds all images; default: the folder of PATH.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a set from files in the formats of the reference code: sharegpt items of planner or critic, items for
    reinforcement learning (each a JSON array, JSON lines, parquet, or a folder of parquet files), or execution records
    of data construction. What cannot be read is left out and named. The trajectories of execution records are kept,
    too, so that `data build --set trajectories='[DIR]'` can score and filter them.

    Example:

    \b
      interleave data import sharegpt critic_sft.json --role critic --out sets/released_critic
      interleave data import rl critic_rl.jsonl --root . --out sets/released_rl
      interleave data import execution_record trajectories/ --out sets/released
    """
    from interleave.datasets.importing import import_set
    from interleave.pages.dataset import write_page

    info = import_set(form, path, out, root, role)
    _print_set(info, out, write_page(out), as_json)


@app.command()
def export_edits(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run, or the folder of a set that `data build` made.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder for edits.jsonl and its images.")],
    as_json: Json = False,
) -> None:
    """Write the edits that stories asked for as rows of a prompt and its source images, on which `flowbp train` aligns
    the generator (`data.prompts`). Each step of a plan that edits an image is a row, with the images that its first
    attempt was given.

    Example:

    \b
      interleave data export-edits runs/requests --out sets/edits
      flowbp train --set data.prompts=sets/edits/edits.jsonl
    """
    from imgen_common.run_folder.find import find_run
    from interleave.datasets.formats import edits

    count = edits.export_edits(run if run.exists() else find_run(str(run), Path("runs")), out)
    file = out / edits.FILE
    print(json.dumps({"type": "Edits", "path": str(file), "rows": count}) if as_json else f"{file}: {count} edits")


@app.command()
def check(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A set's folder, or one of its files.")],
    parse_mode: Annotated[
        ParseMode, typer.Option(help="How answers are parsed: as JSON, also Python-style, or also without <think>.")
    ] = "strict",
    most: Annotated[int, typer.Option(min=1, metavar="N", help="Print at most N problems; all are counted.")] = 100,
    run_configs: Annotated[
        list[Path] | None,
        typer.Option("--run-config", metavar="FILE", help="The recipe that the trained agents will run with."),
    ] = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Read every row and every image of a set and print which rows are wrong and why. The exit code is 1 if any is.
    Rows from sharegpt files train on the text that they have: a warning says how many of their prompts are not what
    run time shows with the templates of --run-config (by default, those of `interleave run`), and where they differ.
    With --run-config or --set, the prompts of all supervised rows are compared.

    Example:

    \b
      interleave data check sets/miniature
      interleave data check sets/released_critic --run-config configs/interleave/klein_interleavethinker.yaml
      interleave data check sets/mine --set critic.template.file=critic.txt --parse-mode tolerant
    """
    from imgen_common.config import load
    from imgen_common.console import count
    from interleave.cli import console as show
    from interleave.datasets.check import SetChecker
    from interleave.loop.config import RunConfig

    run = load(RunConfig, run_configs or [], sets or []) if run_configs or sets else None
    checker, console, num_problems = SetChecker(path, parse_mode, run), show.open_console(), 0
    for num_problems, problem in enumerate(checker.problems(), 1):
        if as_json:
            print(json.dumps({"file": str(problem.file), "line": problem.line, "why": problem.why}))
        elif num_problems <= most:
            console.print(show.sanitize(str(problem)))
    if as_json:
        files = {name: vars(one) for name, one in checker.counts.items()}
        compared = {name: one.as_json() for name, one in checker.prompts.items()}
        print(json.dumps({"problems": num_problems, "files": files, "prompts": compared}))
    else:
        if num_problems > most:
            console.print(f"... and {num_problems - most} more problems")
        for name, one in checker.counts.items():
            console.print(f"{name}: {count(one.rows, 'row')}, {one.wrong} wrong")
        for name, prompts in checker.prompts.items():
            warning = "warning: " if prompts.different else ""
            console.print(show.sanitize(f"{warning}{name}: {prompts.describe()}"), soft_wrap=True)
        console.print("no problems" if not num_problems else count(num_problems, "problem"))
    if num_problems:
        raise typer.Exit(1)


@app.command("show")
def show_(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A file of a set, such as DIR/critic_sft.jsonl.")],
    number: Annotated[int, typer.Argument(metavar="N", min=1, help="Number of the row, counted from 1.")],
    template: Annotated[
        str | None, typer.Option(metavar="NAME", help="With critic_rl: the critic's template; default: the build's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print a row: the prompt with the paths of its images, and the answer to learn or the scores of the image.

    Example: interleave data show sets/miniature/critic_sft.jsonl 3
    """
    from interleave.cli import console as show
    from interleave.datasets.inspect import read_row

    seen = read_row(path, number, template)
    if as_json:
        print(json.dumps(seen.as_json()))
        return
    console = show.open_console()
    for part in seen.lines():
        console.print(part, markup=False, soft_wrap=True)


@app.command()
def agreement(
    path: Annotated[Path, typer.Argument(metavar="SET", help="A set's folder, or one of its files of critic_rl.")],
    configs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="CONFIG...", help="YAML files that set the other `judge`."),
    ] = None,
    sets: Sets = None,
    most: Annotated[
        int, typer.Option(min=0, metavar="N", help="Number of rows to print, those with the largest differences.")
    ] = 5,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Score the images of critic_rl with another judge and compare it with the scores of the set: differences,
    correlations, the share of pairs of images that both judges order alike, and the rows on which they disagree most.
    Its answers are kept in the set's folder; what they cost needs --yes above confirm_calls or confirm_money.

    Example:

    \b
      interleave data agreement sets/mine --set judge.kind=model --set judge.model.model=Qwen/Qwen3-VL-32B-Instruct
    """
    from imgen_common.config import load
    from imgen_common.run_folder.find import CONFIG
    from interleave.cli import console as show
    from interleave.datasets.agreement import compare_judges
    from interleave.datasets.config import DataConfig

    recorded = (path if path.is_dir() else path.parent) / CONFIG
    config = load(DataConfig, [*([recorded] if recorded.is_file() else []), *(configs or [])], sets or [])
    if config.judge is None or (not recorded.is_file() and "judge" not in config.model_fields_set):
        raise UserError("judge: none is given; name the one to compare with, such as --set judge.kind=model")
    found = compare_judges(
        path, config, config.judge.build(), _scoring_progress(config, as_json, yes, "add --yes"), most
    )
    if as_json:
        print(json.dumps(found.as_json()))
        return
    console = show.open_console()
    for line in found.lines():
        console.print(show.sanitize(line), soft_wrap=True)


def _scoring_progress(config: "DataConfig", as_json: bool, yes: bool, remedy: str) -> "BuildProgress":
    """Prints what the judge will cost, which is refused above the limits without `yes`, and how many images it scored,
    now and then."""
    from imgen_common.judging.cost import confirm_cost, estimate_cost
    from interleave.cli import console as show
    from interleave.datasets.build import BuildProgress

    console = show.open_console(stderr=True)

    def confirm(questions: "Iterable[Question]") -> None:
        cost = estimate_cost(questions, config.prices, config.run.loop.concurrency)
        confirm_cost(cost, config, console.print, yes, remedy)

    def print_progress(done: int, total: int) -> None:
        if not as_json and (done == total or done % 200 == 0):
            console.print(f"scored {done}/{total} images")

    return BuildProgress(on_questions=confirm, on_scored=print_progress)


def _print_set(info: "SetInfo", folder: Path, page: Path | None, as_json: bool) -> None:
    """Prints what was made; exit code 1 if there are no rows."""
    if as_json:
        print(json.dumps({"path": str(folder), "page": str(page) if page else None, **info.model_dump(mode="json")}))
    else:
        for name, splits in info.rows.items():
            print(f"{name}: " + ", ".join(f"{count} {split}" for split, count in splits.items()))
        dropped = Counter({f"{one.filter} ({one.of})": one.dropped for one in info.filters if one.dropped})
        if info.judge is not None:
            failures = ", ".join(f"{count} {kind}" for kind, count in info.unscored.items()) or "none"
            print(f"scores: {info.scored} images by {info.judge}, failed: {failures}")
        if dropped:
            print("dropped: " + ", ".join(f"{count} {name}" for name, count in dropped.items()))
        for note in info.notes:
            print(f"note: {one_line(note)}")
        print(f"statistics: {page}" if page else f"{folder}: no rows")
    if page is None:
        raise typer.Exit(1)
