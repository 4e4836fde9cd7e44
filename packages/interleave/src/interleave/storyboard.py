"""One story as HTML: the words and pictures as a reader wants them, and folded under each step how it came about."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from difflib import SequenceMatcher

from PIL import Image

from imgen_common.errors import UserError
from imgen_common.images import data_uri
from imgen_common.page import fold, table, text
from interleave.engine import select
from interleave.parts import Picture
from interleave.records import Attempt, AttemptStatus, Plan, PlannerRecord, PlanStep, Request, Trajectory
from interleave.store import Recorded

SMALL = 128
"""Longest side in pixels up to which a picture is shown enlarged, pixel by pixel, and kept exactly."""
SIDES = (1024, 768, 512, 384, 256)
"""Longest sides to which larger pictures are reduced: the first at which all pictures of the page fit `PIXELS`."""
PIXELS = 40 * 10**6
"""Pixels that all reduced pictures of a page have together, at most, unless they are already at the least side."""
WEBP_QUALITY = 85

MARKS: Mapping[AttemptStatus, tuple[str, str, str]] = {
    "accepted": ("✓", "up", "accepted"),
    "rejected": ("✗", "down", "rejected"),
    "unjudged": ("–", "same", "not judged"),
    "critic_unparsable": ("?", "same", "the critic's answers could not be read"),
    "critic_failed": ("!", "down", "the critic failed"),
    "generator_failed": ("!", "down", "the generator failed"),
}
"""Sign, colour and words of an attempt's status."""
ENDS = {
    "complete": "complete",
    "planner_failed": "ended without a plan",
    "generator_failed": "ended early: the generator failed",
    "critic_failed": "ended early: the critic failed",
    "budget_exhausted": "ended early: its budget is spent",
    "broken": "ended early: an error in the program",
    "unfinished": "not finished",
    "waiting": "not begun",
}
BEING_TOLD = "being told"
FAILURES = {
    "unreachable": "no connection",
    "refused": "the endpoint said no for good",
    "overloaded": "the endpoint was too busy, however often it was asked",
    "deadline": "too slow",
    "garbage": "an answer that cannot be read",
    "out_of_memory": "out of memory",
    "broken": "an error in its own code",
}
"""Kinds of failure in plain words."""


@dataclass(frozen=True)
class Story:
    """All that is known of one request, whether it is finished or not.  attempts: by step and number."""

    request: Request
    planner: PlannerRecord | None = None
    plan: Plan | None = None
    attempts: tuple[Attempt, ...] = ()
    trajectory: Trajectory | None = None

    @classmethod
    def of(cls, request: Request, recorded: Recorded) -> "Story":
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
            return select("last", attempts)
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
            yield from filter(None, (attempt.image_id, *_compared(attempt)))


# --- pictures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Encoded:
    """A picture ready for the page: its own size in pixels, and its data."""

    width: int
    height: int
    uri: str


class Shots:
    """The pictures of a page, each put into it once."""

    def __init__(
        self, image_ids: Iterable[str], pictures: Callable[[str], Picture], sides: Sequence[int] = SIDES
    ) -> None:
        """image_ids: all that will be shown.  pictures: as for `render`.  sides: longest sides, as `SIDES`."""
        ids = list(dict.fromkeys(image_ids))
        self.side = next((side for side in sides if len(ids) * side**2 <= PIXELS), sides[-1])
        """Longest side of a picture in the page."""
        with ThreadPoolExecutor() as pool:
            encoded = pool.map(lambda image_id: self._encode(image_id, pictures), ids)
            self._found = dict(zip(ids, encoded, strict=True))
        self._placed: set[str] = set()

    def _encode(self, image_id: str, pictures: Callable[[str], Picture]) -> _Encoded | str:
        try:
            image = pictures(image_id).image
        except UserError as error:
            return str(error)
        width, height = image.size
        if max(width, height) <= SMALL:
            return _Encoded(width, height, data_uri(image))
        reduced = image.copy()
        reduced.thumbnail((self.side, self.side), Image.Resampling.LANCZOS)
        return _Encoded(width, height, data_uri(reduced, WEBP_QUALITY))

    @property
    def any_small(self) -> bool:
        """Whether some are shown enlarged."""
        return any(isinstance(one, _Encoded) and max(one.width, one.height) <= SMALL for one in self._found.values())

    @property
    def any_reduced(self) -> bool:
        """Whether some were larger than the page shows them."""
        return any(isinstance(one, _Encoded) and max(one.width, one.height) > SMALL for one in self._found.values())

    def show(self, image_id: str, words: str) -> str:
        """The picture, described by `words`."""
        one = self._found[image_id]
        if isinstance(one, str):
            return f'<span class="missing">picture missing: {text(one)}</span>'
        name = f"p{image_id[:20]}"
        inside = f'<use href="#{name}"/>'
        if image_id not in self._placed:
            self._placed.add(image_id)
            size = f'width="{one.width}" height="{one.height}"'
            inside = f'<image id="{name}" {size} href="{one.uri}"/>'
        look = "shot pixels" if max(one.width, one.height) <= SMALL else "shot"
        return (
            f'<svg class="{look}" viewBox="0 0 {one.width} {one.height}" role="img" aria-label="{text(words)}">'
            f"{inside}</svg>"
        )


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
        parts.append(_clock(story.trajectory.spent.seconds))
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
    return f": {user(_plain(error))}" if error else ""


