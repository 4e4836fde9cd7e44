"""The loop: plan, draw, judge, rewrite, for many requests at once, with everything on record.

For every step of a plan the generator draws a picture (the first of a request without pictures from text alone, all
others by editing the latest accepted one), the critic compares it with the picture before, and a rejected one is drawn
again from the same source with the critic's prompt and another seed.  A rejected picture is never a source.  Source:
InterleaveThinker, arXiv 2606.13679; where this loop departs from it, docs/interleave.md says so.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from annotated_types import Ge, Gt
from PIL import Image

from imgen_common.config import Config
from imgen_common.errors import UserError
from imgen_common.streams import stream_key
from interleave.parts import (
    Critic,
    CriticAnswer,
    Generator,
    Job,
    Judge,
    Look,
    PartFailed,
    Picture,
    Planner,
    PlannerAnswer,
)
from interleave.records import (
    Attempt,
    AttemptStatus,
    GeneratorInfo,
    Plan,
    PlannerRecord,
    PlanRecord,
    PlanStep,
    Record,
    Request,
    Scores,
    Spent,
    Trajectory,
    TrajectoryStatus,
)
from interleave.resilience import each
from interleave.store import PictureStore, Recorded, Trace

Selection = Literal["last", "first_success", "best_by_judge", "best_by_verdict_probability"]
PositiveInt = Annotated[int, Ge(1)]
log = logging.getLogger(__name__)


class LoopConfig(Config):
    """How the loop goes, and its budgets."""

    max_steps: PositiveInt = 16
    """Longest plan that is accepted; a longer one is asked for again."""
    max_attempts: PositiveInt = 16
    """Pictures drawn for one step, at most; 5 is the paper's best, its released code takes 3, the miniature's generator
    needs more."""
    max_generations: PositiveInt | None = None
    """Pictures drawn for one request, at most; null: as many as its steps and attempts allow."""
    max_seconds: Annotated[float, Gt(0)] | None = None
    """Seconds after which a request draws no further picture; null: no limit."""
    planner_tries: PositiveInt = 5
    """How often the planner is asked for a plan that can be read."""
    critic_tries: PositiveInt = 3
    """How often the critic is asked for a verdict that can be read, per picture."""
    stop_on_success: bool = True
    """Whether a step ends with its first accepted picture; false: `max_attempts` are always drawn (best of N)."""
    rewrite: bool = True
    """Whether a rejected picture is drawn again with the critic's prompt; false: with the step's own, another seed."""
    select: Selection = "last"
    """Which picture of a step the story shows, among the accepted ones, or all where none was accepted: the last, the
    first accepted, the one with the judge's highest sqrt(sc * pq), or with the critic's highest probability of
    success."""
    references: Literal["latest", "all"] = "latest"
    """What an edit is given: the latest accepted picture, or all accepted ones that the generator can take."""
    concurrency: PositiveInt = 16
    """Requests worked on at once."""


@dataclass(frozen=True)
class Parts:
    """Who does what.  planner None: the request is the only prompt.  critic None: no picture is judged."""

    planner: Planner | None
    critic: Critic | None
    generator: Generator
    judge: Judge | None = None

    async def close(self) -> None:
        """Let go of all of them."""
        for part in (self.planner, self.critic, self.generator, self.judge):
            if part is not None:
                await part.close()


class _Ended(Exception):
    """The story ends here."""

    def __init__(self, status: TrajectoryStatus, error: str) -> None:
        super().__init__(error)
        self.status: TrajectoryStatus = status


class _NoPlan(Exception):
    """The planner gave no plan."""

    def __init__(self, record: PlanRecord) -> None:
        super().__init__((record.planner and record.planner.error) or "no plan")
        self.record = record


@dataclass
class _Story:
    """A request while it is worked on."""

    request: Request
    accepted: list[Picture]
    """Pictures so far: the user's, then one of each drawn step."""
    began: float
    told: list[tuple[str, Picture | None]] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    selected: dict[int, int] = field(default_factory=dict)
    seconds_before: float = 0.0
    """Seconds of attempts of earlier sessions."""

    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.began


