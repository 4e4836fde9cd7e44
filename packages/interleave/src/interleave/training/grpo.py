"""Reinforcement learning of the critic with TRL's GRPOTrainer: it answers recorded attempts, and its prompts are tried.

Generator, judge and scorer run on the event loop of a thread of their own, so that they can be checked before the model
is loaded and closed after it is trained.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imgen_common import hub
from imgen_common.errors import UserError, quoted
from imgen_common.prompt_limits import check_vocabulary
from imgen_common.shapes.vocabulary import VERIFIER, describe_unknown_words
from imgen_common.streams import numpy_generator
from interleave.agents.judge import ModelJudgeConfig
from interleave.agents.prompts import Template, TemplateRef, load_template
from interleave.datasets.rows import RlRow
from interleave.protocols import Generator, Judge
from interleave.storage.images import ImageStore
from interleave.training import run
from interleave.training.batch_plan import GrpoBatchPlan, TrlBatchOptions, plan_grpo_batches
from interleave.training.config import GrpoConfig
from interleave.training.environment import add_regenerate_tool
from interleave.training.memory import (
    MemoryEstimate,
    build_inputs,
    build_meta_model,
    check_adapters,
    estimate_memory,
    zero_options,
)
from interleave.training.reward import reward_weights
from interleave.training.rows import (
    FirstRow,
    GrpoJob,
    build_dataset,
    critic_prompt,
    image_store,
    opened_by_template,
    read_rows,
    rendered_prompt,
    select_by_length,
)
from interleave.training.scoring import (
    ScoringThread,
    build_generator_and_judge,
    build_scoring_callback,
    check_image_tokens,
    start_scoring,
)
from interleave.training.trained_weights import check_trainable
from interleave.training.trl_options import (
    RESERVED_GRPO,
    build_lora_config,
    check_arguments,
    check_options,
    check_values,
    refusals_of_trl,
)


def check_settings(config: GrpoConfig) -> None:
    """Checks what needs neither rows nor a model.  Raises UserError."""
    from trl import GRPOConfig

    check_options("trl", config.trl, GRPOConfig, RESERVED_GRPO)
    check_values(config.trl, GRPOConfig)
    reward_weights(config)
    build_lora_config(config)


def check_grpo(config: GrpoConfig, processes: int, *, needs_weights: bool = True) -> GrpoJob:
    """Checks all that can be checked before the model is loaded.  Raises UserError.

    needs_weights=False: training is only planned, so the files of the model's weights may be missing.
    """
    from trl import GRPOConfig

    check_settings(config)
    check_sharding(config, processes)
    hub.resolve(config.model, weights=needs_weights)
    model = run.load_model(config, device_map="meta") if needs_weights else build_meta_model(config)
    template = load_single_step_template(config.template)
    rows = read_rows(Path(config.data), "critic_rl", RlRow)
    check_world(config, rows)
    prompts = [critic_prompt(row, template) for row in rows]
    store = image_store(config)
    answer = config.trl.get("max_completion_length") or 512  # TRL's default
    processor = run.load_processor(config)
    check_vocabulary(processor.tokenizer, model, config.model)
    check_adapters(config)
    kept = select_by_length(prompts, processor, store, config.max_length, answer)
    if config.trl.get("use_vllm") and config.max_pixels is not None:
        check_image_sizes(rows, store, config.max_pixels)
    failed = sum(not rows[i].evaluation.success for i in kept)
    batch_plan = plan_grpo_batches(config, len(kept), failed, len(rows) - len(kept), processes)
    check_arguments(config.trl, GRPOConfig, processes)  # its words about batches are worse than the plan's
    opened = opened_by_template(processor, prompts[kept[0]], config.trl.get("chat_template_kwargs"))
    return GrpoJob(config, tuple(rows[i] for i in kept), tuple(prompts[i] for i in kept), batch_plan, opened)


def load_single_step_template(ref: TemplateRef) -> Template:
    """The template.  Raises UserError if it needs more than a row of a single step holds."""
    template = load_template(ref)
    for name in sorted(template.placeholders & {"story", "request"}):
        raise UserError(f"template {template.name}: {{{name}}} is not in rows of single steps; use another template")
    return template


def check_world(config: GrpoConfig, rows: Sequence[RlRow]) -> None:
    """Raises UserError where the built-in generator or judge is to work on rows of which none is of its world."""
    unknown = [describe_unknown_words(VERIFIER, row.original_prompt) for row in rows]
    for name in ("generator", "judge"):
        ref = getattr(getattr(config, name), "ref", "")
        if ref.startswith(hub.BUILTIN) and all(unknown):
            said = str(unknown[0]).replace(VERIFIER, ref)
            raise UserError(f"{name}: no row of {config.data} is of its world: {said}; configure another {name}")


def check_image_sizes(rows: Sequence[RlRow], store: ImageStore, max_pixels: int) -> None:
    """Raises UserError for images above `max_pixels`: vLLM resizes with the model's own processor, without a limit."""
    for image_id in {i for row in rows for i in (row.before_id, row.after_id)}:
        width, height = store.get(image_id).image.size
        if width * height > max_pixels:
            raise UserError(
                f"image {image_id[:12]}...: {width}x{height} is more than max_pixels {max_pixels}, and vLLM would "
                "not scale it down; scale the images of the set, or generate without trl.use_vllm"
            )


def check_sharding(config: GrpoConfig, processes: int) -> None:
    """Raises UserError if processes would have to wait for each other in every turn of a trajectory."""
    synchronous = {
        "ZeRO-3": zero_options(config.trl).get("stage") == 3,
        "FSDP": config.trl.get("fsdp"),
        "vLLM": config.trl.get("use_vllm"),
    }
    found = [name for name, is_on in synchronous.items() if is_on]
    if config.reward == "trajectory" and processes > 1 and found:
        raise UserError(
            f"reward: trajectory: processes differ in how many turns they take, so that {found[0]} would hang; "
            "use ZeRO-2 or no sharding, without vLLM, or one process"
        )


