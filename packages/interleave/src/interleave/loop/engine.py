"""The loop: plan, generate, judge, rewrite, for many requests at once, with everything on record.

For every step of a plan the generator makes an image (the first of a request without images from text alone, all others
by editing the latest accepted one), the critic compares it with the image before, and a rejected one is generated again
from the same source with the critic's prompt and another seed.  A rejected image is never a source.  Source:
InterleaveThinker, arXiv 2606.13679; where this loop departs from it, docs/interleave.md says so.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata

from imgen_common.errors import UserError
from imgen_common.streams import stream_seed
from interleave.loop.attempts import AttemptInput, AttemptRunner, select_attempt
from interleave.loop.config import LoopConfig
from interleave.models.concurrency import map_concurrently
from interleave.protocols import BackendError, Components, HashedImage, Planner, PlannerAnswer
from interleave.records import (
    Attempt,
    AttemptStatus,
    FailureKind,
    Plan,
    PlannerRecord,
    PlanRecord,
    PlanStep,
    Record,
    Request,
    Spent,
    Trajectory,
    TrajectoryStatus,
)
from interleave.storage.images import ImageStore
from interleave.storage.trace import Trace, TraceEntry, add_record

log = logging.getLogger(__name__)
NOT_ACCEPTED: tuple[AttemptStatus, ...] = ("rejected", "critic_unparsable")
OF_THE_SERVER: tuple[FailureKind, ...] = ("denied", "unreachable", "rate_limited", "server_error", "timeout")
"""Failures of the generator that say nothing of the request, which may be answered later."""


@dataclass
class _StoryState:
    """A request while it is worked on.

    images: the user's, then one of each step that has one.  parts: words and image of each step so far.
    seconds_before: of attempts of earlier sessions.  replaced: attempts of earlier sessions that are made again, and
    what followed them; no budget counts them.
    """

    request: Request
    images: list[HashedImage] = field(default_factory=list)
    parts: list[tuple[str, HashedImage | None]] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    selected: dict[int, int] = field(default_factory=dict)
    started_at: float = field(default_factory=time.perf_counter)
    seconds_before: float = 0.0
    replaced: list[Attempt] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started_at

    def spent(self, planner: PlannerRecord | None) -> Spent:
        return Spent(
            generations=sum("generate" in attempt.timings for attempt in (*self.attempts, *self.replaced)),
            critic_calls=sum(attempt.critic_tries for attempt in (*self.attempts, *self.replaced)),
            planner_calls=planner.num_tries if planner else 0,
            seconds=self.seconds + sum(sum(attempt.timings.values()) for attempt in self.replaced),
        )


@dataclass(frozen=True)
class _Ending:
    """How a story ends, and why where it is not complete."""

    status: TrajectoryStatus = "complete"
    error: str | None = None
    error_kind: FailureKind | None = None


class Engine:
    """Runs requests through the loop and records what happens.

    Records are appended to `trace` the moment they are complete, images before the records that name them, so that a
    kill at any instant loses at most the attempt in flight.  A request that the trace holds already continues from
    where it stopped; a finished one is returned as it is.  Seeds depend on `seed`, the request's id, the step and the
    attempt alone, so that neither concurrency nor a resume changes what is asked of the models; docs/interleave.md says
    where their answers can differ by rounding.
    """

    def __init__(
        self,
        components: Components,
        loop: LoopConfig,
        seed: int,
        trace: Trace,
        images: ImageStore,
        on_record: Callable[[Record], None] = lambda record: None,
        retry_failed: bool = False,
    ) -> None:
        """on_record: called with every new record.  retry_failed: stories that ended early are continued, and a judge
        that gave no scores to attempts of the others is asked again.

        Raises UserError if the selection needs a judge or a critic that is not there.
        """
        if loop.select == "best_by_judge" and components.judge is None:
            raise UserError("loop.select: best_by_judge needs a judge; configure one or choose another selection")
        if loop.select == "best_by_verdict_probability" and components.critic is None:
            raise UserError("loop.select: best_by_verdict_probability needs a critic; configure one")
        self._planner, self._loop, self._seed = components.planner, loop, seed
        self._attempts = AttemptRunner(components, loop, seed, images)
        self._trace, self._images, self._on_record = trace, images, on_record
        self._retry_failed = retry_failed
        self._recorded = trace.read(forget_whole=True)
        self._writing = asyncio.Lock()

    async def run_all(self, requests: Sequence[Request]) -> list[Trajectory]:
        """The trajectories of all requests in their order; `loop.concurrency` run at once.

        What goes wrong in one request is in its trajectory and touches no other.  Raises UserError where none can
        continue, as on a full disk, and ValueError if two requests have the same id.
        """
        if len({request.id for request in requests}) < len(requests):
            raise ValueError("two requests have the same id")
        self._writing = asyncio.Lock()  # of this event loop
        return await map_concurrently(self.run, requests, self._loop.concurrency)

    async def run(self, request: Request) -> Trajectory:
        """One request, to its end."""
        recorded = self._recorded.get(request.id, TraceEntry())
        if recorded.trajectory is not None and (recorded.trajectory.is_whole or not self._retry_failed):
            if self._retry_failed:  # what the story shows stays as it is: its later steps came from that
                for attempt in (attempt for attempt in recorded.attempts.values() if attempt.has_lost_scores):
                    if (scored := await self._attempts.score_again(attempt)) is not None:
                        await self._write(scored)
            return recorded.trajectory
        story, planned = _StoryState(request), recorded.plan
        try:
            story.images = [self._images.get(image_id) for image_id in request.image_ids]
        except UserError as lost:  # which the other requests do not need
            return await self._end(story, planned, _Ending("internal_error", str(lost)))
        try:
            planned = await self._plan(story, recorded)
            if planned.plan is not None:
                usable = await asyncio.to_thread(self._usable_attempts, recorded)
                again = recorded.attempts.keys() - usable.keys()
                story.replaced = [*recorded.replaced, *(recorded.attempts[key] for key in again)]
                ending = await self._run_steps(story, planned.plan, usable)
            else:
                about = planned.planner
                error = about.error if about and about.error else "no plan"
                ending = _Ending("planner_failed", error, about.error_kind if about else None)
        except UserError:
            raise  # no request can continue
        except Exception as failure:
            log.exception("request %s", request.id)
            ending = _Ending("internal_error", f"{type(failure).__name__}: {failure}")
        return await self._end(story, planned, ending)

    async def _end(self, story: _StoryState, planned: PlanRecord | None, ending: _Ending) -> Trajectory:
        planner = planned.planner if planned else None
        trajectory = Trajectory(
            id=story.request.id,
            request=story.request,
            planner=planner,
            plan=planned.plan if planned else None,
            selected=story.selected,
            status=ending.status,
            error=ending.error,
            error_kind=ending.error_kind,
            spent=story.spent(planner),
            versions=package_versions(),
        )
        await self._write(trajectory)
        return trajectory

    async def _plan(self, story: _StoryState, recorded: TraceEntry) -> PlanRecord:
        """The recorded plan, or a new one."""
        old = recorded.plan
        # A planner that failed in an earlier session is asked again only where failed stories are continued
        if old is not None and (old.plan is not None or recorded.trajectory is None):
            return old
        earlier_tries = old.planner.num_tries if old and old.planner else 0
        record = await request_plan(self._planner, story.request, story.images, self._loop, self._seed, earlier_tries)
        await self._write(record)
        return record

    def _usable_attempts(self, recorded: TraceEntry) -> Mapping[tuple[int, int], Attempt]:
        """Recorded attempts by (step, attempt); not the failed ones at the end, where failures are to be tried again,
        nor those from the first on whose image is lost.

        A failed attempt that others followed stays: what followed depends on how the story went on.
        """
        usable: dict[tuple[int, int], Attempt] = {}
        for key, attempt in sorted(recorded.attempts.items()):
            if attempt.image_id is not None and (reason := self._images.drop_unreadable(attempt.image_id)):
                log.warning("%s; step %d is done again from attempt %d on", reason, *key)
                break
            usable[key] = attempt
        if recorded.trajectory and self._retry_failed:
            for key, attempt in reversed(list(usable.items())):
                if attempt.status not in ("generator_failed", "critic_failed"):
                    break
                del usable[key]
        return usable

    async def _run_steps(self, story: _StoryState, plan: Plan, recorded: Mapping[tuple[int, int], Attempt]) -> _Ending:
        """All steps in order, until one fails or the budget is spent."""
        for step in plan.steps:
            if step.kind == "text":
                story.parts.append((step.words, None))
                continue
            ending = await self._run_step(story, step, recorded)
            # The story shows the step's best image, also where it ends with this step
            attempts = [attempt for attempt in story.attempts if attempt.step == step.index]
            chosen = select_attempt(self._loop.select, attempts)
            if chosen is not None and chosen.image_id is not None:
                image = self._images.get(chosen.image_id)
                story.selected[step.index] = chosen.attempt
                story.images.append(image)
                story.parts.append((step.words, image))
            if ending is not None:
                return ending
            last = attempts[-1]
            # a rejected image, or the best of fewer than were asked for, is not the step's because the server is away
            is_lost = last.error_kind in OF_THE_SERVER
            is_early = last.attempt < self._loop.max_attempts
            if chosen is None or (is_lost and (is_early or chosen.status in NOT_ACCEPTED)):
                return _Ending("generator_failed", f"step {step.index}: {last.error}", last.error_kind)
        accepted = {attempt.step for attempt in story.attempts if attempt.status in ("accepted", "unjudged")}
        if rejected := sorted(story.selected.keys() - accepted):
            steps = f"step{'s' * (len(rejected) > 1)} {', '.join(map(str, rejected))}"
            tried = [attempt for attempt in story.attempts if attempt.step in rejected and attempt.image_id]
            if all(attempt.status == "critic_unparsable" for attempt in tried):
                what = f"no answer of the critic on {steps} could be read (the last: {tried[-1].error})"
                return _Ending("steps_not_accepted", what)
            return _Ending("steps_not_accepted", f"the critic accepted no image of {steps}")
        return _Ending()

    async def _run_step(
        self, story: _StoryState, step: PlanStep, recorded: Mapping[tuple[int, int], Attempt]
    ) -> _Ending | None:
        """The step's attempts, recorded ones first.  What ends the story, if it is the budget or the critic."""
        prompt = step.prompt or ""
        for number in range(1, self._loop.max_attempts + 1):
            # An attempt of an earlier session is taken as it is; its time counts
            attempt = recorded.get((step.index, number))
            if attempt is not None:
                story.seconds_before += sum(attempt.timings.values())
            elif (reason := self._spent_budget(story)) is not None:
                return _Ending("budget_exhausted", reason)
            else:
                so_far = tuple(story.images), tuple(story.parts)
                start = AttemptInput(story.request, step, number, prompt, *so_far, earlier=story.replaced)
                attempt = await self._attempts.run(start)
                await self._write(attempt)
            story.attempts.append(attempt)
            if attempt.status == "critic_failed":
                return _Ending("critic_failed", f"step {step.index}: {attempt.error}", attempt.error_kind)
            # What the generator refuses for good it would refuse again; a server is asked once more: each call waits
            # for it by itself, and an image that took too long, or cannot be read, was perhaps paid for
            failures = [one.error_kind for one in story.attempts[-min(number, 2) :] if one.status == "generator_failed"]
            num_lost = sum(kind in (*OF_THE_SERVER, "malformed_response") for kind in failures)
            if failures[-1:] in (["refused"], ["denied"]) or num_lost == 2:
                break
            if self._loop.stop_on_success and attempt.status in ("accepted", "unjudged"):
                break
            # The next attempt has the critic's prompt; an answer that could not be read leaves the prompt as it is
            if self._loop.rewrite and attempt.status == "rejected":
                prompt = attempt.refined_prompt or prompt
        return None

    def _spent_budget(self, story: _StoryState) -> str | None:
        """Which budget of the request is spent, if one is."""
        loop = self._loop
        if loop.max_generations is not None and len(story.attempts) >= loop.max_generations:
            last = f" (the last failed: {story.attempts[-1].error})" if story.attempts[-1].image_id is None else ""
            return f"{len(story.attempts)} images were asked for, as many as loop.max_generations allows{last}"
        if loop.max_seconds is not None and story.seconds >= loop.max_seconds:
            return f"{story.seconds:.0f} s have passed; loop.max_seconds allows no more"
        return None

    async def _write(self, record: PlanRecord | Attempt | Trajectory) -> None:
        async with self._writing:
            await asyncio.to_thread(self._trace.append, record)
        add_record(self._recorded, record, forget_whole=True)  # for a second call
        self._on_record(record)


