"""The critic's reward, step by step: what GRPO gives for one answer to one recorded attempt.

    R = 0.5 F + 0.1 A + 0.3 S + 0.1 Q
    F  1 if the answer can be read              A  1 if its verdict is the recorded one
    S = ((s' - semantics) / 10 + 1) / 2        Q = ((q' - quality) / 10 + 1) / 2

s', q': the judge's semantics and quality of the image generated with the answer's prompt from the same source.
They are asked for only where the recorded attempt failed; where it succeeded S = Q = 0.5, as where nothing changed.  An
answer that cannot be scored because generator or judge failed has no reward at all.
Source: InterleaveThinker, arXiv 2606.13679, and its released code.
"""

import asyncio
import contextlib
import math
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from interleave.agents.parsing import ParseMode
from interleave.agents.partial_parsing import FormatRule, has_format, parse_partial_answer
from interleave.protocols import BackendError, CriticInput, GenerationRequest, Generator, HashedImage, Judge
from interleave.records import Scores

Reward = Callable[..., Coroutine[Any, Any, list[float | None]]]

NEUTRAL = 0.5
WEIGHTS: Mapping[str, float] = {"format": 0.5, "accuracy": 0.1, "semantics": 0.3, "quality": 0.1}
"""Of the released code."""
PAPER_WEIGHTS: Mapping[str, float] = {"format": 0.5, "accuracy": 0.1, "step": 0.4}
"""Of the paper, R = 0.5 F + 0.5 (0.2 R_acc + 0.8 R_step), see `paper_parts`."""


@dataclass(frozen=True)
class CriticRow:
    """One recorded attempt to judge, and what is known of it.

    semantics, quality: the judge's scores of `after`, in [0, 10].  `is_t2i`: drawn from words alone, `before` is white.
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
class Marks:
    """The four parts of a reward, each in [0, 1] for scores in [0, 10]."""

    format: float
    accuracy: float
    semantics: float
    quality: float

    @property
    def reward(self) -> float:
        """Their sum with `WEIGHTS`."""
        return sum(weight * vars(self)[name] for name, weight in WEIGHTS.items())


@dataclass
class Counts:
    """What scoring cost so far."""

    answers: int = 0
    unscored: int = 0
    pictures: int = 0
    judgements: int = 0
    reasons: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class ScorerSettings:
    """How answers are scored.

    concurrency: answers that may be with generator or judge at once.  deadline: seconds for the image and the scores of
    one answer.  skip_unchanged: a verdict of success with the prompt unchanged draws nothing and gets 0.5 for semantics
    and quality.  ceiling: share of the last `window` answers that may go unscored.  num_kept: results remembered.
    """

    concurrency: int = 16
    deadline: float = 300.0
    seed: int = 0
    rule: FormatRule = "strict"
    parse_mode: ParseMode = "strict"
    skip_unchanged: bool = False
    ceiling: float = 0.25
    window: int = 256
    num_kept: int = 4096


DEFAULT_SETTINGS = ScorerSettings()


class CriticScorer:
    """Marks for answers; equal answers to the same row are scored once, whoever asks and however often.

    All waiting happens on the event loop that asks; at most `concurrency` answers are with generator or judge at once.
    """

    def __init__(self, generator: Generator, judge: Judge, settings: ScorerSettings = DEFAULT_SETTINGS) -> None:
        self._generator, self._judge, self._settings = generator, judge, settings
        self._recent = deque[bool](maxlen=settings.window)
        self._room: asyncio.Semaphore | None = None
        self._marks: OrderedDict[tuple[str, str], asyncio.Task[Marks | None]] = OrderedDict()
        self.counts = Counts()

    async def score(self, answer: str, row: CriticRow) -> Marks | None:
        """The marks of an answer; None if generator or judge failed."""
        key = (row.id, answer)
        if key not in self._marks:
            self._marks[key] = asyncio.create_task(self._score(answer, row))
            while len(self._marks) > self._settings.num_kept and next(iter(self._marks.values())).done():
                self._marks.popitem(last=False)
        self._marks.move_to_end(key)
        return await asyncio.shield(self._marks[key])

    @property
    def unscored_rate(self) -> float:
        """Share of the last answers that have no marks, in [0, 1]."""
        return sum(self._recent) / len(self._recent) if self._recent else 0.0

    @property
    def has_failed_too_often(self) -> bool:
        """Whether training should stop: more than `ceiling` of a quarter window or more went unscored."""
        return len(self._recent) >= (self._recent.maxlen or 0) // 4 and self.unscored_rate > self._settings.ceiling

    async def _score(self, answer: str, row: CriticRow) -> Marks | None:
        self.counts.answers += 1
        seen = parse_partial_answer(answer)
        mark = float(has_format(answer, self._settings.rule, self._settings.parse_mode))
        accuracy = float(seen.verdict is not None and seen.verdict == row.success)
        if row.success:
            return Marks(mark, accuracy, NEUTRAL, NEUTRAL)
        prompt = seen.prompt or row.prompt_used or row.original_prompt
        unchanged = prompt == (row.prompt_used or row.original_prompt)
        if self._settings.skip_unchanged and unchanged and seen.verdict:
            return Marks(mark, accuracy, NEUTRAL, NEUTRAL)
        try:
            async with self.limits():
                scores = await self.judge(prompt, await self.draw(prompt, row), row)
        except (BackendError, TimeoutError) as failure:
            self.tally(failure)
            return None
        self.tally(None)
        semantics = improvement(scores.semantics, row.semantics)
        return Marks(mark, accuracy, semantics, improvement(scores.quality, row.quality))

    @contextlib.asynccontextmanager
    async def limits(self) -> AsyncIterator[None]:
        """Room among the answers that are with generator or judge, and the deadline.  Raises TimeoutError."""
        if self._room is None:
            self._room = asyncio.Semaphore(self._settings.concurrency)
        async with self._room, asyncio.timeout(self._settings.deadline):
            yield

    async def draw(self, prompt: str, row: CriticRow, again: int = 0) -> HashedImage:
        """The picture drawn with `prompt` from the row's source.  again: how often it was drawn anew before."""
        self.counts.pictures += 1
        return await self._generator.generate(
            GenerationRequest(prompt, () if row.is_t2i else (row.before,), self._settings.seed + again)
        )

    async def judge(self, prompt: str, after: HashedImage, row: CriticRow) -> Scores:
        """The judge's scores of a picture drawn with `prompt`."""
        self.counts.judgements += 1
        return await self._judge.score(CriticInput(row.before, after, row.original_prompt, prompt))

    def tally(self, failure: BackendError | TimeoutError | None) -> None:
        """Count an answer that was scored, or could not be."""
        self._recent.append(failure is not None)
        if failure is not None:
            self.counts.unscored += 1
            self.counts.reasons[failure.kind if isinstance(failure, BackendError) else "timeout"] += 1


