"""Generator, judge and scorer of the reward on an event loop of their own, and what they cost."""

import asyncio
import contextlib
import functools
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from imgen_common.errors import UserError
from interleave.agents import scoring as judging
from interleave.agents.prompts import load_template
from interleave.agents.scoring import CachedJudge
from interleave.models import generators
from interleave.models.generators.cache import CachedGenerator
from interleave.protocols import BackendError, CriticInput, GenerationRequest, Generator, Judge
from interleave.training.config import GrpoConfig
from interleave.training.environment import Trajectories
from interleave.training.reward import (
    PAPER_WEIGHTS,
    CriticRow,
    CriticScorer,
    Reward,
    ScorerSettings,
    paper_parts,
    reward_functions,
)
from interleave.training.rows import GrpoJob

T = TypeVar("T")
LOGP_DIFFERENCE = "sampling/sampling_logp_difference/mean"


# --- scoring ---------------------------------------------------------------------------------------------------------


def build_scoring_parts(config: GrpoConfig) -> tuple[Generator, Judge]:
    """Generator and judge as configured, behind their caches.  Raises UserError where one cannot be had."""
    generator: Generator = generators.build_generator(config.generator)
    judge: Judge = judging.build_judge(config.judge)
    if config.cache is not None:
        generator = CachedGenerator(generator, Path(config.cache) / "images")
        judge = CachedJudge(judge, Path(config.cache) / "judgements")
    return generator, judge


@dataclass(frozen=True)
class ScoringThread:
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
        return Trajectories(self.scorer, load_template(config.template), config.scorer.parse_mode, self.call)

    def probe(self, job: GrpoJob) -> None:
        """Draw and judge one picture.  Raises UserError if generator or judge is down: nothing is started then."""
        number = next((n for n, row in enumerate(job.rows) if not row.evaluation.success), None)
        if number is None:
            return
        row: CriticRow = job.item(number)["row"]
        prompt = row.prompt_used or row.original_prompt
        who = "generator"

        async def once() -> None:
            nonlocal who
            picture = await self.generator.generate(GenerationRequest(prompt, () if row.is_t2i else (row.before,), 0))
            who = "judge"
            await self.judge.score(CriticInput(row.before, picture, row.original_prompt, prompt))

        try:
            self.call(asyncio.wait_for(once(), job.config.scorer.deadline))
        except (BackendError, TimeoutError) as error:
            reason = f"{error.kind}: {error}" if isinstance(error, BackendError) else "no answer within the deadline"
            raise UserError(f"the {who} failed on the first row ({reason}); nothing was started") from error


def concurrency_per_process(concurrency: int, processes: int) -> int:
    """What one of `processes` may have with generator and judge at once, of all that is allowed."""
    return max(concurrency // processes, 1)


@contextlib.contextmanager
def scoring_thread(job: GrpoJob, generator: Generator, judge: Judge) -> Iterator[ScoringThread]:
    """A scorer over generator and judge; both are closed at the end."""
    config = job.config.scorer
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="scoring", daemon=True)
    thread.start()
    settings = ScorerSettings(
        concurrency=concurrency_per_process(config.concurrency, job.sums.processes),
        deadline=config.deadline,
        seed=config.seed,
        rule=config.rule,
        parse_mode=config.parse_mode,
        skip_unchanged=config.skip_unchanged,
        ceiling=config.ceiling,
        window=config.window,
    )
    scored = ScoringThread(loop, generator, judge, CriticScorer(generator, judge, settings))
    try:
        yield scored
    finally:
        for part in (generator, judge):
            scored.call(part.close())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


# --- callbacks -------------------------------------------------------------------------------------------------------


def scoring_callback(scored: ScoringThread, job: GrpoJob) -> Any:
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
            self.numbers = scoring_metrics(scored)
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


def scoring_metrics(scored: ScoringThread) -> dict[str, float]:
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


def check_image_tokens(generate: Callable[..., Any], image_token: int) -> Callable[..., Any]:
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
