"""Asks the planner until its plan can be used."""

from collections.abc import Sequence
from dataclasses import replace

from imgen_common.streams import stream_seed
from interleave.loop.config import LoopConfig
from interleave.protocols import BackendError, HashedImage, Planner, PlannerAnswer
from interleave.records import Plan, PlannerRecord, PlanRecord, PlanStep, Request


async def request_plan(
    planner: Planner | None,
    request: Request,
    images: Sequence[HashedImage],
    loop: LoopConfig,
    seed: int,
    earlier_tries: int = 0,
) -> PlanRecord:
    """The plan of a request, asked for until it can be used, or why there is none.

    planner None: one step, whose prompt is the request.  earlier_tries: how often it was asked before; seeds go on from
    there.
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
            answer = _within_limit(await planner.plan(request, images, plan_seed), loop.max_steps)
        except BackendError as failure:
            error, error_kind = failure.description, failure.kind
            break
        error = answer.error or ""
    has_plan = answer.plan is not None
    about = PlannerRecord(
        model=planner.id,
        template=answer.template,
        template_hash=answer.template_hash,
        raw=answer.raw,
        num_tries=earlier_tries + tries,
        error=None if has_plan else error,
        error_kind=None if has_plan else error_kind,
    )
    return PlanRecord(trajectory_id=request.id, request=request, planner=about, plan=answer.plan)


def _within_limit(answer: PlannerAnswer, max_steps: int) -> PlannerAnswer:
    """The answer, without its plan where that is too long."""
    if answer.plan is None or len(answer.plan.steps) <= max_steps:
        return answer
    error = f"a plan of {len(answer.plan.steps)} steps; at most {max_steps} are allowed"
    return replace(answer, plan=None, error=error)
