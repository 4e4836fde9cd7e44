"""All methods on the miniature side by side: equal batch, the same search for a learning rate, several seeds.

1. Calibration: seconds of computing (CPU time of one thread) per update of every competitor, measured in turns.  The
   equal-seconds budget is what the median method needs for `--updates`.
2. Search: every competitor trains at every candidate rate with one seed, which is never reported.  For each budget the
   rate with the highest verifier accuracy on tuning prompts at the guidance of the training is chosen.  Tuning prompts
   are never reported.
3. Final: every competitor trains at its chosen rates with `--seeds`, at equal updates and at equal seconds, and is
   evaluated on test prompts at all guidance scales, with the noise of the untrained base.
The control trains for the same seconds with the generator's own loss on images of the train split, with rates from the
same search.

Every cell is one JSON file under `--folder`.  The same command resumes and skips the cells that are there.  A folder
belongs to one choice of settings and weights.

    python -m benchmarks.quality.miniature --workers 2
    python -m benchmarks.quality.miniature --methods flowbp_sparse,refl --seeds 0 --updates 60
    python -m benchmarks.quality.miniature --report
"""

import math
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import choose_device, read_json, result_file
from benchmarks.quality.miniature_cells import (
    COMPETITORS,
    Bench,
    Settings,
    Stop,
    TrainingJob,
    calibrate,
    check_settings,
    choose_rates,
    evaluate_base,
    make_stops,
    read_cells,
    run_job,
    split_job,
    weight_digests,
)
from benchmarks.quality.miniature_report import write_report
from flowbp.config import TrainConfig
from flowbp.data.prompts import is_shapes_source
from imgen_common.config import load
from imgen_common.errors import UserError, nearest, run_cli

MODULE = "benchmarks.quality.miniature"
FOLDER = Path("runs/benchmark-miniature")


@cache
def load_bench(settings: str, device: str, folder: Path) -> Bench:
    """The models of this process; settings are given as JSON."""
    return Bench(Settings.model_validate_json(settings), torch.device(device), folder)


def run_in_worker(settings: str, device: str, folder: Path, job: TrainingJob) -> str:
    """Runs one job; returns its description."""
    run_job(load_bench(settings, device, folder), folder, job)
    return f"{job.phase} {job.method} rate {job.rate:g} seed {job.seed}"