async def request_plan(
    planner: Planner | None,
    request: Request,
    images: Sequence[HashedImage],
    loop: LoopConfig,
    seed: int,
    earlier_tries: int = 0,
) -> PlanRecord:
    """The plan of a request, asked for until it can be used, or why there is none.

    Without a planner it has one step, whose prompt is the request.  Seeds continue from `earlier_tries`.
    """
    if planner is None:
        step = PlanStep(index=1, instruction=request.text, prompt=request.text)
        return PlanRecord(trajectory_id=request.id, request=request, planner=None, plan=Plan(steps=(step,)))
    answer = PlannerAnswer(None, "")
    tries, error, error_kind = 0, "", None
    while answer.plan is None and tries < loop.planner_tries:
        tries += 1
        try:
            plan_seed = stream_seed(seed, f"plan/{request.id}", earlier_tries + tries)
            answer = await planner.plan(request, images, plan_seed)
        except BackendError as failure:
            error, error_kind = failure.description, failure.kind
            break
        if answer.plan is not None and len(answer.plan.steps) > loop.max_steps:
            what = f"a plan of {len(answer.plan.steps)} steps; at most {loop.max_steps} are allowed"
            answer = replace(answer, plan=None, error=what)
        error = answer.error or ""
    about = PlannerRecord(
        model=planner.id,
        template=answer.template,
        template_hash=answer.template_hash,
        raw=answer.raw,
        finish_reason=answer.finish_reason,
        num_tries=earlier_tries + tries,
        error=error if answer.plan is None else None,
        error_kind=error_kind,
    )
    return PlanRecord(trajectory_id=request.id, request=request, planner=about, plan=answer.plan)


def package_versions() -> dict[str, str]:
    """Versions of the packages that a record depends on."""
    return {name: metadata.version(name) for name in ("interleave", "imgen-common")}