class Engine:
    """Runs requests through the loop and records what happens.

    Records are appended to `trace` the moment they are complete, pictures before the records that name them, so that a
    kill at any instant loses at most the attempt in flight.  A request that the trace holds already is gone on with
    from where it stopped; a finished one is given back as it is.  Seeds depend on `seed`, the request's id, the step
    and the attempt alone, so that neither concurrency nor a resume changes a record (times excepted).
    """

    def __init__(
        self,
        parts: Parts,
        loop: LoopConfig,
        seed: int,
        trace: Trace,
        pictures: PictureStore,
        on_record: Callable[[Record], None] = lambda record: None,
        versions: Mapping[str, str] | None = None,
        retry_failed: bool = False,
    ) -> None:
        """on_record: told of every record, new ones only.  retry_failed: stories that ended early are gone on with.

        Raises UserError if the selection needs a judge or a critic that is not there.
        """
        if loop.select == "best_by_judge" and parts.judge is None:
            raise UserError("loop.select: best_by_judge needs a judge; configure one or choose another selection")
        if loop.select == "best_by_verdict_probability" and parts.critic is None:
            raise UserError("loop.select: best_by_verdict_probability needs a critic; configure one")
        self._parts, self._loop, self._seed = parts, loop, seed
        self._trace, self._pictures, self._on_record = trace, pictures, on_record
        self._versions, self._retry_failed = dict(versions or {}), retry_failed
        self._recorded = trace.read()
        self._writing = asyncio.Lock()

    async def run_all(self, requests: Sequence[Request]) -> list[Trajectory]:
        """All requests, `loop.concurrency` at once, answered in their order.

        What goes wrong in one request is in its trajectory and touches no other.  Raises UserError where nothing can
        go on, as on a full disk, and ValueError if two requests have the same id.
        """
        if len({request.id for request in requests}) < len(requests):
            raise ValueError("two requests have the same id")
        return await each(self.run, requests, self._loop.concurrency)

    async def run(self, request: Request) -> Trajectory:
        """One request, to its end."""
        old = self._recorded.get(request.id, Recorded())
        if old.trajectory is not None and (old.trajectory.status == "complete" or not self._retry_failed):
            return old.trajectory
        story = _Story(request, [], time.perf_counter())
        planned, status, error = old.plan, "complete", None
        try:
            story.accepted = [self._pictures.get(image_id) for image_id in request.image_ids]
            planned = await self._plan(story, old.plan, again=old.trajectory is not None)
            await self._tell(story, planned.plan, self._usable(old))
        except _NoPlan as failure:
            planned, status, error = failure.record, "planner_failed", str(failure)
        except _Ended as end:
            status, error = end.status, str(end)
        except UserError:
            raise
        except Exception as failure:
            log.exception("request %s", request.id)
            status, error = "broken", f"{type(failure).__name__}: {failure}"
        trajectory = Trajectory(
            id=request.id,
            request=request,
            planner=planned.planner if planned else None,
            plan=planned.plan if planned else None,
            selected=story.selected,
            status=status,
            error=error,
            spent=_spent(story, planned.planner if planned else None),
            versions=self._versions,
        )
        await self._write(trajectory)
        return trajectory

    def _usable(self, old: Recorded) -> Mapping[tuple[int, int], Attempt]:
        """Recorded attempts; not those that failed, where failures are to be tried again."""
        if old.trajectory is None or not self._retry_failed:
            return old.attempts
        failed = ("generator_failed", "critic_failed")
        return {key: attempt for key, attempt in old.attempts.items() if attempt.status not in failed}

    async def _write(self, record: PlanRecord | Attempt | Trajectory) -> None:
        async with self._writing:
            await asyncio.to_thread(self._trace.append, record)
        self._on_record(record)

    # --- the plan ----------------------------------------------------------------------------------------------------

    async def _plan(self, story: _Story, old: PlanRecord | None, again: bool) -> PlanRecord:
        """The recorded plan, or a new one (where none could be made, only if `again`).

        Raises _NoPlan if the planner gives none.
        """
        if old is not None and (old.plan is not None or not again):
            return _needing_plan(old)
        tried = old.planner.num_tries if old and old.planner else 0
        record = await ask_planner(self._parts.planner, story.request, story.accepted, self._loop, self._seed, tried)
        await self._write(record)
        return _needing_plan(record)

    # --- the steps ---------------------------------------------------------------------------------------------------

    async def _tell(self, story: _Story, plan: Plan | None, old: Mapping[tuple[int, int], Attempt]) -> None:
        """All steps in order.  Raises _Ended where one fails or the budget is spent."""
        assert plan is not None
        for step in plan.steps:
            if step.kind == "text":
                story.told.append((step.words, None))
                continue
            try:
                attempts = await self._draw_step(story, step, old)
            except _Ended:
                self._choose(story, step, [a for a in story.attempts if a.step == step.index])
                raise
            if not self._choose(story, step, attempts):
                raise _Ended("generator_failed", f"step {step.index}: {attempts[-1].error}")

    def _choose(self, story: _Story, step: PlanStep, attempts: Sequence[Attempt]) -> bool:
        """Put the step's picture into the story.  False if there is none."""
        chosen = select(self._loop.select, attempts)
        if chosen is None or chosen.image_id is None:
            return False
        picture = self._pictures.get(chosen.image_id)
        story.selected[step.index] = chosen.attempt
        story.accepted.append(picture)
        story.told.append((step.words, picture))
        return True

    async def _draw_step(self, story: _Story, step: PlanStep, old: Mapping[tuple[int, int], Attempt]) -> list[Attempt]:
        """The step's attempts, recorded ones first.  Raises _Ended if the budget is spent or the critic failed."""
        attempts: list[Attempt] = []
        prompt = step.prompt or ""
        for number in range(1, self._loop.max_attempts + 1):
            attempt = old.get((step.index, number))
            if attempt is not None:
                story.seconds_before += sum(attempt.timings.values())
            else:
                self._check_budget(story)
                attempt = await self._attempt(story, step, number, prompt)
                await self._write(attempt)
            attempts.append(attempt)
            story.attempts.append(attempt)
            if attempt.status == "critic_failed":
                raise _Ended("critic_failed", f"step {step.index}: {attempt.error}")
            if attempt.status == "generator_failed" and (attempt.error or "").startswith("refused"):
                break
            if self._loop.stop_on_success and attempt.status in ("accepted", "unjudged"):
                break
            if self._loop.rewrite and attempt.status == "rejected":
                prompt = attempt.refined_prompt or prompt
        return attempts

    def _check_budget(self, story: _Story) -> None:
        drawn, seconds = _num_drawn(story), story.seconds()
        if self._loop.max_generations is not None and drawn >= self._loop.max_generations:
            raise _Ended("budget_exhausted", f"{drawn} pictures were drawn, as many as loop.max_generations allows")
        if self._loop.max_seconds is not None and seconds >= self._loop.max_seconds:
            raise _Ended("budget_exhausted", f"{seconds:.0f} s have gone; loop.max_seconds allows no more")

    async def _attempt(self, story: _Story, step: PlanStep, number: int, prompt: str) -> Attempt:
        """Draw, judge and score one picture."""
        generator, request = self._parts.generator, story.request
        wanted = 1 if self._loop.references == "latest" else max(1, generator.max_sources)
        job = Job(prompt, tuple(story.accepted[-wanted:]), _seed(self._seed, "draw", request, step.index, number))
        timings: dict[str, float] = {}
        began = time.perf_counter()
        common = {
            "trajectory_id": request.id,
            "step": step.index,
            "attempt": number,
            "op": "edit" if job.sources else "t2i",
            "source_ids": tuple(picture.id for picture in job.sources),
            "original_prompt": step.prompt,
            "prompt_used": prompt,
            "seed": job.seed,
            "generator": GeneratorInfo(id=generator.id, params=generator.params),
        }
        try:
            after = await generator.generate(job)
        except PartFailed as failure:
            timings["generate"] = time.perf_counter() - began
            error = f"{failure.kind}: {failure}"
            return Attempt(**common, status="generator_failed", error=error, timings=timings)
        timings["generate"] = time.perf_counter() - began
        await asyncio.to_thread(self._pictures.put, after)
        before = story.accepted[-1] if story.accepted else _white(after)
        look = Look(before, after, step.prompt or "", prompt, request.text, tuple(story.told))
        if not story.accepted:
            await asyncio.to_thread(self._pictures.put, before)
        judged = await self._judge(story, step, number, look, timings)
        scores, scoring_error = await self._score(look, timings)
        if scoring_error:
            judged["error"] = f"{judged['error']}; {scoring_error}" if judged.get("error") else scoring_error
        return Attempt(**common, image_id=after.id, before_id=before.id, scores=scores, timings=timings, **judged)

    async def _judge(
        self, story: _Story, step: PlanStep, number: int, look: Look, timings: dict[str, float]
    ) -> dict[str, object]:
        """The critic's part of an attempt's record."""
        if self._parts.critic is None:
            return {"status": "unjudged"}
        began, answer, tries = time.perf_counter(), CriticAnswer(None, "", "not asked"), 0
        error: str | None = None
        status: AttemptStatus = "critic_unparsable"
        while answer.verdict is None and tries < self._loop.critic_tries:
            tries += 1
            seed = _seed(self._seed, "judge", story.request, step.index, number, tries)
            try:
                answer = await self._parts.critic.judge(look, seed)
                error = answer.error
            except PartFailed as failure:
                status, error = "critic_failed", f"{failure.kind}: {failure}"
                break
        timings["critic"] = time.perf_counter() - began
        verdict = answer.verdict
        if verdict is not None:
            status, error = "accepted" if verdict.success else "rejected", None
        return {
            "status": status,
            "error": error,
            "critic_tries": tries,
            "raw": answer.raw,
            "verdict": verdict.success if verdict else None,
            "refined_prompt": verdict.refined_prompt if verdict else None,
            "reasoning": verdict.reasoning if verdict else None,
            "success_probability": answer.success_probability,
        }

    async def _score(self, look: Look, timings: dict[str, float]) -> tuple[Scores | None, str | None]:
        """The judge's scores, or why there are none."""
        if self._parts.judge is None:
            return None, None
        began = time.perf_counter()
        try:
            return await self._parts.judge.score(look), None
        except PartFailed as failure:
            return None, f"judge: {failure.kind}: {failure}"
        finally:
            timings["judge"] = time.perf_counter() - began


