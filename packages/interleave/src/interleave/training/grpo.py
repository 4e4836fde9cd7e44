"""Reinforcement of the critic by TRL's GRPOTrainer: one answer to one recorded attempt, rewarded by what it leads to.

Generator, judge and scorer live on an event loop of their own thread, so that they can be tried before the model is
loaded and closed after it is trained.
"""

import asyncio
import contextlib
import functools
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from imgen_common import hub
from imgen_common.errors import UserError
from imgen_common.streams import numpy_generator
from interleave import generators, judging
from interleave.formats.rows import RlRow, SftRow
from interleave.generators import CachedGenerator
from interleave.judging import CachedJudge
from interleave.parts import Generator, Job, Judge, Look, PartFailed
from interleave.prompts import Template, template
from interleave.rewards import PAPER_WEIGHTS, WEIGHTS, CriticRow, CriticScorer, paper_parts, reward_functions
from interleave.store import PICTURES, PictureStore
from interleave.training import launch
from interleave.training.arithmetic import Batches, GrpoSums, Memory, grpo_sums, memory_of, zero_of
from interleave.training.config import GrpoConfig
from interleave.training.mapping import OWNED_GRPO, check_keys, check_trl
from interleave.training.rows import critic_prompt, dataset, grpo_item, longest, read_rows, short_enough
from interleave.training.trajectory import Trajectories, as_caller

T = TypeVar("T")
Reward = Callable[..., Coroutine[Any, Any, list[float | None]]]
REWARD_WEIGHTS: Mapping[str, Mapping[str, float]] = {
    "released": WEIGHTS,
    "paper": PAPER_WEIGHTS,
    "trajectory": {"trajectory": 1.0},
}
"""Parts of a reward by the key `reward`, and their weights."""
LOGP_DIFFERENCE = "sampling/sampling_logp_difference/mean"


@dataclass(frozen=True)
class GrpoJob:
    """A reinforcement that passed every check.  prompts: of the rows, in their order, rendered as at run time."""

    config: GrpoConfig
    rows: tuple[RlRow, ...]
    prompts: tuple[SftRow, ...]
    sums: GrpoSums

    @property
    def pictures(self) -> PictureStore:
        """Where the rows' pictures are."""
        return PictureStore(Path(self.config.data) / PICTURES)

    def item(self, number: int) -> dict[str, Any]:
        """What the trainer reads for a row."""
        prompt = self.prompts[number]
        return grpo_item(number, self.rows[number], prompt, {i: self.pictures.get(i) for i in prompt.image_ids})


def check(config: GrpoConfig, processes: int, *, here: bool = True) -> GrpoJob:
    """Everything that can be found wrong before a model is loaded.  Raises UserError.

    here=False: the training is only planned; the model's weights may be missing.
    """
    from trl import GRPOConfig

    check_trl(config.trl, GRPOConfig, OWNED_GRPO)
    weights_of(config)
    launch.adapter_of(config)
    refuse_unequal_turns(config, processes)
    hub.resolve(config.model, weights=here)
    found = check_template(config.template)
    rows = read_rows(Path(config.data), "critic_rl", RlRow)
    prompts = [critic_prompt(row, found) for row in rows]
    store = PictureStore(Path(config.data) / PICTURES)
    answer = config.trl.get("max_completion_length") or 512
    kept = short_enough(prompts, launch.load_processor(config), store, config.max_length, answer)
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
    found = template(ref)
    for name in sorted(found.placeholders & {"story", "request"}):
        raise UserError(f"template {found.name}: {{{name}}} is not in rows of single steps; use another template")
    return found


