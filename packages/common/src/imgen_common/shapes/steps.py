"""What a story is made of: drawings and changes of an image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from imgen_common.shapes.scene import Spec, Thing

EditKind = Literal["add", "recolour", "remove"]
EDIT_KINDS: tuple[EditKind, ...] = get_args(EditKind)
MAX_DRIFT = 4.0
"""How far in pixels a thing that a change does not touch may move before the change counts as wrong."""
MAX_STEPS = 4
DIRECTION = {"left of": "left", "right of": "right", "above": "top", "below": "bottom"}
"""The side on which a relation puts its first thing."""
DEFAULT_PLACE = "right"
"""Where a thing goes whose place the request leaves open: the generator's language always names one."""


@dataclass(frozen=True)
class Draw:
    """The first step of a story: an image from a caption."""

    spec: Spec

    @property
    def name(self) -> str:
        return "draw"

    @property
    def after(self) -> tuple[Thing, ...]:
        """The things that the image then shows."""
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
    """A later step: one edit of an image of distinct things (`before`).

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
        """The things that the image then shows."""
        return self.untouched if self.kind == "remove" else (*self.untouched, self.result)

    @property
    def prompt(self) -> str:
        """The instruction, as the generator knows it."""
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
    """`circle` where the shape is unique in the image, else `red circle`."""
    return thing.shape if sum(t.shape == thing.shape for t in among) == 1 else str(thing)
