"""What both trainers need around TRL's: options, processes, run folder, model, resuming, the exported folder.

config.yaml  environment.json  metrics.jsonl  tensorboard/
checkpoints/checkpoint-N/       TRL's, with a manifest, by which a resumed run finds damage
adapter/                        with LoRA: the adapter
model/                          the trained model, for `chat.ref`
"""

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic_core import to_json

from imgen_common import hub
from imgen_common.console import quiet_libraries
from imgen_common.devices import any_process, check_launcher, launched_process
from imgen_common.errors import UserError, quoted
from imgen_common.run_folder.checkpoints import write_manifest
from imgen_common.run_folder.data import DATA, check_data, hash_rows, moved_models, record_data
from imgen_common.run_folder.folder import RunFolder
from imgen_common.run_folder.listing import whole_checkpoints
from imgen_common.shutdown import GracefulShutdown, message_when_stopped
from imgen_common.weights import load_whole, loading
from interleave.models.chat.local import bound_pixels, check_processor
from interleave.models.hashes import hash_models
from interleave.models.remote import HOW_REACHED
from interleave.training.config import MODEL, TrainingConfig, find_place
from interleave.training.memory import UNLOADABLE, zero_options
from interleave.training.trained_weights import NOT_FINITE, build_gradient_check, freeze_vision
from interleave.training.trl_options import (
    OptionsRefusedError,
    check_trackers_installed,
    check_vllm_installed,
    print_lines,
    refusals_of_trackers,
    refusals_of_trl,
    take_trackers,
)

CHECKPOINTS, ADAPTER = "checkpoints", "adapter"
MAY_DIFFER = (
    "data",  # another place of equal rows: `bind_data` compares hashes
    *("trl.logging_steps", "trl.save_steps", "trl.save_total_limit", "trl.dataloader_num_workers", "trl.report_to"),
    *("trl.dataloader_pin_memory", "trl.dataloader_prefetch_factor", "trl.dataloader_persistent_workers"),
    *("trl.ddp_timeout", "trl.per_device_eval_batch_size", "trl.eval_accumulation_steps", "trl.gradient_checkpointing"),
    *("trl.torch_empty_cache_steps", "trl.vllm_gpu_memory_utilization", "trl.vllm_server_base_url"),
    *("trl.vllm_server_host", "trl.vllm_server_port", "trl.vllm_server_timeout", "trl.vllm_group_port"),
    *("trl.disable_tqdm", "cache", "prices"),
    *("scorer.concurrency", "scorer.deadline", "scorer.max_unscored", "scorer.window"),
    *(f"{part}.{key}" for part in ("generator", "judge.model") for key in HOW_REACHED),
)
"""Keys that may change when a run is resumed: the weights depend on none of them, but for rounding."""
RECIPE_KEYS = {
    "DEEPSPEED": "trl.deepspeed=configs/interleave/deepspeed/zero2.json (or zero3.json)",
    "FSDP": "trl.fsdp=true, or with configs/interleave/fsdp/fsdp2.yaml after the recipe",
}
"""Keys of a recipe that shard weights, by accelerate's name for the kind of sharding."""
STOPPING = "stopping after this update, or the last one of its rollout; once more to stop at once"


def prepare_environment() -> None:
    """Call before TRL is imported: turns telemetry off, and tells DeepSpeed whether there is a GPU."""
    import torch

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    quiet_libraries()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def build_arguments(cls: type[Any], config: TrainingConfig, fixed: Mapping[str, Any]) -> Any:
    """TRL's arguments: defaults for this machine, the `trl:` mapping and `fixed`.  Raises UserError for a bad value."""
    import torch

    options: dict[str, Any] = {"seed": config.seed, "remove_unused_columns": False, "output_dir": CHECKPOINTS}
    if not torch.cuda.is_available():
        if config.trl.get("activation_offloading"):
            raise UserError("trl.activation_offloading: moves activations from a GPU, and there is none; leave it out")
        options |= {"use_cpu": True, "bf16": False, "dataloader_pin_memory": False}
    options |= {**config.trl, **fixed}
    zero = zero_options(config.trl)
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise UserError("trl.deepspeed: ZeRO-3 needs zero_optimization.stage3_gather_16bit_weights_on_model_save: true")
    check_vllm_installed(config.trl)
    try:
        with refusals_of_trl():
            arguments = cls(**options)
    except OSError as error:
        raise UserError(f"trl: {' '.join(str(error).split())}") from error
    check_trackers_installed(arguments.report_to)
    if arguments.fsdp and arguments.distributed_state.distributed_type in ("NO", "MULTI_CPU"):
        raise UserError(
            "trl.fsdp: accelerate does not shard weights on a CPU or with one process; use several GPUs or remove it"
        )
    if arguments.deepspeed is not None and arguments.use_cpu:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")  # ZeRO-3 shards weights while they are loaded
    return arguments


