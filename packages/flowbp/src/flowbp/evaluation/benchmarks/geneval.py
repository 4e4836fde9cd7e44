"""The rules of GenEval: are the objects in an image those that a row of metadata asks for?  arXiv 2310.11513."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from annotated_types import Ge, MinLen
from pydantic import AfterValidator, Field, ValidationError, model_validator

from imgen_common.config import Config
from imgen_common.errors import UserError, is_blank, nearest
from imgen_common.tables import read_table

Tag = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
Relation = Literal["left of", "right of", "above", "below"]
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
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
"""Classes of COCO in the order of its detectors, by their names in GenEval."""
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
"""Scores above which a detection counts: in general, and in the task of counting."""
MAX_OBJECTS = 16
"""Number of detections of a class that count, those with the highest scores."""
MARGIN = 0.1
"""Part of the extents of two objects by which their centers must differ at least to be left of, above, ..."""


def _check_said(prompt: str) -> str:
    if is_blank(prompt):
        raise ValueError("is empty; say what to draw")
    return prompt


class ObjectClause(Config):
    """Objects of one class that an image must, or must not, show."""

    name: Annotated[str, Field(alias="class")]
    count: Annotated[int, Ge(1)]
    color: str | None = None
    position: tuple[Relation, Annotated[int, Ge(0)]] | None = None
    """A relation, and the index of the earlier clause to whose objects it is."""


class GenEvalTask(Config):
    """A row of metadata: the image must show at least what `include` says, and fewer than what `exclude` says."""

    classes: ClassVar[tuple[str, ...]] = CLASSES
    colors: ClassVar[tuple[str, ...]] = COLORS

    tag: Tag
    prompt: Annotated[str, AfterValidator(_check_said)]
    include: Annotated[tuple[ObjectClause, ...], MinLen(1)]
    exclude: tuple[ObjectClause, ...] = ()

    @model_validator(mode="after")
    def _what_it_names_exists(self) -> "GenEvalTask":
        for index, wanted in enumerate(self.include):
            if wanted.position and wanted.position[1] >= index:
                raise ValueError(f"position must refer to an earlier clause of include, got {wanted.position[1]}")
        for wanted in (*self.include, *self.exclude):
            if wanted.name not in self.classes:
                raise ValueError(f"unknown class {wanted.name!r}{nearest(wanted.name, self.classes)}; allowed: COCO's")
            if wanted.color is not None and wanted.color not in self.colors:
                near, allowed = nearest(wanted.color, self.colors), ", ".join(self.colors)
                raise ValueError(f"unknown color {wanted.color!r}{near}; allowed: {allowed}")
        return self


def read_tasks(path: Path, limit: int | None = None) -> list[GenEvalTask]:
    """The rows of a metadata file (.jsonl or .json), at most `limit`.  Raises UserError naming a line that is wrong."""
    tasks = [_task(where, row) for where, row in read_table(path, "prompt")]
    if not tasks:
        raise UserError(f"{path}: holds no row of metadata; give GenEval's evaluation_metadata.jsonl or the like")
    return tasks[:limit]


def _task(place: str, row: object) -> GenEvalTask:
    try:
        return GenEvalTask.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in (".".join(map(str, first["loc"])),) if part)
        text = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        given = "" if first["type"] in ("value_error", "missing") else f", got {json.dumps(first['input'])}"
        raise UserError(f"{place}: {where}{text}{given}") from None


@dataclass(frozen=True)
class Detection:
    """An object in an image: class, score, box (left, top, right, bottom) in pixels, and mask (h, w) of bool."""

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = field(default=None, repr=False)


DetectionsByClass = Mapping[str, Sequence[Detection]]
"""Detections by class, the highest score first."""
ClassifyColors = Callable[[Sequence[Detection], str], Sequence[str]]
"""classify_colors(objects, class) -> the color of each."""


def filter_detections(detections: Sequence[Detection], tag: Tag) -> dict[str, list[Detection]]:
    """The detections that count for a task."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    found: dict[str, list[Detection]] = {}
    for one in sorted(detections, key=lambda one: -one.score):
        if one.score > threshold:
            found.setdefault(one.name, []).append(one)
    return {name: objects[:MAX_OBJECTS] for name, objects in found.items()}


def find_mistakes(task: GenEvalTask, found: DetectionsByClass, classify_colors: ClassifyColors) -> list[str]:
    """Why an image does not show what the task asks for; empty if it does.

    Colors and positions are checked for the `count` objects of a class with the highest scores only.  More objects than
    asked for are a mistake only where `exclude` says so.
    """
    mistakes: list[str] = []
    matched: list[Sequence[Detection] | None] = []
    for wanted in task.include:
        objects = list(found.get(wanted.name, ()))[: wanted.count]
        mistake = _mistake(wanted, objects, matched, classify_colors)
        mistakes += [mistake] if mistake else []
        matched.append(None if mistake else objects)
    for unwanted in task.exclude:
        number = len(found.get(unwanted.name, ()))
        if number >= unwanted.count:
            mistakes.append(f"{number} {unwanted.name} found, fewer than {unwanted.count} wanted")
    return mistakes


def _mistake(
    wanted: ObjectClause,
    objects: Sequence[Detection],
    matched: Sequence[Sequence[Detection] | None],
    classify_colors: ClassifyColors,
) -> str | None:
    name, count = wanted.name, wanted.count
    if len(objects) < count:
        return f"{len(objects)} of {count} {name} found"
    if wanted.color is not None:
        seen = classify_colors(objects, name)
        if seen.count(wanted.color) < count:
            return f"{seen.count(wanted.color)} of {count} {name} {wanted.color}; found: {', '.join(seen)}"
    if wanted.position is not None:
        relation, clause = wanted.position
        others = matched[clause]
        if others is None:
            return f"nothing found that {name} could be {relation}"
        if any(relation not in spatial_relations(one.box, other.box) for one in objects for other in others):
            return f"{name} not {relation} {others[0].name}"
    return None


def spatial_relations(box: Sequence[float], other: Sequence[float]) -> set[Relation]:
    """The relations of the first box to the second.  The margin is subtracted from the distance of their centers."""
    offsets = [(box[k] + box[k + 2] - other[k] - other[k + 2]) / 2 for k in (0, 1)]
    extents = [abs(box[k + 2] - box[k]) + abs(other[k + 2] - other[k]) for k in (0, 1)]
    beyond = [math.copysign(max(abs(d) - MARGIN * e, 0), d) for d, e in zip(offsets, extents, strict=True)]
    if max(map(abs, beyond)) < 1e-3:
        return set()
    x, y = (part / math.hypot(*offsets) for part in beyond)
    true: dict[Relation, bool] = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, holds in true.items() if holds}
