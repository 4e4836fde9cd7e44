"""What a machine has and gets before a run: `interleave doctor` and `interleave prefetch`."""

import socket
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from interleave.cli.options import Json, Runs

if TYPE_CHECKING:
    from imgen_common.doctor import Finding


def doctor(
    runs: Runs = Path("runs"),
    port: Annotated[int, typer.Option(help="Port that interleave serve would use.", min=1, max=65535)] = 8000,
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
      interleave doctor
      interleave doctor --json
      interleave doctor --bundle report.zip
    """
    from imgen_common.doctor import examine, run_doctor
    from imgen_common.run_folder.find import find_run

    place = None if run is None else find_run(run, runs)
    found = [*examine(runs), *findings(port)]
    raise typer.Exit(run_doctor("interleave", found, as_json, bundle, place))


def findings(port: int) -> "Iterator[Finding]":
    """What interleave uses beyond what every command does."""
    from imgen_common.doctor import Finding

    with socket.socket() as probe:
        taken = probe.connect_ex(("127.0.0.1", port)) == 0
    remedy = "stop what listens there, or give --set port=N to interleave serve" if taken else ""
    yield Finding("port", "warning" if taken else "ok", f"{port} is {'in use' if taken else 'free'}", remedy)
    for package, purpose in (
        ("deepspeed", "ZeRO"),
        ("ray", "serve --engine ray"),
        ("vllm", "grpo"),
        ("gradio", "demo"),
    ):
        there = find_spec(package) is not None
        yield Finding("extras", "ok", f"{package} ({purpose}): {'installed' if there else 'not installed'}")


def prefetch(
    refs: Annotated[list[str], typer.Argument(metavar="REF", help="org/name[@revision], a folder or builtin:...")],
) -> None:
    """Download models so that they can be used without a network. The command checks that they are complete and prints
    the folder of each; with HF_HUB_OFFLINE=1 it only checks. Gated repositories need `hf auth login` or HF_TOKEN.

    Example:

    \b
      interleave prefetch Qwen/Qwen3-VL-8B-Instruct black-forest-labs/FLUX.2-klein-4B
      HF_HUB_OFFLINE=1 interleave prefetch Qwen/Qwen3-VL-8B-Instruct
    """
    from imgen_common import hub

    for ref in refs:
        print(hub.prefetch(ref))
