"""The command `flowbp`; slow libraries are imported only when a command runs, so that `--help` answers at once."""

from collections.abc import Callable

import typer

from flowbp.cli import doctor, evaluate, export, init, inspect, train
from imgen_common.console import add_version
from imgen_common.errors import run_cli
from imgen_common.run_folder.commands import build_runs_app

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Align a text-to-image flow-matching model to a differentiable reward by reward backpropagation.\n\n"
    "Example: flowbp train",
)
COMMANDS: dict[str, Callable[..., None]] = {
    "init": init.init,
    "train": train.train,
    "estimate": train.estimate,
    "methods": inspect.methods,
    "families": inspect.families,
    "explain": inspect.explain,
    "sample": evaluate.sample,
    "eval": evaluate.evaluate,
    "benchmark": evaluate.benchmark,
    "table": evaluate.table,
    "report": inspect.report,
    "doctor": doctor.doctor,
    "prefetch": export.prefetch,
    "export": export.export,
    "convert-reward": export.convert_reward,
}
for name, command in COMMANDS.items():
    app.command(name)(command)
app.add_typer(build_runs_app("flowbp", ("flowbp_bridge", "refl")), name="runs")

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
