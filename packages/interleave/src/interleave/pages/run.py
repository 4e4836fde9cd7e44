"""One self-contained HTML page about a run: its stories, and an index before them where there are several."""

import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

from imgen_common.files import write_atomic
from imgen_common.page import document, fold, text
from interleave.loop.requests import load_requests
from interleave.pages.images import SMALL, WEBP_QUALITY, Shots
from interleave.pages.story import ENDS, STYLE, Story, reason, story_html
from interleave.pages.words import short, user
from interleave.protocols import HashedImage
from interleave.storage.images import IMAGES, ImageStore
from interleave.storage.trace import TraceEntry, read_trace

PAGE = "report.html"
FIRST = 6
"""Pictures of a story that the index shows."""


def write_report(run_folder: Path, out: Path | None = None) -> Path:
    """Write the page of a run anew, to RUN/report.html unless `out` says otherwise, and return its path.

    Raises UserError if the folder holds no run or its records are damaged.
    """
    recorded = read_trace(run_folder)
    stories = [Story.of(request, recorded.get(request.id, TraceEntry())) for request in load_requests(run_folder)]
    page = out or run_folder / PAGE
    write_atomic(page, render(stories, ImageStore(run_folder / IMAGES).get, run_folder))
    return page


def render(stories: Sequence[Story], pictures: Callable[[str], HashedImage], run: Path | None) -> str:
    """The page.  pictures: gives the picture of an id; where it raises UserError the page says why it is missing.

    run: the folder that commands to go on name, if there is one.
    """
    shots = Shots(chain.from_iterable(story.image_ids() for story in stories), pictures)
    if len(stories) == 1:
        body = [story_html(stories[0], shots, _how_to_go_on(stories, run)), _about_pictures(shots, run)]
        return document(short(stories[0].request.text), STYLE, body)
    # Stories first: a picture is where it is first shown, and the index refers to it.
    told = [story_html(story, shots, anchor=f"s{i}") for i, story in enumerate(stories, 1)]
    head = _headline(stories, run) + _index(stories, shots)
    name = _name(run)
    return document(f"{name}: {len(stories)} stories", STYLE + INDEX_STYLE, [head, *told, _about_pictures(shots, run)])


def _name(run: Path | None) -> str:
    return run.resolve().name if run else "stories"


def _about_pictures(shots: Shots, run: Path | None) -> str:
    told = []
    if shots.any_small:
        told.append(f"Pictures of at most {SMALL} pixels a side are enlarged, each pixel a square.")
    if shots.any_reduced:
        told.append(f"Larger ones are re-encoded (WebP, quality {WEBP_QUALITY}), at most {shots.side} pixels a side.")
    if told and run:
        where = text(str(run / IMAGES))
        told.append(f"The originals lie in <code>{where}</code> under the ids given with each attempt.")
    return f'<footer class="note">{" ".join(told)}</footer>' if told else ""


def _headline(stories: Sequence[Story], run: Path | None) -> str:
    ends = Counter(story.end for story in stories)
    spent = [story.trajectory.spent for story in stories if story.trajectory]
    facts = [
        f"{len(stories)} requests",
        *(f"{count} {ENDS[end]}" for end, count in ends.most_common()),
        f"{sum(one.generations for one in spent)} pictures drawn",
        f"{sum(one.critic_calls for one in spent)} calls of the critic",
    ]
    head = f"<header><h1>{text(_name(run))}</h1><p class=facts>{text(' · '.join(facts))}</p></header>"
    rows = [
        f'<li><a href="#s{i}">{user(short(story.request.text))}</a> {text(ENDS[story.end])}{reason(story)}</li>'
        for i, story in enumerate(stories, 1)
        if story.trajectory is not None and story.end != "complete"
    ]
    failed = fold(f"{len(rows)} ended early", f"<ul>{''.join(rows)}</ul>") if rows else ""
    return head + _how_to_go_on(stories, run) + failed


def _how_to_go_on(stories: Sequence[Story], run: Path | None) -> str:
    if run is None:
        return ""
    command = f"interleave batch --resume {shlex.quote(str(run))}"
    ends = {story.end for story in stories}
    if ends & {"unfinished", "waiting"}:
        return f'<p class="warn">Not finished. To go on: <code>{text(command)}</code></p>'
    if ends == {"complete"}:
        return ""
    what = "it" if len(stories) == 1 else "those that ended early"
    return f'<p class="warn">To try {what} again: <code>{text(command)} --retry</code></p>'


def _index(stories: Sequence[Story], shots: Shots) -> str:
    cards = []
    for i, story in enumerate(stories, 1):
        seen = [(step, story.shown(step)) for step in (story.plan.steps if story.plan else ())]
        pictures = [
            shots.show(one.image_id, step.words or one.prompt_used) for step, one in seen if one and one.image_id
        ]
        more = f"<small>and {len(pictures) - FIRST} more</small>" if len(pictures) > FIRST else ""
        good = story.end == "complete"
        chip = "" if good else f'<span class="chip down">{text(ENDS[story.end])}</span>'
        cards.append(
            f'<a class="entry" href="#s{i}"><span class="strip">{"".join(pictures[:FIRST])}</span>{more}'
            f'<span class="title"><small>{i}</small> {user(short(story.request.text))}</span>{chip}</a>'
        )
    return f'<nav class="index" aria-label="All stories">{"".join(cards)}</nav>'


INDEX_STYLE = """
.index { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: .9rem; margin-top: 1.2rem; }
.entry { display: block; background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .7rem;
  color: inherit; text-decoration: none; content-visibility: auto; contain-intrinsic-size: auto 9rem; }
.entry:hover, .entry:focus-visible { border-color: var(--blue); }
.strip { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 5px; align-items: start; }
.entry .chip { white-space: normal; border-radius: 10px; }
.entry .title { display: block; font-size: .9rem; line-height: 1.35; margin: .45rem 0 .2rem; overflow-wrap: anywhere; }
@media print { .entry { content-visibility: visible; break-inside: avoid; } }
"""
