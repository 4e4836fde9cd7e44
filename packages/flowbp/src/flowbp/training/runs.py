"""Run folders of `flowbp train`: where a new one goes, what a resumed one may change, what it found."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from flowbp.config import TrainConfig
from flowbp.evaluation.compare import Change, have_same_prompts, paired_changes
from flowbp.evaluation.results import load_evaluations
from flowbp.training.preflight import CheckedRun
from imgen_common.config import load, to_yaml
from imgen_common.errors import UserError
from imgen_common.files import write_atomic
from imgen_common.run_folder.find import CONFIG, free_path
from imgen_common.run_folder.folder import RunFolder

MAY_DIFFER = (
    *(
        "name",
        "max_train_steps",
        "checkpoint",
        "trackers",
        "per_device_batch_size",
        "active_steps_per_forward",
        "reward_batch_size",
        "offload_trajectory",
        "watchdog",
        "distributed",
    ),
    *("data.embeddings", "data.cache", "eval.every", "eval.batch_size", "eval.quick_prompts", "eval.quick_num_prompts"),
)
"""Keys of the configuration that a resumed run may change: none alters the updates already made, or makes the
evaluation after another one than the evaluation before."""


GRID = "grid.json"
"""File of a run folder with the noise levels it trains on, for images of its plans."""
METHOD = "{method}"


# --- run folders -----------------------------------------------------------------------------------------------------


def new_run_path(config: TrainConfig, root: Path) -> Path:
    """Where a new run goes: a name made of the method's is numbered until it is free; another must be free as it is.

    Raises UserError for a name that is taken, or no plain folder name.
    """
    name = config.name.replace(METHOD, config.method.name)
    return free_path(root, None if METHOD in config.name else name, name)


def load_resumed_config(run: Path, files: Sequence[Path], sets: Sequence[str]) -> TrainConfig:
    """The configuration that a run recorded, with what is given now over it."""
    return load(TrainConfig, [run / CONFIG, *files], sets)


def check_resume(run: Path, config: TrainConfig) -> None:
    """Raises UserError if the run was made with another configuration, before anything is loaded."""
    RunFolder.open(run, config, is_main=False, may_differ=MAY_DIFFER)


def open_run(
    job: CheckedRun, root: Path, command: Sequence[str], accelerator: Accelerator, *, resume: Path | None
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


def _open_main(job: CheckedRun, root: Path, command: Sequence[str], resume: Path | None) -> RunFolder:
    config = job.config
    if resume is None:
        run = RunFolder.create(new_run_path(config, root), config, command, trackers=config.trackers)
    else:
        run = RunFolder.open(resume, config, command, may_differ=MAY_DIFFER, trackers=config.trackers)
        write_atomic(resume / CONFIG, to_yaml(config))
    write_atomic(run.path / GRID, json.dumps({"sigmas": job.sigmas}) + "\n")
    return run


# --- results ---------------------------------------------------------------------------------------------------------


def compare_base_and_trained(run: Path) -> dict[float, dict[str, Change]]:
    """Base against trained by guidance scale, the training's own first; scales with both evaluations only."""
    own = RunFolder.open(run, is_main=False).config(TrainConfig).guidance_scale
    found = load_evaluations(run)
    scales = sorted({scale for _, scale in found}, key=lambda scale: (not math.isclose(scale, own), scale))
    pairs = {scale: (found.get(("base", scale)), found.get(("trained", scale))) for scale in scales}
    return {
        scale: paired_changes(base, trained)
        for scale, (base, trained) in pairs.items()
        if base is not None and trained is not None and have_same_prompts(base, trained)
    }
