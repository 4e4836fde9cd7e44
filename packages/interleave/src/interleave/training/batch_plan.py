"""Batches, steps and calls of a training, before anything is started."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from imgen_common.errors import UserError
from interleave.agents.judge import ModelJudgeConfig
from interleave.training.config import GrpoConfig
from interleave.training.memory import Memory

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Batches:
    """Those of TRL's options that decide on batches; the defaults are TRL's (a test compares)."""

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

    @classmethod
    def of(cls, trl: Mapping[str, Any]) -> "Batches":
        """Those that a `trl:` mapping gives.  Raises UserError for what is no positive number."""
        found = {name: trl[name] for name in cls.__dataclass_fields__ if trl.get(name) is not None}
        for name, value in found.items():
            if name == "save_strategy" or (name == "max_steps" and value == -1):
                continue
            whole = name not in ("num_train_epochs", "save_steps")
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or value <= 0:
                raise UserError(f"trl.{name}: must be a positive {'whole ' if whole else ''}number, got {value!r}")
        return cls(**found)


@dataclass(frozen=True)
class SftSums:
    """Of a supervised training: rows per update over all processes, updates per epoch and in all.

    repeated: rows that come twice in an epoch, to fill the last batch of those with pictures and of those without.
    """

    processes: int
    rows: int
    left_out: int
    repeated: int
    rows_per_update: int
    updates_per_epoch: int
    updates: int

    def told(self) -> list[str]:
        """In words."""
        return [
            f"rows: {self.rows}, {self.left_out} left out for their length, {self.repeated} repeated to fill batches",
            f"an update: {self.rows_per_update} rows over {self.processes} processes",
            f"updates: {self.updates_per_epoch} an epoch, {self.updates} in all",
        ]


def sft_sums(trl: Mapping[str, Any], rows: int, left_out: int, processes: int, pictured: int | None = None) -> SftSums:
    """The arithmetic of TRL's SFTTrainer.  pictured: how many rows have pictures, where not all or none; then batches
    are of one kind, and all epochs are laid out as one."""
    b = Batches.of(trl)
    batch = b.per_device_train_batch_size * processes
    kinds = (rows,) if pictured is None else (pictured, rows - pictured)
    batches = sum(math.ceil(kind / batch) for kind in kinds)
    repeated = 0 if pictured is None else batches * batch - rows
    per_epoch = math.ceil(batches / b.gradient_accumulation_steps)
    updates = math.ceil(b.num_train_epochs * per_epoch)
    if pictured is not None:
        updates = math.ceil(b.num_train_epochs * batches / b.gradient_accumulation_steps)
    if b.max_steps > 0:
        updates = b.max_steps
    per_update = batch * b.gradient_accumulation_steps
    return SftSums(processes, rows, left_out, repeated, per_update, per_epoch, updates)


@dataclass(frozen=True)
class GrpoSums:
    """Of a reinforcement: a rollout is one round of sampling, from which `updates_per_rollout` updates are made.  With
    `reward: trajectory` a completion is a trajectory, with all its answers.

    pictures, judgements: at most, since equal answers to one row are scored once and the caches know others.
    questions: put to the judge's model.
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
    pictures: int
    judgements: int
    questions: int
    cost: float

    def told(self) -> list[str]:
        """In words."""
        group = self.completions_per_rollout // self.prompts_per_rollout
        return [
            f"rows: {self.rows}, {self.left_out} left out for their length; {self.failed_rows} are of failed attempts",
            f"a rollout: {self.prompts_per_rollout} prompts x {group} answers = {self.completions_per_rollout} over "
            f"{self.processes} processes, {self.updates_per_rollout} updates",
            f"an update: {self.completions_per_update} answers to {self.completions_per_update / group:g} prompts",
            f"updates: {self.updates_per_epoch} an epoch; {self.updates} in all, in {self.rollouts} rollouts",
            f"generator: at most {self.pictures} pictures",
            f"judge: at most {self.judgements} judgements, {self.questions} questions to a model",
            f"cost: at most {self.cost:g}",
        ]


def grpo_sums(config: GrpoConfig, rows: int, failed: int, left_out: int, processes: int) -> GrpoSums:
    """The arithmetic of TRL's GRPOTrainer.

    Raises UserError, with the numbers, where groups do not fit into a rollout, rows do not fill one, or a checkpoint
    would fall into the middle of one, from where a run cannot go on exactly.
    """
    b = Batches.of(config.trl)
    per_rollout, prompts, updates_per_rollout = _checked_rollout(b, rows, processes)
    per_epoch = rows // prompts
    updates = b.max_steps if b.max_steps > 0 else math.ceil(b.num_train_epochs * per_epoch * updates_per_rollout)
    rollouts = math.ceil(updates / updates_per_rollout)
    pictures = judgements = math.ceil(rollouts * per_rollout * failed / rows)
    if config.reward == "trajectory":
        judgements = rollouts * per_rollout
        pictures = judgements * (config.max_attempts - 1)
    asked = 2 * config.judge.num_samples if isinstance(config.judge, ModelJudgeConfig) else 0
    return GrpoSums(
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
        pictures=pictures,
        judgements=judgements,
        questions=judgements * asked,
        cost=pictures * config.prices.image + judgements * config.prices.judgement,
    )


def _checked_rollout(b: Batches, rows: int, processes: int) -> tuple[int, int, int]:
    """Answers, prompts and updates of a rollout.  Raises UserError as `grpo_sums` says."""
    per_rollout, steps = _rollout(b, processes)
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
    updates_per_rollout = steps * b.num_iterations // b.gradient_accumulation_steps
    if b.save_strategy == "steps" and b.save_steps % updates_per_rollout:
        raise UserError(
            f"trl.save_steps {b.save_steps}: must be a multiple of the {updates_per_rollout} updates of a rollout, or "
            "a run cannot go on exactly from its checkpoint"
        )
    return per_rollout, prompts, updates_per_rollout


def _rollout(b: Batches, processes: int) -> tuple[int, int]:
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


def as_json(sums: SftSums | GrpoSums, held: Memory) -> dict[str, Any]:
    """Everything `--dry-run` says."""
    return {**asdict(sums), "memory": {**asdict(held), "total": held.total, "peak": held.peak}}
