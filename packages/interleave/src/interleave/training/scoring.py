"""Generator, judge and scorer on an event loop of their own, and the callback that logs their calls."""

import asyncio
import contextlib
import functools
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from imgen_common.errors import UserError
from interleave.agents.prompts import load_template
from interleave.agents.scoring import CachedJudge
from interleave.models.generators.cache import CachedGenerator
from interleave.protocols import BackendError, CriticInput, GenerationRequest, Generator, Judge
from interleave.training.config import GrpoConfig
from interleave.training.environment import CriticEnvironment, trajectory
from interleave.training.reward import (
    PAPER_WEIGHTS,
    CriticScorer,
    RecordedAttempt,
    RewardFunction,
    paper_parts,
    reward_functions,
)
from interleave.training.rows import GrpoJob, image_store

T = TypeVar("T")


def build_generator_and_judge(config: GrpoConfig) -> tuple[Generator, Judge]:
    """The configured generator and judge behind their caches.  Raises UserError where one cannot be loaded."""
    generator: Generator = config.generator.build()
    judge: Judge = config.judge.build()
    if config.cache is not None:
        generator = CachedGenerator(generator, Path(config.cache) / "images")
        judge = CachedJudge(judge, Path(config.cache) / "judgments")
    return generator, judge


@dataclass(frozen=True)
class ScoringThread:
    """Generator, judge and scorer on the event loop of their own thread."""

    loop: asyncio.AbstractEventLoop
    generator: Generator
    judge: Judge
    scorer: CriticScorer

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs `work` there and waits for it."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def reward_functions(self, config: GrpoConfig) -> list[RewardFunction]:
        """Reward functions for TRL, whose own event loop waits for this one."""
        match config.reward:
            case "released":
                given = reward_functions(self.scorer)
            case "paper":
                given = reward_functions(self.scorer, paper_parts, PAPER_WEIGHTS)
            case "trajectory":
                given = [trajectory]

        def run_in_thread(function: RewardFunction) -> RewardFunction:
            @functools.wraps(function)
            async def there(**columns: Any) -> list[float | None]:
                return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(function(**columns), self.loop))

            return there

        return [run_in_thread(function) for function in given]

    def environment_factory(self, config: GrpoConfig) -> Callable[[], CriticEnvironment]:
        """Makes environments whose images are generated and judged in this thread."""
        template = load_template(config.template)
        return functools.partial(CriticEnvironment, self.scorer, template, config.scorer.parse_mode, self.run)

    def check_services(self, job: GrpoJob) -> None:
        """Generates and judges one image.  Raises UserError if the generator or the judge is down."""
        failed = next((n for n, row in enumerate(job.rows) if not row.evaluation.success), None)
        if failed is None:
            return
        row: RecordedAttempt = job.example(failed, image_store(job.config).get)["row"]
        prompt = row.prompt_used or row.original_prompt
        service = "generator"

        async def check() -> None:
            nonlocal service
            image = await self.generator.generate(GenerationRequest(prompt, () if row.is_t2i else (row.before,), 0))
            service = "judge"
            await self.judge.score(CriticInput(row.before, image, row.original_prompt, prompt))

        try:
            self.run(asyncio.wait_for(check(), job.config.scorer.deadline))
        except (BackendError, TimeoutError) as error:
            reason = f"{error.kind}: {error}" if isinstance(error, BackendError) else "no answer within the deadline"
            raise UserError(f"the {service} failed on the first row ({reason}); training was not started") from error


