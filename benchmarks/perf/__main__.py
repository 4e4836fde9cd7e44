"""Every ratio of speed and memory of this project in one run, and how it changed against the committed result.

    python -m benchmarks.perf
    python -m benchmarks.perf --repeats 9
    python -m benchmarks.perf --only guided --output /dev/null

The result goes to benchmarks/results/perf-HARDWARE.json and .md, and to docs/results/perf.md.  A result of the same
class of machine that is there already is the baseline; changes are printed and decide nothing.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import (
    choose_device,
    describe_run,
    format_versions,
    hardware_name,
    read_json,
    result_file,
    write_json,
)
from benchmarks.perf.suite import CASES, SETTING, Precision, Ratio, compare_precisions, measure
from imgen_common.console import markdown_table, quiet_libraries
from imgen_common.errors import UserError, run_cli
from imgen_common.files import write_atomic

MODULE = "benchmarks.perf"
PAGE = Path(__file__).parents[2] / "docs" / "results" / "perf.md"
HEAD = """# Speed and memory, side by side

Written by `uv run python -m benchmarks.perf`. Each row compares two variants of one computation on the miniature (the
first row: on a tiny random network). The variants run in turns in one process with one thread. Seconds are CPU time of
the process, because the machine is shared with other work; they are medians, and a ratio is the median over repeats of
first / second. Memory is the peak of live tensor bytes above the weights, which does not depend on the machine.
Networks this small spend much of their time outside of matrix products; ratios of large models on a GPU differ.
"""


def format_ratios(ratios: Sequence[Ratio], baseline: Mapping[str, Any]) -> str:
    """The ratios as a Markdown table, beside those of the baseline where there is one."""
    before = {_key(row): row["time"] for row in baseline.get("ratios", [])}
    rows = []
    for one in ratios:
        old = before.get(_key(asdict(one)))
        change = "-" if old is None else f"{one.time / old - 1:+.0%}"
        seconds = (f"{one.first_seconds:.3f}", f"{one.second_seconds:.3f}")
        rows.append([one.name, f"{one.first} / {one.second}", *seconds, f"{one.time:.2f}", f"{one.memory:.2f}", change])
    header = [
        "what",
        "first / second",
        "first s",
        "second s",
        "time ratio",
        "memory ratio",
        "time ratio since baseline",
    ]
    return markdown_table(header, rows)


def _key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["name"], row["first"], row["second"]


def format_precisions(rows: Sequence[Precision]) -> str:
    """What bfloat16 changes, as a Markdown table."""
    header = ["in bfloat16", "error by spread over images", "cosine of gradients", "norm of gradients"]
    return markdown_table(header, [[r.what, f"{r.error:.2%}", f"{r.cosine:.4f}", f"{r.norm:.3f}"] for r in rows])


def main(
    repeats: Annotated[int, typer.Option(help="Repetitions of each pair.", min=1)] = 7,
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
    baseline = read_json(default) if default.exists() else {}
    ratios = []
    for case in chosen:
        ratios.append(one := measure(case, device, repeats))
        print(f"{one.name}: {one.first} / {one.second}: time {one.time:.2f}, memory {one.memory:.2f}", flush=True)
    precisions = [] if only else compare_precisions(device)
    environment = describe_run(MODULE, sys.argv[1:], device)
    parts = [format_ratios(ratios, baseline)]
    if precisions:
        about = (
            "Errors are root mean squares by the standard deviation over images; gradients are compared with float32's."
        )
        parts += [f"Precision of rewards (`rewards.N.dtype`) and autoencoder (`model.vae.dtype`). {about}"]
        parts += [format_precisions(precisions)]
    machine = f"{hardware_name(device)}, one thread, {repeats} repeats, seed 0; {format_versions(environment)}"
    table = "\n\n".join([machine + f"; settings {' '.join(SETTING)}.", *parts]) + "\n"
    print(f"\n{table}")
    content = {"ratios": [asdict(one) for one in ratios], "precisions": [asdict(row) for row in precisions]}
    write_json(output or default, content | {"repeats": repeats, "settings": SETTING, "environment": environment})
    if output is None and not only:
        write_atomic(default.with_suffix(".md"), table)
        write_atomic(PAGE, f"{HEAD}\n{table}")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    run_cli(app, MODULE)
