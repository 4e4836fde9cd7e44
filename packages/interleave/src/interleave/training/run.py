"""What both trainings need around TRL's trainer: its options, processes, run folder, model, resuming, the final folder.

config.yaml  environment.json  metrics.jsonl  tensorboard/
checkpoints/checkpoint-N/       TRL's, with a mark on those that are whole
adapter/                        with LoRA: the adapter alone
model/                          the trained model, for `chat.ref`
"""

import contextlib
import importlib.util
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imgen_common import hub
from imgen_common.console import quiet_libraries
from imgen_common.distributed import check_launcher
from imgen_common.errors import UserError
from imgen_common.files import write_atomic
from imgen_common.run_folder.find import free_path
from imgen_common.run_folder.folder import RunFolder
from interleave.training.config import TrainingConfig
from interleave.training.memory import zero_of
from interleave.training.rows import sized
from interleave.training.trl_options import lora_config
from interleave.training.vision import check_frozen, freeze

CHECKPOINTS, MODEL, ADAPTER, WHOLE = "checkpoints", "model", "adapter", "whole"
MAY_DIFFER = (
    *("trl.logging_steps", "trl.save_total_limit", "trl.dataloader_num_workers", "trl.report_to", "trl.disable_tqdm"),
    *("cache", "prices", "scorer.concurrency", "scorer.deadline", "scorer.ceiling", "scorer.window"),
    *("generator.urls", "generator.url", "generator.calls", "judge.model.url", "judge.model.calls"),
)
"""What may change between the sessions of a run: nothing that its weights depend on."""
OURS = {
    "DEEPSPEED": "trl.deepspeed=configs/interleave/deepspeed/zero2.json (or zero3.json)",
    "FSDP": "trl.fsdp=true, or with configs/interleave/fsdp/fsdp2.yaml after the recipe",
}
"""Settings that cut up weights, by what accelerate calls it."""
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Session:
    """One training on every process: what it is to do, and where.  checkpoint: from where it goes on."""

    run: RunFolder
    arguments: Any
    checkpoint: Path | None

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.run.path


def quiet_environment() -> None:
    """Before TRL is imported: it reports nothing to anybody, and DeepSpeed knows whether there is a GPU."""
    import torch

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    quiet_libraries()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def make_arguments(cls: type[Any], config: TrainingConfig, fixed: Mapping[str, Any]) -> Any:
    """TRL's options: `fixed`, what the machine asks for, and the user's over it.  Raises UserError for a bad value."""
    import torch

    options: dict[str, Any] = {"seed": config.seed, "remove_unused_columns": False, "output_dir": CHECKPOINTS}
    if not torch.cuda.is_available():
        options |= {"use_cpu": True, "bf16": False, "dataloader_pin_memory": False}
    options |= {**config.trl, **fixed}
    check_zero(config.trl)
    if options.get("use_vllm") and importlib.util.find_spec("vllm") is None:
        raise UserError("trl.use_vllm: vllm is not installed; install the extra `vllm` of interleave, or leave it out")
    try:
        arguments = cls(**options)
    except (TypeError, ValueError, ImportError, OSError) as error:
        raise UserError(f"trl: {' '.join(str(error).split())}") from error
    check_fsdp(arguments)
    if arguments.deepspeed is not None and arguments.use_cpu:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")  # ZeRO-3 cuts weights up as they are loaded
    return arguments


def check_zero(trl: Mapping[str, Any]) -> None:
    """Raises UserError if ZeRO-3 could train a model but not write it."""
    zero = zero_of(trl)
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise UserError("trl.deepspeed: ZeRO-3 needs zero_optimization.stage3_gather_16bit_weights_on_model_save: true")


def check_fsdp(arguments: Any) -> None:
    """Raises UserError if weights would silently not be shared out."""
    from accelerate.utils import DistributedType

    if arguments.fsdp and arguments.distributed_state.distributed_type in (
        DistributedType.NO,
        DistributedType.MULTI_CPU,
    ):
        raise UserError(
            "trl.fsdp: accelerate shares out no weights on a CPU or with one process; use several GPUs, or leave it out"
        )


