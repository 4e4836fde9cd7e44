"""Stories: requests in plain words or riddles, the correct plan in the generator's language, strict verification."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from imgen_common.shapes.scene import (
    ALL_THINGS,
    CATEGORIES,
    COLOURS,
    OPPOSITE,
    OPPOSITE_POSITION,
    POSITIONS,
    RELATIONS,
    SHAPES,
    Spec,
    Split,
    Thing,
    parse_caption,
    position_holds,
    relation_holds,
    specs,
    split_of,
)
from imgen_common.shapes.steps import DIRECTION, MAX_DRIFT, Change, Draw, EditKind, Step, Story
from imgen_common.shapes.verify import Detection, caption_holds, detect
from imgen_common.shapes.wording import tell

# --- reading prompts -------------------------------------------------------------------------------------------------

_THING = rf"((?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)}))"
_NAME = rf"((?:(?:{'|'.join(COLOURS)}) )?(?:{'|'.join(SHAPES)}))"
_ADD_POSITION = re.compile(rf"add a {_THING} on the ({'|'.join(POSITIONS)})")
_ADD_RELATION = re.compile(rf"add a {_THING} ({'|'.join(RELATIONS)}) the {_NAME}")
_RECOLOUR = re.compile(rf"make the {_NAME} ({'|'.join(COLOURS)})")
_REMOVE = re.compile(rf"remove the {_NAME}")


def read_prompt(prompt: str, before: Sequence[Thing] | None) -> Step | None:
    """The step that a prompt of the generator's language asks for; None where it is not of that language or impossible.

    before: the things in the image, None where there is no image yet.  A change needs distinct things and a name
    that means exactly one of them.
    """
    prompt = " ".join(prompt.split())
    if before is None:
        try:
            return Draw(parse_caption(prompt))
        except KeyError:
            return None
    things = tuple(before)
    if len(set(things)) < len(things):
        return None
    if match := _ADD_POSITION.fullmatch(prompt):
        return _addition(things, match[1], match[2], None)
    if match := _ADD_RELATION.fullmatch(prompt):
        anchor = _meant(match[3], things)
        return None if anchor is None else _addition(things, match[1], match[2], anchor)
    if match := _RECOLOUR.fullmatch(prompt):
        target = _meant(match[1], things)
        if target is None or Thing(match[2], target.shape) in things:
            return None
        return Change("recolour", things, target, colour=match[2])
    if match := _REMOVE.fullmatch(prompt):
        target = _meant(match[1], things)
        return None if target is None else Change("remove", things, target)
    return None


def _meant(name: str, things: Sequence[Thing]) -> Thing | None:
    found = [t for t in things if name in (str(t), t.shape)]
    return found[0] if len(found) == 1 else None


def _addition(before: tuple[Thing, ...], target: str, place: str, anchor: Thing | None) -> Change | None:
    thing = Thing(*target.split())
    return None if thing in before else Change("add", before, thing, place=place, anchor=anchor)


def same_step(got: Step | None, want: Step) -> bool:
    """Whether two steps ask for the same; a place that `want` leaves open may be any."""
    if isinstance(got, Draw) and isinstance(want, Draw):
        return _meaning(got.spec) == _meaning(want.spec)
    if isinstance(got, Change) and isinstance(want, Change):
        same = (got.kind, got.target, got.colour) == (want.kind, want.target, want.colour)
        return same and (not want.place or (got.place, got.anchor) == (want.place, want.anchor))
    return False


def _meaning(spec: Spec) -> tuple[tuple[Thing, ...], str]:
    things = tuple(sorted(spec.things))
    turned = spec.category == "relation" and things != spec.things
    return things, OPPOSITE[spec.place] if turned else spec.place


def plan_is_correct(prompts: Sequence[str], story: Story) -> bool:
    """Whether prompts are a correct plan of the story: as many steps, each asking for the same as the story's."""
    if len(prompts) != len(story.steps):
        return False
    befores: list[Sequence[Thing] | None] = [None, *(step.after for step in story.steps)]
    return all(
        same_step(read_prompt(prompt, before), step)
        for prompt, before, step in zip(prompts, befores, story.steps, strict=False)
    )


# --- verification ----------------------------------------------------------------------------------------------------


def step_holds(before: Sequence[Detection] | None, found: Sequence[Detection], step: Step) -> bool:
    """Whether what was read in an image is the step's result, given what was read in the image before it.

    A change: exactly the expected things; the untouched ones, and a recoloured one, within `MAX_DRIFT` pixels of where
    they were in the image before; the added thing where its clause says.
    """
    if isinstance(step, Draw):
        return caption_holds(found, step.spec)
    if before is None or Counter(d.thing for d in found) != Counter(step.after):
        return False
    was, now = {d.thing: d for d in before}, {d.thing: d for d in found}
    stays = [(t, t) for t in step.untouched] + ([(step.target, step.result)] if step.kind == "recolour" else [])
    for old, new in stays:
        if old not in was or max(abs(was[old].x - now[new].x), abs(was[old].y - now[new].y)) > MAX_DRIFT:
            return False
    if step.kind != "add" or not step.place:
        return True
    added = now[step.target]
    if step.anchor is None:
        return position_holds(step.place, added.x, added.y)
    return relation_holds(step.place, (added.x, added.y), (now[step.anchor].x, now[step.anchor].y))


