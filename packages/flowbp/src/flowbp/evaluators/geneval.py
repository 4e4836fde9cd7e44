"""The rules of GenEval: are the objects found in a picture those that a row of metadata asks for?  arXiv 2310.11513."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np
from annotated_types import Ge, MinLen
from pydantic import Field, ValidationError, model_validator

from flowbp.data import numbered_lines
from imgen_common.config import Config
from imgen_common.errors import UserError, nearest

Tag = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
Colour = Literal["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
Relation = Literal["left of", "right of", "above", "below"]
COLOURS: tuple[Colour, ...] = get_args(Colour)
CLASSES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote"),
    *("computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock"),
    *("vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)
"""Classes of COCO in the order of its detectors, by GenEval's names."""
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
"""A detection counts above this score; where objects are to be counted, above the second."""
MAX_OBJECTS = 16
"""Detections of a class that are looked at, the surest ones."""
MARGIN = 0.1
"""Part of both objects' extents by which their centres must differ at least to be left of, above, ..."""


class Wanted(Config):
    """Objects of one class."""

    name: Annotated[str, Field(alias="class")]
    count: Annotated[int, Ge(1)]
    color: Colour | None = None
    position: tuple[Relation, Annotated[int, Ge(0)]] | None = None
    """A relation, and to which earlier clause's objects."""


class Task(Config):
    """A row of metadata: at least what `include` says, and fewer than what `exclude` says."""

    tag: Tag
    prompt: Annotated[str, MinLen(1)]
    include: Annotated[tuple[Wanted, ...], MinLen(1)]
    exclude: tuple[Wanted, ...] = ()

    @model_validator(mode="after")
    def _refers_to_what_is_there(self) -> "Task":
        for place, wanted in enumerate(self.include):
            if wanted.position and wanted.position[1] >= place:
                raise ValueError(f"position must refer to an earlier clause of include, got {wanted.position[1]}")
        for wanted in (*self.include, *self.exclude):
            if wanted.name not in CLASSES:
                raise ValueError(f"unknown class {wanted.name!r}{nearest(wanted.name, CLASSES)}; allowed: COCO's")
        return self


def read_tasks(path: Path, limit: int | None = None) -> list[Task]:
    """The rows of a metadata file (.jsonl), at most `limit`.  Raises UserError with the line that is wrong."""
    tasks = [_task(f"{path}:{number}", line) for number, line in numbered_lines(path)]
    if not tasks:
        raise UserError(f"{path}: holds no row of metadata; give GenEval's evaluation_metadata.jsonl or the like")
    return tasks[:limit]


def _task(place: str, line: str) -> Task:
    try:
        return Task.model_validate(json.loads(line))
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in (".".join(map(str, first["loc"])),) if part)
        said = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        given = "" if first["type"] in ("value_error", "missing") else f", got {json.dumps(first['input'])}"
        raise UserError(f"{place}: {where}{said}{given}") from None
    except ValueError:
        raise UserError(f"{place}: not JSON; each line must be an object with tag, prompt and include") from None


# --- the rules -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Detection:
    """An object: class, score, box (left, top, right, bottom) in pixels, and mask (h, w) of bool."""

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = field(default=None, repr=False)


Found = Mapping[str, Sequence[Detection]]
"""Detections by class, the surest first."""
Colouring = Callable[[Sequence[Detection], str], Sequence[str]]
"""colours(objects, class) -> the colour of each."""


def kept(detections: Sequence[Detection], tag: Tag) -> dict[str, list[Detection]]:
    """The detections that count for a task."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    found: dict[str, list[Detection]] = {}
    for one in sorted(detections, key=lambda one: -one.score):
        if one.score > threshold:
            found.setdefault(one.name, []).append(one)
    return {name: objects[:MAX_OBJECTS] for name, objects in found.items()}


def mistakes(task: Task, found: Found, colours: Colouring) -> list[str]:
    """Why a picture does not show what the task asks for; empty where it does.

    Colours and positions are asked of the surest `count` objects of a class alone; more objects than asked for are
    wrong only where `exclude` says so.
    """
    said: list[str] = []
    matched: list[Sequence[Detection] | None] = []
    for wanted in task.include:
        objects = list(found.get(wanted.name, ()))[: wanted.count]
        mistake = _mistake(wanted, objects, matched, colours)
        said += [mistake] if mistake else []
        matched.append(None if mistake else objects)
    for unwanted in task.exclude:
        number = len(found.get(unwanted.name, ()))
        if number >= unwanted.count:
            said.append(f"{number} {unwanted.name} found, fewer than {unwanted.count} wanted")
    return said


def _mistake(
    wanted: Wanted, objects: Sequence[Detection], matched: Sequence[Sequence[Detection] | None], colours: Colouring
) -> str | None:
    name, count = wanted.name, wanted.count
    if len(objects) < count:
        return f"{len(objects)} of {count} {name} found"
    if wanted.color is not None:
        seen = colours(objects, name)
        if seen.count(wanted.color) < count:
            return f"{seen.count(wanted.color)} of {count} {name} {wanted.color}; found: {', '.join(seen)}"
    if wanted.position is not None:
        relation, clause = wanted.position
        others = matched[clause]
        if others is None:
            return f"nothing found that {name} could be {relation}"
        if any(relation not in relations(one.box, other.box) for one in objects for other in others):
            return f"{name} not {relation} {others[0].name}"
    return None


def relations(box: Sequence[float], other: Sequence[float]) -> set[Relation]:
    """How the first box lies to the second; the margin is taken off the distance of their centres."""
    offsets = [(box[k] + box[k + 2] - other[k] - other[k + 2]) / 2 for k in (0, 1)]
    extents = [abs(box[k + 2] - box[k]) + abs(other[k + 2] - other[k]) for k in (0, 1)]
    beyond = [math.copysign(max(abs(d) - MARGIN * e, 0), d) for d, e in zip(offsets, extents, strict=True)]
    if max(map(abs, beyond)) < 1e-3:
        return set()
    x, y = (part / math.hypot(*offsets) for part in beyond)
    true: dict[Relation, bool] = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, holds in true.items() if holds}
