"""The command `flowbp doctor`."""

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowbp.cli.options import Json, Runs

if TYPE_CHECKING:
    from imgen_common.doctor import Finding


def doctor(
    runs: Runs = Path("runs"),
    as_json: Json = False,
    bundle: Annotated[
        Path | None, typer.Option(metavar="FILE.zip", help="Write a bundle for a report of a fault, without secrets.")
    ] = None,
    run: Annotated[str | None, typer.Option(metavar="RUN", help="Run whose files go in.")] = None,
) -> None:
    """Look at what this machine offers: Python, torch, GPUs and attention kernels, disks, shared memory, the file
    system of the runs (locks, fsync), cached models with their licenses, tokens (whether there are any; their values
    are never shown), and optional packages. Each finding that is not ok comes with its remedy. The exit code is 1 if
    there is a problem that would stop a run.

    Example:

    \b
      flowbp doctor
      flowbp doctor --json
      flowbp doctor --bundle report.zip
    """
    from imgen_common.doctor import examine, run_doctor
    from imgen_common.run_folder.find import find_run

    place = None if run is None else find_run(run, runs)
    found = [*examine(runs), *findings()]
    raise typer.Exit(run_doctor("flowbp", found, as_json, bundle, place))


def findings() -> "Iterator[Finding]":
    """What flowbp uses beyond what every command does."""
    from imgen_common.doctor import Finding

    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    remedy = "" if compiler else "install a C compiler to use model.compile"
    yield Finding("compiler", "ok", "there" if compiler else "none; model.compile needs one", remedy)
    for package, purpose in (("torchao", "model.quantization"), ("wandb", "trackers"), ("trackio", "trackers")):
        there = find_spec(package) is not None
        yield Finding("extras", "ok", f"{package} ({purpose}): {'installed' if there else 'not installed'}")
