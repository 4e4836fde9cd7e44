"""Stories: requests in plain words or riddles, the correct plan in the generator's language, strict verification."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from torch import Tensor

from imgen_common.shapes.edits import MAX_DRIFT, EditKind
from imgen_common.shapes.scene import (
    ALL_THINGS,
    CATEGORIES,
    COLOURS,
    NUMBERS,
    OPPOSITE,
    OPPOSITE_POSITION,
    POSITIONS,
    RELATIONS,
    SHAPES,
    Spec,
    Split,
    Thing,
    parse_caption,
    plural,
    position_holds,
    relation_holds,
    specs,
    split_of,
)
from imgen_common.shapes.verify import Detection, detect, judge

MAX_STEPS = 4
DIRECTION = {"left of": "left", "right of": "right", "above": "top", "below": "bottom"}
"""The side on which a relation puts its first thing."""
DEFAULT_PLACE = "right"
"""Where a thing goes whose place the request leaves open: the generator's language always names one."""


@dataclass(frozen=True)
class Draw:
    """The first step of a story: a picture from a caption."""

    spec: Spec

    @property
    def name(self) -> str:
        return "draw"

    @property
    def after(self) -> tuple[Thing, ...]:
        """The things that the picture then shows."""
        return self.spec.things

    @property
    def prompt(self) -> str:
        """The caption, as the generator knows it."""
        return self.spec.caption

    @property
    def text(self) -> str:
        """A sentence for the reader of the story."""
        return f"Here {'are' if self.spec.category == 'count' else 'is'} {self.prompt}."


@dataclass(frozen=True)
class Change:
    """A later step: one edit of a picture of distinct things (`before`).

    target: the thing added, or the one recoloured or removed, as it was.  `colour`: the new one of a recolouring.
    `place`: of an addition, a position, or a relation to the thing `anchor`; "" where the request leaves it open.
    """

    kind: EditKind
    before: tuple[Thing, ...]
    target: Thing
    colour: str = ""
    place: str = ""
    anchor: Thing | None = None

    @property
    def name(self) -> str:
        return self.kind

    @property
    def result(self) -> Thing:
        """The target as it is afterwards."""
        return Thing(self.colour, self.target.shape) if self.kind == "recolour" else self.target

    @property
    def untouched(self) -> tuple[Thing, ...]:
        """What must stay where it was."""
        return tuple(t for t in self.before if t != self.target)

    @property
    def after(self) -> tuple[Thing, ...]:
        """The things that the picture then shows."""
        return self.untouched if self.kind == "remove" else (*self.untouched, self.result)

    @property
    def prompt(self) -> str:
        """The instruction, as the generator knows it (`Edit.instruction`)."""
        if self.kind == "add":
            return f"add a {self.target} {self._clause}"
        name = short_name(self.target, self.before)
        return f"make the {name} {self.colour}" if self.kind == "recolour" else f"remove the {name}"

    @property
    def _clause(self) -> str:
        if self.anchor is None:
            return f"on the {self.place or DEFAULT_PLACE}"
        return f"{self.place} the {short_name(self.anchor, self.before)}"

    @property
    def text(self) -> str:
        """A sentence for the reader of the story."""
        if self.kind == "add":
            return f"A {self.target} joins, {self._clause}."
        name = short_name(self.target, self.before)
        return f"The {name} turns {self.colour}." if self.kind == "recolour" else f"The {name} is gone."


Step = Draw | Change


@dataclass(frozen=True)
class Story:
    """A request and its correct plan.  `riddle`: the request names things by facts, not by colour and shape."""

    request: str
    steps: tuple[Step, ...]
    riddle: bool = False

    @property
    def prompts(self) -> list[str]:
        """The plan: a caption, then instructions."""
        return [step.prompt for step in self.steps]


def short_name(thing: Thing, among: Sequence[Thing]) -> str:
    """`circle` where the shape is unique in the picture, else `red circle`."""
    return thing.shape if sum(t.shape == thing.shape for t in among) == 1 else str(thing)


# --- reading prompts -------------------------------------------------------------------------------------------------

