"""The command `interleave`, one file per group of commands.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

import typer

from imgen_common.console import add_version
from imgen_common.errors import run_cli
from imgen_common.run_folder.commands import build_runs_app
from interleave.cli import benchmark, data, export_reward, machine, run, serve, train

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Make stories of images and text with any image generator: a planner writes the steps, a critic judges each "
    "image and rewrites the prompt.\n\n"
    'Example: interleave run "draw a yellow circle, then make it red"',
)
for command in (run.run, run.batch, run.merge, run.plan, run.report, machine.prefetch, serve.serve, serve.demo):
    app.command()(command)
app.add_typer(data.app, name="data")
app.add_typer(benchmark.app, name="benchmark")
app.command()(train.sft)
app.command()(train.grpo)
app.command()(export_reward.export_reward)
app.command()(machine.doctor)
app.add_typer(build_runs_app("interleave", ("requests", "requests-2")), name="runs")

add_version(app, "interleave")

RENAMED = {
    **dict.fromkeys(("-c", "--config"), "the file after REQUEST or FILE, as in: interleave run REQUEST CONFIG"),
    "--policy": "--parse-mode",
}
"""Options of earlier versions, each with what to write now."""


def main() -> None:
    """Entry point of `interleave` and of `python -m interleave`."""
    run_cli(app, "interleave", RENAMED)
