"""The command `flowbp`; slow libraries are imported only when a command runs, so that `--help` answers at once."""

from collections.abc import Callable

import typer

from flowbp.cli import doctor, evaluate, export, init, inspect, train
from imgen_common.console import GroupedCommands, add_version
from imgen_common.errors import run_cli
from imgen_common.run_folder.commands import build_runs_app

app = typer.Typer(
    cls=GroupedCommands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Align a text-to-image flow-matching model to a differentiable reward by reward backpropagation.\n\n"
    "Example: flowbp train",
)
COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    "Training": {"train": train.train, "init": init.init, "estimate": train.estimate},
    "Methods and models": {"methods": inspect.methods, "explain": inspect.explain, "families": inspect.families},
    "Evaluation": {
        "sample": evaluate.sample,
        "eval": evaluate.evaluate,
        "benchmark": evaluate.benchmark,
        "table": evaluate.table,
        "report": inspect.report,
    },
    "Files": {"export": export.export, "convert-reward": export.convert_reward},
    "This machine": {"doctor": doctor.doctor, "prefetch": export.prefetch},
}
"""Commands by the heading of `flowbp --help` under which they stand."""
for heading, commands in COMMANDS.items():
    for name, command in commands.items():
        app.command(name, rich_help_panel=heading)(command)
app.add_typer(build_runs_app("flowbp", ("flowbp_bridge", "refl")), rich_help_panel="This machine")

add_version(app, "flowbp")

RENAMED = {
    "plan": "estimate",
    "--steps": "--num-inference-steps",
    "--guidance": "--guidance-scale",
    "--num": "--num-images",
    "--picture": "--figure",
    "--colours": "--color-model",
}
"""Commands and options of earlier versions, each with its present name."""


def main() -> None:
    """Entry point of `flowbp` and of `python -m flowbp`."""
    run_cli(app, "flowbp", RENAMED)
