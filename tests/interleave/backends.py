"""Parts that do as they are told, for tests of the loop: plans by request, verdicts by rule, pictures by hash."""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from interleave.parts import CriticAnswer, Job, Look, PartFailed, Picture, PlannerAnswer
from interleave.records import Plan, PlanStep, Request, Scores, Verdict


def picture_of(job: Job) -> Image.Image:
    """A picture that tells its prompt, sources and seed apart."""
    named = repr((job.prompt, [source.id for source in job.sources], job.seed)).encode()
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

    answer: Callable[[Request, int], Plan | str | PartFailed]
    latency: float = 0.0
    calls: int = 0
    id: str = "fake planner"

    async def plan(self, request: Request, pictures: Sequence[Picture], seed: int) -> PlannerAnswer:
        self.calls += 1
        await asyncio.sleep(self.latency)
        answer = self.answer(request, seed)
        if isinstance(answer, PartFailed):
            raise answer
        template = {"template": "fake", "template_hash": "0"}
        if isinstance(answer, str):
            return PlannerAnswer(None, answer, "unreadable", **template)
        return PlannerAnswer(answer, "raw", **template)

    async def close(self) -> None:
        pass


@dataclass
class FakeCritic:
    """Answers with `answer(look, seed)`: a verdict (success, next prompt), an error, or a failure."""

    answer: Callable[[Look, int], tuple[bool, str] | str | PartFailed]
    latency: float = 0.0
    looks: list[Look] = field(default_factory=list)
    probability: Callable[[Look], float] | None = None
    id: str = "fake critic"

    async def judge(self, look: Look, seed: int) -> CriticAnswer:
        self.looks.append(look)
        await asyncio.sleep(self.latency)
        answer = self.answer(look, seed)
        if isinstance(answer, PartFailed):
            raise answer
        if isinstance(answer, str):
            return CriticAnswer(None, answer, "unreadable")
        verdict = Verdict(success=answer[0], refined_prompt=answer[1], reasoning="seen")
        return CriticAnswer(verdict, "raw", None, self.probability(look) if self.probability else None)

    async def close(self) -> None:
        pass


@dataclass
class FakeGenerator:
    """Draws `picture_of` the job; fails where `fails(job)` gives a failure.  `limit`: jobs at once."""

    fails: Callable[[Job], Exception | None] = lambda job: None
    latency: float = 0.0
    limit: int = 10_000
    max_sources: int = 1
    id: str = "fake generator"
    params: Mapping[str, Any] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._room = asyncio.Semaphore(self.limit)

    async def generate(self, job: Job) -> Picture:
        async with self._room:
            self.jobs.append(job)
            await asyncio.sleep(self.latency)
        failure = self.fails(job)
        if failure is not None:
            raise failure
        return Picture.of(picture_of(job))

    async def close(self) -> None:
        pass


@dataclass
class FakeJudge:
    """Scores by rule."""

    score_of: Callable[[Look], float]
    id: str = "fake judge"

    async def score(self, look: Look) -> Scores:
        value = self.score_of(look)
        return Scores(sc=value, pq=value, judge_id=self.id)

    async def close(self) -> None:
        pass


def repeated(jobs: Sequence[Job]) -> Counter[tuple[Any, ...]]:
    """Jobs that were given more than once."""
    counts = Counter((job.prompt, tuple(s.id for s in job.sources), job.seed) for job in jobs)
    return Counter({job: count for job, count in counts.items() if count > 1})
