"""`flowbp train` and `flowbp estimate`."""

import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowbp.cli.options import Json, ResumeFrom, Runs, Sets, print_notes, report_error_once
from imgen_common.console import format_duration, spinner
from imgen_common.devices import announce_process
from imgen_common.errors import UserError, quoted, written_or_warned
from imgen_common.shutdown import message_when_stopped

if TYPE_CHECKING:
    from flowbp.config import TrainConfig
    from flowbp.training.preflight import CheckedRun
    from flowbp.training.progress import NullReporter


def train(
    configs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="CONFIG", help="YAML files; later ones override earlier ones. Default: the miniature."),
    ] = None,
    sets: Sets = None,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Continue a run from its last checkpoint.")] = None,
    resume_from: ResumeFrom = "last",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print what would be done, without loading weights.")
    ] = False,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Train a model by reward backpropagation. Without arguments it trains a miniature model of colored shapes on the
    CPU in minutes. The run folder holds the configuration, metrics, checkpoints, evaluations before and after training,
    and a report. Ctrl-C, SIGTERM and SIGHUP save and stop; --resume continues exactly where the run stopped. Under
    torchrun and accelerate launch all processes share the batch; with distributed.kind=fsdp2 or zero3 they also share
    the weights.

    Example:

    \b
      flowbp train
      flowbp train --set method=flowbp_bridge --set method.coupling.alpha=0.3
      flowbp train my.yaml --set optim.learning_rate=3e-5 --dry-run
      flowbp train --resume runs/flowbp_bridge
      flowbp train --resume runs/flowbp_bridge --resume-from last-good
      torchrun --nproc_per_node 2 -m flowbp train
      torchrun --nproc_per_node 8 -m flowbp train my.yaml --set distributed.kind=fsdp2
    """
    is_main = announce_process().rank == 0
    with report_error_once():
        _refuse_method_as_file(configs or [])
        with spinner("checking"):
            # what needs no torch is imported and checked first, so that a typo costs no time
            from flowbp.config import TrainConfig
            from flowbp.training.runs import check_training
            from imgen_common.config import load
            from imgen_common.run_folder.find import CONFIG, find_run
            from imgen_common.run_folder.folder import choose_checkpoint

            run_path = find_run(resume, runs, "flowbp train") if resume is not None else None
            if run_path is None or (is_main and not dry_run):
                choose_checkpoint(run_path, resume_from)
            recorded = [run_path / CONFIG] if run_path else []
            config = load(TrainConfig, [*recorded, *(configs or [])], sets or [])
            job, path = check_training(config, runs, run_path)
        if not dry_run:
            _run(job, runs, run_path, as_json, is_main)
        elif is_main:
            _print_dry_run(job, path, as_json)


def _refuse_method_as_file(files: list[Path]) -> None:
    """Answers `flowbp train refl` with the option that chooses a method."""
    from flowbp.methods import METHODS

    for file in files:
        if str(file) in METHODS and not file.exists():
            raise UserError(f"{file}: no such file; to choose the method write --set method={file}")


def _print_dry_run(job: "CheckedRun", path: Path, as_json: bool) -> None:
    from flowbp.cli import console
    from flowbp.training.preflight import unread_prompts, update_arithmetic

    numbers, plan, notes = update_arithmetic(job), job.plans[0], unread_prompts(job.config)
    if as_json:
        costs = {key: getattr(plan, key) for key in ("num_gradient_forwards", "num_plain_forwards")}
        content = {"run": str(path), "config": job.config.model_dump(mode="json"), "arithmetic": numbers}
        print(json.dumps(content | {"plan": asdict(plan) | costs, "notes": notes}))
        return
    print_notes(notes)
    console.print_dry_run(job.config, numbers)
    console.print_start(job.prompts, str(path))
    print()
    console.print_plan(job.config, plan, f"{job.config.method.name}: the plan of the first update")


def _run(job: "CheckedRun", runs: Path, resume: Path | None, as_json: bool, is_main: bool) -> None:
    """Trains, and reports progress on the main process."""
    import torch
    from accelerate import Accelerator

    from flowbp.cli.console import print_start
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
        print_start(job.prompts, str(run.path))

    def describe_stop() -> str:
        latest = run.latest_checkpoint()
        saved = "before the first checkpoint" if latest is None else f"saved up to update {latest}"
        return f"stopped; {saved}; continue with: flowbp train --resume {quoted(run.path)}"

    try:
        with message_when_stopped(describe_stop) if is_main else nullcontext(), run, reporter:
            training.train(job.config, run, accelerator, reporter)
    finally:
        accelerator.end_training()
    if is_main:
        _finish(job.config, run.path, reporter, time.monotonic() - start)


def _finish(config: "TrainConfig", run: Path, reporter: "NullReporter", seconds: float) -> None:
    """Writes the report, and prints the result."""
    from flowbp.cli import console
    from flowbp.evaluation.compare import scores_as_json
    from flowbp.reports import report
    from flowbp.training import progress
    from flowbp.training.runs import compare_base_and_trained

    page = written_or_warned(lambda: report.write_report(run), f"flowbp report {quoted(run)}")
    found = compare_base_and_trained(run)
    if isinstance(reporter, progress.JsonLinesReporter):
        results = [{"guidance": scale, "scores": scores_as_json(scores)} for scale, scores in found.items()]
        reporter.event("done", run=str(run), report=page and str(page), seconds=seconds, results=results)
        return
    print()
    own = config.guidance_scale if config.eval.model is None else None
    console.print_comparison(found, own, "base", "trained")
    print(f"\n{format_duration(seconds)}\nrun folder: {run}\nreport:     {page or 'not written'}")


def estimate(
    configs: Annotated[
        list[Path] | None, typer.Argument(metavar="CONFIG", help="YAML files, as for flowbp train.")
    ] = None,
    sets: Sets = None,
    gpus: Annotated[int, typer.Option(help="Number of processes, one per GPU.", min=1)] = 1,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory of a GPU, such as 24GiB or 80GB.")] = None,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Card whose time is estimated, such as 'RTX 4090'. Default: this machine's."),
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(help="Speed of a GPU in TFLOP/s, instead of half its published peak.", min=0.001)
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Run two real updates on this machine and compare. Needs the weights.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Estimate what a run needs before it begins: GPU memory by part, operations and time of an update, disk space and
    licenses. It reads no weights and needs no GPU: one step of every stage is traced with tensors that have a shape but
    no data. If torch sees no GPU, the memory of the CPU's operations is counted. Fragmentation of the allocator and the
    GPU context (about half a GiB) are not included. With --memory it says whether the run fits, which settings would
    help most, and which values of model.recompute and keep_graphs are the fastest that fit. Times assume half the
    published peak of a card, which updates of large batches reach.

    Example:

    \b
      flowbp estimate configs/flowbp/sd3_5_medium/lora_24gb.yaml --memory 24GB --gpu "RTX 4090"
      flowbp estimate configs/flowbp/flux1_dev/flowbp_bridge.yaml --gpus 8 --memory 80GB --gpu H100
      flowbp estimate --calibrate
    """
    with spinner("tracing") as say:
        from flowbp.config import TrainConfig
        from flowbp.config.sizes import parse_memory_size
        from flowbp.training import preflight
        from imgen_common.config import load
        from imgen_common.devices import device_of, known_card

        limit = parse_memory_size(memory) if memory is not None else None
        if calibrate and gpus > 1:
            raise UserError(f"--calibrate: runs one process, so it cannot be compared with --gpus {gpus}; leave it out")
        if gpu is not None and tflops is None:
            known_card(gpu)  # before torch is imported

        def config_of(changes: Sequence[str] = ()) -> "TrainConfig":
            return load(TrainConfig, configs or [], [*(sets or []), *changes])

        preflight.check_inputs(config_of(), gpus, weights=calibrate)
        from flowbp import estimate as estimates

        speed = estimates.speed_of(gpu, tflops)
        job = preflight.check_run(config_of(), gpus, estimate_only=not calibrate)
        say("tracing embedding, a rollout, a swept step, rewards and an evaluation ...")
        found = estimates.estimate_run(job)
        advice = fastest = None
        if limit is not None:
            fastest = estimates.fastest_that_fits(config_of, gpus, limit, found, say)
        if limit is not None and found.peak > limit:
            advice = estimates.advise_settings(config_of, gpus, limit, found, say)
        measured = estimates.measure_run(job.config, device_of("auto")) if calibrate else None
    content = estimates.estimate_as_json(job, found, speed, limit, advice, measured)
    if fastest is not None:
        content["fastest"] = asdict(fastest)
    if as_json:
        print(json.dumps(content))
        return
    from flowbp.cli import console

    console.print_estimate(content)
