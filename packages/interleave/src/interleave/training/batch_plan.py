"""Batches, updates and calls of a training run, computed before anything is started."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from imgen_common.errors import UserError
from interleave.agents.judge import ModelJudgeConfig
from interleave.training.config import GrpoConfig


@dataclass(frozen=True)
class TrlBatchOptions:
    """The options of TRL that decide about batches; the defaults are TRL's (a test compares them)."""

    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    num_train_epochs: float = 3.0
    max_steps: int = -1
    save_strategy: str = "steps"
    save_steps: float = 500
    num_generations: int = 8
    num_iterations: int = 1
    steps_per_generation: int | None = None
    generation_batch_size: int | None = None
    max_completion_length: int | None = 512
    dataloader_drop_last: bool = False

    @classmethod
    def from_trl(cls, trl: Mapping[str, Any]) -> "TrlBatchOptions":
        """The options of a `trl:` mapping.  Raises UserError for a value that is no positive number."""
        found = {name: trl[name] for name in cls.__dataclass_fields__ if trl.get(name) is not None}
        for name, value in found.items():
            if name in ("save_strategy", "dataloader_drop_last") or (name == "max_steps" and value == -1):
                continue
            whole = name not in ("num_train_epochs", "save_steps")
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or value <= 0:
                raise UserError(f"trl.{name}: must be a positive {'whole ' if whole else ''}number, got {value!r}")
        return cls(**found)


@dataclass(frozen=True)
class SftBatchPlan:
    """Batches of supervised training: rows per update over all processes, updates per epoch and in total.

    left_out: rows longer than `max_length`.  repeated: rows that come twice in an epoch, to fill the last batch of rows
    with images and the last one of rows without.
    """

    processes: int
    rows: int
    left_out: int
    repeated: int
    rows_per_update: int
    updates_per_epoch: int
    updates: int

    def lines(self) -> list[str]:
        """Sentences for a terminal."""
        return [
            f"rows: {self.rows}; {self.left_out} too long and dropped, {self.repeated} repeated to fill batches",
            f"one update: {self.rows_per_update} rows over {self.processes} processes",
            f"updates: {self.updates_per_epoch} per epoch, {self.updates} in total",
        ]


def plan_sft_batches(
    trl: Mapping[str, Any], rows: int, left_out: int, processes: int, num_with_images: int | None = None
) -> SftBatchPlan:
    """The batches of TRL's SFTTrainer.

    num_with_images: how many rows have images, where neither all nor none have; then each batch is of one kind, and
    all epochs are laid out as one.  Raises UserError where rows that do not fill a batch are all that there are, and
    they are to be dropped.
    """
    b = TrlBatchOptions.from_trl(trl)
    batch = b.per_device_train_batch_size * processes
    kinds = (rows,) if num_with_images is None else (num_with_images, rows - num_with_images)
    drops = b.dataloader_drop_last and num_with_images is None  # batches of one kind are filled
    batches = rows // batch if drops else sum(math.ceil(kind / batch) for kind in kinds)
    if not batches:
        raise UserError(f"{rows} rows do not fill a batch of {batch}; give more, or leave out trl.dataloader_drop_last")
    repeated = 0 if num_with_images is None else batches * batch - rows
    per_epoch = math.ceil(batches / b.gradient_accumulation_steps)
    if b.max_steps > 0:
        updates = b.max_steps
    elif num_with_images is None:
        updates = math.ceil(b.num_train_epochs * per_epoch)
    else:
        updates = math.ceil(b.num_train_epochs * batches / b.gradient_accumulation_steps)
    per_update = batch * b.gradient_accumulation_steps
    return SftBatchPlan(processes, rows, left_out, repeated, per_update, per_epoch, updates)


@dataclass(frozen=True)
class GrpoBatchPlan:
    """Batches of reinforcement learning: a rollout is one round of sampling, used for `updates_per_rollout` updates.

    With `reward: trajectory` a completion is a trajectory with all its answers.  images, judgments: upper bounds, since
    equal answers to one row are scored once and the caches hold others.  questions: sent to the judge's model.
    """

    processes: int
    rows: int
    left_out: int
    failed_rows: int
    prompts_per_rollout: int
    completions_per_rollout: int
    completions_per_update: int
    updates_per_rollout: int
    updates_per_epoch: int
    rollouts: int
    updates: int
    images: int
    judgments: int
    questions: int
    cost: float

    def lines(self) -> list[str]:
        """Sentences for a terminal."""
        group = self.completions_per_rollout // self.prompts_per_rollout
        return [
            f"rows: {self.rows}; {self.left_out} too long and dropped, {self.failed_rows} of failed attempts",
            f"one rollout: {self.prompts_per_rollout} prompts x {group} answers = {self.completions_per_rollout} over "
            f"{self.processes} processes, {self.updates_per_rollout} updates",
            f"one update: {self.completions_per_update} answers to {self.completions_per_update / group:g} prompts",
            f"updates: {self.updates_per_epoch} per epoch, {self.updates} in total, in {self.rollouts} rollouts",
            f"generator: at most {self.images} images",
            f"judge: at most {self.judgments} judgments, {self.questions} questions to a model",
            f"cost: at most {self.cost:g}",
        ]