def refuse_resized(rows: Sequence[RlRow], store: PictureStore, max_pixels: int) -> None:
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
    from interleave.training.tracing import inputs_of

    job = check(config, processes, here=False)
    processor, b = launch.load_processor(config), Batches.of(config.trl)
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
    launch.quiet_environment()
    from trl import GRPOConfig, GRPOTrainer

    job = check(config, launch.num_processes("interleave grpo"))
    fixed: dict[str, Any] = {"reward_weights": list(weights_of(config).values())}
    fixed |= {"shuffle_dataset": False, "num_train_epochs": 1, "max_steps": job.sums.updates}  # see `order`
    in_loop = config.reward == "trajectory"
    if in_loop:
        fixed["max_tool_calling_iterations"] = config.max_attempts - 1
    arguments = launch.make_arguments(GRPOConfig, config, fixed)
    with scoring(job, *(make_parts or parts)(config)) as scored:
        scored.probe(job)
        with launch.session(
            config, arguments, command, runs=runs, name=name, otherwise="grpo_critic", resume=resume
        ) as at:
            watch = make_watch(scored, job)
            processor = launch.load_processor(config)
            trainer = GRPOTrainer(
                model=launch.load_model(config),
                args=arguments,
                train_dataset=train_rows(job),
                reward_funcs=scored.functions(config),
                processing_class=as_caller(processor) if in_loop else processor,
                environment_factory=scored.trajectories(config).new if in_loop else None,
                peft_config=launch.adapter_of(config),
                callbacks=[watch, launch.make_keeper(at.run, lambda: watch.numbers), *callbacks],
            )
            launch.check_trained(trainer, config)
            if arguments.use_vllm:
                model = trainer.vllm_generation
                model.generate = guarded(model.generate, trainer.model.config.image_token_id)
            trainer.train(resume_from_checkpoint=str(at.checkpoint) if at.checkpoint else None)
            if watch.stopped:
                raise UserError(f"{watch.stopped}; mend it and go on with interleave grpo --resume {at.path}")
            return launch.export(trainer, at, config)


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


# --- scoring ---------------------------------------------------------------------------------------------------------


def parts(config: GrpoConfig) -> tuple[Generator, Judge]:
    """Generator and judge as configured, behind their caches.  Raises UserError where one cannot be had."""
    generator: Generator = generators.make(config.generator)
    judge: Judge = judging.make(config.judge)
    if config.cache is not None:
        generator = CachedGenerator(generator, Path(config.cache) / "pictures")
        judge = CachedJudge(judge, Path(config.cache) / "judgements")
    return generator, judge


