"""What an image shows (`Scene`) and what a caption states (`Spec`): sampling, captions, splits."""

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np

SIZE = 32
"""Side of an image in pixels."""

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.16, 0.16),
    "yellow": (0.93, 0.85, 0.18),
    "green": (0.14, 0.72, 0.24),
    "cyan": (0.18, 0.80, 0.86),
    "blue": (0.18, 0.30, 0.92),
    "purple": (0.66, 0.22, 0.80),
}
SHAPES = ("circle", "square", "triangle", "cross")
POSITIONS = ("left", "right", "top", "bottom")
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
OPPOSITE_POSITION = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
NUMBERS = {2: "two", 3: "three"}

Category = Literal["single", "position", "two", "relation", "count", "binding"]
"""GenEval's tasks: one object, its place, two objects, their relation, a number, colours bound to two objects."""
CATEGORIES: tuple[Category, ...] = get_args(Category)
Split = Literal["train", "tune", "test"]


def plural(shape: str) -> str:
    """`circle` -> `circles`, `cross` -> `crosses`."""
    return shape + ("es" if shape.endswith("s") else "s")


@dataclass(frozen=True, order=True)
class Thing:
    """One coloured shape, as a caption names it."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


ALL_THINGS = tuple(Thing(c, s) for c in COLOURS for s in SHAPES)


@dataclass(frozen=True)
class Spec:
    """What a caption states.  `place`: a position for `position`, the first's relation to the second for `relation`."""

    category: Category
    things: tuple[Thing, ...]
    place: str = ""

    @property
    def caption(self) -> str:
        """The sentence, one per spec: `a red circle left of a blue square`."""
        first = self.things[0]
        match self.category:
            case "single":
                return f"a {first}"
            case "position":
                return f"a {first} on the {self.place}"
            case "count":
                return f"{NUMBERS[len(self.things)]} {first.colour} {plural(first.shape)}"
            case "relation":
                return f"a {first} {self.place} a {self.things[1]}"
            case "two" | "binding":
                return f"a {first} and a {self.things[1]}"


@dataclass(frozen=True)
class Placed:
    """A thing in the image: center (x right, y down) and radius in pixels; `rgb` is its own shade."""

    thing: Thing
    x: float
    y: float
    radius: float
    rgb: tuple[float, float, float]


@dataclass(frozen=True)
class Scene:
    """Everything needed to render an image exactly: background gray in [0, 1] and the placed things."""

    background: float
    placed: tuple[Placed, ...]

    @property
    def things(self) -> tuple[Thing, ...]:
        """The things without their places."""
        return tuple(p.thing for p in self.placed)


def pair_category(a: Thing, b: Thing) -> Category:
    """`binding` where both colour and shape differ (they can be swapped), else `two`."""
    return "binding" if a.colour != b.colour and a.shape != b.shape else "two"


@cache
def split_of(things: tuple[Thing, ...]) -> Split:
    """The split that owns a multiset of things (order does not matter), so no scene or caption crosses splits.

    Within each kind (one thing, a repeated thing, two things) the keys are ranked by hash: 70 % train, 10 % tune,
    20 % test.  Other multisets (edits can make them) fall back on the hash itself, in the same proportions.
    """
    key = tuple(sorted(things))
    for kind in _kinds():
        if key in kind:
            rank = kind.index(key) / len(kind)
            break
    else:
        rank = int.from_bytes(_digest(key)[:8]) / 2**64
    return "train" if rank < 0.7 else "tune" if rank < 0.8 else "test"


def _digest(key: tuple[Thing, ...]) -> bytes:
    return hashlib.sha256("|".join(map(str, key)).encode()).digest()


@cache
def _kinds() -> tuple[tuple[tuple[Thing, ...], ...], ...]:
    ordered = sorted(ALL_THINGS)
    pairs = list(itertools.combinations(ordered, 2))
    kinds: list[list[tuple[Thing, ...]]] = [[(t,) * number for t in ordered] for number in (1, 2, 3)]
    kinds += [[p for p in pairs if pair_category(*p) == category] for category in ("two", "binding")]
    return tuple(tuple(sorted(kind, key=_digest)) for kind in kinds)


