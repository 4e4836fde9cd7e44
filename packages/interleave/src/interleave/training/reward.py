"""The critic's reward, step by step: what GRPO gives for one answer to one recorded attempt.

    R = 0.5 F + 0.1 A + 0.3 S + 0.1 Q
    F  1 if the answer can be read              A  1 if its verdict is the recorded one
    S = ((s' - semantics) / 10 + 1) / 2        Q = ((q' - quality) / 10 + 1) / 2

s', q': the judge's semantics and quality of the image generated with the answer's prompt from the same source.
The judge is asked only where the recorded attempt failed; where it succeeded S = Q = 0.5, as where nothing changed.  An
answer that cannot be scored because the generator or the judge failed has no reward.
Source: InterleaveThinker, arXiv 2606.13679, and its released code.
"""

import asyncio
import contextlib
import math
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from imgen_common.errors import UserError
from interleave.agents.partial_parsing import has_format, parse_partial_answer
from interleave.models.concurrency import mark_retrieved
from interleave.protocols import BackendError, CriticInput, GenerationRequest, Generator, HashedImage, Judge
from interleave.records import Scores
from interleave.training.config import GrpoConfig, ScorerConfig
from interleave.training.trl_options import check_keys

RewardFunction = Callable[..., Coroutine[Any, Any, list[float | None]]]

NEUTRAL = 0.5
DEFAULT_CONFIG = ScorerConfig()
MAX_CACHED_ANSWERS = 4096
WEIGHTS: Mapping[str, float] = {"format": 0.5, "accuracy": 0.1, "semantics": 0.3, "quality": 0.1}
"""Weights of the released code."""
PAPER_WEIGHTS: Mapping[str, float] = {"format": 0.5, "accuracy": 0.1, "step": 0.4}
"""Weights of the paper, R = 0.5 F + 0.5 (0.2 R_acc + 0.8 R_step), see `paper_parts`."""
REWARD_WEIGHTS: Mapping[str, Mapping[str, float]] = {
    "released": WEIGHTS,
    "paper": PAPER_WEIGHTS,
    "trajectory": {"trajectory": 1.0},
}
"""The parts of each reward and their weights, by the key `reward`."""


def reward_weights(config: GrpoConfig) -> dict[str, float]:
    """Weights of the parts of the reward, in the order of its functions.  Raises UserError for an unknown part."""
    own = REWARD_WEIGHTS[config.reward]
    check_keys("reward_weights", config.reward_weights, set(own), f"reward: {config.reward}")
    weights = {**own, **config.reward_weights}
    if not any(weights.values()):
        raise UserError("reward_weights: all are 0, so that every answer gets the same reward; raise one")
    return weights


@dataclass(frozen=True)
class RecordedAttempt:
    """One recorded attempt for the critic to judge, with its scores.

    semantics, quality: the judge's scores of `after`, in [0, 10].  is_t2i: generated from the prompt alone,
    so that `before` is white.
    """

    id: str
    original_prompt: str
    prompt_used: str
    before: HashedImage
    after: HashedImage
    is_t2i: bool
    success: bool
    semantics: float
    quality: float


@dataclass(frozen=True)
class RewardParts:
    """The four parts of a reward, each in [0, 1] for scores in [0, 10]."""

    format: float
    accuracy: float
    semantics: float
    quality: float


@dataclass
class ScoringCounts:
    """Calls so far.  reasons: of the answers without a score, by kind of failure."""

    answers: int = 0
    unscored: int = 0
    images: int = 0
    judgments: int = 0
    reasons: Counter[str] = field(default_factory=Counter)


