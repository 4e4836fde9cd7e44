"""GenEval (shapes): GenEval's rules on images of the shapes world, whose verifier finds the objects and their colors.

It is no GenEval: prompts, classes, colors and the judge are those of the shapes world.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from flowbp.data.prompts import shapes_split
from flowbp.evaluation.benchmarks.geneval import Detection, GenEvalTask, Tag, filter_detections, find_mistakes
from imgen_common.shapes.scene import COLOURS, SHAPES, Category, Spec, Split, Thing, specs
from imgen_common.streams import numpy_generator

if TYPE_CHECKING:
    from PIL import Image

VERIFIER = "builtin:shapes/verifier"
TASKS_PER_TAG = 16
"""Tasks of a kind, where a split has as many."""
CATEGORY: dict[Tag, Category] = {
    "single_object": "single",
    "two_object": "two",
    "counting": "count",
    "colors": "single",
    "position": "relation",
    "color_attr": "binding",
}
"""The captions of the shapes world by which GenEval's tasks are expressed."""


class ShapesTask(GenEvalTask):
    """A task about the shapes world."""

    classes: ClassVar = SHAPES
    colors: ClassVar = tuple(COLOURS)


def shapes_tasks(source: str, limit: int | None = None) -> list[ShapesTask]:
    """The tasks of `builtin:shapes/SPLIT`, always the same ones, the kinds in turn, at most `limit`.

    Raises UserError for an unknown source.
    """
    split = shapes_split(source)
    kinds = itertools.zip_longest(*(_tasks(tag, split) for tag in CATEGORY))
    return [task for turn in kinds for task in turn if task is not None][:limit]


def _tasks(tag: Tag, split: Split) -> Iterator[ShapesTask]:
    """Tasks about objects of different classes, since the rules tell objects apart by their class."""
    options = specs(CATEGORY[tag], split)
    if tag != "counting":
        options = tuple(spec for spec in options if len({thing.shape for thing in spec.things}) == len(spec.things))
    order = numpy_generator(0, f"geneval-{tag}-{split}").permutation(len(options))
    for index in order[:TASKS_PER_TAG]:
        yield _task(tag, options[index])


def _task(tag: Tag, spec: Spec) -> ShapesTask:
    first, count = spec.things[0], len(spec.things)
    exclude = []
    if tag == "counting":
        include = [_clause(first) | {"count": count}]
        exclude = [_clause(first) | {"count": count + 1}]
    elif tag == "position":
        include = [_clause(spec.things[1]), _clause(first) | {"position": (spec.place, 0)}]
    else:
        colored = tag in ("colors", "color_attr")
        include = [_clause(thing) | ({"color": thing.colour} if colored else {}) for thing in spec.things]
    return ShapesTask.model_validate({"tag": tag, "prompt": spec.caption, "include": include, "exclude": exclude})


def _clause(thing: Thing) -> dict[str, Any]:
    return {"class": thing.shape, "count": 1}


@dataclass(frozen=True)
class ShapesDetection(Detection):
    """A thing that the verifier found.  Its score is 1: the verifier names a thing, or does not."""

    color: str = ""


def find_mistakes_by_verifier(images: Sequence["Image.Image"], tasks: Sequence[GenEvalTask]) -> list[list[str]]:
    """The mistakes in each image (all of one size) by GenEval's rules; none if it shows what its task asks for."""
    return [
        find_mistakes(task, filter_detections(things, task.tag), _colors)
        for task, things in zip(tasks, _find_things(images), strict=True)
    ]


def _find_things(images: Sequence["Image.Image"]) -> list[list[ShapesDetection]]:
    from imgen_common.images import from_pil
    from imgen_common.shapes.verify import detect  # imports torch

    return [
        [ShapesDetection(one.thing.shape, 1.0, one.box, color=one.thing.colour) for one in found if one.box]
        for found in detect(from_pil(images))
    ]


def _colors(objects: Sequence[Detection], name: str) -> list[str]:
    return [one.color for one in objects if isinstance(one, ShapesDetection)]
