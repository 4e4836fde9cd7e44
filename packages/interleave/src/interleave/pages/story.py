"""One story as HTML: the words and pictures as a reader wants them, and folded under each step how it came about."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from imgen_common.page import fold, table, text
from interleave.loop.selection import select_attempt
from interleave.pages.attempts import attempts_html, compared_images
from interleave.pages.images import Shots
from interleave.pages.words import MARKS, count, describe_error, fact_list, format_seconds, labeled, preformatted, user
from interleave.records import Attempt, Plan, PlannerRecord, PlanStep, Request, Trajectory
from interleave.storage.trace import TraceEntry

ENDS = {
    "complete": "complete",
    "planner_failed": "ended without a plan",
    "generator_failed": "ended early: the generator failed",
    "critic_failed": "ended early: the critic failed",
    "budget_exhausted": "ended early: its budget is spent",
    "internal_error": "ended early: an error in the program",
    "unfinished": "not finished",
    "waiting": "not begun",
}
BEING_TOLD = "being told"


@dataclass(frozen=True)
class Story:
    """All that is known of one request, whether it is finished or not.  attempts: by step and number."""

    request: Request
    planner: PlannerRecord | None = None
    plan: Plan | None = None
    attempts: tuple[Attempt, ...] = ()
    trajectory: Trajectory | None = None

    @classmethod
    def of(cls, request: Request, recorded: TraceEntry) -> "Story":
        """From the records of a run."""
        known = recorded.trajectory or recorded.plan
        return cls(
            request,
            known.planner if known else None,
            known.plan if known else None,
            tuple(recorded.attempts[key] for key in sorted(recorded.attempts)),
            recorded.trajectory,
        )

    @property
    def end(self) -> str:
        """How it stands: a key of `ENDS`."""
        if self.trajectory is not None:
            return self.trajectory.status
        return "unfinished" if self.planner or self.plan or self.attempts else "waiting"

    def attempts_of(self, step: PlanStep) -> list[Attempt]:
        """The attempts at a step."""
        return [attempt for attempt in self.attempts if attempt.step == step.index]

    def shown(self, step: PlanStep) -> Attempt | None:
        """The attempt whose picture stands for a step: the selected one, or so far the last."""
        attempts = self.attempts_of(step)
        if self.trajectory is None:
            return select_attempt("last", attempts)
        selected = self.trajectory.selected.get(step.index)
        return next((attempt for attempt in attempts if attempt.attempt == selected), None)

    def reached(self, step: PlanStep) -> bool:
        """Whether the story came as far as a step: all pictures before it are there, and the critic did not fail."""
        if self.end == "critic_failed" and step.index > max((one.step for one in self.attempts), default=0):
            return False
        before = [earlier for earlier in (self.plan.steps if self.plan else ()) if earlier.index < step.index]
        shown = [self.shown(earlier) for earlier in before if earlier.kind == "image"]
        return all(one is not None and one.image_id is not None for one in shown)

    def image_ids(self) -> Iterable[str]:
        """Pictures given, drawn and compared with."""
        yield from self.request.image_ids
        for attempt in self.attempts:
            yield from filter(None, (attempt.image_id, *compared_images(attempt)))


# --- one story -------------------------------------------------------------------------------------------------------


def story_html(story: Story, shots: Shots, hint: str = "", anchor: str = "", *, live: bool = False) -> str:
    """One story as HTML, without a page around it.

    hint: HTML that says how to go on.  anchor: its name in a page of many.  live: while it is being told, without what
    unfolds.
    """
    steps = "".join(_step(story, step, shots, live) for step in (story.plan.steps if story.plan else ()))
    given = "".join(
        shots.show(image_id, f"picture {i} of the request") for i, image_id in enumerate(story.request.image_ids, 1)
    )
    given = f'<div class="given"><p class="note">given with the request</p><div>{given}</div></div>' if given else ""
    tag, place = ("h2", f' id="{anchor}"') if anchor else ("h1", "")
    look = ' class="long"' if len(story.request.text) > 160 else ""
    behind = "" if live else _planning(story) + _spending(story)
    return (
        f'<article class="story"{place}><header><{tag}{look} dir="auto">{text(story.request.text)}</{tag}>'
        f"<p class=facts>{_facts(story, anchor, live)}</p></header>{_ending(story, hint)}"
        f"{given}{steps}{behind}</article>"
    )


def _facts(story: Story, anchor: str, live: bool) -> str:
    good = {"complete": "up", "unfinished": "same", "waiting": "same"}.get(story.end, "down")
    words = BEING_TOLD if live and story.trajectory is None else ENDS[story.end]
    parts = [f'<span class="chip {good}">{text(words)}</span>']
    if story.plan:
        parts.append(count(len(story.plan.steps), "step"))
    if story.attempts:
        parts.append(count(sum(one.image_id is not None for one in story.attempts), "picture") + " drawn")
    if story.trajectory:
        parts.append(format_seconds(story.trajectory.spent.seconds))
    if anchor:
        parts.append('<a href="#">all stories</a>')
    return " · ".join(parts)


def _ending(story: Story, hint: str) -> str:
    """Why it is not complete, and what to do."""
    why = reason(story)
    told = f'<p class="warn">{text(ENDS[story.end].capitalize())}{why}.</p>' if why else ""
    return told + hint


def reason(story: Story) -> str:
    """Why a story ended, as HTML that goes on after how it ended; "" where there is nothing to say."""
    error = story.trajectory.error if story.trajectory else None
    return f": {user(describe_error(error))}" if error else ""


def _step(story: Story, step: PlanStep, shots: Shots, live: bool) -> str:
    words = f'<p class="tell" dir="auto">{text(step.words)}</p>' if step.words else ""
    number = f'<p class="number">{step.index}</p>'
    attempts, shown = story.attempts_of(step), story.shown(step)
    if not story.reached(step):
        return f'<section class="step later">{number}{words}<p class="note">not reached{" yet" * live}</p></section>'
    if step.kind == "text":
        return f'<section class="step text">{number}{words}</section>'
    if not attempts:
        state = "not drawn" if story.trajectory else "being drawn"
        return f'<section class="step later">{number}{words}<p class="note">{state}</p></section>'
    picture = '<span class="missing">no picture</span>'
    if shown and shown.image_id:
        picture = shots.show(shown.image_id, step.words or shown.prompt_used)
    state = _state(attempts, shown, story.trajectory is not None)
    strip = _strip(attempts, shown, shots) if len(attempts) > 1 else ""
    how = (
        ""
        if live
        else fold(f"How it was drawn: {count(len(attempts), 'attempt')}", attempts_html(attempts, shown, shots))
    )
    return (
        f'<section class="step"><div class="scene">{picture}</div>'
        f'<div class="words">{number}{words}<p class="state">{state}</p>{strip}</div>{how}</section>'
    )


def _state(attempts: Sequence[Attempt], shown: Attempt | None, ended: bool) -> str:
    """What became of a step."""
    last = shown or attempts[-1]
    _, colour, words = MARKS[last.status]
    more = f" at attempt {last.attempt} of {len(attempts)}" if len(attempts) > 1 else ""
    if ended and shown is not None and shown.status == "rejected":
        words, more = "never accepted", f"; attempt {last.attempt} of {len(attempts)} is shown"
    return f'<span class="chip {colour}">{text(words)}{more}</span>'


def _strip(attempts: Sequence[Attempt], shown: Attempt | None, shots: Shots) -> str:
    """All attempts at a glance."""
    parts = []
    for one in attempts:
        sign, colour, words = MARKS[one.status]
        told = f"attempt {one.attempt}, {words}: {one.prompt_used}"
        picture = shots.show(one.image_id, told) if one.image_id else '<span class="missing"></span>'
        chosen = " chosen" if one is shown else ""
        parts.append(
            f'<span class="try{chosen}" title="{text(told)}">{picture}'
            f'<i class="mark {colour}" aria-hidden="true">{sign}</i></span>'
        )
    return f'<div class="tries">{"".join(parts)}</div>'


def _planning(story: Story) -> str:
    if story.plan is None and story.planner is None:
        return ""
    parts = []
    if story.plan:
        if story.plan.reasoning:
            parts.append(labeled("The planner's reasoning", text(story.plan.reasoning)))
        rows = [
            [str(step.index), *(user(value or "") for value in (step.name, step.instruction, step.prompt, step.text))]
            for step in story.plan.steps
        ]
        parts.append(table(["", "Name", "Instruction", "Prompt", "Text"], rows))
    if story.planner:
        about = story.planner
        template = f"{about.template} ({about.template_hash[:12]})"
        asked = count(about.num_tries, "time")
        error = describe_error(about.error or "")
        parts.append(fact_list({"model": about.model, "template": template, "asked": asked, "error": error}))
        parts.append(fold("The planner's answer as it came", preformatted(about.raw)) if about.raw else "")
    return fold("The plan", *parts)


def _spending(story: Story) -> str:
    if story.trajectory is None:
        return ""
    spent = story.trajectory.spent
    facts = {
        "pictures drawn": str(spent.generations),
        "calls of the planner": str(spent.planner_calls),
        "calls of the critic": str(spent.critic_calls),
        "time": format_seconds(spent.seconds),
        **story.trajectory.versions,
        "request": story.request.id,
    }
    return fold("What it took", fact_list(facts))


STYLE = """
.story { --pic: 27rem; margin-top: 1rem; }
.story[id] { --pic: 15rem; margin-top: 3.5rem; padding-top: 1.5rem; border-top: 1px solid var(--line);
  content-visibility: auto; contain-intrinsic-size: auto 60rem; scroll-margin-top: 0; }