def plan_grpo(config: GrpoConfig, processes: int) -> tuple[GrpoBatchPlan, MemoryEstimate, FirstRow]:
    """The batches, costs and memory of a training run, and its first prompt as the model reads it; nothing is
    started."""
    job = check_grpo(config, processes, needs_weights=False)
    processor, b = run.load_processor(config), TrlBatchOptions.from_trl(config.trl)
    batch, answer = b.per_device_train_batch_size, b.max_completion_length or 0
    inputs = build_inputs(job.prompts, processor, image_store(config), batch, answer)
    rollout = job.batch_plan.completions_per_rollout // processes * inputs["input_ids"].shape[1]
    memory = estimate_memory(config, processes, inputs, 0 if config.trl.get("use_vllm") else rollout)
    prompt = rendered_prompt(processor, job.prompts[0], config.trl.get("chat_template_kwargs"))
    return job.batch_plan, memory, FirstRow(prompt)


def _bound(job: GrpoJob) -> dict[str, Sequence[object]]:
    """What a run cannot be resumed without: rows, prompts, and the questions of its judge."""
    judge = job.config.judge
    questions = (judge.semantics_template, judge.quality_template) if isinstance(judge, ModelJudgeConfig) else ()
    texts = [load_template(name).text for name in questions]
    return {"critic_rl": job.rows, "template": job.prompts, "the templates of judge": texts}


def train_grpo(
    config: GrpoConfig,
    command: Sequence[str],
    *,
    runs: Path = Path("runs"),
    name: str | None = None,
    resume: Path | None = None,
    callbacks: Sequence[Any] = (),
    build_services: Callable[[GrpoConfig], tuple[Generator, Judge]] | None = None,
) -> Path:
    """Trains, or resumes the run in `resume`; returns the folder of the trained model.

    build_services: builds generator and judge, instead of those of `config`.  Raises UserError, also when so many
    answers could not be scored that training stopped, with a checkpoint.
    """
    run.prepare_environment()
    from trl import GRPOConfig

    job = check_grpo(config, run.num_processes("interleave grpo"))
    # options of TRL that follow from ours; `row_order` lays the rows out for all passes
    fixed: dict[str, Any] = {"shuffle_dataset": False, "num_train_epochs": 1, "max_steps": job.batch_plan.updates}
    fixed |= {"max_tool_calling_iterations": config.max_attempts - 1} if config.reward == "trajectory" else {}
    fixed["reward_weights"] = list(reward_weights(config).values())
    arguments = run.build_arguments(GRPOConfig, config, fixed)
    with start_scoring(job, *(build_services or build_generator_and_judge)(config)) as scored:
        # one image is generated and judged before anything is written, so that a run does not start without a service
        scored.check_services(job)
        where: dict[str, Any] = {"runs": runs, "name": name, "default_name": "grpo_critic", "resume": resume}
        opened = run.open_run(config, arguments, command, **where)
        with opened as (run_folder, checkpoint), run.message_how_to_continue(run_folder, "grpo"):
            run.bind_data(run_folder, config.models, _bound(job))
            counting = build_scoring_callback(scored, job)
            # the run's callback comes after the one that counts, whose metrics it logs beside TRL's
            logging = run.build_run_callback(run_folder, lambda: counting.metrics, job.batch_plan.updates_per_rollout)
            trainer = _build_trainer(job, scored, arguments, [counting, logging, *callbacks])
            check_trainable(trainer.model, config.vision)
            run.run_training(trainer, logging, checkpoint)
            if counting.stop_reason:
                raise UserError(f"{counting.stop_reason}; then: interleave grpo --resume {quoted(run_folder.path)}")
            return run.export_model(trainer, run_folder.path, config)


@refusals_of_trl()
def _build_trainer(job: GrpoJob, scored: ScoringThread, arguments: Any, callbacks: Sequence[Any]) -> Any:
    """TRL's trainer; with `reward: trajectory` it runs the critic in its loop."""
    from trl import GRPOTrainer

    config, in_loop = job.config, job.config.reward == "trajectory"
    processor = run.load_processor(config)
    trainer = GRPOTrainer(
        model=run.load_model(config),
        args=arguments,
        train_dataset=build_dataset(row_order(job), job.example, image_store(config)),
        reward_funcs=scored.reward_functions(config),
        processing_class=add_regenerate_tool(processor) if in_loop else processor,
        environment_factory=scored.environment_factory(config) if in_loop else None,
        peft_config=build_lora_config(config),
        callbacks=list(callbacks),
    )
    if arguments.use_vllm:
        model = trainer.vllm_generation
        model.generate = check_image_tokens(model.generate, trainer.model.config.image_token_id)
    return trainer


def row_order(job: GrpoJob) -> list[int]:
    """Numbers of the rows in the order of training, all passes in one list.

    TRL's sampler does not know, after a resume, which pass it is in: it would start again with the order of the first.
    """
    wanted = job.batch_plan.rollouts * job.batch_plan.prompts_per_rollout
    size = len(job.rows) // job.batch_plan.prompts_per_rollout * job.batch_plan.prompts_per_rollout
    found: list[int] = []
    while len(found) < wanted:
        numbers = np.arange(len(job.rows))
        if job.config.trl.get("shuffle_dataset", True):
            numbers = numpy_generator(job.config.seed, "order of rows", len(found) // size).permutation(numbers)
        found += numbers[:size].tolist()
    return found[:wanted]