def _plain(error: str) -> str:
    """An error with its kind in plain words."""
    return re.sub(rf"\b({'|'.join(FAILURES)})(?=: )", lambda found: FAILURES[found[0]], error)


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
    how = "" if live else fold(f"How it was drawn: {count(len(attempts), 'attempt')}", _all(attempts, shown, shots))
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


def _all(attempts: Sequence[Attempt], shown: Attempt | None, shots: Shots) -> str:
    return "".join(_attempt(one, shots, one is shown and len(attempts) > 1) for one in attempts)


def _attempt(one: Attempt, shots: Shots, chosen: bool) -> str:
    _, colour, words = MARKS[one.status]
    chips = f'<span class="chip {colour}">{text(words)}</span>' + (' <span class="chip">shown</span>' if chosen else "")
    error = f'<p class="warn">{user(_plain(one.error))}</p>' if one.error else ""
    answer = fold("The critic's answer as it came", _pre(one.raw)) if one.raw else ""
    return (
        f'<article class="attempt"><h3>Attempt {one.attempt} {chips}</h3>{_before_after(one, shots)}'
        f"<div>{error}{_prompts(one)}{_reasons(one)}{_numbers(one)}{answer}</div></article>"
    )


def _compared(one: Attempt) -> tuple[str, ...]:
    """The picture before, where there was one: before the first the critic compares with an empty one."""
    if one.before_id and one.source_ids:
        return (one.before_id,)
    return one.source_ids[-1:]


def _before_after(one: Attempt, shots: Shots) -> str:
    before = [shots.show(image_id, "the picture before") for image_id in _compared(one)]
    figures = [f"<figure>{picture}<figcaption>before</figcaption></figure>" for picture in before]
    if one.image_id:
        picture = shots.show(one.image_id, one.prompt_used)
        figures.append(f"<figure>{picture}<figcaption>{'after' if before else 'drawn'}</figcaption></figure>")
    return f'<div class="pair">{"".join(figures)}</div>'


def _prompts(one: Attempt) -> str:
    changed = one.prompt_used != one.original_prompt
    title = "Prompt, as changed from the plan's" if changed else "Prompt, as the plan has it"
    told = [_labelled(title, word_diff(one.original_prompt, one.prompt_used))]
    if one.refined_prompt and one.refined_prompt != one.prompt_used:
        title = "The critic's next prompt, as changed from this"
        told.append(_labelled(title, word_diff(one.prompt_used, one.refined_prompt)))
    elif one.verdict is False:
        told.append(_labelled("The critic's next prompt", "the same"))
    return "".join(told)


def _reasons(one: Attempt) -> str:
    return _labelled("The critic's reasons", text(one.reasoning)) if one.reasoning else ""


