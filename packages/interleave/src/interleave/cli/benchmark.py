"""The commands `interleave benchmark ...`.  Nothing heavy is imported before one runs."""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from imgen_common.console import count, spinner
from imgen_common.errors import UserError, check_choice, quoted
from imgen_common.shutdown import message_when_stopped
from interleave.cli.options import Configs, Json, Sets, Yes

if TYPE_CHECKING:
    from interleave.benchmarks.base import Output
    from interleave.benchmarks.run import BenchmarkWork

app = typer.Typer(
    name="benchmark",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Official benchmarks with any generator, agents and judge: UEval, WISE, RISEBench and CoMM.\n\n"
    "Example: interleave benchmark ueval --out scores/ueval",
)
Stage = Literal["all", "generate", "score"]
TITLES = {
    "ueval": "UEval: questions that are answered with text and images",
    "wise": "WISE_Verified: images that need knowledge of the world, judged right or wrong",
    "wise_legacy": "WISE as published first, with three marks; not the same scale as WISE_Verified",
    "rise": "RISEBench: edits that need reasoning",
    "comm": "CoMM: sequences of text and images, tasks 1 to 4",
}
EXAMPLE = """Example:

\b
  interleave benchmark {name} --out scores/{name}{more}
  interleave benchmark {name} configs/interleave/benchmark_{name}.yaml --data data/{name} --prompts-from repository \\
    --run-config configs/interleave/klein_qwen3vl.yaml --out scores/klein-{name} --yes
  interleave benchmark {name} configs/interleave/benchmark_{name}.yaml --data data/{name} \\
    --run-config configs/interleave/klein_qwen3vl.yaml --out scores/klein-{name} --stage generate --shard 2/8
  interleave benchmark {name} configs/interleave/benchmark_{name}.yaml --data data/{name} \\
    --outputs-from theirs --out scores/theirs-{name}
"""