def improvement(new: float, old: float) -> float:
    """Scores in [0, 10] to a reward in [0, 1]; 0.5 where nothing changed."""
    return ((new - old) / 10 + 1) / 2


def released_parts(marks: Marks, row: CriticRow) -> Mapping[str, float]:
    """The parts of the released reward, by the names of `WEIGHTS`: the marks themselves."""
    return vars(marks)


def paper_parts(marks: Marks, row: CriticRow) -> Mapping[str, float]:
    """The parts of the paper's reward, by the names of `PAPER_WEIGHTS`.

    accuracy: minus the distance to the recorded verdict, 0 or -1.  step: gain of the overall score
    sqrt(semantics quality) / 10, in [-1, 1]; 0 where the recorded attempt succeeded.  The paper names neither the scale
    nor how the two scores are joined; both are as its released code reports them.
    """
    semantics = row.semantics + 10 * (2 * marks.semantics - 1)
    quality = row.quality + 10 * (2 * marks.quality - 1)
    step = (math.sqrt(max(semantics, 0) * max(quality, 0)) - math.sqrt(row.semantics * row.quality)) / 10
    return {"format": marks.format, "accuracy": marks.accuracy - 1, "step": step}


def reward_functions(
    scorer: CriticScorer,
    rows_of: Callable[[Mapping[str, Sequence[Any]]], Sequence[CriticRow]],
    parts_of: Callable[[Marks, CriticRow], Mapping[str, float]] = released_parts,
    names: Iterable[str] = tuple(WEIGHTS),
) -> list[Callable[..., Coroutine[Any, Any, list[float | None]]]]:
    """Asynchronous reward functions for TRL over one scorer, one for each of `names`, the parts that `parts_of` gives.

    rows_of: from the batch's columns to rows.  Where an answer has no marks all of them give None, so that TRL leaves
    it out of its group.
    """

    def function(part: str) -> Callable[..., Coroutine[Any, Any, list[float | None]]]:
        async def reward(completions: Sequence[Any], **columns: Any) -> list[float | None]:
            rows = rows_of(columns)
            answers = [text_of(completion) for completion in completions]
            marks = await asyncio.gather(
                *(scorer.score(answer, row) for answer, row in zip(answers, rows, strict=True))
            )
            return [
                None if mark is None else float(parts_of(mark, row)[part])
                for mark, row in zip(marks, rows, strict=True)
            ]

        reward.__name__ = part
        return reward

    return [function(name) for name in names]


def text_of(completion: Any) -> str:
    """A completion's words, whether TRL gives a string or one assistant message, with text or parts."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)
