"""Edit instructions with exact before and after scenes: add, recolour, remove."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
from imgen_common.shapes.steps import EDIT_KINDS, Change, EditKind
from imgen_common.shapes.stories import step_holds
from imgen_common.shapes.verify import Detection, detect


@dataclass(frozen=True)
class Edit:
    """One change and the exact scenes before and after it."""

    change: Change
    before: Scene
    after: Scene

    @property
    def instruction(self) -> str:
        """The change in the generator's language."""
        return self.change.prompt

    @property
    def caption(self) -> str:
        """What the image after it shows, as captions of the world say it: of three things the first and the new one."""
        change, things = self.change, self.after.things
        if change.kind == "add" and change.anchor is not None and len(things) == 2:
            return f"a {change.target} {change.place} a {change.anchor}"
        return " and ".join(f"a {thing}" for thing in dict.fromkeys((things[0], things[-1])))

    @property
    def source_caption(self) -> str:
        """What the image before it shows, as the captions of the world say it: at most its first two things."""
        return " and ".join(f"a {thing}" for thing in self.before.things[:2])


def sample_edit(rng: np.random.Generator, split: Split = "train", kind: EditKind | None = None) -> Edit:
    """A random edit whose after-scene belongs to the split, so that no result crosses splits."""
    kind = kind or EDIT_KINDS[rng.integers(len(EDIT_KINDS))]
    make = {"add": _add, "recolour": _recolour, "remove": _remove}[kind]
    while True:
        edit = make(rng)
        if edit is not None and split_of(tuple(sorted(edit.after.things))) == split:
            return edit


def _any_scene(rng: np.random.Generator, sizes: Sequence[int]) -> Scene:
    """A scene of distinct things from any split: the image before an edit."""
    size = int(rng.choice(sizes))
    things = tuple(ALL_THINGS[i] for i in rng.choice(len(ALL_THINGS), size, replace=False))
    category = "single" if size == 1 else pair_category(*things[:2])
    return compose(Spec(category, things), rng)


def _add(rng: np.random.Generator) -> Edit | None:
    before = _any_scene(rng, (1, 1, 2))
    target = ALL_THINGS[rng.integers(len(ALL_THINGS))]
    if target in before.things:
        return None
    placed = place(target, len(before.placed) + 1, rng)
    if not fits(placed, before.placed):
        return None
    anchor = None if rng.random() < 0.5 else before.placed[0]
    if anchor is None:
        clauses = [p for p in POSITIONS if position_holds(p, placed.x, placed.y, 4.0)]
    else:
        clauses = [r for r in RELATIONS if relation_holds(r, (placed.x, placed.y), (anchor.x, anchor.y), 7.0)]
    if not clauses:
        return None
    clause = clauses[rng.integers(len(clauses))]
    change = Change("add", before.things, target, place=clause, anchor=None if anchor is None else anchor.thing)
    return Edit(change, before, Scene(before.background, (*before.placed, placed)))


def _recolour(rng: np.random.Generator) -> Edit:
    before = _any_scene(rng, (1, 2, 2))
    i = int(rng.integers(len(before.placed)))
    old = before.placed[i]
    colours = [c for c in COLOURS if Thing(c, old.thing.shape) not in before.things]
    colour = colours[rng.integers(len(colours))]
    new = replace(old, thing=Thing(colour, old.thing.shape), rgb=shade(colour, rng))
    after = Scene(before.background, (*before.placed[:i], new, *before.placed[i + 1 :]))
    return Edit(Change("recolour", before.things, old.thing, colour=colour), before, after)


def _remove(rng: np.random.Generator) -> Edit:
    before = _any_scene(rng, (2, 2, 3))
    i = int(rng.integers(len(before.placed)))
    after = Scene(before.background, (*before.placed[:i], *before.placed[i + 1 :]))
    return Edit(Change("remove", before.things, before.placed[i].thing), before, after)


def edit_holds(found: Sequence[Detection], edit: Edit) -> bool:
    """Whether what was read in an image is the edit's result, judged on the exact scene before it."""
    return step_holds([Detection(p.thing, p.x, p.y, 1.0) for p in edit.before.placed], found, edit.change)


def verify_edits(images: Tensor, edits: Sequence[Edit]) -> list[bool]:
    """Whether each image (n, 3, SIZE, SIZE) in [0, 1] is its edit's result."""
    return [edit_holds(found, edit) for found, edit in zip(detect(images), edits, strict=True)]
