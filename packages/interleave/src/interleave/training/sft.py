"""Supervised training of planner or critic by TRL's SFTTrainer, on the answers alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imgen_common import hub
from imgen_common.errors import UserError
from interleave.datasets.rows import SftRow
from interleave.storage.images import IMAGES, ImageStore
from interleave.training import run
from interleave.training.batch_plan import Batches, SftSums, sft_sums
from interleave.training.config import Role, SftConfig
from interleave.training.memory import Memory, memory_of
from interleave.training.rows import (
    arranged,
    check_template,
    dataset,
    is_mixed,
    longest,
    read_rows,
    sft_item,
    short_enough,
)
from interleave.training.trl_options import OWNED_SFT, check_trl


@dataclass(frozen=True)
class SftJob:
    """A supervised training that passed every check.  val_rows: to evaluate on, none where the set has no split."""

    config: SftConfig
    role: Role
    rows: tuple[SftRow, ...]
    val_rows: tuple[SftRow, ...]
    sums: SftSums

    @property
    def pictures(self) -> ImageStore:
        """Where the rows' pictures are."""
        return ImageStore(Path(self.config.data) / IMAGES)


def check(role: Role, config: SftConfig, processes: int, *, here: bool = True) -> SftJob:
    """Everything that can be found wrong before a model is loaded.  Raises UserError.

    here=False: the training is only planned; the model's weights may be missing.
    """
    from trl import SFTConfig

    check_trl(config.trl, SFTConfig, OWNED_SFT)
    run.adapter_of(config)
    Batches.of(config.trl)
    hub.resolve(config.model, weights=here)
    name = f"{role}_sft"
    folder = Path(config.data)
    rows = read_rows(folder, name, SftRow)
    val = read_rows(folder, f"{name}.val", SftRow) if (folder / f"{name}.val.jsonl").exists() else []
    processor = run.load_processor(config)
    check_template(processor, rows[0])
    store = ImageStore(folder / IMAGES)
    kept = [rows[i] for i in short_enough(rows, processor, store, config.max_length)]
    kept_val = [val[i] for i in short_enough(val, processor, store, config.max_length)] if val else []
    if config.trl.get("eval_strategy", "no") != "no" and not kept_val:
        raise UserError(f"trl.eval_strategy: {folder / f'{name}.val.jsonl'} is missing; make it or leave this out")
    if is_mixed(kept) and "epoch" in (config.trl.get("save_strategy"), config.trl.get("eval_strategy")):
        raise UserError("trl: a strategy of `epoch` needs rows that all have pictures, or none; use `steps`")
    pictured = sum(bool(row.image_ids) for row in kept) if is_mixed(kept) else None
    sums = sft_sums(config.trl, len(kept), len(rows) - len(kept), processes, pictured)
    return SftJob(config, role, tuple(kept), tuple(kept_val), sums)


def plan(role: Role, config: SftConfig, processes: int) -> tuple[SftSums, Memory]:
    """What a training would do and hold; nothing is started."""
    from interleave.training.memory import inputs_of

    job = check(role, config, processes, here=False)
    processor = run.load_processor(config)
    row = longest(job.rows, processor, job.pictures)
    batch = Batches.of(config.trl).per_device_train_batch_size
    inputs = inputs_of(row, processor, job.pictures, batch, more=0)
    return job.sums, memory_of(config, hub.resolve(config.model, weights=False), processes, inputs, kept=0)


def train(
    role: Role,
    config: SftConfig,
    command: Sequence[str],
    *,
    runs: Path = Path("runs"),
    name: str | None = None,
    resume: Path | None = None,
    callbacks: Sequence[Any] = (),
) -> Path:
    """Train, or go on with the run in `resume`; the folder of the trained model.  Raises UserError."""
    run.quiet_environment()
    from trl import SFTConfig, SFTTrainer

    job = check(role, config, run.num_processes(f"interleave sft {role}"))
    fixed: dict[str, Any] = {"max_length": None}
    if is_mixed(job.rows):
        fixed |= {"train_sampling_strategy": "sequential", "num_train_epochs": 1}
    arguments = run.make_arguments(SFTConfig, config, fixed)
    with run.session(config, arguments, command, runs=runs, name=name, otherwise=f"sft_{role}", resume=resume) as at:
        trainer = SFTTrainer(
            model=run.load_model(config),
            args=arguments,
            train_dataset=train_rows(job),
            eval_dataset=eval_rows(job) if job.val_rows else None,
            processing_class=run.load_processor(config),
            peft_config=run.adapter_of(config),
            callbacks=[run.make_keeper(at.run), *callbacks],
        )
        run.check_trained(trainer, config)
        # Qwen3-VL's own loss takes no count of tokens, but TRL's, which is used, does: without it the mean would be
        # over micro-batches and processes, and depend on how rows are shared out.
        trainer.model_accepts_loss_kwargs = True
        trainer.train(resume_from_checkpoint=str(at.checkpoint) if at.checkpoint else None)
        return run.export(trainer, at, config)


def train_rows(job: SftJob) -> Any:
    """The dataset; of a mixed set all passes are laid out, in batches of one kind."""
    order = list(range(len(job.rows)))
    if is_mixed(job.rows):
        b = Batches.of(job.config.trl)
        batch = b.per_device_train_batch_size * job.sums.processes
        epochs = run.epochs_of(job.config.trl, b.num_train_epochs, len(order), job.sums.rows_per_update)
        order = arranged([bool(row.image_ids) for row in job.rows], batch, epochs, job.config.seed)
    return _dataset(job, job.rows, order)


def eval_rows(job: SftJob) -> Any:
    """The dataset to evaluate on."""
    batch = job.config.trl.get("per_device_eval_batch_size", 8) * job.sums.processes
    order = list(range(len(job.val_rows)))
    if is_mixed(job.val_rows):
        order = arranged([bool(row.image_ids) for row in job.val_rows], batch, 1, None)
    return _dataset(job, job.val_rows, order)


def _dataset(job: SftJob, rows: Sequence[SftRow], order: Sequence[int]) -> Any:
    return dataset(order, lambda n: rows[n].image_ids, lambda n, pictures: sft_item(rows[n], pictures), job.pictures)
