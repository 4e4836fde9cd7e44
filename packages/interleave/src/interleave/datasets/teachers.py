"""Teachers of the miniature: correct plans and verdicts behind the loop's Protocols.

The critic's reasoning reads both images in a fixed form, says of each thing that the instruction wants whether the
image has it, and concludes:

    before: red circle d g. after: (blue cross) m f, (red circle) d g. want: (blue square) wrong, (red circle) asked.
    wrong things

Things stand in order of their names, each with its column and row (sixteen each, `PLACES`).
"""

from collections.abc import Iterable, Sequence

from imgen_common.shapes.scene import OPPOSITE, OPPOSITE_POSITION, SIZE, Spec, Thing, position_holds
from imgen_common.shapes.steps import DIRECTION, MAX_DRIFT, Change, Draw, Step, Story, short_name
from imgen_common.shapes.stories import read_prompt, step_holds
from imgen_common.shapes.verify import Detection
from interleave.agents.miniature import detect_things, is_blank
from interleave.agents.prompts import render_plan, render_verdict
from interleave.protocols import CriticAnswer, CriticInput, HashedImage, PlannerAnswer
from interleave.records import Plan, PlanStep, Request, Verdict

PLACES = "abcdefghijklmnop"
"""Sixteen columns from the left, sixteen rows from the top, of two pixels each."""


# --- planner ---------------------------------------------------------------------------------------------------------


def make_plan(story: Story) -> Plan:
    """The story's plan, with the reasoning that leads to it."""
    steps = tuple(
        PlanStep(index=i, name=step.name, instruction=step.text, prompt=step.prompt)
        for i, step in enumerate(story.steps, 1)
    )
    return Plan(steps=steps, reasoning="; ".join(map(_explain_step, story.steps)))


def _explain_step(step: Step) -> str:
    """What a step does, and what is in the image after it."""
    if isinstance(step, Draw):
        return step.prompt
    where = f" {step.place} {step.anchor or ''}".rstrip()
    done = {"add": f"add {step.target}{where}", "remove": f"remove {step.target}"}.get(
        step.kind, f"make {step.target} {step.colour}"
    )
    return f"{done}: {', '.join(map(str, step.after))}"


def make_verdict(before: Sequence[Detection] | None, after: Sequence[Detection], original: str, used: str) -> Verdict:
    """The verdict that the verifier's readings imply.

    On success the prompt used comes back.  Otherwise the next prompt is another wording of the original instruction
    (`rewordings`) where the last one used was the original itself, else the original: wordings take turns.
    """
    step = read_prompt(original, None if before is None else [d.thing for d in before])
    want = "nothing fits" if step is None else _compare_things(step.after, [d.thing for d in after])
    finding = _finding(before, after, step)
    reasoning = f"before: {_list_detections(before)}. after: {_list_detections(after, '({})')}. want: {want}. {finding}"
    if finding == "as asked":
        return Verdict(success=True, refined_prompt=used, reasoning=reasoning)
    others = wordings(original, before)[1:]
    refined = others[0] if others and used == original else original
    return Verdict(success=False, refined_prompt=refined, reasoning=reasoning)


def _compare_things(wanted: Sequence[Thing], shown: Sequence[Thing]) -> str:
    """Each wanted thing with whether it is among those shown, none of which counts twice."""
    left, parts = list(shown), []
    for thing in sorted(wanted):
        parts.append(f"({thing}) {'asked' if thing in left else 'wrong'}")
        if thing in left:
            left.remove(thing)
    return ", ".join(parts)


def _list_detections(found: Sequence[Detection] | None, name: str = "{}") -> str:
    if not found:
        return "nothing"
    ordered = sorted(found, key=lambda d: (d.thing, d.x, d.y))
    return ", ".join(f"{name.format(d.thing)} {_cell(d.x)} {_cell(d.y)}" for d in ordered)


def _cell(pixels: float) -> str:
    return PLACES[min(max(int(pixels * len(PLACES) / SIZE), 0), len(PLACES) - 1)]


