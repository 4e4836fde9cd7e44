"""The command `interleave`, one file per group of commands.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

from collections.abc import Callable

import typer

from imgen_common.console import GroupedCommands, add_version
from imgen_common.errors import run_cli
from imgen_common.run_folder.commands import build_runs_app
from interleave.cli import benchmark, data, export_reward, machine, run, serve, train

app = typer.Typer(
    cls=GroupedCommands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Make stories of images and text with any image generator: a planner writes the steps, a critic judges each "
    "image and rewrites the prompt.\n\n"
    'Example: interleave run "draw a yellow circle, then make it red"',
)
COMMANDS: dict[str, tuple[typer.Typer | Callable[..., None], ...]] = {
    "Stories": (run.run, run.batch, run.merge, run.plan, run.report),
    "Services": (serve.serve, serve.demo),
    "Training and evaluation": (data.app, train.sft, train.grpo, export_reward.export_reward, benchmark.app),
    "This machine": (machine.doctor, machine.prefetch, build_runs_app("interleave", ("requests", "requests-2"))),
}
"""Commands by the heading of `interleave --help` under which they stand."""
for heading, commands in COMMANDS.items():
    for command in commands:
        if isinstance(command, typer.Typer):
            app.add_typer(command, rich_help_panel=heading)
        else:
            app.command(rich_help_panel=heading)(command)

add_version(app, "interleave")

RENAMED = {
    **dict.fromkeys(("-c", "--config"), "the file after REQUEST or FILE, as in: interleave run REQUEST CONFIG"),
    "--policy": "--parse-mode",
}
"""Options of earlier versions, each with what to write now."""


def main() -> None:
    """Entry point of `interleave` and of `python -m interleave`."""
    run_cli(app, "interleave", RENAMED)