def verify_story(images: Tensor, story: Story) -> list[bool]:
    """Whether each step of the story holds, judged on the image before it; steps without an image do not.

    images: (n, 3, h, w) in [0, 1], the story's images in order; n may be smaller than the number of steps.
    Raises ValueError if there are more images than steps.
    """
    if len(images) > len(story.steps):
        raise ValueError(f"{len(images)} images for a story of {len(story.steps)} steps")
    found = detect(images) if len(images) else []
    befores = [None, *found]
    held = [step_holds(b, f, s) for b, f, s in zip(befores, found, story.steps, strict=False)]
    return held + [False] * (len(story.steps) - len(held))


# --- drawing stories -------------------------------------------------------------------------------------------------


def sample_story(
    rng: np.random.Generator, split: Split = "train", num_steps: int | None = None, riddle: bool = False
) -> Story:
    """A story of 1 to `MAX_STEPS` steps; the things of every one of its images belong to the split.

    Riddles put facts that the split owns in the place of colours and shapes (`shape_facts`, `colour_facts`).
    """
    count = num_steps or int(rng.choice([1, 2, 3, 4], p=[0.25, 0.3, 0.3, 0.15]))
    while True:
        steps = _sample_steps(rng, split, count, riddle)
        if steps is not None:
            request = tell(steps, lambda options: options[int(rng.integers(len(options)))], split if riddle else None)
            return Story(request, steps, riddle)


def sample_change(
    things: tuple[Thing, ...],
    rng: np.random.Generator,
    split: Split,
    taken: frozenset[tuple[Thing, str]] = frozenset(),
    open_share: float = 0.0,
) -> Change | None:
    """A random change of an image whose result belongs to the split; None where there is none.

    taken: (thing, side) pairs, so that nothing is asked to stand where there may be no room.
    open_share: how many of the additions leave the place open.
    """
    kinds: list[EditKind] = ["add", "add", "recolour"] if len(things) < 3 else []
    if len(things) > 1:
        kinds.append("remove")
    for _ in range(20):
        kind = kinds[rng.integers(len(kinds))]
        target = ALL_THINGS[rng.integers(len(ALL_THINGS))] if kind == "add" else things[rng.integers(len(things))]
        change = Change(kind, things, target)
        if kind == "recolour":
            change = Change(kind, things, target, colour=list(COLOURS)[rng.integers(len(COLOURS))])
        elif kind == "add" and rng.random() >= open_share:
            if rng.random() < 0.4:
                change = Change(kind, things, target, place=POSITIONS[rng.integers(4)])
            else:
                place, anchor = RELATIONS[rng.integers(4)], things[rng.integers(len(things))]
                if (anchor, DIRECTION[place]) in taken:
                    continue
                change = Change(kind, things, target, place=place, anchor=anchor)
        after = change.after
        new = change.kind == "remove" or change.result not in things
        if new and split_of(tuple(sorted(after))) == split:
            return change
    return None


def _sample_steps(rng: np.random.Generator, split: Split, count: int, riddle: bool) -> tuple[Step, ...] | None:
    """One try; None where a change finds no result in the split."""
    weights = {"single": 3.0, "position": 2.0} if count > 1 or riddle else {"single": 1.0, "position": 1.0}
    names = [c for c in CATEGORIES if c != "count" or (count == 1 and not riddle)]
    shares = np.array([weights.get(c, 1.0) for c in names])
    options = specs(names[rng.choice(len(names), p=shares / shares.sum())], split)
    spec = options[rng.integers(len(options))]
    steps: list[Step] = [Draw(spec)]
    taken: set[tuple[Thing, str]] = set()
    if spec.category == "position":
        taken.add((spec.things[0], spec.place))
    if spec.category == "relation":
        taken |= _sides(spec.things[0], spec.place, spec.things[1])
    while len(steps) < count:
        change = sample_change(steps[-1].after, rng, split, frozenset(taken), open_share=0.1)
        if change is None or (change.kind == "remove" and change.target == steps[-1].after[-1] and len(steps) > 1):
            return None
        steps.append(change)
        if change.kind == "recolour":
            taken |= {(change.result, side) for thing, side in taken if thing == change.target}
        elif change.anchor is not None:
            taken |= _sides(change.target, change.place, change.anchor)
        elif change.place:
            taken.add((change.target, change.place))
    return tuple(steps)


def _sides(thing: Thing, relation: str, anchor: Thing) -> set[tuple[Thing, str]]:
    """What a relation takes up: the thing's own outer side, the anchor's side towards it, and its other side."""
    side = DIRECTION[relation]
    return {(thing, side), (thing, OPPOSITE_POSITION[side]), (anchor, side), (anchor, OPPOSITE_POSITION[side])}
