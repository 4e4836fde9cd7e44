"""Run folders of `flowbp train`: where a new one goes, what a resumed one may change, what it found."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flowbp.config import TrainConfig
from flowbp.evaluation.compare import Change, paired_changes
from flowbp.training.preflight import CheckedRun, check_disk, check_launcher, check_run, hash_settings
from imgen_common.config import to_yaml
from imgen_common.devices import launched_process
from imgen_common.errors import UserError
from imgen_common.files import read_text, write_atomic
from imgen_common.run_folder.data import check_data, moved_models, record_data
from imgen_common.run_folder.find import CONFIG, free_path
from imgen_common.run_folder.folder import RunFolder
from imgen_common.run_folder.trackers import tracker_module

if TYPE_CHECKING:
    from accelerate import Accelerator

MAY_DIFFER = (
    *("name", "max_train_steps", "checkpoint", "trackers", "per_device_batch_size", "active_steps_per_forward"),
    *("optim.learning_rate", "optim.max_grad_norm"),
    *("reward_batch_size", "offload_trajectory", "watchdog", "distributed"),
    *("data.prompts", "data.key", "eval.prompts"),  # other places of equal prompts: `check_data` compares hashes
    *("keep_graphs", "model.recompute", "model.vae.gradient_checkpointing", "model.vae.slicing"),
    *("data.embeddings", "data.cache", "eval.every", "eval.batch_size", "eval.quick_prompts", "eval.quick_num_prompts"),
    *("model.vae.preview", "model.working_copy", "model.attention", "model.compile", "rollout.compile"),
    "guidance.batched",
)
"""Keys of the configuration that a resumed run may change: none alters the updates already made or, but for rounding,
makes the evaluation after another one than the evaluation before; nor does another place of the same model
(`moved_models`).  What it changes is recorded (`EARLIER_CONFIG`)."""
EARLIER_CONFIG = "config-until-{:06d}.yaml"
"""File of a run folder with the configuration up to an update after which the run went on with another one."""
GRID = "grid.json"
"""File of a run folder with the noise levels it trains on, for images of its plans."""


def new_run_path(config: TrainConfig, root: Path) -> Path:
    """Where a new run goes: a name made of the method's is numbered until it is free; another must be free as it is.

    Raises UserError for a name that is taken, or no plain folder name.
    """
    name = config.name.replace("{method}", config.method.name)
    return free_path(root, None if "{method}" in config.name else name, name)


def check_training(config: TrainConfig, root: Path, resume: Path | None) -> tuple[CheckedRun, Path]:
    """The run, checked, and where it goes; nothing is written.  resume: the folder of a run to continue.

    Raises UserError as `check_run` does, and if the run to continue has another configuration (also where its file was
    edited) or other prompts, the folder is taken, the launcher does not fit, or the disk has no room.
    """
    checkpoint = None
    if resume is not None:
        run = RunFolder.open(resume, is_main=False)
        config = _with_recorded_adapter(config, run.config(TrainConfig))
        checkpoint, moved = run.latest_checkpoint(), moved_models(resume, config, _places(config))
        RunFolder.open(resume, config, is_main=False, may_differ=(*MAY_DIFFER, *moved))
        if moved:  # before anything of another model is blamed
            check_data(resume, hash_settings(config))
        if config.max_train_steps < (made := checkpoint or 0):
            given = f"max_train_steps {config.max_train_steps}"
            raise UserError(f"{given}: {resume} has made {made} updates already; give {made} or more")
    path = resume or new_run_path(config, root)
    for tracker in config.trackers:
        tracker_module(tracker)
    check_launcher(config.distributed.kind, os.environ)
    job = check_run(config, launched_process(os.environ).size, with_adapter=checkpoint is None)
    check_disk(job, path, resume=resume is not None)
    if resume is not None:
        check_data(resume, job.data)
    return job, path


def _places(config: TrainConfig) -> dict[str, str]:
    """What the hashes of models and adapters are called (`hash_settings`), by the keys that say where these lie."""
    parts = {"rewards": config.rewards, "heldout": config.heldout}
    rewards = {f"{key}.{i}.ref": f"the reward {one.name}" for key, part in parts.items() for i, one in enumerate(part)}
    return {key: key for key in ("model.ref", "eval.model", "lora.init")} | rewards


def _with_recorded_adapter(config: TrainConfig, recorded: TrainConfig) -> TrainConfig:
    """A configuration with what its run recorded of the adapter that both begin with, where it says nothing else."""
    if config.lora is None or recorded.lora is None or (config.lora.init is None) != (recorded.lora.init is None):
        return config
    given = {name: getattr(config.lora, name) for name in config.lora.model_fields_set}
    return config.model_copy(update={"lora": recorded.lora.model_copy(update=given)})


def open_run(
    job: CheckedRun, root: Path, command: Sequence[str], accelerator: "Accelerator", *, resume: Path | None
) -> RunFolder:
    """The run folder on every process; the main one makes or opens it.  Raises UserError on all if it cannot."""
    from accelerate.utils import broadcast_object_list

    config, run, answer = job.config, None, ["", ""]
    if accelerator.is_main_process:
        try:
            if resume is None:
                run = RunFolder.create(new_run_path(config, root), config, command, trackers=config.trackers)
                record_data(run.path, job.data)
            else:
                free = (*MAY_DIFFER, *moved_models(resume, config, _places(config)))
                run = RunFolder.open(resume, config, command, may_differ=free, trackers=config.trackers)
                _change_config(run, config)
            write_atomic(run.path / GRID, json.dumps({"sigmas": job.sigmas}) + "\n")
            answer[0] = str(run.path)
        except UserError as error:
            answer[1] = str(error)
            if run is not None:
                run.close()
            if run is not None and resume is None:
                shutil.rmtree(run.path, ignore_errors=True)
    broadcast_object_list(answer)
    if answer[1]:
        raise UserError(answer[1])
    return run or RunFolder.open(Path(answer[0]), is_main=False)


def _change_config(run: RunFolder, config: TrainConfig) -> None:
    """Writes the configuration with which a run goes on, and keeps the one that it had if that was another."""
    before, now = read_text(run.path / CONFIG), to_yaml(config)
    earlier = run.path / EARLIER_CONFIG.format(run.latest_checkpoint() or 0)
    if before != now and not earlier.exists():
        write_atomic(earlier, before)
    write_atomic(run.path / CONFIG, now)


def compare_base_and_trained(run: Path) -> dict[float, dict[str, Change]]:
    """Base against trained by guidance scale, the run's own first; scales with both evaluations only."""
    from flowbp.evaluation.results import load_evaluations, pair_evaluations

    own = RunFolder.open(run, is_main=False).config(TrainConfig).eval_guidance_scales[0]
    return {scale: paired_changes(*pair) for scale, pair in pair_evaluations(load_evaluations(run), own).items()}