def num_processes(command: str) -> int:
    """How many processes were launched for `command`, such as "interleave grpo".

    Raises UserError if the launcher did not start them, or would shard weights itself.
    """
    check_launcher(os.environ, command, RECIPE_KEYS)
    return launched_process(os.environ).size


def is_main_process() -> bool:
    return launched_process(os.environ).rank == 0


def run_on_main_process(work: Callable[[], str]) -> str:
    """Runs `work` on the main process and returns its result on all; a UserError is raised on all."""
    import torch.distributed as dist

    answer = ["", ""]
    if is_main_process():
        try:
            answer[0] = work()
        except UserError as error:
            answer[1] = str(error)
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(answer)
    if answer[1]:
        raise UserError(answer[1])
    return answer[0]


@contextlib.contextmanager
def open_run(
    config: TrainingConfig,
    arguments: Any,
    command: Sequence[str],
    *,
    runs: Path,
    name: str | None,
    default_name: str,
    resume: Path | None,
) -> Iterator[tuple[RunFolder, str | None]]:
    """Opens the run folder, new or resumed, on every process; with it, the checkpoint from which to resume.

    default_name: of a new run where no `name` is given.  Raises UserError if it cannot be opened or is finished.  A new
    one is removed again where TRL refuses the options.
    """
    from transformers.trainer_utils import get_last_checkpoint

    _ = arguments.device  # joins the process group
    trackers, opened = take_trackers(arguments), list[RunFolder]()

    def work() -> str:
        place = find_place(runs, name, default_name, resume)
        if resume is None:
            made = RunFolder.create(place, config, command, trackers=trackers)
        else:
            free = (*MAY_DIFFER, *moved_models(place, config, config.places))  # `bind_data` compares hashes
            made = RunFolder.open(place, config, command, may_differ=free, trackers=trackers)
        opened.append(stack.enter_context(made))
        return str(made.path)

    with contextlib.ExitStack() as stack:
        path = Path(run_on_main_process(work))
        run = opened[0] if opened else RunFolder.open(path, is_main=False)
        arguments.output_dir = str(path / CHECKPOINTS)
        checkpoint = get_last_checkpoint(arguments.output_dir) if (path / CHECKPOINTS).is_dir() else None
        run.rewind(int(checkpoint.rpartition("-")[2]) if checkpoint else -1)
        if resume is None and run.is_main:
            stack.enter_context(_removed_if_refused(path))
        yield run, checkpoint


@contextlib.contextmanager
def _removed_if_refused(run: Path) -> Iterator[None]:
    """Removes a new run within which TRL refuses the options, which is before there is anything to resume."""
    try:
        yield
    except OptionsRefusedError:
        shutil.rmtree(run, ignore_errors=True)
        raise


def bind_data(run: RunFolder, models: Mapping[str, Any], sets: Mapping[str, Sequence[Any]]) -> None:
    """Keeps hashes of models (`hash_models`), rows and texts, by what they are, and of the number of processes with a
    run that has none and no checkpoint.  Raises UserError, on all processes, if a resumed one was started with others.
    """

    def work() -> str:
        data = {name: hash_rows(to_json(row).decode() for row in rows) for name, rows in sets.items()}
        data |= {"the number of processes": hash_rows([str(launched_process(os.environ).size)]), **hash_models(models)}
        is_bound = (run.path / DATA).exists() or whole_checkpoints(run.path)
        check_data(run.path, data) if is_bound else record_data(run.path, data)
        return ""

    run_on_main_process(work)


def message_how_to_continue(run: RunFolder, command: str) -> contextlib.AbstractContextManager[None]:
    """Where its block is stopped, the main process says what is saved.  command: such as "sft critic"."""

    def describe_stop() -> str:
        latest = max(whole_checkpoints(run.path), default=None)
        saved = "before the first checkpoint" if latest is None else f"saved up to update {latest}"
        return f"stopped; {saved}; continue with: interleave {command} --resume {quoted(run.path)}"

    return message_when_stopped(describe_stop) if is_main_process() else contextlib.nullcontext()


def run_training(trainer: Any, callback: Any, checkpoint: str | None) -> None:
    """Trains, from `checkpoint` if there is one.  callback: of `build_run_callback`.

    Raises UserError where a trained weight gets no gradient, TRL cannot build what the options ask for, or a tracker
    does not start.

    A first Ctrl-C, SIGTERM or SIGHUP ends the update and saves it; then KeyboardInterrupt is raised.
    """
    print_lines(trainer)
    trainer.add_callback(build_gradient_check(trainer.model))
    with (
        callback.shutdown,
        refusals_of_trl(has_begun=lambda: callback.began or checkpoint is not None),
        refusals_of_trackers(trainer.args.report_to, lambda: callback.began),
    ):
        trainer.train(resume_from_checkpoint=checkpoint)
    if callback.stopped:
        raise KeyboardInterrupt


