"""Teachers that know: the miniature's own plans and verdicts behind the loop's Protocols."""

from collections.abc import Iterable, Sequence

from imgen_common.shapes.stories import Story
from interleave.miniature.data import judge, plan_of
from interleave.miniature.oracle import is_blank, things_in
from interleave.parts import CriticAnswer, Look, Picture, PlannerAnswer
from interleave.prompts import render_plan, render_verdict
from interleave.records import Request


class StoryPlanner:
    """Gives each story's correct plan."""

    def __init__(self, stories: Iterable[Story]) -> None:
        self._stories = {story.request: story for story in stories}

    @property
    def id(self) -> str:
        return "shapes stories"

    async def plan(self, request: Request, pictures: Sequence[Picture], seed: int) -> PlannerAnswer:
        """The plan with its reasoning."""
        story = self._stories.get(request.text)
        if story is None:
            return PlannerAnswer(None, "", "not a request of prompts.kind shapes")
        plan = plan_of(story)
        return PlannerAnswer(plan, render_plan(plan))

    async def close(self) -> None:
        """Nothing to let go of."""


class KnowingCritic:
    """The verifier's verdict with the reasoning that leads to it, and another wording after a failure."""

    @property
    def id(self) -> str:
        return "shapes verifier"

    async def judge(self, look: Look, seed: int) -> CriticAnswer:
        """What the readings of both pictures imply."""
        before = None if is_blank(look.before) else things_in(look.before)
        used = look.prompt_used or look.original_prompt
        verdict = judge(before, things_in(look.after), look.original_prompt, used)
        return CriticAnswer(verdict, render_verdict(verdict))

    async def close(self) -> None:
        """Nothing to let go of."""