def num_processes(command: str) -> int:
    """How many processes were launched.  command: what was, as "interleave grpo".  Raises UserError if the launcher
    did not do what was asked of it, or would do what `trl` is asked for."""
    check_launcher(os.environ, command, OURS)
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the first process."""
    return int(os.environ.get("RANK", "0")) == 0


def agreed(work: Callable[[], str]) -> str:
    """What `work` gives on the main process, on all; a UserError of its is raised on all."""
    import torch.distributed as dist

    answer = ["", ""]
    if is_main():
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
def session(
    config: TrainingConfig,
    arguments: Any,
    command: Sequence[str],
    *,
    runs: Path,
    name: str | None,
    otherwise: str,
    resume: Path | None,
) -> Iterator[Session]:
    """The run folder, new or resumed, on every process.

    otherwise: name of a new run where none is given.  Raises UserError if it cannot be had or is finished.
    """
    _ = arguments.device  # joins the process group
    opened: list[RunFolder] = []

    def work() -> str:
        path = resume or free_path(runs, name, otherwise)
        if resume is None:
            opened.append(RunFolder.create(path, config, command))
        else:
            if (path / MODEL).exists():
                raise UserError(f"{path}: finished already; its model is {path / MODEL}")
            opened.append(RunFolder.open(path, config, command, may_differ=MAY_DIFFER))
            discard_torn(path / CHECKPOINTS)
        return str(path)

    try:
        path = Path(agreed(work))
        run = opened[0] if opened else RunFolder.open(path, is_main=False)
        arguments.output_dir = str(path / CHECKPOINTS)
        checkpoint = last_whole(path / CHECKPOINTS)
        run.rewind(int(checkpoint.name.partition("-")[2]) if checkpoint else 0)
        yield Session(run, arguments, checkpoint)
    finally:
        for run in opened:
            run.close()


# --- checkpoints -----------------------------------------------------------------------------------------------------


def _checkpoints(folder: Path) -> list[Path]:
    found = [entry for entry in folder.iterdir() if CHECKPOINT.fullmatch(entry.name)] if folder.is_dir() else []
    return sorted(found, key=lambda entry: int(entry.name.partition("-")[2]))


def last_whole(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    return next((entry for entry in reversed(_checkpoints(folder)) if (entry / WHOLE).exists()), None)


def discard_torn(folder: Path) -> None:
    """Remove checkpoints that a kill left unfinished."""
    for entry in _checkpoints(folder):
        if not (entry / WHOLE).exists():
            shutil.rmtree(entry)


def make_keeper(run: RunFolder, extra: Callable[[], Mapping[str, float]] = dict) -> Any:
    """A callback that marks whole checkpoints and writes every logged number, and those of `extra`, to the run."""
    from transformers import TrainerCallback

    class Keeper(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            _barrier()
            if is_main():
                write_atomic(Path(args.output_dir) / f"checkpoint-{state.global_step}" / WHOLE, "")

        def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **kwargs: Any) -> None:
            numbers = {name: float(value) for name, value in logs.items() if isinstance(value, int | float)}
            run.log(state.global_step, {**numbers, **extra()})

    return Keeper()


def _barrier() -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()


# --- models ----------------------------------------------------------------------------------------------------------


def load_processor(config: TrainingConfig) -> Any:
    """The model's processor, with pictures limited as at run time.  Raises UserError where it cannot be had."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(hub.resolve(config.model, weights=False), local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _no_model(config.model, error) from error
    return sized(processor, config.max_pixels)


def load_model(config: TrainingConfig) -> Any:
    """The model to train, its vision tower frozen as asked.  Raises UserError where it cannot be had."""
    import torch
    from transformers import AutoModelForImageTextToText

    dtype = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            hub.resolve(config.model),
            local_files_only=True,
            use_safetensors=True,
            dtype=dtype,
            attn_implementation=config.attention,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _no_model(config.model, error) from error
    if config.lora is None:
        freeze(model, config.vision)
    return model


def _no_model(ref: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300]
    return UserError(f"{ref}: not a vision-language model that can be loaded ({reason})")


def adapter_of(config: TrainingConfig) -> Any:
    """peft's configuration; None without `lora`."""
    return None if config.lora is None else lora_config(config.lora, config.vision)


def check_trained(trainer: Any, config: TrainingConfig) -> None:
    """Raises RuntimeError if a weight is about to be trained that must not be, or none is."""
    trained = [name for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    if not trained:
        raise RuntimeError("no weights would be trained")
    check_frozen(trained, "frozen" if config.lora is not None and config.vision == "frozen" else config.vision)


def export(trainer: Any, at: Session, config: TrainingConfig) -> Path:
    """Write `model/` (and `adapter/`): a plain transformers folder, by all processes together."""
    fresh = at.path / (ADAPTER if config.lora is not None else f"{MODEL}.new")
    trainer.save_model(str(fresh))
    _barrier()
    if is_main():
        (fresh / "training_args.bin").unlink(missing_ok=True)  # a pickle
        if config.lora is not None:
            fresh = _merged(config, fresh, at.path / f"{MODEL}.new")
        load_processor(config.model_copy(update={"max_pixels": None})).save_pretrained(fresh)
        hub.check_folder(fresh)
        fresh.rename(at.path / MODEL)
    _barrier()
    return at.path / MODEL


def _merged(config: TrainingConfig, adapter: Path, target: Path) -> Path:
    """The model with its adapter added to the weights, on the CPU."""
    from peft import PeftModel
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # under ZeRO-3 weights would be cut up as they are loaded
    model = PeftModel.from_pretrained(load_model(config), str(adapter))
    model.merge_and_unload().save_pretrained(target)
    return target


def epochs_of(trl: Mapping[str, Any], default: float, rows: int, rows_per_update: int) -> int:
    """How many passes a training makes at most.  Raises UserError unless it is a whole number."""
    steps = trl.get("max_steps", -1)
    if steps > 0:
        return math.ceil(steps * rows_per_update / rows)
    epochs = trl.get("num_train_epochs", default)
    if epochs != int(epochs):
        raise UserError(
            f"trl.num_train_epochs {epochs}: must be whole where some rows have pictures and others none; or give "
            "trl.max_steps"
        )
    return int(epochs)