@dataclass(frozen=True)
class Scored:
    """Generator, judge and scorer on their event loop."""

    loop: asyncio.AbstractEventLoop
    generator: Generator
    judge: Judge
    scorer: CriticScorer

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` there and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def functions(self, config: GrpoConfig) -> list[Reward]:
        """Reward functions for TRL, whose own event loop waits for this one."""
        match config.reward:
            case "released":
                given = reward_functions(self.scorer, lambda columns: columns["row"])
            case "paper":
                given = reward_functions(self.scorer, lambda columns: columns["row"], paper_parts, PAPER_WEIGHTS)
            case "trajectory":
                given = [self.trajectories(config).reward_function()]

        def moved(function: Reward) -> Reward:
            @functools.wraps(function)
            async def there(**columns: Any) -> list[float | None]:
                return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(function(**columns), self.loop))

            return there

        return [moved(function) for function in given]

    def trajectories(self, config: GrpoConfig) -> Trajectories:
        """Trajectories that are drawn and judged here."""
        return Trajectories(self.scorer, template(config.template), config.scorer.policy, self.call)

    def probe(self, job: GrpoJob) -> None:
        """Draw and judge one picture.  Raises UserError if generator or judge is down: nothing is started then."""
        number = next((n for n, row in enumerate(job.rows) if not row.evaluation.success), None)
        if number is None:
            return
        row: CriticRow = job.item(number)["row"]
        prompt = row.rewritten_prompt or row.origin_prompt
        who = "generator"

        async def once() -> None:
            nonlocal who
            picture = await self.generator.generate(Job(prompt, () if row.is_t2i else (row.before,), 0))
            who = "judge"
            await self.judge.score(Look(row.before, picture, row.origin_prompt, prompt))

        try:
            self.call(asyncio.wait_for(once(), job.config.scorer.deadline))
        except (PartFailed, TimeoutError) as error:
            reason = f"{error.kind}: {error}" if isinstance(error, PartFailed) else "no answer within the deadline"
            raise UserError(f"the {who} failed on the first row ({reason}); nothing was started") from error


def share(concurrency: int, processes: int) -> int:
    """What one of `processes` may have with generator and judge at once, of all that is allowed."""
    return max(concurrency // processes, 1)


@contextlib.contextmanager
def scoring(job: GrpoJob, generator: Generator, judge: Judge) -> Iterator[Scored]:
    """A scorer over generator and judge; both are closed at the end."""
    config = job.config.scorer
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="scoring", daemon=True)
    thread.start()
    scorer = CriticScorer(
        generator,
        judge,
        concurrency=share(config.concurrency, job.sums.processes),
        deadline=config.deadline,
        seed=config.seed,
        rule=config.rule,
        policy=config.policy,
        skip_unchanged=config.skip_unchanged,
        ceiling=config.ceiling,
        window=config.window,
    )
    scored = Scored(loop, generator, judge, scorer)
    try:
        yield scored
    finally:
        for part in (generator, judge):
            scored.call(part.close())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


# --- callbacks -------------------------------------------------------------------------------------------------------


def make_watch(scored: Scored, job: GrpoJob) -> Any:
    """A callback that adds up what scoring costs, and ends training where too much of it fails or vLLM strays.

    Attributes: `numbers`, to be logged; `stopped`, why training ended early, or "".
    """
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.numbers: Mapping[str, float] = {}
            self.stopped = ""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # Between two rollouts only: from the middle of one a run could not go on exactly.
            if state.global_step % job.sums.updates_per_rollout:
                return
            self.numbers = costs(scored)
            if self.numbers["scoring/failed_too_often"]:
                reasons = ", ".join(f"{kind} {n}" for kind, n in scored.scorer.counts.reasons.most_common())
                share = self.numbers["scoring/unscored_rate"]
                self.stopped = f"generator or judge failed on {share:.0%} of the last answers ({reasons}) at update "
                self.stopped += f"{state.global_step}, which is saved"
            if self.stopped:
                control.should_save = control.should_training_stop = True

        def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **kwargs: Any) -> None:
            found = logs.get(LOGP_DIFFERENCE)
            limit = job.config.max_logp_difference
            if found is not None and found > limit:
                self.stopped = f"vLLM's log-probabilities differ by {found:.3g} from the trainer's (more than "
                self.stopped += f"max_logp_difference {limit:g})"

    return Watch()


def costs(scored: Scored) -> dict[str, float]:
    """Counters over all processes, by name; every process must ask."""
    import torch
    import torch.distributed as dist

    counts = scored.scorer.counts
    values = {
        "scoring/answers": counts.answers,
        "scoring/unscored": counts.unscored,
        "scoring/pictures": counts.pictures,
        "scoring/judgements": counts.judgements,
        "scoring/unscored_rate": scored.scorer.unscored_rate,
        "scoring/failed_too_often": float(scored.scorer.has_failed_too_often),
    }
    if isinstance(scored.generator, CachedGenerator):
        values["scoring/pictures_from_cache"] = scored.generator.hits
    if isinstance(scored.judge, CachedJudge):
        values["scoring/judgements_from_cache"] = scored.judge.hits
    if dist.is_available() and dist.is_initialized():
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
        dist.all_reduce(total)
        values = dict(zip(values, total.tolist(), strict=True))
        values["scoring/unscored_rate"] /= dist.get_world_size()
    return {name: float(value) for name, value in values.items()}


def guarded(generate: Callable[..., Any], image_token: int) -> Callable[..., Any]:
    """vLLM's `generate`, which raises UserError if it saw another number of picture tokens than it was given: it may
    expand again what the processor has expanded."""

    def checked(*, prompts: Sequence[Sequence[int]], **kwargs: Any) -> Any:
        found = generate(prompts=prompts, **kwargs)
        for given, seen in zip(prompts, found[0], strict=True):
            before, after = list(given).count(image_token), list(seen).count(image_token)
            if before != after:
                raise UserError(
                    f"vLLM read {after} picture tokens where the prompt has {before}; use trl.vllm_mode: server, "
                    "another version of vllm, or generate without trl.use_vllm"
                )
        return found

    return checked