def build_run_callback(
    run: RunFolder, extra_metrics: Callable[[], Mapping[str, float]] = dict, updates_per_rollout: int = 1
) -> Any:
    """A callback that marks complete checkpoints and writes logged metrics and those of `extra_metrics` to the run.

    Attributes: `shutdown`, in which training runs; `stopped`, early and with a checkpoint; `began`, with an optimizer.
    updates_per_rollout: it stops only between two rollouts, since a run cannot resume exactly from the middle of one.
    """
    from transformers import TrainerCallback

    class RunCallback(TrainerCallback):
        shutdown = GracefulShutdown(STOPPING if is_main_process() else "")
        stopped = began = False

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.began = True
            state.compute_steps(args, state.max_steps)  # a resumed run has those of its checkpoint
            self.save_total_limit, args.save_total_limit = args.save_total_limit, None  # for `_finish_checkpoint`

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            may_stop = not state.global_step % updates_per_rollout and state.global_step < state.max_steps
            if may_stop and any_process(self.shutdown.requested, args.device):
                self.stopped = control.should_save = control.should_training_stop = True

        on_evaluate = on_step_end

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            _finish_checkpoint(args, state, self.save_total_limit)

        def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **kwargs: Any) -> None:
            numbers = {name: float(value) for name, value in logs.items() if isinstance(value, int | float)}
            run.log(state.global_step, {**numbers, **extra_metrics()})
            if not args.fp16 and not math.isfinite(numbers.get("grad_norm", 0.0)):
                raise UserError(NOT_FINITE.format(state.global_step, "the gradient"))

    return RunCallback()


def _finish_checkpoint(args: Any, state: Any, save_total_limit: int | None) -> None:
    """Marks the checkpoint that was written as complete, and only then, unlike transformers, removes older ones."""
    from transformers.trainer_utils import rotate_checkpoints

    _barrier()
    if is_main_process():
        write_manifest(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        rotate_checkpoints(args.output_dir, save_total_limit, state.best_model_checkpoint)


def _barrier() -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def load_processor(config: TrainingConfig) -> Any:
    """The model's processor, with images limited as at run time.  Raises UserError where it cannot be loaded."""
    from transformers import AutoProcessor

    folder = hub.resolve(config.model, weights=False)
    with loading(UNLOADABLE.format(config.model)):
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    check_processor(processor, folder, config.model)
    if config.max_pixels is not None:  # as `LocalChat` does
        bound_pixels(processor, config.max_pixels, config.model)
    return processor


def load_model(config: TrainingConfig, **options: Any) -> Any:
    """The model to train, its vision tower frozen as configured.  Raises UserError where it cannot be loaded.

    options: of `load_whole`; with device_map="meta" it is only checked.
    """
    from transformers import AutoModelForImageTextToText

    with loading(UNLOADABLE.format(config.model)):
        folder = hub.resolve(config.model)
        options |= {"dtype": config.dtype, "attn_implementation": config.attention}
        model = load_whole(AutoModelForImageTextToText, folder, **options)
    if config.lora is None:
        freeze_vision(model, config.vision)
    return model


def export_model(trainer: Any, run: Path, config: TrainingConfig) -> Path:
    """Writes `model/`, a plain transformers folder, and `adapter/`; a collective operation.  Returns `model/`."""
    fresh = run / f"{MODEL}.new"
    try:
        _write_model(trainer, run, fresh, config)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if is_main_process():
        fresh.rename(run / MODEL)
    _barrier()
    return run / MODEL


def _write_model(trainer: Any, run: Path, fresh: Path, config: TrainingConfig) -> None:
    saved = fresh if config.lora is None else run / ADAPTER
    trainer.save_model(str(saved))
    _barrier()
    if is_main_process():
        (saved / "training_args.bin").unlink(missing_ok=True)  # it is a pickle
        if config.lora is not None:
            from peft import PeftModel
            from transformers.integrations.deepspeed import unset_hf_deepspeed_config

            unset_hf_deepspeed_config()  # ZeRO-3 would shard the weights while they are loaded
            PeftModel.from_pretrained(load_model(config), str(saved)).merge_and_unload().save_pretrained(fresh)
        load_processor(config.model_copy(update={"max_pixels": None})).save_pretrained(fresh)
        hub.check_folder(fresh)