def run_jobs(settings: Settings, device: torch.device, folder: Path, jobs: Sequence[TrainingJob], workers: int) -> None:
    """Runs the jobs that lack a cell, in this process or in worker processes of one thread each."""
    left = [job for whole in jobs for job in split_job(settings, whole) if job.missing_stops(folder)]
    arguments = (settings.model_dump_json(), str(device), folder)
    if not left:
        return
    if workers < 2:
        for number, job in enumerate(left, 1):
            print(f"{number} of {len(left)}: {run_in_worker(*arguments, job)}", flush=True)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(left)), mp_context=context) as pool:
        running = [pool.submit(run_in_worker, *arguments, job) for job in left]
        try:
            for number, done in enumerate(as_completed(running), 1):
                print(f"{number} of {len(left)}: {done.result()}", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def search_jobs(settings: Settings, calibration: dict[str, Any], methods: Sequence[str]) -> list[TrainingJob]:
    """Jobs of every method at every candidate rate, the longest first."""
    jobs = [
        TrainingJob("search", method, rate, settings.search_seed, make_stops(settings, calibration, method))
        for method in methods
        for rate in settings.rates
    ]
    return longest_first(jobs, calibration)


def final_jobs(
    settings: Settings, calibration: dict[str, Any], folder: Path, methods: Sequence[str], seeds: Sequence[int]
) -> list[TrainingJob]:
    """Jobs of every method at its chosen rates, seed by seed; budgets that chose the same rate share a run."""
    scale = settings.config.guidance_scale
    chosen = choose_rates(read_cells(folder), scale, settings.rates)
    jobs = []
    for seed in seeds:
        of_seed = []
        for method in methods:
            by_rate: dict[float, list[Stop]] = {}
            for stop in make_stops(settings, calibration, method):
                by_rate.setdefault(chosen[method, stop.budget], []).append(stop)
            of_seed += [TrainingJob("final", method, rate, seed, tuple(part)) for rate, part in by_rate.items()]
        jobs += longest_first(of_seed, calibration)
    return jobs


def longest_first(jobs: Sequence[TrainingJob], calibration: dict[str, Any]) -> list[TrainingJob]:
    """The jobs in descending order of duration, so that no worker waits long for the last one."""
    return sorted(jobs, key=lambda job: -max(s.updates for s in job.stops) * calibration["per_update"][job.method])


def compare_methods(
    settings: Settings, device: torch.device, folder: Path, methods: Sequence[str], seeds: Sequence[int], workers: int
) -> None:
    """Runs all stages, each of which resumes."""
    check_settings(folder, settings)
    calibration, base = folder / "calibration.json", folder / "base.json"
    if not (calibration.exists() and base.exists()):
        bench = load_bench(settings.model_dump_json(), str(device), folder)
        print("calibration and base", flush=True)
        if not calibration.exists():
            calibrate(bench, calibration)
        if not base.exists():
            evaluate_base(bench, base)
    timing = read_json(calibration)
    for method in methods:
        planned = ", ".join(f"{stop.updates} at equal {stop.budget}" for stop in make_stops(settings, timing, method))
        print(f"{method}: {timing['per_update'][method]:.3f} s an update; {planned}", flush=True)
    run_jobs(settings, device, folder, search_jobs(settings, timing, methods), workers)
    run_jobs(settings, device, folder, final_jobs(settings, timing, folder, methods, seeds), workers)


def make_settings(recipe: TrainConfig, updates: int, seconds: float | None, rates: Sequence[float]) -> Settings:
    """The settings of the folder.  Raises UserError where they allow no comparison."""
    if len(set(rates)) < 2 or not all(0 < rate <= 1 and math.isfinite(rate) for rate in rates):
        raise UserError(f"--rates {list(rates)}: give at least two learning rates in (0, 1]")
    for source in (recipe.eval.prompts, recipe.eval.quick_prompts):
        if not is_shapes_source(source):
            raise UserError(f"{source}: the verifier reads captions of the shapes world; give builtin:shapes/SPLIT")
    if recipe.eval.prompts == recipe.eval.quick_prompts:
        raise UserError(f"{recipe.eval.prompts}: rates are chosen on eval.quick_prompts; they must differ")
    return Settings(
        config=recipe,
        updates=updates,
        seconds=seconds,
        rates=tuple(sorted(set(rates))),
        rounds=6,
        search_seed=1000,
        pretraining_images=16_384,
        weights=weight_digests([recipe.model.ref, *(scorer.ref for scorer in recipe.scorers)]),
    )


def parse_numbers(text: str, option: str) -> list[float]:
    """Numbers separated by commas.  Raises UserError for anything else."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text!r}: give numbers separated by commas") from None


def parse_methods(text: str) -> list[str]:
    """Names of competitors separated by commas, or `all`.  Raises UserError for an unknown one."""
    chosen = list(COMPETITORS) if text == "all" else text.split(",")
    for name in chosen:
        if name not in COMPETITORS:
            raise UserError(
                f"--methods: unknown {name!r}{nearest(name, COMPETITORS)}; allowed: {', '.join(COMPETITORS)}"
            )
    return chosen


def main(
    methods: Annotated[
        str, typer.Option(help="Names separated by commas, or all; `pretraining` is the control.")
    ] = "all",
    seeds: Annotated[str, typer.Option(help="Reported training seeds, separated by commas.")] = "0,1,2",
    updates: Annotated[int, typer.Option(help="Updates of the equal-updates budget.", min=1)] = 100,
    seconds: Annotated[float | None, typer.Option(help="Equal-seconds budget; default: the median method's.")] = None,
    rates: Annotated[str, typer.Option(help="Candidate learning rates, separated by commas.")] = "3e-5,1e-4,3e-4",
    num_prompts: Annotated[int, typer.Option(help="Number of reported test prompts.", min=2)] = 504,
    tune_prompts: Annotated[int, typer.Option(help="Number of tuning prompts of the search.", min=2)] = 240,
    config: Annotated[list[Path] | None, typer.Option(help="Recipe that all methods share.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of the recipe.")] = None,
    workers: Annotated[int, typer.Option(help="Processes of one thread each.", min=1)] = 2,
    folder: Annotated[Path, typer.Option(help="Folder of the cells.")] = FOLDER,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    output: Annotated[Path | None, typer.Option(help="JSON of the report; by default named by the hardware.")] = None,
    report: Annotated[bool, typer.Option(help="Only write the report of the finished cells.")] = False,
) -> None:
    """All methods on the miniature at equal updates and equal seconds, with the control and the untrained base."""
    where = choose_device(device)
    if not report:
        prompts = [f"eval.num_prompts={num_prompts}", f"eval.quick_num_prompts={tune_prompts}"]
        recipe = load(TrainConfig, config or [], [*(sets or []), *prompts])
        settings = make_settings(recipe, updates, seconds, parse_numbers(rates, "--rates"))
        chosen_seeds = [int(seed) for seed in parse_numbers(seeds, "--seeds")]
        if settings.search_seed in chosen_seeds:
            raise UserError(f"--seeds: {settings.search_seed} is the seed of the search; choose others")
        compare_methods(settings, where, folder, parse_methods(methods), chosen_seeds, workers)
    write_report(folder, output or result_file("miniature", where, "json"))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    run_cli(app, MODULE)
