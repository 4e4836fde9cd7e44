"""One attempt at a step: generate an image, ask the critic, score it; and which attempt a story shows."""

import asyncio
import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from imgen_common.errors import UserError
from imgen_common.streams import stream_seed
from interleave.loop.config import LoopConfig, Selection
from interleave.protocols import BackendError, Components, CriticAnswer, CriticInput, GenerationRequest, HashedImage
from interleave.records import Attempt, AttemptStatus, FailureKind, GeneratorInfo, PlanStep, Request, Scores
from interleave.storage.images import ImageStore


@dataclass(frozen=True)
class AttemptInput:
    """What an attempt starts from: `prompt` for `step`, the images so far, and the story that they belong to.

    earlier: attempts of earlier sessions that are made again.
    """

    request: Request
    step: PlanStep
    number: int
    prompt: str
    images: Sequence[HashedImage]
    story: tuple[tuple[str, HashedImage | None], ...]
    earlier: Sequence[Attempt] = ()


@dataclass
class _Outcome:
    """What came of an attempt, filled in from stage to stage.  timings: seconds of each stage."""

    status: AttemptStatus = "unjudged"
    error: str | None = None
    error_kind: FailureKind | None = None
    image_id: str | None = None
    revised_prompt: str | None = None
    before_id: str | None = None
    answer: CriticAnswer = field(default_factory=lambda: CriticAnswer(None, ""))
    critic_tries: int = 0
    scores: Scores | None = None
    timings: dict[str, float] = field(default_factory=dict)

    def fail(self, status: AttemptStatus, failure: BackendError) -> None:
        self.status, self.error, self.error_kind = status, failure.description, failure.kind

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.timings[stage] = time.perf_counter() - began


