"""The papers' benchmarks in their miniature editions: the generator alone, with the planner, and with the critic too.

`interleave benchmark NAME` makes and judges the images of each cell, in a folder of its own below `--work`; what is
done there is found again, so that the same command resumes.  The built-in planner reads no images, so that RISEBench,
whose items are edits of an image, has no cells with it.  GenEval (shapes) is `flowbp benchmark`, of text to image: of
the generator alone, as it is and after one `flowbp train`.

    python -m benchmarks.quality.official_miniature
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import (
    describe_run,
    format_versions,
    read_json,
    result_file,
    resume_arguments,
    run_command,
    write_json,
)
from imgen_common.config import load
from imgen_common.console import markdown_table
from imgen_common.errors import run_cli
from imgen_common.files import write_atomic
from interleave.benchmarks.config import BenchmarkConfig
from interleave.benchmarks.report import Figure
from interleave.benchmarks.run import score_now
from interleave.benchmarks.setup import BenchmarkRequest, prepare

MODULE = "benchmarks.quality.official_miniature"
GENEVAL, ALIGNED = "geneval_shapes", "single shot, aligned"
NO_PLANNER, NO_CRITIC = "run.planner.kind=none", "run.critic.kind=none"
SYSTEMS: dict[str, tuple[str, ...]] = {
    "single shot": (NO_PLANNER, NO_CRITIC),
    "planner": (NO_CRITIC,),
    "planner + critic": (),
}
FIGURES = {
    "ueval": ("UEval, macro mean", "macro"),
    "wise": ("WISE_Verified, overall", "overall"),
    "wise_legacy": ("WISE (legacy), overall", "overall"),
    "rise": ("RISEBench, accuracy", "accuracy"),
    "comm": ("CoMM task 4, IRS", "irs"),
    GENEVAL: ("GenEval (shapes), overall", "shapes_overall"),
}
"""Title of a column, and its figure."""
WITHOUT_PLANNER = ("rise",)
NOTE = (
    "{items} items each; brackets are 95 % bootstrap intervals over items. The judge is the verifier of the shapes "
    "world, the questions are in our own words, and the data are the miniature's: no number here can be compared with "
    "a published one. A single shot is one image from the request as it stands, most of whose words the built-in "
    "generator does not know, and no text. The built-in planner reads no images: RISEBench has no cells with it. "
    "GenEval (shapes) has GenEval's rules, {prompts} captions and {images} images, and intervals over captions; it is "
    "of text to image, so that a single shot is all of it. The aligned generator is that of one `flowbp train` with "
    "its defaults, one seed; the other benchmarks were not run with it."
)


app = typer.Typer(add_completion=False)


def measure(name: str, system: str, work: Path) -> dict[str, Any]:
    """A cell: the benchmark's report, and the seconds that this call took."""
    folder = work / f"{name}-{system.replace(' ', '_')}"
    sets = [*SYSTEMS[system], f"run.cache={work / 'images'}"]
    start = time.perf_counter()
    made, differences = prepare(
        BenchmarkRequest(name, "builtin:shapes", folder), load(BenchmarkConfig, [], sets), [MODULE]
    )
    made.generate(lambda record: None)
    outputs = made.outputs()
    score_now(made, outputs, made.config.judge.build(), lambda done, total: None)
    report = made.write_report(outputs, differences)
    return {**asdict(report), "seconds": time.perf_counter() - start}


def measure_geneval(name: str, model: str, work: Path) -> dict[str, Any]:
    """A cell of GenEval (shapes), at the generator's settings of the other cells; `name`: of its folder in `work`."""
    start = time.perf_counter()
    words = f"--protocol {GENEVAL} --prompts builtin:shapes/test --score {GENEVAL}=builtin:shapes/verifier"
    words += " --num-inference-steps 12 --guidance-scale 2 --batch-size 32"
    run_command(work, name, "flowbp", "benchmark", model, *words.split(), "--out", str(work / name))
    (row,) = json.loads((work / name / "table.json").read_text(encoding="utf-8"))
    figures = [
        asdict(Figure(key, one["mean"], one["low"], one["high"], one["mean"])) for key, one in row["means"].items()
    ]
    counts = {"num_prompts": row["means"]["shapes_overall"]["num"], "num_images": row["images"]}
    return {**counts, "figures": figures, "seconds": time.perf_counter() - start}


def align(work: Path) -> str:
    """The run folder of the generator that `flowbp train` aligns."""
    fresh = ["--set", "name=aligned", "--runs", str(work)]
    run_command(work, "train", "flowbp", "train", *resume_arguments(work / "aligned", fresh))
    return str(work / "aligned")


def format_cell(report: Mapping[str, Any] | None, figure: str) -> str:
    """A figure and its interval; `-` for a cell that cannot be."""
    if report is None:
        return "-"
    found = next((Figure(**one) for one in report["figures"] if one["name"] == figure), None)
    if found is None or found.value is None:
        return "no value"
    return f"{found.value:.3g} [{found.low:.3g}, {found.high:.3g}]"


def format_table(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """The systems by the benchmarks."""
    rows = [
        [system, *(format_cell(cells.get(f"{name} {system}"), figure) for name, (_, figure) in FIGURES.items())]
        for system in (*SYSTEMS, ALIGNED)
    ]
    return markdown_table(["", *(title for title, _ in FIGURES.values())], rows)


@app.command()
def main(
    work: Annotated[Path, typer.Option(help="Folder of the cells.")] = Path("runs/official_miniature"),
    output: Annotated[Path | None, typer.Option(help="JSON file; by default named by the hardware.")] = None,
) -> None:
    """Measure all cells and write the results."""
    device = torch.device("cpu")
    cells: dict[str, dict[str, Any]] = {}
    work.mkdir(parents=True, exist_ok=True)
    for name in FIGURES:
        for system in systems_of(name):
            slug = f"{name}-{system.replace(' ', '_').replace(',', '')}"
            kept = work / f"{slug}.json"
            if not kept.exists() and name == GENEVAL:
                model = align(work) if system == ALIGNED else "builtin:shapes/generator"
                write_json(kept, measure_geneval(slug, model, work))
            elif not kept.exists():
                write_json(kept, measure(name, system, work))
            cells[f"{name} {system}"] = read_json(kept)
            print(f"{name} {system}: {cells[f'{name} {system}']['seconds']:.0f} s", flush=True)
    environment = describe_run(MODULE, sys.argv[1:], device)
    file = output or result_file("official_miniature", device, "json")
    write_json(file, {"environment": environment, "cells": cells})
    write_atomic(file.with_suffix(".md"), write_page(cells, environment))


def systems_of(name: str) -> Sequence[str]:
    """The rows in which a benchmark has a cell."""
    if name == GENEVAL:
        return ("single shot", ALIGNED)
    return ("single shot",) if name in WITHOUT_PLANNER else tuple(SYSTEMS)


def write_page(cells: Mapping[str, Mapping[str, Any]], environment: dict[str, Any]) -> str:
    """The table and what must be known of it."""
    items = max(cell["num_items"] for cell in cells.values() if "num_items" in cell)
    geneval = cells[f"{GENEVAL} single shot"]
    lines: Sequence[str] = [
        "# The papers' benchmarks in their miniature editions",
        "",
        format_table(cells),
        "",
        NOTE.format(items=items, prompts=geneval["num_prompts"], images=geneval["num_images"]),
        "",
        f"All cells together: {sum(cell['seconds'] for cell in cells.values()) / 60:.1f} minutes, without training.",
        "",
        format_versions(environment),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_cli(app, MODULE)
