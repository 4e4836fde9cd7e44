"""Parts that do as they are told, for tests of the loop: plans by request, verdicts by rule, images by hash."""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from interleave.protocols import BackendError, CriticAnswer, CriticInput, GenerationRequest, HashedImage, PlannerAnswer
from interleave.records import Plan, PlanStep, Request, Scores, Verdict


def picture_of(request: GenerationRequest) -> Image.Image:
    """An image that tells its prompt, sources and seed apart."""
    named = repr((request.prompt, [source.id for source in request.sources], request.seed)).encode()
    return Image.frombytes("RGB", (4, 4), (hashlib.sha256(named).digest() * 2)[:48])


def plan_of(*prompts: str | None) -> Plan:
    """Steps with these prompts; None is a step of text alone."""
    steps = (
        PlanStep(index=i, prompt=prompt, instruction=prompt, text=None if prompt else f"words {i}")
        for i, prompt in enumerate(prompts, 1)
    )
    return Plan(steps=tuple(steps), reasoning="because")


@dataclass
class FakePlanner:
    """Answers with `answer(request, seed)`: a plan, an error, or a failure."""

    answer: Callable[[Request, int], Plan | str | BackendError]
    latency: float = 0.0
    calls: int = 0
    id: str = "fake planner"

    async def plan(self, request: Request, pictures: Sequence[HashedImage], seed: int) -> PlannerAnswer:
        self.calls += 1
        await asyncio.sleep(self.latency)
        answer = self.answer(request, seed)
        if isinstance(answer, BackendError):
            raise answer
        template = {"template": "fake", "template_hash": "0"}
        if isinstance(answer, str):
            return PlannerAnswer(None, answer, "unreadable", **template)
        return PlannerAnswer(answer, "raw", **template)

    async def close(self) -> None:
        pass


@dataclass
class FakeCritic:
    """Answers with `answer(shown, seed)`: a verdict (success, next prompt), an error, or a failure."""

    answer: Callable[[CriticInput, int], tuple[bool, str] | str | BackendError]
    latency: float = 0.0
    looks: list[CriticInput] = field(default_factory=list)
    probability: Callable[[CriticInput], float] | None = None
    id: str = "fake critic"

    async def judge(self, shown: CriticInput, seed: int) -> CriticAnswer:
        self.looks.append(shown)
        await asyncio.sleep(self.latency)
        answer = self.answer(shown, seed)
        if isinstance(answer, BackendError):
            raise answer
        if isinstance(answer, str):
            return CriticAnswer(None, answer, "unreadable")
        verdict = Verdict(success=answer[0], refined_prompt=answer[1], reasoning="seen")
        return CriticAnswer(verdict, "raw", None, self.probability(shown) if self.probability else None)

    async def close(self) -> None:
        pass


@dataclass
class FakeGenerator:
    """Draws `picture_of` the request; fails where `fails(request)` gives a failure.  `limit`: jobs at once."""

    fails: Callable[[GenerationRequest], Exception | None] = lambda request: None
    latency: float = 0.0
    limit: int = 10_000
    max_sources: int = 1
    id: str = "fake generator"
    params: Mapping[str, Any] = field(default_factory=dict)
    jobs: list[GenerationRequest] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._room = asyncio.Semaphore(self.limit)

    async def generate(self, request: GenerationRequest) -> HashedImage:
        async with self._room:
            self.jobs.append(request)
            await asyncio.sleep(self.latency)
        failure = self.fails(request)
        if failure is not None:
            raise failure
        return HashedImage.from_pil(picture_of(request))

    async def close(self) -> None:
        pass


@dataclass
class FakeJudge:
    """Scores by rule."""

    score_of: Callable[[CriticInput], float]
    id: str = "fake judge"

    async def score(self, shown: CriticInput) -> Scores:
        value = self.score_of(shown)
        return Scores(semantics=value, quality=value, judge_id=self.id)

    async def close(self) -> None:
        pass


def repeated(jobs: Sequence[GenerationRequest]) -> Counter[tuple[Any, ...]]:
    """Jobs that were given more than once."""
    counts = Counter((request.prompt, tuple(s.id for s in request.sources), request.seed) for request in jobs)
    return Counter({request: count for request, count in counts.items() if count > 1})