class AttemptRunner:
    """Makes attempts.  Seeds depend on `seed`, the request's id, the step and the attempt alone."""

    def __init__(self, components: Components, loop: LoopConfig, seed: int, images: ImageStore) -> None:
        self._components, self._loop, self._seed, self._images = components, loop, seed, images

    async def run(self, start: AttemptInput) -> Attempt:
        """The attempt, its images stored.  What a component fails on is in the record."""
        generator, step = self._components.generator, start.step
        # An edit is given the latest accepted image, or as many of them as the generator takes
        wanted = 1 if self._loop.references == "latest" else max(1, generator.max_sources)
        sources = tuple(start.images[-wanted:])
        generation = GenerationRequest(start.prompt, sources, self._stream_seed("draw", start))
        outcome = _Outcome()
        await self._generate(start, generation, outcome)
        verdict = outcome.answer.verdict
        return Attempt(
            trajectory_id=start.request.id,
            step=step.index,
            attempt=start.number,
            op="edit" if sources else "t2i",
            source_ids=tuple(source.id for source in sources),
            before_id=outcome.before_id,
            original_prompt=step.prompt or "",
            prompt_used=start.prompt,
            revised_prompt=outcome.revised_prompt,
            seed=generation.seed,
            generator=GeneratorInfo(id=generator.id, params=generator.params),
            image_id=outcome.image_id,
            verdict=verdict.success if verdict else None,
            refined_prompt=verdict.refined_prompt if verdict else None,
            reasoning=verdict.reasoning if verdict else None,
            success_probability=outcome.answer.success_probability,
            raw=outcome.answer.raw,
            finish_reason=outcome.answer.finish_reason,
            critic_tries=outcome.critic_tries,
            error=outcome.error,
            error_kind=outcome.error_kind,
            scores=outcome.scores,
            timings=outcome.timings,
            status=outcome.status,
        )

    async def _generate(self, start: AttemptInput, generation: GenerationRequest, outcome: _Outcome) -> None:
        """Generate the image; if there is one, judge and score it."""
        if (after := await asyncio.to_thread(self._unjudged_image, start, generation)) is None:
            try:
                with outcome.timed("generate"):
                    after = await self._components.generator.generate(generation)
            except BackendError as failure:
                outcome.fail("generator_failed", failure)
                return
        await asyncio.to_thread(self._images.put, after)
        # The critic compares with the latest accepted image; the first one of a story with a white canvas
        before = start.images[-1] if start.images else HashedImage.white(*after.image.size)
        if not start.images:
            await asyncio.to_thread(self._images.put, before)
        outcome.image_id, outcome.before_id, outcome.revised_prompt = after.id, before.id, after.revised_prompt
        drawn = after.revised_prompt or start.prompt
        asked = start.step.prompt or "", drawn, start.request.text, start.story
        shown = CriticInput(before, after, *asked, is_edit=bool(start.images))
        await self._judge(start, shown, outcome)
        await self._score(shown, outcome)

    def _unjudged_image(self, start: AttemptInput, generation: GenerationRequest) -> HashedImage | None:
        """The image of the same attempt of an earlier session, about which the critic gave no answer; it is not to be
        paid for again."""
        asked = start.step.index, start.number, generation.prompt, tuple(source.id for source in generation.sources)
        for old in start.earlier:
            is_same = (old.step, old.attempt, old.prompt_used, old.source_ids) == asked
            if is_same and old.status == "critic_failed" and old.image_id is not None:
                with contextlib.suppress(UserError):  # it is lost
                    return replace(self._images.get(old.image_id), revised_prompt=old.revised_prompt)
        return None

    async def _judge(self, start: AttemptInput, shown: CriticInput, outcome: _Outcome) -> None:
        """Ask the critic, with other seeds until its answer can be read."""
        critic = self._components.critic
        if critic is None:
            return
        outcome.status = "critic_unparsable"
        with outcome.timed("critic"):
            while outcome.answer.verdict is None and outcome.critic_tries < self._loop.critic_tries:
                outcome.critic_tries += 1
                try:
                    seed = self._stream_seed("judge", start, outcome.critic_tries)
                    outcome.answer = await critic.judge(shown, seed)
                except BackendError as failure:
                    outcome.fail("critic_failed", failure)
                    return
                outcome.error = outcome.answer.error
        verdict = outcome.answer.verdict
        if verdict is not None:
            outcome.status, outcome.error = "accepted" if verdict.success else "rejected", None

    async def _score(self, shown: CriticInput, outcome: _Outcome) -> None:
        """Ask the judge, if there is one; the attempt counts without its scores too."""
        judge = self._components.judge
        if judge is None:
            return
        try:
            with outcome.timed("judge"):
                outcome.scores = await judge.score(shown)
        except BackendError as failure:
            outcome.error = "; ".join(filter(None, (outcome.error, f"judge: {failure.description}")))

    async def score_again(self, attempt: Attempt) -> Attempt | None:
        """The attempt with the scores that its judge could not give; None where it fails again, or an image is lost."""
        ids = [image_id for image_id in (attempt.before_id, attempt.image_id) if image_id is not None]
        try:
            before, after = [await asyncio.to_thread(self._images.get, image_id) for image_id in ids]
        except UserError:
            return None
        outcome = _Outcome()
        await self._score(CriticInput(before, after, attempt.original_prompt, attempt.drawn_prompt), outcome)
        if outcome.scores is None:
            return None
        return attempt.with_scores(outcome.scores, attempt.timings["judge"] + outcome.timings["judge"])

    def _stream_seed(self, purpose: str, start: AttemptInput, *counters: int) -> int:
        return stream_seed(self._seed, f"{purpose}/{start.request.id}", start.step.index, start.number, *counters)


def select_attempt(rule: Selection, attempts: Sequence[Attempt]) -> Attempt | None:
    """One of the accepted attempts, or of all that have an image where none was accepted; None without an image.

    Of equal ones the earliest wins.
    """
    generated = [attempt for attempt in attempts if attempt.image_id is not None]
    accepted = [attempt for attempt in generated if attempt.status == "accepted"]
    pool = accepted or generated
    if not pool:
        return None
    match rule:
        case "last":
            return pool[-1]
        case "first_success":
            return accepted[0] if accepted else pool[-1]
        case "best_by_judge":
            return max(pool, key=lambda a: a.scores.overall if a.scores else -1.0)
        case "best_by_verdict_probability":
            return max(pool, key=lambda a: -1.0 if a.success_probability is None else a.success_probability)
