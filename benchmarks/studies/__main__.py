"""Trains the variants of a study for equal seconds, and writes its table and its figure.

    python -m benchmarks.studies alpha
    python -m benchmarks.studies all --seeds 0,1,2

Seconds are those of computing (CPU time of one thread).  Before the trainings the variants take turns for a few
updates, which says how many updates the seconds allow each.  The same command goes on with a study that was stopped.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.common import choose_device, describe_run, result_file
from benchmarks.quality.gradient_fidelity import FidelitySize
from benchmarks.studies import fidelity, report
from benchmarks.studies.runs import MODULE, StudySize, run_study
from benchmarks.studies.studies import STUDIES
from imgen_common.errors import UserError, nearest, run_cli

FIDELITY = "fidelity"
NAMES = (*STUDIES, FIDELITY)


def main(
    name: Annotated[str, typer.Argument(help=f"{', '.join(NAMES)}, or all.")],
    seeds: Annotated[str, typer.Option(help="Training seeds, separated by commas.")] = "0,1,2",
    seconds: Annotated[float, typer.Option(help="Seconds of computing of each training.")] = 60.0,
    num_prompts: Annotated[int, typer.Option(help="Test prompts of each evaluation.", min=2)] = 504,
    updates: Annotated[str, typer.Option(help="fidelity: updates after which it measures.")] = "0,30,60",
    prompts: Annotated[int, typer.Option(help="fidelity: prompts of each measurement.", min=2)] = 8,
    plans: Annotated[int, typer.Option(help="fidelity: plans per prompt and method.", min=1)] = 4,
    sets: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of the recipe.")] = None,
    folder: Annotated[Path, typer.Option(help="Folder of the trainings.")] = Path("runs/studies"),
    results: Annotated[Path | None, typer.Option(help="Folder of the results; by default benchmarks/results.")] = None,
) -> None:
    """One question about the design of the backward trajectory, answered on the miniature."""
    if name != "all" and name not in NAMES:
        raise UserError(f"unknown study {name!r}{nearest(name, NAMES)}; give {', '.join(NAMES)} or all")
    size = StudySize(seconds=seconds, num_prompts=num_prompts, sets=tuple(sets or ()))
    chosen, device = _numbers(seeds, "--seeds"), choose_device("auto")
    environment = describe_run(MODULE, sys.argv[1:], device)

    def output(study: str) -> Path:
        file = result_file(f"study_{study}", device, "md")
        return file if results is None else results / file.name

    for study_name in NAMES if name == "all" else (name,):
        if study_name == FIDELITY:
            shape, stops = FidelitySize(prompts=prompts, plans=plans), _numbers(updates, "--updates")
            found = fidelity.measure_along_training(stops, chosen, shape, folder, device)
            setup = f"{prompts} prompts x {shape.images} images x {plans} plans, training seeds {seeds}; N = 12."
            setup += " Brackets: 95 % bootstrap over prompts, after averaging over plans and seeds."
            table, figure = report.format_fidelity(found), report.plot_fidelity(found)
            report.write_study(output(FIDELITY), fidelity.TITLE, table, figure, setup, environment, found)
            continue
        study, result = STUDIES[study_name], run_study(study_name, size, chosen, folder, device)
        config = size.recipe(study)
        setup = f"{seconds:g} s of computing for each training, seeds {seeds}, {num_prompts} test prompts, N = "
        setup += f"{config.num_inference_steps}, batch {config.total_batch_size}, learning rate "
        setup += f"{config.optim.learning_rate:g}, guidance {config.guidance_scale:g}. Brackets: 95 % bootstrap over "
        setup += "prompts of the paired difference to the base, after averaging over seeds."
        table, figure = report.format_study(study, result), report.plot_study(study, result)
        content = report.study_content(result)
        report.write_study(output(study_name), study.title, table, figure, setup, environment, content)


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text!r}: give whole numbers separated by commas") from None


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    run_cli(app, MODULE)
