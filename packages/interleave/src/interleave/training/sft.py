"""Supervised training of planner or critic with TRL's SFTTrainer; the loss is on the answers alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from imgen_common import hub
from imgen_common.errors import UserError, quoted, warn_once
from imgen_common.prompt_limits import check_vocabulary
from imgen_common.run_folder.data import recorded_data
from interleave.agents.parsing import ParseFailure, parse_plan, parse_verdict
from interleave.datasets.rows import SftRow
from interleave.training import run
from interleave.training.batch_plan import SftBatchPlan, TrlBatchOptions, plan_sft_batches
from interleave.training.config import Role, SftConfig
from interleave.training.memory import (
    MemoryEstimate,
    build_inputs,
    build_meta_model,
    check_adapters,
    estimate_memory,
)
from interleave.training.rows import (
    FirstRow,
    build_dataset,
    check_chat_template,
    has_both_kinds,
    image_store,
    order_by_kind,
    read_rows,
    rendered_prompt,
    select_by_length,
    sft_example,
)
from interleave.training.trained_weights import check_trainable
from interleave.training.trl_options import (
    RESERVED_SFT,
    build_lora_config,
    check_arguments,
    check_evaluation,
    check_options,
    check_values,
    refusals_of_trl,
)


@dataclass(frozen=True)
class SftJob:
    """A supervised training run that passed every check.  val_rows: to evaluate on; empty without a `val` file."""

    config: SftConfig
    rows: tuple[SftRow, ...]
    val_rows: tuple[SftRow, ...]
    batch_plan: SftBatchPlan


def check_settings(config: SftConfig) -> None:
    """Checks what needs neither rows nor a model.  Raises UserError."""
    from trl import SFTConfig

    check_options("trl", config.trl, SFTConfig, RESERVED_SFT)
    check_values(config.trl, SFTConfig)
    check_evaluation(config.trl)
    build_lora_config(config)
    TrlBatchOptions.from_trl(config.trl)


def check_sft(role: Role, config: SftConfig, processes: int, *, needs_weights: bool = True) -> SftJob:
    """Checks all that can be checked before the model is loaded.  Raises UserError.

    needs_weights=False: training is only planned, so the files of the model's weights may be missing.
    """
    from trl import SFTConfig

    check_settings(config)
    check_arguments(config.trl, SFTConfig, processes)
    hub.resolve(config.model, weights=needs_weights)
    model = run.load_model(config, device_map="meta") if needs_weights else build_meta_model(config)
    name = f"{role}_sft"
    folder = Path(config.data)
    has_val = (folder / f"{name}.val.jsonl").exists()
    rows = read_rows(folder, name, SftRow, reasoning=config.reasoning)
    val = read_rows(folder, f"{name}.val", SftRow, reasoning=config.reasoning) if has_val else []
    if run.is_main_process():
        warn_of_unreadable_answers(role, rows, config)
    processor = run.load_processor(config)
    check_vocabulary(processor.tokenizer, model, config.model)
    check_adapters(config, has_images=any(row.image_ids for row in rows))
    check_chat_template(processor, rows[0])
    store = image_store(config)
    kept = [rows[i] for i in select_by_length(rows, processor, store, config.max_length)]
    kept_val = [val[i] for i in select_by_length(val, processor, store, config.max_length)] if val else []
    evaluated = "eval_strategy" if config.trl.get("eval_strategy", "no") != "no" else "eval_on_start"
    if config.trl.get(evaluated) and not kept_val:
        raise UserError(
            f"trl.{evaluated}: {folder / f'{name}.val.jsonl'} is missing; build a set that has it, or remove the key"
        )
    if has_both_kinds(kept) and "epoch" in (config.trl.get("save_strategy"), config.trl.get("eval_strategy")):
        raise UserError("trl: a strategy of `epoch` needs rows that all have images or rows without any; use `steps`")
    num_with_images = sum(bool(row.image_ids) for row in kept) if has_both_kinds(kept) else None
    batch_plan = plan_sft_batches(config.trl, len(kept), len(rows) - len(kept), processes, num_with_images)
    return SftJob(config, tuple(kept), tuple(kept_val), batch_plan)


def warn_of_unreadable_answers(role: Role, rows: Sequence[SftRow], config: SftConfig) -> None:
    """Says once how many answers an agent that learned them could not use, as they cannot be read at run time."""
    parse = parse_plan if role == "planner" else parse_verdict
    answers = [parse(row.completion, "strict" if config.reasoning else "direct") for row in rows]
    found = [(i, answer.reason) for i, answer in enumerate(answers) if isinstance(answer, ParseFailure)]
    if found:
        (row, reason), of = found[0], f"{len(found)} of {len(rows)}"
        warn_once(
            f"{config.data}: {of} answers cannot be read as those of a {role} (first in row {row + 1}: {reason}); "
            "interleave data check names all"
        )


def plan_sft(role: Role, config: SftConfig, processes: int) -> tuple[SftBatchPlan, MemoryEstimate, FirstRow]:
    """The batches and the memory of a training run, and its first row as the model reads it; nothing is started."""
    job = check_sft(role, config, processes, needs_weights=False)
    batch = TrlBatchOptions.from_trl(config.trl).per_device_train_batch_size
    processor = run.load_processor(config)
    inputs = build_inputs(job.rows, processor, image_store(config), batch)
    first = FirstRow(rendered_prompt(processor, job.rows[0]), job.rows[0].completion)
    return job.batch_plan, estimate_memory(config, processes, inputs), first


def trained_agent(folder: Path) -> str | None:
    """The agent that a run of `train_sft` trains; None for another run, and one of an earlier version."""
    return next((role for role in get_args(Role) if f"{role}_sft" in recorded_data(folder)), None)


def train_sft(
    role: Role,
    config: SftConfig,
    command: Sequence[str],
    *,
    runs: Path = Path("runs"),
    name: str | None = None,
    resume: Path | None = None,
    callbacks: Sequence[Any] = (),
) -> Path:
    """Trains, or resumes the run in `resume`; returns the folder of the trained model.  Raises UserError."""
    if resume is not None and (trained := trained_agent(resume)) not in (None, role):
        raise UserError(
            f"{resume}: trains the {trained}; resume it with interleave sft {trained} --resume {quoted(resume)}"
        )
    run.prepare_environment()
    from trl import SFTConfig

    job = check_sft(role, config, run.num_processes(f"interleave sft {role}"))
    # rows that are too long were dropped, so TRL must not truncate; mixed rows come in an order that TRL must keep
    fixed: dict[str, Any] = {"max_length": None}
    if has_both_kinds(job.rows):
        fixed |= {"train_sampling_strategy": "sequential", "num_train_epochs": 1}
    arguments = run.build_arguments(SFTConfig, config, fixed)
    opened = run.open_run(config, arguments, command, runs=runs, name=name, default_name=f"sft_{role}", resume=resume)
    with opened as (run_folder, checkpoint), run.message_how_to_continue(run_folder, f"sft {role}"):
        rows = {f"{role}_sft": job.rows, f"{role}_sft.val": job.val_rows}
        run.bind_data(run_folder, {"model": config.model}, rows)
        callback = run.build_run_callback(run_folder)
        trainer = _build_trainer(job, arguments, [callback, *callbacks])
        check_trainable(trainer.model, config.vision)
        # Qwen3-VL's own loss takes no number of tokens, but TRL's loss, which is used here, does: without it the mean
        # would be taken over micro-batches and processes, and depend on how the rows are distributed.
        trainer.model_accepts_loss_kwargs = True
        run.run_training(trainer, callback, checkpoint)
        return run.export_model(trainer, run_folder.path, config)


@refusals_of_trl()
def _build_trainer(job: SftJob, arguments: Any, callbacks: Sequence[Any]) -> Any:
    from trl import SFTTrainer

    batch = arguments.per_device_eval_batch_size
    return SFTTrainer(
        model=run.load_model(job.config),
        args=arguments,
        train_dataset=build_train_dataset(job),
        eval_dataset=_build_dataset(job, job.val_rows, batch) if job.val_rows else None,
        processing_class=run.load_processor(job.config),
        peft_config=build_lora_config(job.config),
        callbacks=list(callbacks),
    )


def build_train_dataset(job: SftJob) -> Any:
    """The dataset; that of a mixed set holds all epochs, in batches of one kind.

    Raises UserError if a mixed set is to be trained on for a fraction of an epoch.
    """
    b = TrlBatchOptions.from_trl(job.config.trl)
    epochs = b.num_train_epochs
    if b.max_steps > 0:
        epochs = math.ceil(b.max_steps * job.batch_plan.rows_per_update / len(job.rows))
    if has_both_kinds(job.rows) and epochs != int(epochs):
        raise UserError(
            f"trl.num_train_epochs {epochs}: must be whole where some rows have images and others none; or give "
            "trl.max_steps"
        )
    return _build_dataset(job, job.rows, b.per_device_train_batch_size, int(epochs), job.config.seed)


def _build_dataset(job: SftJob, rows: Sequence[SftRow], batch: int, epochs: int = 1, seed: int | None = None) -> Any:
    """The dataset of `rows` in their order, or of a mixed set as `order_by_kind` says."""
    order = list(range(len(rows)))
    if has_both_kinds(rows):
        order = order_by_kind([bool(row.image_ids) for row in rows], batch * job.batch_plan.processes, epochs, seed)
    return build_dataset(order, lambda n, load: sft_example(rows[n], load), image_store(job.config))
