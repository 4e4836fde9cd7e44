"""Requests in plain words and in riddles."""

import hashlib
from collections.abc import Callable, Sequence
from functools import cache

from imgen_common.shapes.scene import NUMBERS, Split, Thing, plural
from imgen_common.shapes.steps import Change, Draw, Step, short_name

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
GROUPS = {"two": "a pair of", "three": "a group of three"}
SHORT_NAMES = ("the {c} one", "the {c} shape")
TOGETHER = ("and", "and", "next to", "together with")
OPENINGS = ("", "", "", "", "please ", "Please ", "first ", "First, ", "could you ", "I want you to ")
LINKS = (
    ", then ", ", then ", " then ", " and then ", ", and then ", ". Then ", ", next ", ". Next, ", ", after that ",
    ". After that, ", ". Now ", " and ", ", ",
)  # fmt: skip
LAST_LINKS = (", finally ", ". Finally, ", " and finally ", ", and at last ", *LINKS)
ENDINGS = ("", "", ".")

CHANGES = tuple(
    opening + change.partition("{a}")[0] + what
    for what in ("the ", "it ")
    for opening in dict.fromkeys(OPENINGS)
    for change in dict.fromkeys((*REMOVALS, *RECOLOURINGS, *RIDDLED_RECOLOURINGS))
    if change.split()[0] not in DRAW_VERBS
)
"""How a request begins that asks to change something, in a first step that has nothing to change."""

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
        if isinstance(step, Draw):
            parts.append(_tell_draw(step, choose, riddles))
            topic = step.after[0] if len(step.after) == 1 else None
        else:
            parts.append(_tell_change(step, topic, choose, riddles))
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
            what = choose((f"{number} {things}", f"{GROUPS[number]} {things}", f"{number} {things}"))
        case "relation":
            second = _noun(spec.things[1], choose, riddles)
            beside = choose([form.format(a=second) for form in BESIDE[spec.place]])
            turned = f"{second} with {first} {choose(BESIDE_IT[spec.place])}"
            what = choose((f"{first} {beside}", f"{first} {beside}", turned))
        case "two" | "binding":
            second = _noun(spec.things[1], choose, riddles)
            what = f"{first} {choose(TOGETHER)} {second}"
    return f"{choose(DRAW_VERBS)} {what}"


def _references(thing: Thing, among: Sequence[Thing]) -> list[str]:
    """How plain words may mean a thing that is in the image."""
    names = [f"the {short_name(thing, among)}"] * 2 + [f"the {thing}"]
    if sum(t.colour == thing.colour for t in among) == 1:
        names += [name.format(c=thing.colour) for name in SHORT_NAMES]
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
