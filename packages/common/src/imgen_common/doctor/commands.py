"""The command `doctor`, which both programs have."""

import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imgen_common.errors import UserError
from imgen_common.run_folder.commands import Json, Runs

if TYPE_CHECKING:
    from imgen_common.doctor.findings import Finding


Bundle = Annotated[
    Path | None,
    typer.Option("--bundle", metavar="FILE.zip", help="Write a bundle for a report of a fault, without secrets."),
]
OfRun = Annotated[str | None, typer.Option("--run", metavar="RUN", help="With --bundle: the run whose files go in.")]


def build_doctor(program: str, own_findings: Callable[[], "Iterable[Finding]"]) -> Callable[..., None]:
    """The command of a program.  own_findings: about what it uses beyond what every program does."""

    def doctor(runs: Runs = Path("runs"), as_json: Json = False, bundle: Bundle = None, run: OfRun = None) -> None:
        """Look at what this machine offers: Python, torch, GPUs and attention kernels, disks, shared memory, the file
        system of the runs (locks, fsync), cached models with their licenses, tokens (whether there are any; their
        values are never shown), and optional packages. Each finding that is not ok comes with its remedy. The exit
        code is 1 if there is a problem that would stop a run.

        Example:

        \b
          PROGRAM doctor
          PROGRAM doctor --json
          PROGRAM doctor --bundle report.zip
        """
        if run is not None and bundle is None:
            raise UserError("--run RUN goes into a bundle; add --bundle FILE.zip")
        from imgen_common.doctor.findings import examine
        from imgen_common.run_folder.find import find_run

        place = None if run is None else find_run(run, runs)
        if bundle is not None and bundle.exists():
            raise UserError(f"{bundle}: exists; give another name")
        found = [*examine(runs), *own_findings()]
        if bundle is not None:
            from imgen_common.doctor.bundle import write_bundle

            write_bundle(bundle, program, found, place)
        raise typer.Exit(print_findings(found, bundle, as_json))

    doctor.__doc__ = inspect.cleandoc(doctor.__doc__ or "").replace("PROGRAM", program)
    return doctor


def print_findings(findings: "Sequence[Finding]", bundle: Path | None, as_json: bool) -> int:
    """Prints findings, how many of them are bad, and where the bundle is; returns the exit code, 1 for a problem."""
    problems, warnings = (sum(finding.state == state for finding in findings) for state in ("problem", "warning"))
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
        return int(problems > 0)
    for finding in findings:
        print(f"{finding.state:8} {finding.area}: {finding.text}{f'; {finding.remedy}' if finding.remedy else ''}")
    counts = [f"{n} {what}{'s' * (n != 1)}" for n, what in ((problems, "problem"), (warnings, "warning"))]
    print(f"\n{len(findings)} findings: {', '.join(counts)}")
    if bundle is not None:
        print(f"written to {bundle}; look through it before you send it")
    return int(problems > 0)
