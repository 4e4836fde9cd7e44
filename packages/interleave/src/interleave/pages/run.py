"""A self-contained HTML page about a run: its stories, and an index before them where there are several.

A run of more stories than a browser shows well has several such pages, each with links to the others.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from imgen_common import page
from imgen_common.errors import quoted
from imgen_common.files import write_atomic
from imgen_common.run_folder.find import TOLD, maker_of
from interleave.loop.requests import load_requests
from interleave.pages import TEMPLATES
from interleave.pages.images import SMALL, WEBP_QUALITY, PageImages
from interleave.pages.story import StoryView
from interleave.pages.words import STORY_STATUS
from interleave.protocols import HashedImage
from interleave.storage.images import IMAGES, ImageStore
from interleave.storage.trace import TraceEntry, read_trace

PAGE = "report.html"
MAX_STORIES = 500
"""Stories of one page."""
MAX_INDEX_IMAGES = 6
"""Images of a story that the index shows."""


def write_report(run_folder: Path, out: Path | None = None) -> Path:
    """Write the page of a run anew, to RUN/report.html unless `out` says otherwise, and return its path.

    The stories after the first `MAX_STORIES` are in report-2.html and so on, beside it.
    Raises UserError if the folder holds no run or its records are damaged.
    """
    recorded = read_trace(run_folder)
    stories = [StoryView.of(request, recorded.get(request.id, TraceEntry())) for request in load_requests(run_folder)]
    path = out or run_folder / PAGE
    starts = range(0, max(len(stories), 1), MAX_STORIES)
    names = [path.name, *(f"{path.stem}-{number}{path.suffix}" for number in range(2, len(starts) + 1))]
    parts = [
        Part(name, start, min(start + MAX_STORIES, len(stories))) for name, start in zip(names, starts, strict=True)
    ]
    load = ImageStore(run_folder / IMAGES).get
    for part in parts:
        page_of_part = render_stories(stories[part.start : part.end], load, run_folder, parts, part.start)
        write_atomic(path.with_name(part.name) if part.start else path, page_of_part)
    return path


class Part(NamedTuple):
    """The stories `start` to `end` of a run, counted from 0, and the name of the file that shows them."""

    name: str
    start: int
    end: int


def render_stories(
    stories: Sequence[StoryView],
    load: Callable[[str], HashedImage],
    run: Path | None,
    parts: Sequence[Part] = (),
    start: int = 0,
) -> str:
    """The page.  load: gives the image of an id; where it raises UserError the page says why it is missing.

    run: the folder that commands to resume name, if there is one.  parts: all pages of the run, where there are
    several; start: how many stories come before those of this page.
    """
    name = run.resolve().name if run else "stories"
    num_statuses = Counter(story.status for story in stories)
    spent = [story.trajectory.spent for story in stories if story.trajectory]
    values = {
        "stories": stories,
        "images": PageImages(chain.from_iterable(story.image_ids() for story in stories), load),
        "hint": _resume_hint(stories, run),
        "name": name,
        "title": stories[0].title if len(stories) == 1 else f"{name}: {len(stories)} stories",
        "facts": [
            f"{len(stories)} requests",
            *(f"{num} {STORY_STATUS[status]}" for status, num in num_statuses.most_common()),
            f"{sum(one.generations for one in spent)} images",
            f"{sum(one.critic_calls for one in spent)} critic calls",
        ],
        "num_failed": sum(story.has_failed for story in stories),
        "alone": len(stories) == 1 and len(parts) < 2,
        "parts": parts,
        "start": start,
        "max_index_images": MAX_INDEX_IMAGES,
        "small": SMALL,
        "quality": WEBP_QUALITY,
        "folder": str(run / IMAGES) if run else "",
    }
    return page.render("run.html.jinja", values, TEMPLATES)


def _resume_hint(stories: Sequence[StoryView], run: Path | None) -> tuple[str, str] | None:
    """How to finish what is not complete, if a command can: what to say, and the command."""
    statuses = {story.status for story in stories}
    if run is None or maker_of(run) == TOLD or statuses <= {"complete", "steps_not_accepted"}:
        return None
    command = f"interleave batch --resume {quoted(run)}"
    if statuses & {"unfinished", "waiting"}:
        return "Not finished. To continue", command
    what = "it" if len(stories) == 1 else "those that ended early"
    if statuses <= {"complete", "steps_not_accepted", "budget_exhausted"}:
        return (
            f"To go on with {what}, with a larger loop.max_generations or loop.max_seconds by --set",
            f"{command} --retry",
        )
    return f"To try {what} again", f"{command} --retry"
