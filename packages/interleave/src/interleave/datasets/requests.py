"""What a build asks for: requests from a file, or of the miniature's world."""

from pathlib import Path
from typing import TYPE_CHECKING

from imgen_common.errors import UserError
from imgen_common.streams import numpy_generator
from interleave.datasets.config import FilePrompts, ShapesPrompts
from interleave.loop import requests
from interleave.records import Request
from interleave.storage.images import ImageStore

if TYPE_CHECKING:
    from imgen_common.shapes.steps import Story

TRIES = 50
"""Drawn per request wanted before the world counts as exhausted."""


def ask(prompts: FilePrompts | ShapesPrompts | None, pictures: ImageStore) -> list[Request]:
    """The requests, their pictures in the store.  Raises UserError as `requests.read_file`."""
    match prompts:
        case None:
            return []
        case FilePrompts():
            return requests.read_requests(Path(prompts.path), pictures)
        case ShapesPrompts():
            return [
                requests.make_request(story.request, (), pictures, f"{prompts.split}-{number:06d}", category(story))
                for number, story in stories(prompts).items()
            ]


def stories(prompts: ShapesPrompts) -> "dict[int, Story]":
    """Different stories by the number of their draw.  Raises UserError if the world has too few."""
    from imgen_common.shapes.stories import sample_story

    found: dict[str, tuple[int, Story]] = {}
    for number in range(TRIES * prompts.count):
        rng = numpy_generator(prompts.seed, f"data-prompts-{prompts.split}", number)
        story = sample_story(rng, prompts.split, riddle=bool(rng.random() < prompts.riddles))
        found.setdefault(story.request, (number, story))
        if len(found) == prompts.count:
            return dict(found.values())
    raise UserError(f"prompts.count: {prompts.count} different requests are not to be had, {len(found)} are")


def category(story: "Story") -> str:
    """How a request is worded, and how many steps it asks for."""
    steps = len(story.steps)
    return f"{'riddle' if story.riddle else 'plain'}, {steps} step{'s' * (steps != 1)}"