a { color: var(--blue); }
.story h1, .story h2 { white-space: pre-line; overflow-wrap: anywhere; }
.story h1.long, .story h2.long { font-size: 1.05rem; font-weight: 500; line-height: 1.5; letter-spacing: 0; }
.step { display: grid; grid-template-columns: minmax(0, var(--pic)) minmax(0, 1fr); gap: .4rem 2rem; align-items: start;
  margin-top: 2rem; break-inside: avoid; }
.step.text, .step.later { display: block; } .step.later { opacity: .6; }
.step > details { grid-column: 1 / -1; margin: .2rem 0; }
.shot { display: block; width: 100%; height: auto; border-radius: 8px; background: var(--card); }
.shot.pixels { image-rendering: pixelated; }
.scene .shot { max-height: 85vh; box-shadow: 0 0 0 1px var(--line); }
.words { align-self: center; }
.missing { display: grid; place-items: center; min-height: 5rem; border: 1px dashed var(--line); border-radius: 8px;
  color: var(--muted); font-size: .85rem; padding: .5rem; overflow-wrap: anywhere; }
.number { color: var(--muted); font-size: .85rem; margin: 0; font-variant-numeric: tabular-nums; }
.tell { font-size: 1.3rem; line-height: 1.4; margin: 0 0 .8rem; white-space: pre-line; overflow-wrap: anywhere; }
.given > div { display: flex; flex-wrap: wrap; gap: .8rem; } .given .shot { width: 11rem; }
.given .note { margin: 0 0 .3rem; }
.tries { display: flex; flex-wrap: wrap; gap: .5rem; margin-top: .8rem; }
.try { position: relative; width: 4.2rem; opacity: .75; } .try.chosen { opacity: 1; }
.try.chosen .shot { outline: 2px solid var(--green); outline-offset: 2px; }
.try .missing { min-height: 4.2rem; padding: 0; }
.mark { position: absolute; right: -4px; bottom: -4px; width: 1.2rem; height: 1.2rem; border-radius: 50%; color: #fff;
  background: #6b7280; font: 700 .75rem/1.2rem system-ui, sans-serif; text-align: center; }
.mark.up { background: #047a55; } .mark.down { background: #be123c; }
.attempt { display: grid; grid-template-columns: minmax(0, 17rem) minmax(0, 1fr); gap: .6rem 1.6rem;
  border-left: 2px solid var(--line); padding: .2rem 0 .2rem 1.1rem; margin: 1rem 0 1.4rem; break-inside: avoid; }
.attempt h3 { grid-column: 1 / -1; } .attempt .chip { font-weight: 400; margin-left: .3rem; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .6rem; align-items: start; }
.pair figure { margin: 0; } .pair figcaption { font-size: .8rem; color: var(--muted); text-align: center; }
h4 { font-size: .8rem; font-weight: 600; color: var(--muted); margin: .7rem 0 .1rem; }
.attempt h4:first-child { margin: 0; }
.quote { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
ins { color: var(--green); text-decoration: underline; text-underline-offset: 2px; }
del { color: var(--red); text-decoration: line-through; }
dl { margin: .8rem 0; font-size: .85rem; display: grid; gap: .1rem; }
dl div { display: grid; grid-template-columns: 9.5rem minmax(0, 1fr); gap: 1rem; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
.story pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.story td { vertical-align: top; } .story > details { margin: 1.2rem 0 0; } .step + details { margin-top: 2.2rem; }
.story > details + details { margin-top: .4rem; }
footer.note { margin-top: 3rem; }
@media (max-width: 700px) { .step, .attempt { grid-template-columns: minmax(0, 1fr); } .tell { font-size: 1.15rem; }
  .story { --pic: 100%; } dl div { grid-template-columns: 7rem minmax(0, 1fr); } }
@media print { .story[id] { content-visibility: visible; } main { max-width: none; padding: 0; }
  .story { --pic: 9cm; } details:not([open]) { display: none; } }
"""