_THING = rf"((?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)}))"
_NAME = rf"((?:(?:{'|'.join(COLOURS)}) )?(?:{'|'.join(SHAPES)}))"
_ADD_POSITION = re.compile(rf"add a {_THING} on the ({'|'.join(POSITIONS)})")
_ADD_RELATION = re.compile(rf"add a {_THING} ({'|'.join(RELATIONS)}) the {_NAME}")
_RECOLOUR = re.compile(rf"make the {_NAME} ({'|'.join(COLOURS)})")
_REMOVE = re.compile(rf"remove the {_NAME}")


def read_prompt(prompt: str, before: Sequence[Thing] | None) -> Step | None:
    """The step that a prompt of the generator's language asks for; None where it is not of that language or impossible.

    before: the things in the picture, None where there is no picture yet.  A change needs distinct things and a name
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
    """Whether what was read in a picture is the step's result, given what was read in the picture before it.

    A caption is judged by `verify.judge`.  A change: exactly the expected things; the untouched ones, and a recoloured
    one, within `MAX_DRIFT` pixels of where they were in the picture before; the added thing where its clause says.
    """
    if isinstance(step, Draw):
        return judge(found, step.spec).ok
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


def verify_step(before: Tensor | None, after: Tensor, step: Step) -> bool:
    """The oracle critic: whether `after` is the step's result.

    Pictures (3, 32, 32) in [0, 1] (`imgen_common.images.from_pil`); `before` is the accepted picture, None for `Draw`.
    """
    return step_holds(None if before is None else detect(before[None])[0], detect(after[None])[0], step)


def verify_story(pictures: Tensor, story: Story) -> list[bool]:
    """Whether each step of the story holds, judged on the picture before it; steps without a picture do not.

    pictures: (n, 3, 32, 32) in [0, 1], the story's pictures in order; n may be smaller than the number of steps.
    Raises ValueError if there are more pictures than steps.
    """
    if len(pictures) > len(story.steps):
        raise ValueError(f"{len(pictures)} pictures for a story of {len(story.steps)} steps")
    found = detect(pictures) if len(pictures) else []
    befores = [None, *found]
    held = [step_holds(b, f, s) for b, f, s in zip(befores, found, story.steps, strict=False)]
    return held + [False] * (len(story.steps) - len(held))


# --- drawing stories -------------------------------------------------------------------------------------------------


def sample_story(
    rng: np.random.Generator, split: Split = "train", num_steps: int | None = None, riddle: bool = False
) -> Story:
    """A story of 1 to `MAX_STEPS` steps; the things of every one of its pictures belong to the split.

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
    """A random change of a picture whose result belongs to the split; None where there is none.

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


# --- words -----------------------------------------------------------------------------------------------------------

Choose = Callable[[Sequence[str]], str]

DRAW_VERBS = ("draw", "paint", "sketch", "show", "create", "start with", "begin with", "show me", "draw me")
ADD_VERBS = ("add", "put", "place", "draw", "insert", "add", "put", "place")
RECOLOURINGS = (
    "make {a} {c}", "turn {a} {c}", "colour {a} {c}", "color {a} {c}", "paint {a} {c}", "change {a} to {c}",
    "recolour {a} to {c}", "change the colour of {a} to {c}", "make {a} {c}", "let {a} become {c}",
)  # fmt: skip
RIDDLED_RECOLOURINGS = (
    "make {a} the colour of {f}", "turn {a} the colour of {f}", "give {a} the colour of {f}", "colour {a} like {f}",
)  # fmt: skip
REMOVALS = ("remove {a}", "take away {a}", "take {a} away", "erase {a}", "delete {a}", "get rid of {a}", "remove {a}")
AT = {
    "left": ("on the left", "at the left", "on the left side", "in the left half"),
    "right": ("on the right", "at the right", "on the right side", "in the right half"),
    "top": ("at the top", "on the top", "in the upper half", "in the top half"),
    "bottom": ("at the bottom", "on the bottom", "in the lower half", "in the bottom half"),
}
BESIDE = {
    "left of": ("left of {a}", "to the left of {a}", "on the left of {a}"),
    "right of": ("right of {a}", "to the right of {a}", "on the right of {a}"),
    "above": ("above {a}", "over {a}"),
    "below": ("below {a}", "under {a}", "beneath {a}", "underneath {a}"),
}
BESIDE_IT = {
    "left of": ("on its left", "to its left", "left of it", "to the left of it", "on its left side"),
    "right of": ("on its right", "to its right", "right of it", "to the right of it", "on its right side"),
    "above": ("above it", "over it"),
    "below": ("below it", "under it", "beneath it", "underneath it"),
}
OPENINGS = ("", "", "", "", "please ", "Please ", "first ", "First, ", "could you ", "I want you to ")
LINKS = (
    ", then ", ", then ", " then ", " and then ", ", and then ", ". Then ", ", next ", ". Next, ", ", after that ",
    ". After that, ", ". Now ", " and ", ", ",
)  # fmt: skip
LAST_LINKS = (", finally ", ". Finally, ", " and finally ", ", and at last ", *LINKS)
ENDINGS = ("", "", ".")

SHAPE_FACTS = {
    "circle": ("without corners", "of a coin", "of a wheel", "of the full moon", "of a plate", "without any corner"),
    "square": ("with four corners", "with four equal sides", "of a chessboard field", "of a die", "of a window pane"),
    "triangle": ("with three corners", "with three sides", "of a slice of pizza", "of a pyramid", "of a tent"),
    "cross": ("of a plus sign", "with four arms", "of the letter x", "of two bars that meet", "of a pharmacy sign"),
}
"""What follows "the shape" in a riddle."""
COLOUR_FACTS = {
    "red": ("blood", "a strawberry", "a fire engine", "a ripe tomato", "a stop sign", "a ruby"),
    "yellow": ("a lemon", "a banana", "the sun", "butter", "a canary", "an egg yolk"),
    "green": ("grass", "a leaf", "an emerald", "a frog", "spinach", "blue mixed with yellow"),
    "cyan": ("a swimming pool", "glacier ice", "turquoise", "tropical water", "a robin egg", "green mixed with blue"),
    "blue": ("a sapphire", "the deep sea", "jeans", "a blueberry", "the clear sky", "a cornflower"),
    "purple": ("grapes", "lavender", "a plum", "a violet", "an aubergine", "red mixed with blue"),
}
"""What follows "the colour of" in a riddle."""
RIDDLES = (
    "the shape {s} in the colour of {c}", "a shape {s} in the colour of {c}", "a shape {s} with the colour of {c}",
    "the shape {s} that has the colour of {c}", "a shape {s} coloured like {c}",
    "something in the colour of {c} and in the shape {s}", "a {c} coloured shape {s}",
)  # fmt: skip


@cache
def shape_facts(thing: Thing, split: Split) -> tuple[tuple[str, str], ...]:
    """The riddles of a thing that a split owns, (colour's fact, shape's fact): no pair of facts crosses splits."""
    return _share([(c, s) for c in COLOUR_FACTS[thing.colour] for s in SHAPE_FACTS[thing.shape]], split)


@cache
def colour_facts(colour: str, shape: str, split: Split) -> tuple[str, ...]:
    """The facts by which a split may ask to recolour a shape."""
    return tuple(fact for fact, _ in _share([(fact, shape) for fact in COLOUR_FACTS[colour]], split))


def _share(pairs: Sequence[tuple[str, str]], split: Split) -> tuple[tuple[str, str], ...]:
    """A split's part of the pairs, ranked by hash: 2/3 train, 1/6 tune, 1/6 test."""
    ranked = sorted(pairs, key=lambda pair: hashlib.sha256("|".join(pair).encode()).digest())
    first, second = len(ranked) * 4 // 6, len(ranked) * 5 // 6
    return tuple({"train": ranked[:first], "tune": ranked[first:second], "test": ranked[second:]}[split])


