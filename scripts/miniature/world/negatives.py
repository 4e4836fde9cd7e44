"""Captions that differ minimally from a true one and are false: what the reward models learn to tell apart."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from imgen_common.shapes.scene import COLOURS, OPPOSITE, OPPOSITE_POSITION, SHAPES, Spec, Thing, pair_category


def _other(options: Sequence[str], not_this: str, rng: np.random.Generator) -> str:
    rest = [o for o in options if o != not_this]
    return rest[rng.integers(len(rest))]


def hard_negative(spec: Spec, rng: np.random.Generator) -> Spec:
    """A caption that differs minimally and is false of every scene of `spec`.

    Changes one colour or shape, swaps the attributes of two things, turns a relation or position round, or changes
    the number.
    """
    while True:
        candidate = _mutate(spec, rng)
        pair_clash = candidate.category in ("two", "relation", "binding") and len(set(candidate.things)) < 2
        if not pair_clash and not _implies(spec, candidate):
            return candidate


def turned(spec: Spec) -> Spec:
    """The same things with their position or relation turned round."""
    return replace(spec, place=(OPPOSITE | OPPOSITE_POSITION)[spec.place])


def _mutate(spec: Spec, rng: np.random.Generator) -> Spec:
    things = list(spec.things)
    moves = ["colour", "shape", "number"]
    moves += {
        "binding": ["swap"] * 3,
        "relation": ["swap", "turn", "turn"],
        "position": ["turn"] * 2,
        "count": ["number"],
    }.get(spec.category, [])
    move = moves[rng.integers(len(moves))]
    if move in ("colour", "shape"):
        i = int(rng.integers(len(things)))
        old = things[i]
        new = (
            replace(old, colour=_other(list(COLOURS), old.colour, rng))
            if move == "colour"
            else replace(old, shape=_other(SHAPES, old.shape, rng))
        )
        things = [new] * len(things) if spec.category == "count" else [*things[:i], new, *things[i + 1 :]]
    elif move == "swap":
        a, b = things
        things = [Thing(b.colour, a.shape), Thing(a.colour, b.shape)]
    elif move == "turn":
        return turned(spec)
    elif spec.category == "count":
        number = int(_other(["1", "2", "3"], str(len(things)), rng))
        return Spec("count" if number > 1 else "single", (things[0],) * number)
    elif len(things) == 1:
        return Spec("count", (things[0],) * int(rng.integers(2, 4)))
    else:
        return Spec("single", (things[int(rng.integers(2))],))
    category = pair_category(*things) if spec.category in ("two", "binding") else spec.category
    return Spec(category, tuple(things), spec.place)


def _implies(truth: Spec, claim: Spec) -> bool:
    """Whether some scene of `truth` also satisfies `claim` (read strictly: exactly these things)."""
    if sorted(truth.things) != sorted(claim.things):
        return False
    turned = claim.category == "relation" and claim.things != truth.things
    return truth.place == (OPPOSITE[claim.place] if turned else claim.place)
