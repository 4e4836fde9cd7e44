"""`flowbp train` and `flowbp estimate`."""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowbp.cli.options import Json, Runs, Sets, report_error_once, spinner
from imgen_common.errors import UserError

if TYPE_CHECKING:
    from flowbp.config import TrainConfig
    from flowbp.core.plan import Plan
    from flowbp.training.preflight import CheckedRun
    from flowbp.training.progress import NullReporter


# --- train -----------------------------------------------------------------------------------------------------------


def train(
    configs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="CONFIG", help="YAML files, later ones override earlier ones; none: the miniature."),
    ] = None,
    sets: Sets = None,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Continue a run from its last checkpoint.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print what would be done, without loading weights.")
    ] = False,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Train a model by reward backpropagation. Without arguments it trains a miniature model of colored shapes on the
    CPU in minutes. The run folder holds configuration, metrics, checkpoints, evaluations before and after, and a
    report. Ctrl-C saves and stops; --resume continues exactly where it stopped. Under torchrun and accelerate launch
    all processes share the batch, and with distributed.kind=fsdp2, zero2 or zero3 the weights.

    Example:

    \b
      flowbp train
      flowbp train --set method=flowbp_bridge --set method.coupling.alpha=0.3
      flowbp train my.yaml --set optim.learning_rate=3e-5 --dry-run
      flowbp train --resume runs/flowbp_bridge
      torchrun --nproc_per_node 2 -m flowbp train
      torchrun --nproc_per_node 8 -m flowbp train my.yaml --set distributed.kind=fsdp2
    """
    with report_error_once():
        _train(configs or [], sets or [], resume, dry_run, runs, as_json, int(os.environ.get("RANK", "0")) == 0)


def _train(
    files: list[Path], sets: list[str], resume: str | None, dry_run: bool, runs: Path, as_json: bool, is_main: bool
) -> None:
    _refuse_method_as_file(files)
    with spinner("checking"):
        from flowbp.config import TrainConfig
        from flowbp.training import preflight
        from flowbp.training.runs import check_resume, load_resumed_config, new_run_path
        from imgen_common.config import load
        from imgen_common.console import quiet_libraries
        from imgen_common.run_folder.find import find_run

        run_path = find_run(resume, runs) if resume else None
        config = load_resumed_config(run_path, files, sets) if run_path else load(TrainConfig, files, sets)
        if run_path:
            check_resume(run_path, config)
        path = run_path or new_run_path(config, runs)
        quiet_libraries()
        preflight.check_launcher(config.distributed.kind, os.environ)
        job = preflight.check_run(config, int(os.environ.get("WORLD_SIZE", "1")))
        preflight.check_disk(job, path, resume=run_path is not None)
    if not dry_run:
        _run(job, runs, run_path, as_json, is_main)
    elif is_main:
        _print_dry_run(job, path, as_json)


def _refuse_method_as_file(files: list[Path]) -> None:
    """Answers `flowbp train refl` with the option that chooses a method."""
    for file in files:
        if not file.suffix and not file.exists():
            from flowbp.methods import METHODS

            if str(file) in METHODS:
                raise UserError(f"{file}: no such file; to choose the method write --set method={file}")


def _print_dry_run(job: "CheckedRun", path: Path, as_json: bool) -> None:
    from flowbp.cli import console
    from flowbp.training import preflight

    numbers = preflight.update_arithmetic(job)
    plan = job.plans[0]
    if as_json:
        content = {"run": str(path), "config": job.config.model_dump(mode="json"), "arithmetic": numbers}
        print(json.dumps(content | {"plan": _plan_json(plan)}))
        return
    console.print_dry_run(job.config, numbers, str(path))
    console.print_plan(job.config.method, plan, f"{job.config.method.name}: the plan of the first update")


def _plan_json(plan: "Plan") -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(plan) | {
        "num_gradient_forwards": plan.num_gradient_forwards,
        "num_plain_forwards": plan.num_plain_forwards,
    }


def _run(job: "CheckedRun", runs: Path, resume: Path | None, as_json: bool, is_main: bool) -> None:
    """Trains, and reports progress on the main process."""
    import torch
    from accelerate import Accelerator

    from flowbp.training import loop as training
    from flowbp.training import progress
    from flowbp.training.runs import open_run

    start = time.monotonic()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    run = open_run(job, runs, ["flowbp", *sys.argv[1:]], accelerator, resume=resume)
    scores = [scorer.name for scorer in job.config.scorers]
    reporter = progress.make_reporter(job.config.max_train_steps, scores, is_main=is_main, as_json=as_json)
    if isinstance(reporter, progress.JsonLinesReporter):
        reporter.event("start", run=str(run.path), max_train_steps=job.config.max_train_steps)
    elif is_main:
        print(f"run folder: {run.path}", flush=True)
    try:
        with run, reporter:
            training.train(job.config, run, accelerator, reporter)
    except KeyboardInterrupt:
        if is_main:
            print(f"\nstopped; continue with: flowbp train --resume {run.path}", file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        accelerator.end_training()
    if is_main:
        _finish(job.config, run.path, reporter, time.monotonic() - start)


def _finish(config: "TrainConfig", run: Path, reporter: "NullReporter", seconds: float) -> None:
    """Writes the report, and prints the result."""
    from flowbp.cli import console
    from flowbp.evaluation.compare import changes_as_json
    from flowbp.reports import report
    from flowbp.training import progress
    from flowbp.training.runs import compare_base_and_trained

    page = report.write_report(run)
    found = compare_base_and_trained(run)
    if isinstance(reporter, progress.JsonLinesReporter):
        results = [{"guidance": scale, "scores": changes_as_json(scores)} for scale, scores in found.items()]
        reporter.event("done", run=str(run), report=str(page), seconds=seconds, results=results)
        return
    print()
    console.print_comparison(found, config.guidance_scale, "base", "trained")
    print(f"\n{progress.format_duration(seconds)}\nrun folder: {run}\nreport:     {page}")


def estimate(
    configs: Annotated[
        list[Path] | None, typer.Argument(metavar="CONFIG", help="As for flowbp train; none: the miniature.")
    ] = None,
    sets: Sets = None,
    gpus: Annotated[int, typer.Option(help="Processes, one per GPU.", min=1)] = 1,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory of a GPU, such as 24GiB or 80GB.")] = None,
    tflops: Annotated[float, typer.Option(help="Assumed speed of a GPU in TFLOP/s.", min=0.001)] = 400.0,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure two real updates here, and compare. Needs the weights.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Estimate what a run needs before it begins: memory of a GPU by part, operations and time of an update, disk,
    licenses. It reads no weights and needs no GPU: one step of every stage is traced with tensors that have shapes but
    no content. If torch sees no GPU, the memory of the CPU's operations is counted. Fragmentation of the allocator and
    the context of the GPU (about half a GiB) come on top. With --memory it says whether the run fits, and which
    settings would help most.

    Example:

    \b
      flowbp estimate configs/flowbp/sd3_5_medium/lora_24gb.yaml --memory 24GiB
      flowbp estimate configs/flowbp/flux1_dev/flowbp_bridge.yaml --gpus 8 --memory 80GB --set distributed.kind=fsdp2
      flowbp estimate --calibrate
    """
    with spinner("tracing"):
        from flowbp import estimate as estimates
        from flowbp.config import TrainConfig
        from flowbp.training import preflight
        from imgen_common.config import load
        from imgen_common.console import quiet_libraries
        from imgen_common.devices import device_of

        limit = estimates.parse_memory_size(memory) if memory else None
        quiet_libraries()

        def config_of(changes: Sequence[str] = ()) -> "TrainConfig":
            return load(TrainConfig, configs or [], [*(sets or []), *changes])

        job = preflight.check_run(config_of(), gpus, estimate_only=not calibrate)
        found = estimates.estimate_run(job)
        advice = estimates.advise_settings(config_of, gpus, found.peak) if limit and found.peak > limit else None
        measured = estimates.measure_run(job.config, device_of("auto")) if calibrate else None
    content = estimates.estimate_as_json(job, found, tflops, limit, advice, measured)
    if as_json:
        print(json.dumps(content))
        return
    from flowbp.cli import console

    console.print_estimate(content)