def run(
    context: typer.Context,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to create, or to continue in.")],
    configs: Configs = None,
    run_configs: Annotated[
        list[Path] | None,
        typer.Option("--run-config", metavar="FILE", help="A recipe of `interleave batch`; may be repeated."),
    ] = None,
    data: Annotated[
        str, typer.Option(metavar="PATH", help="The official data on disk; default: the miniature's edition.")
    ] = "builtin:shapes",
    prompts_from: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Your copy of the authors' repository, whose questions are asked."),
    ] = None,
    outputs_from: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Score what others made, in the layout of the authors' scorer."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use only N items, at equal distances.", min=1)] = None,
    shard: Annotated[str, typer.Option(metavar="K/N", help="Do the K-th of N parts, as processes share it.")] = "1/1",
    stage: Annotated[str, typer.Option(metavar="STAGE", help="generate, score, or all.")] = "all",
    yes: Yes = False,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Generate a benchmark's items, ask the judge about them, and print its figures.

    Example: interleave benchmark ueval --out scores/ueval
    """
    with spinner("loading"):
        chosen = check_choice("--stage", stage, Stage)
        if outputs_from is not None and chosen == "generate":
            raise UserError("--outputs-from: was made already; leave out --stage generate")
        from interleave.benchmarks.report import table_markdown
        from interleave.benchmarks.setup import BenchmarkRequest, check_judge, load_config, prepare

        name = context.command.name or ""
        request = BenchmarkRequest(name, data, out, prompts_from, outputs_from, limit, shard)
        config = load_config(configs or [], run_configs or [], sets or [])
        work, differences = prepare(request, config, sys.argv)
        makes = outputs_from is None and chosen != "score" and work.num_done() < len(work.shard.of(work.items))
        if makes and chosen != "generate":
            check_judge(config.judge, work.benchmark.judge, is_miniature=work.is_miniature)
    with message_when_stopped(lambda: "stopped; the same command continues"):
        if makes:
            _generate(work, as_json)
        outputs = work.outputs()
        work.write_outputs(outputs)
        if outputs_from is None and chosen != "score":
            _print_failed(work, outputs, as_json)
        if chosen != "generate":
            _score(work, outputs, yes, is_checked=makes)
    # a table would tell of the judge that is set now, not of one that answered
    if chosen == "generate" and not as_json:
        print(f"{len(outputs)} of {len(work.items)} items are generated; --stage score asks the judge about them")
        return
    report = work.write_report(outputs, differences)
    print(json.dumps(asdict(report), indent=1) if as_json else table_markdown(report).rstrip())


for benchmark, title in TITLES.items():
    # the built-in planner reads no images, as the items of RISEBench have them
    without = " --set run.planner.kind=none" if benchmark == "rise" else ""
    app.command(benchmark, help=f"{title}.\n\n{EXAMPLE.format(name=benchmark, more=without)}")(run)


def _generate(work: "BenchmarkWork", as_json: bool) -> None:
    from interleave.cli import console

    out = console.open_console(stderr=as_json)
    work.generate(console.BatchProgressPrinter(out, len(work.shard.of(work.items)), work.num_done()))


def _print_failed(work: "BenchmarkWork", outputs: "Mapping[str, Output]", as_json: bool) -> None:
    from interleave.cli import console

    mine = work.shard.of(work.items)
    if failed := sum(item.id not in outputs for item in mine):
        console.open_console(stderr=as_json).print(
            f"{failed} of {count(len(mine), 'item')} failed and will be missing; to try again: interleave batch "
            f"--resume {console.sanitize(quoted(work.generation))} --retry, then this command",
            soft_wrap=True,
        )


def _score(work: "BenchmarkWork", outputs: "Mapping[str, Output]", yes: bool, *, is_checked: bool) -> None:
    """is_checked: whether the judge was asked before images were made; else it is now, if anything is left to ask."""
    from imgen_common.judging.cost import confirm_cost
    from interleave.benchmarks.run import score_now
    from interleave.benchmarks.setup import check_judge
    from interleave.cli import console

    out = console.open_console(stderr=True)
    with spinner("counting questions"):
        judge = work.config.judge.build()
        cost = work.estimate(outputs, judge)
        if cost.calls and not is_checked:
            check_judge(work.config.judge, work.benchmark.judge, is_miniature=work.is_miniature)
    confirm_cost(cost, work.config, out.print, yes, "add --yes, or --limit N to ask less")
    every = max(1, len(outputs) // 20)

    def print_progress(done: int, total: int) -> None:
        if done % every == 0 or done == total:
            out.print(f"judged {done}/{total} items")

    score_now(work, outputs, judge, print_progress)


def agree(
    first: Annotated[Path, typer.Argument(metavar="A", help="A folder of `interleave benchmark`.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another, of the same items with another judge.")],
    as_json: Json = False,
) -> None:
    """How far two judges agree on the same outputs: the share of equal answers, Cohen's kappa, the correlation of
    ranks, and the items on which they differ.

    Example: interleave benchmark agree scores/ueval scores/ueval_other_judge
    """
    from imgen_common.console import markdown_table
    from interleave.benchmarks.setup import compare_folders

    found = compare_folders(first, second)
    if as_json:
        finite = [{name: value if value == value else None for name, value in vars(one).items()} for one in found]
        print(json.dumps(finite, indent=1))
        return
    header = ["question", "answers", "same", "kappa", "rank correlation", "difference"]
    cells = [
        [
            one.name,
            str(one.num),
            f"{one.same:.1%}",
            *("–" if math.isnan(value) else f"{value:.3f}" for value in (one.kappa, one.correlation)),
            f"{one.difference:+.3f}",
        ]
        for one in found
    ]
    print(markdown_table(header, cells))
    if any(math.isnan(one.kappa) or math.isnan(one.correlation) for one in found):
        print("–: a judge that answers all items alike has none")
    for one in found:
        for where, left, right in one.differing[:5]:
            print(f"{one.name}: {where}: {left:g} and {right:g}")


app.command()(agree)
