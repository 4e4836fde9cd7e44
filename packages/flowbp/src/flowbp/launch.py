"""What happens before and after a training run: checks that need no weights, the arithmetic, the run folder."""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from flowbp import backbones
from flowbp.compare import Change, changes, comparable
from flowbp.config import TrainConfig
from flowbp.data import load_prompts
from flowbp.networks import check_machine, prepare
from flowbp.plan import Plan
from flowbp.plan import plan as draw_plan
from flowbp.results import load_evaluations
from flowbp.train import MAY_DIFFER, shares, trainable
from imgen_common import hub, launchers
from imgen_common.config import load, to_yaml
from imgen_common.errors import UserError
from imgen_common.runs import CONFIG, RunFolder, free_path, write_atomic
from imgen_common.streams import numpy_generator

GRID = "grid.json"
"""File of a run folder with the noise levels it trains on, for pictures of its plans."""
METHOD = "{method}"
COPIES_KEPT = 4
"""Tensors of a checkpoint per trained weight: itself, its average and two moments."""
NUM_DRAWN = 64
"""Plans over which the cost of an update is averaged."""


@dataclass(frozen=True)
class Job:
    """A run that passed every check.

    plans: those of the first updates; num_weights: how many numbers are trained.
    """

    config: TrainConfig
    num_processes: int
    sigmas: tuple[float, ...]
    plans: tuple[Plan, ...]
    num_weights: int
    num_prompts: int


def check(config: TrainConfig, num_processes: int, *, here: bool = True) -> Job:
    """Everything that can be found wrong without loading weights, so that nothing is written for a run that cannot be.

    here=False: it is only planned; weights, a GPU and optional packages may be missing.
    Raises UserError: a batch that does not divide, missing models, no prompts, more active steps than there are,
    picture sizes, adapters or switches that do not fit the model.
    """
    shares(config, num_processes)
    for ref in (config.model.ref, *(scorer.ref for scorer in config.scorers)):
        hub.resolve(ref, weights=here)
    num_prompts = len(load_prompts(config.data.prompts, config.data.key))
    for source, limit in (
        (config.eval.prompts, config.eval.num_prompts),
        (config.eval.quick_prompts, config.eval.quick_num_prompts),
    ):
        load_prompts(source, config.data.key, limit)
    backbone = backbones.told(backbones.skeleton(config.model.ref), config.model.ref, config.model.embedded_guidance)
    if here:
        check_machine(config.model)
    prepare(backbone, config.model)
    size = (config.model.height, config.model.width)
    sigmas = tuple(float(s) for s in backbone.sigmas(config.num_steps, size))
    plans = tuple(
        draw_plan(config.method, sigmas, numpy_generator(config.seed, "plan", update))
        for update in range(min(config.num_updates, NUM_DRAWN))
    )
    num_weights = sum(p.numel() for p in trainable(backbone.net, config).values())
    return Job(config, num_processes, sigmas, plans, num_weights, num_prompts)


def check_launcher(kind: str, environment: Mapping[str, str]) -> None:
    """Raises UserError if weights are to be cut up without a launcher, or a launcher was told to do it itself, or
    started one process where several were asked for."""
    kinds = {"FSDP": "distributed.kind=fsdp2", "DEEPSPEED": "distributed.kind=zero2 or zero3"}
    launchers.check_launcher(environment, "flowbp train", kinds)
    if kind != "ddp" and "RANK" not in environment:
        raise UserError(
            f"distributed.kind {kind}: needs processes; start it with torchrun --nproc_per_node N -m flowbp train ..., "
            "or with accelerate launch"
        )


