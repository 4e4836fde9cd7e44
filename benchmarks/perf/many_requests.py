"""What the engine of interleave itself costs for very many requests: time, memory, resuming, pages.

Planner, critic and generator are scripted and answer at once, so that all that is measured is the engine, its records
and its images: two steps per request, each with one image of 32 x 32 pixels and one verdict.  Every number of requests
is made by one process, and taken up by two others: one that finds nothing left to do, and one that writes the pages.

    python -m benchmarks.perf.many_requests
    python -m benchmarks.perf.many_requests --requests 1000,100000 --work many
"""

import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from imgen_common.console import markdown_table
from imgen_common.errors import UserError, run_cli
from interleave.loop.config import RunConfig
from interleave.loop.requests import make_request
from interleave.loop.run import build_components, create_run, run_requests
from interleave.pages.run import write_report

MODULE = "benchmarks.perf.many_requests"
MIB = 2**20
Task = Literal["run", "resume", "pages"]


@dataclass(frozen=True)
class Cost:
    """Of a process: seconds of work and of computing, and its memory (peak resident set) before and after, in bytes."""

    seconds: float
    cpu: float
    before: int
    after: int


@dataclass(frozen=True)
class Row:
    """What a number of requests cost.  disk: bytes of the run folder's records."""

    requests: int
    run: Cost
    resume: Cost
    pages: Cost
    trace: int


def scripted_config() -> RunConfig:
    """A run whose models answer at once."""
    keys = ("step_number", "step_name", "instruction", "prompt", "auxiliary_text")
    steps = [
        dict(zip(keys, (i, "", prompt, prompt, None), strict=True)) for i, prompt in enumerate(("draw", "edit"), 1)
    ]
    plan, verdict = {"execution_plan": steps}, {"previous_step_success": True, "refine_prompt": ""}
    answers = [f"<think>so</think><answer>{json.dumps(value)}</answer>" for value in (plan, verdict)]
    models = [{"kind": "model", "model": {"kind": "scripted", "answers": [answer]}} for answer in answers]
    generator = {"kind": "scripted", "height": 32, "width": 32}
    return RunConfig.model_validate({"planner": models[0], "critic": models[1], "generator": generator})


def peak_memory() -> int:
    """Bytes of the largest resident set so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(task: Task, folder: Path, number: int) -> Cost:
    """Does one part of the measurement in this process."""
    config = scripted_config()
    if task != "pages":
        with tempfile.TemporaryDirectory() as made:  # libraries are loaded where they are needed first
            _run(Path(made) / "one", config, ["a story"])
    before, start, cpu = peak_memory(), time.perf_counter(), time.process_time()
    if task == "run":
        _run(folder, config, [f"story {i}" for i in range(number)])
    elif task == "resume":
        _resume(folder, config, number)
    else:
        write_report(folder)
    return Cost(time.perf_counter() - start, time.process_time() - cpu, before, peak_memory())


def _run(folder: Path, config: RunConfig, texts: Sequence[str]) -> None:
    create_run(folder, config, lambda store: [make_request(text, [], store) for text in texts])
    _resume(folder, config, len(texts))


def _resume(folder: Path, config: RunConfig, number: int) -> None:
    stories = asyncio.run(run_requests(folder, build_components(config), config, [MODULE], lambda record: None))
    if [story.status for story in stories] != ["complete"] * number:
        raise RuntimeError("a story is not complete")


def measure(number: int, folder: Path) -> Row:
    """The costs of a number of requests, each in a process of its own."""
    costs = {}
    for task in ("run", "resume", "pages"):
        command = [sys.executable, "-m", MODULE, "--task", task, "--work", str(folder), "--requests", str(number)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise UserError(f"{task} of {number} requests failed; its messages are above")
        costs[task] = Cost(**json.loads(done.stdout.splitlines()[-1]))
    return Row(number, **costs, trace=(folder / "trace.jsonl").stat().st_size)


def format_table(rows: Sequence[Row]) -> str:
    """The table as Markdown."""
    header = ["requests", "ms per request", "CPU ms", "memory MiB", "KiB per request", "records MB"]
    header += ["resume s", "resume MiB", "pages s", "pages MiB"]
    return markdown_table(
        header,
        [
            [
                f"{row.requests:,}",
                f"{1000 * row.run.seconds / row.requests:.2f}",
                f"{1000 * row.run.cpu / row.requests:.2f}",
                f"{row.run.after / MIB:,.0f}",
                f"{(row.run.after - row.run.before) / 1024 / row.requests:.1f}",
                f"{row.trace / 1e6:,.1f}",
                f"{row.resume.seconds:.1f}",
                f"{row.resume.after / MIB:,.0f}",
                f"{row.pages.seconds:.1f}",
                f"{row.pages.after / MIB:,.0f}",
            ]
            for row in rows
        ],
    )


def main(
    requests: Annotated[str, typer.Option(help="Numbers of requests, separated by commas.")] = "1000,10000,100000",
    work_folder: Annotated[
        Path | None, typer.Option("--work", help="Where runs go; by default a temporary folder.")
    ] = None,
    task: Annotated[Task | None, typer.Option(hidden=True)] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file; by default named by the hardware.")] = None,
) -> None:
    """Time and memory of the engine for very many scripted requests; exit code 1 if they grow faster than linearly."""
    if task is not None:
        assert work_folder is not None
        print(json.dumps(asdict(work(task, work_folder, int(requests)))))
        return
    with tempfile.TemporaryDirectory() as made:
        place = work_folder or Path(made)
        rows = [measure(int(number), place / number) for number in requests.split(",")]
    import torch

    from benchmarks.common import Claim, describe_run, hardware_name, result_file, write_json

    cpu, load = torch.device("cpu"), os.getloadavg()[0]
    first, last = rows[0], rows[-1]
    growth = last.requests / first.requests
    time_ratio = last.run.cpu / first.run.cpu / growth
    memory_ratio = (last.run.after - last.run.before) / (first.run.after - first.run.before) / growth
    claims = [
        Claim("CPU seconds per request, most requests / fewest <= 1.25", time_ratio, time_ratio <= 1.25),
        Claim("memory per request, most requests / fewest <= 1.25", memory_ratio, memory_ratio <= 1.25),
    ]
    print(f"{hardware_name(cpu)}, {os.cpu_count()} cores, load average {load:.1f}\n\n{format_table(rows)}\n")
    print("\n".join(map(str, claims)))
    file = output or result_file("many_requests", cpu, "json")
    content = {"rows": [asdict(row) for row in rows], "claims": [asdict(claim) for claim in claims]}
    write_json(file, content | {"load_average": load, "environment": describe_run(MODULE, sys.argv[1:], cpu)})
    print(f"written to {file}")
    if not all(claim.holds for claim in claims):
        raise typer.Exit(1)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    run_cli(app, MODULE)