async def ask_planner(
    planner: Planner | None, request: Request, pictures: Sequence[Picture], loop: LoopConfig, seed: int, tried: int = 0
) -> PlanRecord:
    """The plan of a request, asked for until it can be used, or why there is none.

    planner None: one step, whose prompt is the request.  tried: how often it was asked before; seeds go on from there.
    """
    if planner is None:
        step = PlanStep(index=1, instruction=request.text, prompt=request.text)
        return PlanRecord(trajectory_id=request.id, request=request, planner=None, plan=Plan(steps=(step,)))
    answer, error = PlannerAnswer(None, ""), ""
    tries = 0
    while answer.plan is None and tries < loop.planner_tries:
        tries += 1
        try:
            answer = await planner.plan(request, pictures, _seed(seed, "plan", request, tried + tries))
        except PartFailed as failure:
            error = f"{failure.kind}: {failure}"
            break
        error = answer.error or ""
        if answer.plan is not None and len(answer.plan.steps) > loop.max_steps:
            error = f"a plan of {len(answer.plan.steps)} steps; at most {loop.max_steps} are allowed"
            answer = replace(answer, plan=None)
    about = PlannerRecord(
        model=planner.id,
        template=answer.template,
        template_hash=answer.template_hash,
        raw=answer.raw,
        num_tries=tried + tries,
        error=None if answer.plan else error,
    )
    return PlanRecord(trajectory_id=request.id, request=request, planner=about, plan=answer.plan)


