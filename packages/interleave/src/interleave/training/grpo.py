"""Reinforcement of the critic by TRL's GRPOTrainer: one answer to one recorded attempt, rewarded by what it leads to.

Generator, judge and scorer live on an event loop of their own thread, so that they can be tried before the model is
loaded and closed after it is trained.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imgen_common import hub
from imgen_common.errors import UserError
from imgen_common.streams import numpy_generator
from interleave.agents.prompts import Template, load_template
from interleave.datasets.rows import RlRow
from interleave.protocols import Generator, Judge
from interleave.storage.images import IMAGES, ImageStore
from interleave.training import run
from interleave.training.batch_plan import Batches, GrpoSums, grpo_sums
from interleave.training.config import GrpoConfig
from interleave.training.environment import as_caller
from interleave.training.memory import Memory, memory_of, zero_of
from interleave.training.reward import PAPER_WEIGHTS, WEIGHTS
from interleave.training.rows import GrpoJob, critic_prompt, dataset, grpo_item, longest, read_rows, short_enough
from interleave.training.scoring import (
    ScoringThread,
    build_scoring_parts,
    check_image_tokens,
    scoring_callback,
    scoring_thread,
)
from interleave.training.trl_options import OWNED_GRPO, check_keys, check_trl

REWARD_WEIGHTS: Mapping[str, Mapping[str, float]] = {
    "released": WEIGHTS,
    "paper": PAPER_WEIGHTS,
    "trajectory": {"trajectory": 1.0},
}
"""Parts of a reward by the key `reward`, and their weights."""


def check(config: GrpoConfig, processes: int, *, here: bool = True) -> GrpoJob:
    """Everything that can be found wrong before a model is loaded.  Raises UserError.

    here=False: the training is only planned; the model's weights may be missing.
    """
    from trl import GRPOConfig

    check_trl(config.trl, GRPOConfig, OWNED_GRPO)
    weights_of(config)
    run.adapter_of(config)
    refuse_unequal_turns(config, processes)
    hub.resolve(config.model, weights=here)
    found = check_template(config.template)
    rows = read_rows(Path(config.data), "critic_rl", RlRow)
    prompts = [critic_prompt(row, found) for row in rows]
    store = ImageStore(Path(config.data) / IMAGES)
    answer = config.trl.get("max_completion_length") or 512
    kept = short_enough(prompts, run.load_processor(config), store, config.max_length, answer)
    if config.trl.get("use_vllm") and config.max_pixels is not None:
        refuse_resized(rows, store, config.max_pixels)
    failed = sum(not rows[i].evaluation.success for i in kept)
    sums = grpo_sums(config, len(kept), failed, len(rows) - len(kept), processes)
    return GrpoJob(config, tuple(rows[i] for i in kept), tuple(prompts[i] for i in kept), sums)


def weights_of(config: GrpoConfig) -> dict[str, float]:
    """Weights of the parts of the reward, in the order of its functions.  Raises UserError for a part it has not."""
    own = REWARD_WEIGHTS[config.reward]
    check_keys("reward_weights", config.reward_weights, set(own), f"reward: {config.reward}")
    weights = {**own, **config.reward_weights}
    if not any(weights.values()):
        raise UserError("reward_weights: all are 0, so that no answer is better than another; raise one")
    return weights


def check_template(ref: str) -> Template:
    """The template.  Raises UserError if it shows more than a row of a single step holds."""
    found = load_template(ref)
    for name in sorted(found.placeholders & {"story", "request"}):
        raise UserError(f"template {found.name}: {{{name}}} is not in rows of single steps; use another template")
    return found


def refuse_resized(rows: Sequence[RlRow], store: ImageStore, max_pixels: int) -> None:
    """Raises UserError for pictures above `max_pixels`: vLLM sizes by the model's own processor, which knows no such
    limit."""
    for image_id in {i for row in rows for i in (row.before_id, row.after_id)}:
        width, height = store.get(image_id).image.size
        if width * height > max_pixels:
            raise UserError(
                f"picture {image_id[:12]}...: {width}x{height} is more than max_pixels {max_pixels}, and vLLM would "
                "not scale it down; scale the set's pictures, or generate without trl.use_vllm"
            )


def refuse_unequal_turns(config: GrpoConfig, processes: int) -> None:
    """Raises UserError for trajectories where every process would have to wait for all others in every turn."""
    waits = {
        "ZeRO-3": zero_of(config.trl).get("stage") == 3,
        "FSDP": config.trl.get("fsdp"),
        "vLLM": config.trl.get("use_vllm"),
    }
    found = [name for name, is_on in waits.items() if is_on]
    if config.reward == "trajectory" and processes > 1 and found:
        raise UserError(
            f"reward: trajectory: processes differ in how many turns they take, so that {found[0]} would hang; "
            "use ZeRO-2 or no sharding, without vLLM, or one process"
        )


def plan(config: GrpoConfig, processes: int) -> tuple[GrpoSums, Memory]:
    """What a training would do, cost and hold; nothing is started."""
    from interleave.training.memory import inputs_of

    job = check(config, processes, here=False)
    processor, b = run.load_processor(config), Batches.of(config.trl)
    row, answer = longest(job.prompts, processor, job.pictures), b.max_completion_length or 0
    inputs = inputs_of(row, processor, job.pictures, b.per_device_train_batch_size, more=answer)
    rollout = job.sums.completions_per_rollout // processes * inputs["input_ids"].shape[1]
    kept = 0 if config.trl.get("use_vllm") else rollout
    return job.sums, memory_of(config, hub.resolve(config.model, weights=False), processes, inputs, kept)


def train(
    config: GrpoConfig,
    command: Sequence[str],
    *,
    runs: Path = Path("runs"),
    name: str | None = None,
    resume: Path | None = None,
    callbacks: Sequence[Any] = (),
    make_parts: Callable[[GrpoConfig], tuple[Generator, Judge]] | None = None,
) -> Path:
    """Train, or go on with the run in `resume`; the folder of the trained model.

    make_parts: generator and judge, where not those of `config`.  Raises UserError, also where so many answers went
    unscored that training stopped, with a checkpoint.
    """
    run.quiet_environment()
    from trl import GRPOConfig

    job = check(config, run.num_processes("interleave grpo"))
    arguments = run.make_arguments(GRPOConfig, config, _fixed_options(job))
    with scoring_thread(job, *(make_parts or build_scoring_parts)(config)) as scored:
        # one image is made and judged before anything is written, so that a service that is down stops the run here
        scored.probe(job)
        with run.session(
            config, arguments, command, runs=runs, name=name, otherwise="grpo_critic", resume=resume
        ) as at:
            watch = scoring_callback(scored, job)
            # after the callback that counts, the one that keeps its numbers beside TRL's
            keeper = run.make_keeper(at.run, lambda: watch.numbers)
            trainer = _make_trainer(job, scored, arguments, [watch, keeper, *callbacks])
            run.check_trained(trainer, config)
            trainer.train(resume_from_checkpoint=str(at.checkpoint) if at.checkpoint else None)
            if watch.stopped:
                raise UserError(f"{watch.stopped}; mend it and go on with interleave grpo --resume {at.path}")
            return run.export(trainer, at, config)


def _fixed_options(job: GrpoJob) -> dict[str, Any]:
    """Options of TRL that follow from ours; the rows are laid out for all passes by `order`."""
    fixed: dict[str, Any] = {"reward_weights": list(weights_of(job.config).values())}
    fixed |= {"shuffle_dataset": False, "num_train_epochs": 1, "max_steps": job.sums.updates}
    turns = {"max_tool_calling_iterations": job.config.max_attempts - 1} if job.config.reward == "trajectory" else {}
    return fixed | turns


def _make_trainer(job: GrpoJob, scored: ScoringThread, arguments: Any, callbacks: Sequence[Any]) -> Any:
    """TRL's trainer; with `reward: trajectory` it runs the critic in the loop that it will be used in."""
    from trl import GRPOTrainer

    config, in_loop = job.config, job.config.reward == "trajectory"
    processor = run.load_processor(config)
    trainer = GRPOTrainer(
        model=run.load_model(config),
        args=arguments,
        train_dataset=train_rows(job),
        reward_funcs=scored.functions(config),
        processing_class=as_caller(processor) if in_loop else processor,
        environment_factory=scored.trajectories(config).new if in_loop else None,
        peft_config=run.adapter_of(config),
        callbacks=list(callbacks),
    )
    if arguments.use_vllm:
        model = trainer.vllm_generation
        model.generate = check_image_tokens(model.generate, trainer.model.config.image_token_id)
    return trainer


def order(job: GrpoJob) -> list[int]:
    """Numbers of the rows in the order of training, all passes laid out as one.

    TRL's sampler cannot tell, after a resume, which pass it is in: it would begin with the order of the first again.
    """
    wanted = job.sums.rollouts * job.sums.prompts_per_rollout
    size = len(job.rows) // job.sums.prompts_per_rollout * job.sums.prompts_per_rollout
    found: list[int] = []
    while len(found) < wanted:
        numbers = np.arange(len(job.rows))
        if job.config.trl.get("shuffle_dataset", True):
            numbers = numpy_generator(job.config.seed, "order of rows", len(found) // size).permutation(numbers)
        found += numbers[:size].tolist()
    return found[:wanted]


def train_rows(job: GrpoJob) -> Any:
    """The dataset."""
    return dataset(
        order(job),
        lambda n: job.prompts[n].image_ids,
        lambda n, pictures: grpo_item(n, job.rows[n], job.prompts[n], pictures),
        job.pictures,
    )