def plan_grpo_batches(config: GrpoConfig, rows: int, failed: int, left_out: int, processes: int) -> GrpoBatchPlan:
    """The batches of TRL's GRPOTrainer.

    Raises UserError, with the numbers, where groups do not fit into a rollout, rows do not fill one, or a checkpoint
    would fall into the middle of one, from which a run cannot resume exactly.
    """
    b = TrlBatchOptions.from_trl(config.trl)
    per_rollout, prompts, updates_per_rollout = _check_rollout(b, rows, processes)
    per_epoch = rows // prompts
    updates = b.max_steps if b.max_steps > 0 else math.ceil(b.num_train_epochs * per_epoch * updates_per_rollout)
    _check_saving(b, updates, per_epoch, updates_per_rollout)
    rollouts = math.ceil(updates / updates_per_rollout)
    images = judgments = math.ceil(rollouts * per_rollout * failed / rows)
    if config.reward == "trajectory":
        judgments = rollouts * per_rollout
        images = judgments * (config.max_attempts - 1)
    asked = 2 * config.judge.num_samples if isinstance(config.judge, ModelJudgeConfig) else 0
    return GrpoBatchPlan(
        processes=processes,
        rows=rows,
        left_out=left_out,
        failed_rows=failed,
        prompts_per_rollout=prompts,
        completions_per_rollout=per_rollout,
        completions_per_update=processes * b.per_device_train_batch_size * b.gradient_accumulation_steps,
        updates_per_rollout=updates_per_rollout,
        updates_per_epoch=per_epoch * updates_per_rollout,
        rollouts=rollouts,
        updates=updates,
        images=images,
        judgments=judgments,
        questions=judgments * asked,
        cost=images * config.prices.image + judgments * config.prices.judgment,
    )


def _check_rollout(b: TrlBatchOptions, rows: int, processes: int) -> tuple[int, int, int]:
    """Answers, prompts and updates of a rollout.  Raises UserError as `plan_grpo_batches` says."""
    per_rollout, steps = _rollout_size(b, processes)
    if b.num_generations < 2:
        raise UserError(f"trl.num_generations {b.num_generations}: a group needs at least 2 answers")
    if per_rollout % b.num_generations:
        raise UserError(
            f"trl.num_generations {b.num_generations}: does not divide the answers of a rollout, {processes} processes "
            f"x {b.per_device_train_batch_size} per_device_train_batch_size x {steps} steps_per_generation = "
            f"{per_rollout}; change one of them"
        )
    prompts = per_rollout // b.num_generations
    if rows < prompts:
        raise UserError(
            f"{rows} rows do not fill a rollout of {prompts} prompts ({per_rollout} answers / {b.num_generations} "
            "num_generations); give more rows or a smaller rollout"
        )
    if steps * b.num_iterations % b.gradient_accumulation_steps:
        raise UserError(
            f"trl.gradient_accumulation_steps {b.gradient_accumulation_steps}: does not divide the steps of a rollout, "
            f"{steps} steps_per_generation x {b.num_iterations} num_iterations = {steps * b.num_iterations}"
        )
    return per_rollout, prompts, steps * b.num_iterations // b.gradient_accumulation_steps


def _check_saving(b: TrlBatchOptions, updates: int, per_epoch: int, updates_per_rollout: int) -> None:
    """Raises UserError where nothing is saved in time, or a checkpoint would fall into the middle of a rollout.

    Below 1, `save_steps` is a share of the updates."""
    if b.save_strategy == "best" or (b.save_strategy == "epoch" and updates > per_epoch * updates_per_rollout):
        why = "nothing is evaluated" if b.save_strategy == "best" else "all passes count as one epoch"
        raise UserError(f"trl.save_strategy: {b.save_strategy}: {why}, so nothing would be saved in time; use steps")
    every = math.ceil(updates * b.save_steps) if b.save_steps < 1 else b.save_steps
    if b.save_strategy == "steps" and every % updates_per_rollout:
        raise UserError(
            f"trl.save_steps {b.save_steps}: must be a multiple of the {updates_per_rollout} updates of a rollout, or "
            "a run cannot resume exactly from its checkpoint"
        )


def _rollout_size(b: TrlBatchOptions, processes: int) -> tuple[int, int]:
    """Answers of a rollout, and its micro-batches on each process."""
    micro = processes * b.per_device_train_batch_size
    if b.generation_batch_size is None:
        steps = b.steps_per_generation or b.gradient_accumulation_steps
        return micro * steps, steps
    if b.steps_per_generation is not None:
        raise UserError("trl.generation_batch_size and trl.steps_per_generation: give one of the two")
    if b.generation_batch_size % micro:
        raise UserError(
            f"trl.generation_batch_size {b.generation_batch_size}: must be a multiple of {processes} processes x "
            f"{b.per_device_train_batch_size} per_device_train_batch_size = {micro}"
        )
    return b.generation_batch_size, b.generation_batch_size // micro