def concurrency_per_process(concurrency: int, processes: int) -> int:
    """The share of each process in the answers that the generator and the judge may work on at once; at least one."""
    return max(concurrency // processes, 1)


@contextlib.contextmanager
def start_scoring(job: GrpoJob, generator: Generator, judge: Judge) -> Iterator[ScoringThread]:
    """Starts the thread of a scorer over generator and judge; at the end answers that are still scored are cancelled,
    and both are closed."""
    config = job.config.scorer
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="scoring", daemon=True)
    thread.start()
    concurrency = concurrency_per_process(config.concurrency, job.batch_plan.processes)
    scorer = CriticScorer(generator, judge, config.model_copy(update={"concurrency": concurrency}), job.opened)
    scored = ScoringThread(loop, generator, judge, scorer)

    async def close() -> None:
        pending = asyncio.all_tasks() - {asyncio.current_task()}
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for part in (generator, judge):
            await part.close()

    try:
        yield scored
    finally:
        scored.run(close())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def build_scoring_callback(scored: ScoringThread, job: GrpoJob) -> Any:
    """A callback that counts the calls of scoring, and ends training where too many fail or vLLM's numbers differ.

    Attributes: `metrics`, to be logged; `stop_reason`, why training ended early, or "".
    """
    from transformers import TrainerCallback

    class ScoringCallback(TrainerCallback):
        def __init__(self) -> None:
            self.metrics: Mapping[str, float] = {}
            self.stop_reason = ""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # only between two rollouts: a run cannot resume exactly from the middle of one
            if state.global_step % job.batch_plan.updates_per_rollout:
                return
            scored.loop.call_soon_threadsafe(scored.scorer.forget_failures)
            self.metrics = gather_scoring_metrics(scored)
            if self.metrics["scoring/failed_too_often"]:
                reasons = ", ".join(f"{kind} {n}" for kind, n in scored.scorer.counts.reasons.most_common())
                share = self.metrics["scoring/unscored_rate"]
                self.stop_reason = f"generator or judge failed on {share:.0%} of the last answers ({reasons}); "
                self.stop_reason += f"update {state.global_step} is saved"
            if self.stop_reason:
                control.should_save = control.should_training_stop = True

        def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **kwargs: Any) -> None:
            difference, limit = logs.get("sampling/sampling_logp_difference/mean"), job.config.max_logp_difference
            if difference is not None and difference > limit:
                self.stop_reason = f"vLLM's log-probabilities differ by {difference:.3g} from the trainer's (more than "
                self.stop_reason += f"max_logp_difference {limit:g})"

    return ScoringCallback()


def gather_scoring_metrics(scored: ScoringThread) -> dict[str, float]:
    """Counters over all processes by name; a collective operation that every process must call."""
    import torch
    import torch.distributed as dist

    counts = scored.scorer.counts
    values = {
        "scoring/answers": counts.answers,
        "scoring/unscored": counts.unscored,
        "scoring/images": counts.images,
        "scoring/judgments": counts.judgments,
        "scoring/unscored_rate": scored.scorer.unscored_rate,
        "scoring/failed_too_often": float(scored.scorer.has_failed_too_often),
    }
    if isinstance(scored.generator, CachedGenerator):
        values["scoring/images_from_cache"] = scored.generator.hits
    if isinstance(scored.judge, CachedJudge):
        values["scoring/judgments_from_cache"] = scored.judge.hits
    if dist.is_available() and dist.is_initialized():
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
        dist.all_reduce(total)
        values = dict(zip(values, total.tolist(), strict=True))
        values["scoring/unscored_rate"] /= dist.get_world_size()
    return {name: float(value) for name, value in values.items()}


def check_image_tokens(generate: Callable[..., Any], image_token: int) -> Callable[..., Any]:
    """vLLM's `generate`, with a UserError if it read another number of image tokens than the prompt has: it may expand
    again what the processor has expanded."""

    def generate_checked(*, prompts: Sequence[Sequence[int]], **kwargs: Any) -> Any:
        found = generate(prompts=prompts, **kwargs)
        for given, seen in zip(prompts, found[0], strict=True):
            before, after = list(given).count(image_token), list(seen).count(image_token)
            if before != after:
                raise UserError(
                    f"vLLM read {after} image tokens where the prompt has {before}; use trl.vllm_mode: server, "
                    "another version of vllm, or generate without trl.use_vllm"
                )
        return found

    return generate_checked
