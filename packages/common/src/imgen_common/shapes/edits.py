"""Edit instructions with exact before and after scenes: add, recolour, remove."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from torch import Tensor

from imgen_common.shapes.scene import (
    ALL_THINGS,
    COLOURS,
    POSITIONS,
    RELATIONS,
    Scene,
    Spec,
    Split,
    Thing,
    compose,
    fits,
    pair_category,
    place,
    position_holds,
    relation_holds,
    shade,
    split_of,
)
from imgen_common.shapes.verify import Detection, detect

EditKind = Literal["add", "recolour", "remove"]
EDIT_KINDS: tuple[EditKind, ...] = get_args(EditKind)
MAX_DRIFT = 4.0
"""How far in pixels a thing that the instruction does not touch may move before the edit counts as wrong."""


@dataclass(frozen=True)
class Edit:
    """One instruction and the exact scenes before and after it.

    `target` is the thing added, or the thing recoloured or removed as it was before; `colour` the new colour of a
    recolouring; `place` and `anchor` the clause of an addition (a position, or a relation to the thing `anchor`).
    """

    kind: EditKind
    instruction: str
    before: Scene
    after: Scene
    target: Thing
    colour: str = ""
    place: str = ""
    anchor: Thing | None = None


def _name(thing: Thing, among: Sequence[Thing]) -> str:
    """`circle` where the shape is unique in the picture, else `red circle`."""
    return thing.shape if sum(t.shape == thing.shape for t in among) == 1 else str(thing)


def sample_edit(rng: np.random.Generator, split: Split = "train", kind: EditKind | None = None) -> Edit:
    """A random edit whose after-scene belongs to the split, so that no result crosses splits."""
    kind = kind or EDIT_KINDS[rng.integers(len(EDIT_KINDS))]
    make = {"add": _add, "recolour": _recolour, "remove": _remove}[kind]
    while True:
        edit = make(rng)
        if edit is not None and split_of(tuple(sorted(edit.after.things))) == split:
            return edit


def _any_scene(rng: np.random.Generator, sizes: Sequence[int]) -> Scene:
    """A scene of distinct things from any split: the before-picture of an edit."""
    size = int(rng.choice(sizes))
    things = tuple(ALL_THINGS[i] for i in rng.choice(len(ALL_THINGS), size, replace=False))
    category = "single" if size == 1 else pair_category(*things[:2])
    return compose(Spec(category, things), rng)


def _add(rng: np.random.Generator) -> Edit | None:
    before = _any_scene(rng, (1, 1, 2))
    target = ALL_THINGS[rng.integers(len(ALL_THINGS))]
    if target in before.things:
        return None
    anchor, placed = before.placed[0], place(target, len(before.placed) + 1, rng)
    if not fits(placed, before.placed):
        return None
    after = Scene(before.background, (*before.placed, placed))
    if rng.random() < 0.5:
        clauses = [p for p in POSITIONS if position_holds(p, placed.x, placed.y, 4.0)]
        if not clauses:
            return None
        clause = clauses[rng.integers(len(clauses))]
        return Edit("add", f"add a {target} on the {clause}", before, after, target, place=clause)
    clauses = [r for r in RELATIONS if relation_holds(r, (placed.x, placed.y), (anchor.x, anchor.y), 7.0)]
    if not clauses:
        return None
    clause = clauses[rng.integers(len(clauses))]
    name = _name(anchor.thing, before.things)
    return Edit("add", f"add a {target} {clause} the {name}", before, after, target, place=clause, anchor=anchor.thing)


def _recolour(rng: np.random.Generator) -> Edit | None:
    before = _any_scene(rng, (1, 2, 2))
    i = int(rng.integers(len(before.placed)))
    old = before.placed[i]
    colours = [c for c in COLOURS if Thing(c, old.thing.shape) not in before.things]
    colour = colours[rng.integers(len(colours))]
    new = replace(old, thing=Thing(colour, old.thing.shape), rgb=shade(colour, rng))
    after = Scene(before.background, (*before.placed[:i], new, *before.placed[i + 1 :]))
    instruction = f"make the {_name(old.thing, before.things)} {colour}"
    return Edit("recolour", instruction, before, after, old.thing, colour=colour)


def _remove(rng: np.random.Generator) -> Edit | None:
    before = _any_scene(rng, (2, 2, 3))
    i = int(rng.integers(len(before.placed)))
    gone = before.placed[i].thing
    after = Scene(before.background, (*before.placed[:i], *before.placed[i + 1 :]))
    return Edit("remove", f"remove the {_name(gone, before.things)}", before, after, gone)


def judge_edit(found: Sequence[Detection], edit: Edit) -> bool:
    """Whether a picture is the edit's result: exactly the after-scene's things, the untouched ones within `MAX_DRIFT`.

    A recoloured thing must stay where it was; an added thing must satisfy its clause wherever it stands.
    """
    if Counter(d.thing for d in found) != Counter(edit.after.things):
        return False
    by_thing = {d.thing: d for d in found}
    for placed in edit.after.placed:
        seen = by_thing[placed.thing]
        if edit.kind == "add" and placed.thing == edit.target:
            continue
        if max(abs(seen.x - placed.x), abs(seen.y - placed.y)) > MAX_DRIFT:
            return False
    if edit.kind != "add":
        return True
    new = by_thing[edit.target]
    if edit.anchor is None:
        return position_holds(edit.place, new.x, new.y)
    anchor = by_thing[edit.anchor]
    return relation_holds(edit.place, (new.x, new.y), (anchor.x, anchor.y))


def verify_edits(images: Tensor, edits: Sequence[Edit]) -> list[bool]:
    """Whether each picture (n, 3, SIZE, SIZE) in [0, 1] is the result of its edit."""
    return [judge_edit(found, edit) for found, edit in zip(detect(images), edits, strict=True)]