@cache
def specs(category: Category, split: Split) -> tuple[Spec, ...]:
    """Every caption of a category in a split, in a fixed order."""
    found: list[Spec] = []
    ordered_pairs = list(itertools.permutations(ALL_THINGS, 2))
    match category:
        case "single":
            found = [Spec("single", (t,)) for t in ALL_THINGS]
        case "position":
            found = [Spec("position", (t,), p) for t in ALL_THINGS for p in POSITIONS]
        case "count":
            found = [Spec("count", (t,) * n) for t in ALL_THINGS for n in NUMBERS]
        case "relation":
            found = [Spec("relation", pair, r) for pair in ordered_pairs for r in RELATIONS]
        case "two" | "binding":
            found = [Spec(category, pair) for pair in ordered_pairs if pair_category(*pair) == category]
    return tuple(s for s in found if split_of(s.things) == split)


WEIGHTS: dict[Category, float] = {
    "single": 1.0,
    "position": 1.0,
    "two": 1.5,
    "relation": 2.0,
    "count": 1.5,
    "binding": 1.5,
}
"""How often each category is drawn for training: the harder, the oftener."""


def sample_spec(rng: np.random.Generator, split: Split = "train", category: Category | None = None) -> Spec:
    """Draws a caption of a split; the category by `WEIGHTS` unless given."""
    if category is None:
        weights = np.array([WEIGHTS[c] for c in CATEGORIES])
        category = CATEGORIES[rng.choice(len(CATEGORIES), p=weights / weights.sum())]
    options = specs(category, split)
    return options[rng.integers(len(options))]


def balanced_specs(count: int, rng: np.random.Generator, split: Split) -> list[Spec]:
    """`count` captions of a split, the categories in turn; within a category none repeats before all were drawn."""
    decks: dict[Category, list[int]] = {c: [] for c in CATEGORIES}
    chosen = []
    for i in range(count):
        category = CATEGORIES[i % len(CATEGORIES)]
        options = specs(category, split)
        if not decks[category]:
            decks[category] = list(rng.permutation(len(options)))
        chosen.append(options[decks[category].pop()])
    return chosen


def parse_caption(caption: str) -> Spec:
    """The spec that a caption states; inverse of `Spec.caption`.  Raises KeyError for any other sentence."""
    return _captions()[" ".join(caption.split())]


@cache
def _captions() -> dict[str, Spec]:
    splits: tuple[Split, ...] = get_args(Split)
    return {s.caption: s for c in CATEGORIES for split in splits for s in specs(c, split)}


def position_holds(position: str, x: float, y: float, margin: float = 1.0) -> bool:
    """Whether the point (pixels) lies on the stated side of the image's center, by at least `margin` pixels."""
    center = (SIZE - 1) / 2
    return {"left": center - x, "right": x - center, "top": center - y, "bottom": y - center}[position] > margin


def relation_holds(relation: str, a: tuple[float, float], b: tuple[float, float], margin: float = 1.5) -> bool:
    """Whether point `a` stands in the relation to `b` by `margin` pixels."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    return {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation] >= margin


def shade(colour: str, rng: np.random.Generator) -> tuple[float, float, float]:
    """A slightly varied RGB of a named colour."""
    rgb = np.clip(np.array(COLOURS[colour]) * rng.uniform(0.92, 1.06) + rng.uniform(-0.03, 0.03, 3), 0.0, 1.0)
    return (float(rgb[0]), float(rgb[1]), float(rgb[2]))


def place(thing: Thing, crowd: int, rng: np.random.Generator) -> Placed:
    """A thing somewhere in the image, wholly inside; smaller in a crowd of three."""
    radius = float(rng.uniform(4.2, 6.0) if crowd < 3 else rng.uniform(4.0, 5.0))
    x, y = rng.uniform(radius + 1, SIZE - 2 - radius, 2)
    return Placed(thing, float(x), float(y), radius, shade(thing.colour, rng))


def fits(a: Placed, others: Sequence[Placed]) -> bool:
    """Whether a placed thing keeps a visible gap to all others."""
    return all(math.hypot(a.x - b.x, a.y - b.y) >= (a.radius + b.radius) * 1.25 + 1.5 for b in others)


def compose(spec: Spec, rng: np.random.Generator) -> Scene:
    """A random scene that the caption describes with room to spare (4 px for a position, 7 px for a relation)."""
    while True:
        placed: list[Placed] = []
        for thing in spec.things:
            candidate = place(thing, len(spec.things), rng)
            if not fits(candidate, placed):
                break
            placed.append(candidate)
        if len(placed) < len(spec.things):
            continue
        a = placed[0]
        if spec.category == "position" and not position_holds(spec.place, a.x, a.y, 4.0):
            continue
        if spec.category == "relation" and not relation_holds(spec.place, (a.x, a.y), (placed[1].x, placed[1].y), 7.0):
            continue
        return Scene(float(rng.uniform(0.05, 0.25)), tuple(placed))