class CriticScorer:
    """Scores answers; equal answers to the same row are scored once.

    It works on the event loop that calls it, on at most `concurrency` answers at once.
    """

    def __init__(
        self, generator: Generator, judge: Judge, config: ScorerConfig = DEFAULT_CONFIG, opened: str = ""
    ) -> None:
        """opened: what the chat template begins each answer with, which is not in the answers."""
        self._generator, self._judge, self._config, self.opened = generator, judge, config, opened
        self._recent = deque[bool](maxlen=config.window)
        self._semaphore = asyncio.Semaphore(config.concurrency)  # joins the event loop that first waits for it
        self._parts: OrderedDict[tuple[str, str], asyncio.Task[RewardParts | None]] = OrderedDict()
        self.counts = ScoringCounts()

    async def score(self, answer: str, row: RecordedAttempt) -> RewardParts | None:
        """The parts of an answer's reward; None if the generator or the judge failed."""
        key = (row.id, answer)
        if key not in self._parts:
            self._parts[key] = asyncio.create_task(self._score(answer, row))
            self._parts[key].add_done_callback(mark_retrieved)
            while len(self._parts) > MAX_CACHED_ANSWERS and next(iter(self._parts.values())).done():
                self._parts.popitem(last=False)
        self._parts.move_to_end(key)
        return await asyncio.shield(self._parts[key])

    def forget_failures(self) -> None:
        """Score answers that had no reward when they come again, as once a service is back; only between rollouts, so
        that all parts of a reward are of one try."""
        for key in [
            key
            for key, task in self._parts.items()
            if task.done() and (task.cancelled() or task.exception() or not task.result())
        ]:
            del self._parts[key]

    @property
    def unscored_rate(self) -> float:
        """Share of the last answers without a reward, in [0, 1]."""
        return sum(self._recent) / len(self._recent) if self._recent else 0.0

    @property
    def has_failed_too_often(self) -> bool:
        """Whether training should stop: of at least a quarter window more than `max_unscored` have no reward."""
        return len(self._recent) >= (self._recent.maxlen or 0) // 4 and self.unscored_rate > self._config.max_unscored

    async def _score(self, answer: str, row: RecordedAttempt) -> RewardParts | None:
        self.counts.answers += 1
        answer = self.opened + answer
        answered = parse_partial_answer(answer)
        well_formed = float(has_format(answer, self._config.format_rule, self._config.parse_mode))
        accuracy = float(answered.verdict is not None and answered.verdict == row.success)
        recorded_prompt = row.prompt_used or row.original_prompt
        prompt = answered.prompt or recorded_prompt
        unchanged = prompt == recorded_prompt and answered.verdict
        if row.success or (self._config.skip_unchanged and unchanged):
            return RewardParts(well_formed, accuracy, NEUTRAL, NEUTRAL)
        try:
            async with self.limit():
                scores = await self.score_image(prompt, await self.generate_image(prompt, row), row)
        except (BackendError, TimeoutError) as failure:
            self.count_result(failure)
            return None
        self.count_result(None)
        semantics = normalize_gain(scores.semantics, row.semantics)
        return RewardParts(well_formed, accuracy, semantics, normalize_gain(scores.quality, row.quality))

    @contextlib.asynccontextmanager
    async def limit(self) -> AsyncIterator[None]:
        """Waits until fewer than `concurrency` answers are in work, then sets the deadline.  Raises TimeoutError."""
        async with self._semaphore, asyncio.timeout(self._config.deadline):
            yield

    async def generate_image(self, prompt: str, row: RecordedAttempt, seed_offset: int = 0) -> HashedImage:
        """The image generated with `prompt` from the row's source."""
        self.counts.images += 1
        return await self._generator.generate(
            GenerationRequest(prompt, () if row.is_t2i else (row.before,), self._config.seed + seed_offset)
        )

    async def score_image(self, prompt: str, after: HashedImage, row: RecordedAttempt) -> Scores:
        """The judge's scores of an image generated with `prompt`."""
        self.counts.judgments += 1
        return await self._judge.score(CriticInput(row.before, after, row.original_prompt, prompt))

    def count_result(self, failure: BackendError | TimeoutError | None) -> None:
        """Counts an answer that was scored, or that could not be."""
        self._recent.append(failure is not None)
        if failure is not None:
            self.counts.unscored += 1
            self.counts.reasons[failure.kind if isinstance(failure, BackendError) else "timeout"] += 1


def normalize_gain(new: float, old: float) -> float:
    """The gain between two scores in [0, 10] as a reward in [0, 1]; 0.5 where nothing changed."""
    return ((new - old) / 10 + 1) / 2


def paper_parts(parts: RewardParts, row: RecordedAttempt) -> Mapping[str, float]:
    """The parts of the paper's reward, by the names of `PAPER_WEIGHTS`.

    accuracy: minus the distance to the recorded verdict, 0 or -1.  step: gain of the overall score
    sqrt(semantics quality) / 10, in [-1, 1]; 0 where the recorded attempt succeeded.  The paper names neither the scale
    nor how the two scores are joined; both are as its released code reports them.
    """
    semantics = row.semantics + 10 * (2 * parts.semantics - 1)
    quality = row.quality + 10 * (2 * parts.quality - 1)
    step = (math.sqrt(max(semantics, 0) * max(quality, 0)) - math.sqrt(row.semantics * row.quality)) / 10
    return {"format": parts.format, "accuracy": parts.accuracy - 1, "step": step}


def reward_functions(
    scorer: CriticScorer,
    parts_of: Callable[[RewardParts, RecordedAttempt], Mapping[str, float]] = lambda parts, row: vars(parts),
    names: Iterable[str] = tuple(WEIGHTS),
) -> list[RewardFunction]:
    """Asynchronous reward functions for TRL over one scorer, one for each of the `names` of what `parts_of` gives.

    For an answer without a reward all of them return None, so that TRL leaves it out of its group.
    """

    def function(name: str) -> RewardFunction:
        async def reward(
            completions: Sequence[Any], row: Sequence[RecordedAttempt], **columns: Any
        ) -> list[float | None]:
            scored = await asyncio.gather(*map(scorer.score, map(completion_text, completions), row))
            return [
                None if parts is None else float(parts_of(parts, one)[name])
                for parts, one in zip(scored, row, strict=True)
            ]

        reward.__name__ = name
        return reward

    return [function(name) for name in names]


def completion_text(completion: Any) -> str:
    """The text of a completion, which TRL gives as a string or as one assistant message with text or parts."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)