def _numbers(one: Attempt) -> str:
    names = {"generate": "drawing", "critic": "judging", "judge": "scoring"}
    times = ", ".join(f"{names.get(name, name)} {_clock(value)}" for name, value in one.timings.items())
    sources = f"edited from {count(len(one.source_ids), 'picture')}" if one.op == "edit" else "drawn from words alone"
    params = json.dumps(dict(one.generator.params), ensure_ascii=False) if one.generator.params else ""
    return _listed(
        {
            "how": sources,
            "seed": str(one.seed),
            "times": times,
            "asked": f"{one.critic_tries} times" if one.critic_tries > 1 else "",
            "probability of success": "" if one.success_probability is None else f"{one.success_probability:.3f}",
            "scores": _scores(one),
            "generator": f"{one.generator.id} {params}",
            "picture": one.image_id or "",
        }
    )


def _scores(one: Attempt) -> str:
    if one.scores is None:
        return ""
    return f"semantics {one.scores.sc:g}, quality {one.scores.pq:g} of 10, by {one.scores.judge_id}"


def _planning(story: Story) -> str:
    if story.plan is None and story.planner is None:
        return ""
    parts = []
    if story.plan:
        if story.plan.reasoning:
            parts.append(_labelled("The planner's reasoning", text(story.plan.reasoning)))
        rows = [
            [str(step.index), *(user(value or "") for value in (step.name, step.instruction, step.prompt, step.text))]
            for step in story.plan.steps
        ]
        parts.append(table(["", "Name", "Instruction", "Prompt", "Text"], rows))
    if story.planner:
        about = story.planner
        template = f"{about.template} ({about.template_hash[:12]})"
        asked = count(about.num_tries, "time")
        error = _plain(about.error or "")
        parts.append(_listed({"model": about.model, "template": template, "asked": asked, "error": error}))
        parts.append(fold("The planner's answer as it came", _pre(about.raw)) if about.raw else "")
    return fold("The plan", *parts)


def _spending(story: Story) -> str:
    if story.trajectory is None:
        return ""
    spent = story.trajectory.spent
    facts = {
        "pictures drawn": str(spent.generations),
        "calls of the planner": str(spent.planner_calls),
        "calls of the critic": str(spent.critic_calls),
        "time": _clock(spent.seconds),
        **story.trajectory.versions,
        "request": story.request.id,
    }
    return fold("What it took", _listed(facts))


# --- words -----------------------------------------------------------------------------------------------------------

_IDEOGRAPH = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"(?:[{_IDEOGRAPH}]|[.,;:!?、。]+|[^\s.,;:!?、。{_IDEOGRAPH}]+)\s*|\s+")


def word_diff(old: str, new: str) -> str:
    """How `new` differs from `old`, word by word, as HTML: removed words in <del>, added ones in <ins>."""
    before, after = _WORD.findall(old), _WORD.findall(new)
    a, b = ([word.strip() for word in words] for words in (before, after))
    parts = []
    for kind, i, j, k, m in SequenceMatcher(None, a, b, autojunk=len(a) + len(b) > 2000).get_opcodes():
        if kind == "equal":
            parts += [text(max(pair, key=len)) for pair in zip(before[i:j], after[k:m], strict=True)]
            continue
        removed, added = "".join(before[i:j]), "".join(after[k:m])
        parts.append(_marked("del", removed) + (" " if removed.strip() and added.strip() else ""))
        parts.append(_marked("ins", added) + (added or removed)[len((added or removed).rstrip()) :])
    return "".join(parts)


def _marked(tag: str, words: str) -> str:
    return f"<{tag}>{text(words.rstrip())}</{tag}>" if words.strip() else ""


def user(value: str) -> str:
    """What someone wrote, in its own direction of writing."""
    return f"<bdi>{text(value)}</bdi>"


def _labelled(title: str, inside: str) -> str:
    """inside: HTML."""
    return f'<h4>{text(title)}</h4><p class="quote" dir="auto">{inside}</p>'


def _listed(facts: Mapping[str, str]) -> str:
    """Names and values; empty ones are left out."""
    rows = (f"<div><dt>{user(name)}</dt><dd>{user(value)}</dd></div>" for name, value in facts.items() if value)
    return f"<dl>{''.join(rows)}</dl>"


def _pre(value: str) -> str:
    return f'<pre dir="auto">{text(value)}</pre>'


def short(value: str, length: int = 110) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(value.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _clock(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"


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