def tell(steps: Sequence[Step], choose: Choose, riddles: Split | None = None) -> str:
    """A request for the steps in plain words; `riddles`: in facts that this split owns.

    "it" is the thing that the step before drew alone, added or recoloured.
    """
    topic: Thing | None = None
    parts: list[str] = []
    for i, step in enumerate(steps):
        if i:
            parts.append(choose(LAST_LINKS if i == len(steps) - 1 else LINKS))
        parts.append(_tell_draw(step, choose, riddles) if isinstance(step, Draw) else "")
        if isinstance(step, Draw):
            topic = step.after[0] if len(step.after) == 1 else None
            continue
        parts[-1] = _tell_change(step, topic, choose, riddles)
        topic = None if step.kind == "remove" else step.result
    opening = choose(OPENINGS)
    if not opening:
        parts[0] = choose((parts[0], parts[0][0].upper() + parts[0][1:]))
    return opening + "".join(parts) + choose(ENDINGS)


def _noun(thing: Thing, choose: Choose, riddles: Split | None) -> str:
    if riddles is None:
        return f"a {thing}"
    pairs = {f"{colour}, {shape}": (colour, shape) for colour, shape in shape_facts(thing, riddles)}
    colour, shape = pairs[choose(tuple(pairs))]
    return choose(_riddles_for(colour, shape)).format(c=colour, s=shape)


