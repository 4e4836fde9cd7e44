"""`python -m benchmarks.cross NAME`."""

import typer

from benchmarks.cross import closed_loop, two_by_two
from imgen_common.errors import run_cli

if __name__ == "__main__":
    app = typer.Typer(add_completion=False, no_args_is_help=True, help="Benchmarks that need both products.")
    app.callback()(lambda: None)
    app.command("closed_loop")(closed_loop.main)
    app.command("two_by_two")(two_by_two.main)
    run_cli(app, "benchmarks.cross")
