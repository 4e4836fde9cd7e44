"""The requests of a build, from a file or from the miniature's world."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from imgen_common.errors import UserError
from imgen_common.run_folder.data import DATA, DataHash, check_data, hash_rows, record_data
from imgen_common.streams import numpy_generator
from interleave.datasets.config import FilePrompts, ShapesPrompts
from interleave.loop import requests
from interleave.loop.config import RunConfig
from interleave.loop.run import hash_inputs
from interleave.records import Request
from interleave.storage.images import IMAGES, ImageStore

if TYPE_CHECKING:
    from imgen_common.shapes.steps import Story

TRIES = 50
"""Samples per wanted request before the world counts as exhausted."""


def make_requests(prompts: FilePrompts | ShapesPrompts | None, images: ImageStore) -> list[Request]:
    """The requests; their images are put into the store.  Raises UserError as `requests.read_requests`."""
    match prompts:
        case None:
            return []
        case FilePrompts():
            return requests.read_requests(Path(prompts.path), images)
        case ShapesPrompts():
            return [
                requests.make_request(story.request, (), images, f"{prompts.split}-{number:06d}", _category_of(story))
                for number, story in sample_stories(prompts).items()
            ]


def record(out: Path, made: Sequence[Request], config: RunConfig) -> None:
    """Keeps hashes of the requests, and of the models that are loaded for them, with the build in `out`."""
    record_data(out, {"prompts": _hash(made), **hash_inputs(config, "run.")})


def check_models(out: Path, config: RunConfig) -> None:
    """Raises UserError if a model or a template has changed since the build in `out` was begun."""
    if (out / DATA).exists():
        check_data(out, hash_inputs(config, "run."))


def check_same(out: Path, prompts: FilePrompts | ShapesPrompts | None) -> None:
    """Raises UserError for a file that has changed since the build in `out` was begun, if it is still there."""
    # one of an earlier version has no hashes
    if not isinstance(prompts, FilePrompts) or not Path(prompts.path).exists() or not (out / DATA).exists():
        return
    check_data(out, {"prompts": _hash(make_requests(prompts, ImageStore(out / IMAGES)))})


def _hash(made: Sequence[Request]) -> DataHash:
    return hash_rows(request.model_dump_json() for request in made)


def sample_stories(prompts: ShapesPrompts) -> "dict[int, Story]":
    """Different stories by the number of their sample.  Raises UserError if the world has too few."""
    from imgen_common.shapes.stories import sample_story

    found: dict[str, tuple[int, Story]] = {}
    for number in range(TRIES * prompts.count):
        rng = numpy_generator(prompts.seed, f"data-prompts-{prompts.split}", number)
        story = sample_story(rng, prompts.split, riddle=bool(rng.random() < prompts.riddles))
        found.setdefault(story.request, (number, story))
        if len(found) == prompts.count:
            return dict(found.values())
    raise UserError(f"prompts.count: there are no {prompts.count} different requests, only {len(found)}")


def _category_of(story: "Story") -> str:
    steps = len(story.steps)
    return f"{'riddle' if story.riddle else 'plain'}, {steps} step{'s' * (steps != 1)}"
