"""Every ratio of speed and memory of this project in one run, and how it changed against the committed result.

    python -m benchmarks.perf
    python -m benchmarks.perf --repeats 9
    python -m benchmarks.perf --only guided --output /dev/null

The result goes to benchmarks/results/perf-HARDWARE.json and .md, and to docs/results/perf.md.  The result of the same
class of machine that is committed there is the baseline; changes are printed and decide nothing.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import (
    RESULTS,
    choose_device,
    describe_run,
    format_versions,
    hardware_name,
    result_file,
    write_json,
)
from benchmarks.perf.baseline import changes, comparable, describe, read_committed
from benchmarks.perf.stories import ServiceRatio, measure_service
from benchmarks.perf.suite import CASES, SETTING, Precision, Ratio, compare_precisions, compare_rollouts, measure
from imgen_common.console import markdown_table, quiet_libraries
from imgen_common.errors import UserError, run_cli
from imgen_common.files import write_atomic

MODULE = "benchmarks.perf"
PAGE = Path(__file__).parents[2] / "docs" / "results" / "perf.md"
HEAD = """# Speed and memory, side by side

Written by `uv run python -m benchmarks.perf --repeats 7`. Each row compares two variants of one computation on
the miniature (the first row: on a tiny random network).
The variants run in turns in one process with one thread. Seconds are CPU time of
the process, because the machine is shared with other work; they are medians, and a ratio is the median over repeats of
first / second. Only these ratios mean anything: seconds depend on what else the machine does. Memory is the peak of
live tensor bytes above the weights, which does not depend on the machine. Networks this small spend much of their time
outside of matrix products; ratios of large models on a GPU differ.

The last columns compare the ratios with those of the result that was committed before for the same class of machine,
which `benchmarks/results` names by its processor or GPU; `-` marks what that result does not have. On a shared machine
the ratios of times in two runs of the same code differed by up to 8 %, those of memory not at all.
"""
SERVICE = (
    "`interleave serve` with two workers of 32 images at once and a scripted generator that waits for 0.2 s an image. "
    "Its bound is the rate of the generator alone. Rates are by the wall clock, and clients, service and other work "
    "share the machine."
)
PRECISION = (
    "Precision of rewards (`rewards.N.dtype`), autoencoder (`model.vae.dtype`) and rollouts (`rollout.dtype`). Errors "
    "are root mean squares by the standard deviation over images. Gradients are compared with float32's: of scores by "
    "images, of images by latents, and of updates whose rollouts are rounded by all weights, the sweep being float32. "
    "Those of updates are means over updates with other prompts, of which some bear a change of the images badly."
)


def format_ratios(ratios: Sequence[Ratio], baseline: Mapping[str, Any]) -> str:
    """The ratios as a Markdown table, and how they changed since the baseline."""
    now, before = [asdict(one) for one in ratios], baseline.get("ratios", [])
    times, memories = (changes(now, before, ("name", "first", "second"), value) for value in ("time", "memory"))
    rows = []
    for one, time, memory in zip(ratios, times, memories, strict=True):
        seconds = (f"{one.first_seconds:.3f}", f"{one.second_seconds:.3f}")
        found = (f"{one.time:.2f}", "-" if one.memory is None else f"{one.memory:.2f}")
        changed = (format_change(time), format_change(memory))
        rows.append([one.name, f"{one.first} / {one.second}", *seconds, *found, *changed])
    header = ["what", "first / second", "first s", "second s", "time ratio", "memory ratio"]
    return markdown_table([*header, "time since baseline", "memory since baseline"], rows)


def format_change(change: float | None) -> str:
    """A change in percent; "-" where there is nothing to compare with."""
    return "-" if change is None else f"{round(change, 2) + 0.0:+.0%}"  # never -0


def format_service(rows: Sequence[ServiceRatio], baseline: Mapping[str, Any]) -> str:
    """The service against the bound of its generator, as a Markdown table."""
    found = changes([asdict(one) for one in rows], baseline.get("service", []), ("clients",), "ratio")
    cells = [
        [str(one.clients), f"{one.rate:.1f}", f"{one.bound:.1f}", f"{one.ratio:.2f}", format_change(change)]
        for one, change in zip(rows, found, strict=True)
    ]
    return markdown_table(["clients", "images/s", "bound of the generator", "ratio", "since baseline"], cells)


def format_precisions(rows: Sequence[Precision]) -> str:
    """What a lower precision changes, as a Markdown table."""
    header = ["what", "error by spread over images", "cosine of gradients", "least cosine", "norm of gradients"]
    cells = []
    for r in rows:
        least = "-" if r.least is None else f"{r.least:.4f}"
        cells.append([r.what, f"{r.error:.2%}", f"{r.cosine:.4f}", least, f"{r.norm:.3f}"])
    return markdown_table(header, cells)


def main(
    repeats: Annotated[int, typer.Option(help="Repetitions of each pair.", min=1)] = 7,
    seconds: Annotated[float, typer.Option(help="Seconds of the service for each number of clients.", min=0.1)] = 5.0,
    only: Annotated[str, typer.Option(help="Only the cases whose name or variants contain this.")] = "",
    output: Annotated[Path | None, typer.Option(help="JSON file; by default named by the hardware.")] = None,
) -> None:
    """Every ratio of speed and memory of this project, measured side by side on the miniature and tiny models."""
    quiet_libraries()
    torch.set_num_threads(1)
    device = choose_device("auto")
    chosen = [case for case in CASES if only in f"{case.name} {case.first} {case.second}"]
    if not chosen:
        raise UserError(f"--only {only}: no case has it; cases are {', '.join(case.name for case in CASES)}")
    default = result_file("perf", device, "json")
    baseline = comparable(read_committed(RESULTS / default.name), SETTING)
    ratios = []
    for case in chosen:
        ratios.append(one := measure(case, device, repeats))
        memory = "" if one.memory is None else f", memory {one.memory:.2f}"
        print(f"{one.name}: {one.first} / {one.second}: time {one.time:.2f}{memory}", flush=True)
    service = [] if only else measure_service(seconds)
    precisions = [] if only else [*compare_precisions(device), *compare_rollouts(device)]
    environment = describe_run(MODULE, sys.argv[1:], device)
    machine = f"{hardware_name(device)}, one thread, {repeats} repeats, seed 0; {format_versions(environment)}"
    parts = [machine + f"; settings {' '.join(SETTING)}. {describe(baseline)}", format_ratios(ratios, baseline)]
    if not only:
        parts += [SERVICE, format_service(service, baseline), PRECISION, format_precisions(precisions)]
    table = "\n\n".join(parts) + "\n"
    print(f"\n{table}")
    found: dict[str, Sequence[Any]] = {"ratios": ratios, "service": service, "precisions": precisions}
    content = {name: [asdict(row) for row in rows] for name, rows in found.items()}
    write_json(output or default, content | {"repeats": repeats, "settings": SETTING, "environment": environment})
    if output is None and not only and default.parent == RESULTS:
        write_atomic(default.with_suffix(".md"), table)
        write_atomic(PAGE, f"{HEAD}\n{table}")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    run_cli(app, MODULE)