@cache
def _riddles_for(colour: str, shape: str) -> tuple[str, ...]:
    """The riddles that read well with these facts."""
    simple = not colour.startswith(("a ", "an ", "the ")) and "mixed" not in colour
    return tuple(
        riddle
        for riddle in RIDDLES
        if (shape.startswith("of") or not riddle.endswith("in the shape {s}"))
        and (simple or not riddle.startswith("a {c}"))
    )


def _tell_draw(step: Draw, choose: Choose, riddles: Split | None) -> str:
    spec = step.spec
    first = _noun(spec.things[0], choose, riddles)
    what = first
    match spec.category:
        case "position":
            what = f"{first} {choose(AT[spec.place])}"
        case "count":
            number, things = NUMBERS[len(spec.things)], f"{spec.things[0].colour} {plural(spec.things[0].shape)}"
            group = {"two": "a pair of", "three": "a group of three"}[number]
            what = choose((f"{number} {things}", f"{group} {things}", f"{number} {things}"))
        case "relation":
            second = _noun(spec.things[1], choose, riddles)
            beside = choose([form.format(a=second) for form in BESIDE[spec.place]])
            turned = f"{second} with {first} {choose(BESIDE_IT[spec.place])}"
            what = choose((f"{first} {beside}", f"{first} {beside}", turned))
        case "two" | "binding":
            second = _noun(spec.things[1], choose, riddles)
            what = f"{first} {choose(('and', 'and', 'next to', 'together with'))} {second}"
    return f"{choose(DRAW_VERBS)} {what}"


def _references(thing: Thing, among: Sequence[Thing]) -> list[str]:
    """How plain words may mean a thing that is in the picture."""
    names = [f"the {short_name(thing, among)}"] * 2 + [f"the {thing}"]
    if sum(t.colour == thing.colour for t in among) == 1:
        names += [f"the {thing.colour} one", f"the {thing.colour} shape"]
    return names


def _tell_change(step: Change, topic: Thing | None, choose: Choose, riddles: Split | None) -> str:
    if step.kind == "add":
        return _tell_addition(step, topic, choose, riddles)
    names = _references(step.target, step.before)
    if step.kind == "remove":
        return choose(REMOVALS).format(a=choose(names))
    if step.target == topic:
        names += ["it"] * len(names)
    name = choose(names)
    if riddles is not None:
        fact = choose(colour_facts(step.colour, step.target.shape, riddles))
        return choose(RIDDLED_RECOLOURINGS).format(a=name, f=fact)
    return choose(RECOLOURINGS).format(a=name, c=step.colour)


def _tell_addition(step: Change, topic: Thing | None, choose: Choose, riddles: Split | None) -> str:
    what = f"{choose(ADD_VERBS)} {_noun(step.target, choose, riddles)}"
    if not step.place:
        return what
    if step.anchor is None:
        where = choose(AT[step.place])
    else:
        forms = [form.format(a=choose(_references(step.anchor, step.before))) for form in BESIDE[step.place]]
        where = choose([*forms, *(BESIDE_IT[step.place] if step.anchor == topic else ())])
    return choose((f"{what} {where}", f"{what} {where}", f"{what} {where}", f"{where} {what}"))