def select(rule: Selection, attempts: Sequence[Attempt]) -> Attempt | None:
    """The attempt whose picture the story shows: one of the accepted ones, or of all that have a picture where none
    was accepted; None without a picture.  Of equal ones the earliest wins."""
    drawn = [attempt for attempt in attempts if attempt.image_id is not None]
    accepted = [attempt for attempt in drawn if attempt.status == "accepted"]
    pool = accepted or drawn
    if not pool:
        return None
    match rule:
        case "last":
            return pool[-1]
        case "first_success":
            return accepted[0] if accepted else pool[-1]
        case "best_by_judge":
            return max(pool, key=lambda a: math.sqrt(a.scores.sc * a.scores.pq) if a.scores else -1.0)
        case "best_by_verdict_probability":
            return max(pool, key=lambda a: -1.0 if a.success_probability is None else a.success_probability)


def _needing_plan(record: PlanRecord) -> PlanRecord:
    if record.plan is None:
        raise _NoPlan(record)
    return record


def _seed(seed: int, purpose: str, request: Request, *counters: int) -> int:
    return stream_key(seed, f"{purpose}/{request.id}", *counters) % 2**31


def _white(like: Picture) -> Picture:
    return Picture.of(Image.new("RGB", like.image.size, "white"))


def _num_drawn(story: _Story) -> int:
    return sum(attempt.image_id is not None for attempt in story.attempts)


def _spent(story: _Story, planner: PlannerRecord | None) -> Spent:
    return Spent(
        generations=_num_drawn(story),
        critic_calls=sum(attempt.critic_tries for attempt in story.attempts),
        planner_calls=planner.num_tries if planner else 0,
        seconds=story.seconds(),
    )