def check_disk(job: Job, folder: Path, *, resume: bool) -> None:
    """Raises UserError unless the disk of `folder` (or of its nearest parent) has room for the run's checkpoints."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    checkpoints = 1 if resume else job.config.checkpoint.keep + 1
    needed = job.num_weights * 4 * COPIES_KEPT * checkpoints
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{folder}: no room for {checkpoints} checkpoints: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free; "
            "make room, give another --runs, or train fewer weights (lora)"
        )


def arithmetic(job: Job) -> dict[str, Any]:
    """What an update costs, per update and picture, averaged over the first plans of the run."""
    config = job.config
    share, micro = shares(config, job.num_processes)
    guided, detached = config.guidance.scale != 1, config.guidance.detach_negative
    active = sum(p.num_gradient_forwards for p in job.plans) / len(job.plans)
    plain = sum(p.num_plain_forwards for p in job.plans) / len(job.plans)
    jacobians = sum(term.coupling > 0 for p in job.plans for term in p.terms) / len(job.plans)
    with_gradient = active * (2 if guided and not detached else 1)
    without = plain * (2 if guided else 1) + (active if guided and detached else 0)
    return {
        "processes": job.num_processes,
        "pictures_per_update": config.batch_size,
        "pictures_per_process": share,
        "micro_batches_per_process": share // micro,
        "evaluations_per_picture_with_gradient": with_gradient,
        "evaluations_per_picture_without_gradient": without,
        "evaluations_per_update_with_gradient": with_gradient * config.batch_size,
        "evaluations_per_update_without_gradient": without * config.batch_size,
        "jacobians_per_picture": jacobians,
        "updates": config.num_updates,
        "pictures": config.num_updates * config.batch_size,
        "prompts": job.num_prompts,
        "epochs": config.num_updates * config.batch_size / job.num_prompts,
        "trained_weights": job.num_weights,
        "checkpoint_bytes": job.num_weights * 4 * COPIES_KEPT,
    }


# --- run folders -----------------------------------------------------------------------------------------------------


def new_path(config: TrainConfig, root: Path) -> Path:
    """Where a new run goes: a name made of the method's is numbered until it is free; another must be free as it is.

    Raises UserError for a name that is taken, or no plain folder name.
    """
    name = config.name.replace(METHOD, config.method.name)
    return free_path(root, None if METHOD in config.name else name, name)


def resumed_config(run: Path, files: Sequence[Path], sets: Sequence[str]) -> TrainConfig:
    """The configuration that a run recorded, with what is given now over it."""
    return load(TrainConfig, [run / CONFIG, *files], sets)


def check_resume(run: Path, config: TrainConfig) -> None:
    """Raises UserError if the run was made with another configuration, before anything is loaded."""
    RunFolder.open(run, config, is_main=False, may_differ=MAY_DIFFER)


def open_run(
    job: Job, root: Path, command: Sequence[str], accelerator: Accelerator, *, resume: Path | None
) -> RunFolder:
    """The run folder on every process: the main one makes or opens it, the others read it once it is there.

    Raises UserError, the same on every process, if the main one cannot.
    """
    answer: list[str] = ["", ""]
    run: RunFolder | None = None
    if accelerator.is_main_process:
        try:
            run = _open_main(job, root, command, resume)
            answer[0] = str(run.path)
        except UserError as error:
            answer[1] = str(error)
    broadcast_object_list(answer)
    if answer[1]:
        raise UserError(answer[1])
    return run or RunFolder.open(Path(answer[0]), is_main=False)


def _open_main(job: Job, root: Path, command: Sequence[str], resume: Path | None) -> RunFolder:
    config = job.config
    if resume is None:
        run = RunFolder.create(new_path(config, root), config, command, trackers=config.trackers)
    else:
        run = RunFolder.open(resume, config, command, may_differ=MAY_DIFFER, trackers=config.trackers)
        write_atomic(resume / CONFIG, to_yaml(config))
    write_atomic(run.path / GRID, json.dumps({"sigmas": job.sigmas}) + "\n")
    return run


# --- results ---------------------------------------------------------------------------------------------------------


def summary(run: Path) -> dict[float, dict[str, Change]]:
    """Base against trained by guidance scale, the training's own first; scales with both evaluations only."""
    own = RunFolder.open(run, is_main=False).config(TrainConfig).guidance.scale
    found = load_evaluations(run)
    scales = sorted({scale for _, scale in found}, key=lambda scale: (not math.isclose(scale, own), scale))
    pairs = {scale: (found.get(("base", scale)), found.get(("trained", scale))) for scale in scales}
    return {
        scale: changes(base, trained)
        for scale, (base, trained) in pairs.items()
        if base is not None and trained is not None and comparable(base, trained)
    }