def _finding(before: Sequence[Detection] | None, after: Sequence[Detection], step: Step | None) -> str:
    """`as asked`, or the first thing that is not."""
    if step is None:
        return "not as asked"
    if step_holds(before, after, step):
        return "as asked"
    if sorted(d.thing for d in after) != sorted(step.after):
        return "wrong things"
    if isinstance(step, Change) and before is not None and _has_moved(before, after, step):
        return "moved"
    return "wrong place"


def _has_moved(before: Sequence[Detection], after: Sequence[Detection], step: Change) -> bool:
    was, now = {d.thing: d for d in before}, {d.thing: d for d in after}
    pairs = [(t, t) for t in step.untouched] + ([(step.target, step.result)] if step.kind == "recolour" else [])
    return any(max(abs(was[a].x - now[b].x), abs(was[a].y - now[b].y)) > MAX_DRIFT for a, b in pairs)


def wordings(original: str, before: Sequence[Detection] | None) -> list[str]:
    """The instruction itself and, where it makes sense of the image before, its `rewordings`."""
    step = read_prompt(original, None if before is None else [d.thing for d in before])
    others = [] if step is None else rewordings(step, before or ())
    return [original, *(w for w in others if w != original)]


def rewordings(step: Step, before: Sequence[Detection]) -> list[str]:
    """Other prompts of the generator's language that ask for the same, given the image before; the best first.

    Two things change places in the sentence (a relation turns round).  A thing to recolour or remove is named in full,
    or by its shape alone.  `right of the circle` becomes `on the right` where the circle stands in the left half, and
    `on the right` becomes `right of` a thing in the right half; likewise for the other sides.
    """
    if isinstance(step, Draw):
        spec = step.spec
        if spec.category not in ("two", "binding", "relation"):
            return []
        place = OPPOSITE[spec.place] if spec.place else ""
        return [Spec(spec.category, (spec.things[1], spec.things[0]), place).caption]
    if step.kind == "recolour":
        return [f"make the {step.target} {step.colour}"]
    if step.kind == "remove":
        return [f"remove the {step.target}"]
    return _other_places(step, before)


MARGIN = 2.0
"""How far from the middle, in pixels, a thing must stand for its half to imply a relation."""


def _other_places(step: Change, before: Sequence[Detection]) -> list[str]:
    places = {d.thing: d for d in before}
    if step.anchor is not None:
        anchor, side = places[step.anchor], DIRECTION[step.place]
        far = position_holds(OPPOSITE_POSITION[side], anchor.x, anchor.y, MARGIN)
        return [f"add a {step.target} on the {side}"] if far else []
    relation = {side: relation for relation, side in DIRECTION.items()}[step.place]
    near = sorted(t for t, d in places.items() if position_holds(step.place, d.x, d.y, 0.0))
    return [f"add a {step.target} {relation} the {short_name(t, step.before)}" for t in near]


class StoryPlanner:
    """Gives each story's correct plan."""

    id = "shapes stories"

    def __init__(self, stories: Iterable[Story]) -> None:
        self._stories = {story.request: story for story in stories}

    async def plan(self, request: Request, images: Sequence[HashedImage], seed: int) -> PlannerAnswer:
        """The plan with its reasoning."""
        story = self._stories.get(request.text)
        if story is None:
            return PlannerAnswer(None, "", "not a request of prompts.kind shapes")
        plan = make_plan(story)
        return PlannerAnswer(plan, render_plan(plan))

    async def close(self) -> None:
        """Nothing to release."""


class TeacherCritic:
    """The verifier's verdict with the reasoning that leads to it, and another wording after a failure."""

    id = "shapes verifier"

    async def judge(self, shown: CriticInput, seed: int) -> CriticAnswer:
        """What the readings of both images imply."""
        before = None if is_blank(shown.before) else detect_things(shown.before)
        used = shown.prompt_used or shown.original_prompt
        verdict = make_verdict(before, detect_things(shown.after), shown.original_prompt, used)
        return CriticAnswer(verdict, render_verdict(verdict))

    async def close(self) -> None:
        """Nothing to release."""
