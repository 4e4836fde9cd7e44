"""Cases on which the critic is trained: generated images, also mirrored and recolored, and rendered ones."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from imgen_common.shapes.edits import Edit, sample_edit
from imgen_common.shapes.render import CENTROID, render
from imgen_common.shapes.scene import (
    ALL_THINGS,
    COLOURS,
    SHAPES,
    SIZE,
    Placed,
    Scene,
    Spec,
    Thing,
    compose,
    fits,
    place,
    sample_spec,
    shade,
    split_of,
)
from imgen_common.shapes.steps import Step
from imgen_common.shapes.stories import read_prompt, sample_change
from imgen_common.shapes.verify import Detection
from interleave.datasets.teachers import wordings
from scripts.miniature.agents.data import Case, read_cases
from scripts.miniature.agents.pool import WHITE, GeneratedImages, to_bytes
from scripts.miniature.world.negatives import hard_negative

OTHER_SIDE = {"left": "right", "right": "left"}
NEXT_COLOR = {"red": "green", "green": "blue", "blue": "red", "yellow": "cyan", "cyan": "purple", "purple": "yellow"}
"""The color that each becomes when red light turns green, green blue, and blue red."""
OTHER_PROMPT = 0.15
"""Probability that an image is shown with another prompt."""
UNRELATED = 0.1
"""Probability that images and prompt are unrelated.  Without such cases the critic learns which things the training
split never asks for, and misreads them: it reads 77 % of the shapes in generated images of the test split and 88 % of
those of the training split."""
REWORDED = 0.35
"""Probability that the prompt used is another wording of the original instruction, where there is one."""
UNCHANGED = 0.08
"""Probability that a generated change is shown with an unchanged image."""
MAX_SHIFT = 2
"""Largest shift of generated images in pixels."""
EXACT = 0.4
"""Share of rendered images that show what the prompt asks for."""


@dataclass(frozen=True)
class _GeneratedCase:
    """A generated image with its prompt, the step that the prompt asks for, and other wordings of it."""

    case: Case
    things: tuple[Thing, ...]
    step: Step | None
    wordings: tuple[str, ...]


def to_cases(generated: GeneratedImages) -> list[Case]:
    """A case for each generated image with its own prompt."""
    return [
        Case(None if bool((before == WHITE).all()) else before, after, prompt, prompt)
        for before, after, prompt in zip(generated.before, generated.after, generated.prompts, strict=True)
    ]


def _known(case: Case, before: list[Detection] | None) -> _GeneratedCase:
    things = tuple(d.thing for d in before or ())
    step = read_prompt(case.original, None if before is None else things)
    return _GeneratedCase(case, things, step, tuple(wordings(case.original, before)[1:]))


class CaseSampler:
    """Samples cases; everything that they ask for belongs to the training split."""

    def __init__(self, generated: GeneratedImages) -> None:
        cases = to_cases(generated)
        self._known = [_known(case, before) for case, (before, _) in zip(cases, read_cases(cases), strict=True)]

    def sample(self, rng: np.random.Generator, generated_share: float) -> Case:
        """One case, with probability `generated_share` of a generated image."""
        if rng.random() < UNRELATED:
            return self._sample_unrelated(rng)
        if rng.random() < generated_share:
            return self._sample_generated(rng)
        return _render_scene(rng) if rng.random() < 0.4 else _render_change(rng)

    def _sample_unrelated(self, rng: np.random.Generator) -> Case:
        """Images in any colors, before, after and prompt from different stories."""
        one, other = (self._known[rng.integers(len(self._known))].case for _ in range(2))
        turns = int(rng.integers(3))
        after = (one if rng.random() < 0.5 else other).after.roll(turns, 0)
        if rng.random() < 0.5:
            caption = sample_spec(rng).caption
            return Case(None, after, caption, caption)
        before = (one.after if one.before is None else one.before).roll(turns, 0)
        prompt = sample_edit(rng).instruction
        return Case(before, after, prompt, prompt)

    def _sample_generated(self, rng: np.random.Generator) -> Case:
        known = self._known[rng.integers(len(self._known))]
        case = known.case
        if rng.random() < OTHER_PROMPT:
            prompt = _sample_other_prompt(known, rng)
            case = replace(case, original=prompt, used=prompt)
        elif known.wordings and rng.random() < REWORDED:
            wording = known.wordings[rng.integers(len(known.wordings))]
            case = replace(case, original=wording) if rng.random() < 0.4 else replace(case, used=wording)
        if case.before is not None and rng.random() < UNCHANGED:
            case = replace(case, after=case.before)
        if rng.random() < 0.5:
            case = _mirror(case)
        case = _shift(case, *(int(k) for k in rng.integers(-MAX_SHIFT, MAX_SHIFT + 1, size=2)))
        turns = int(rng.integers(3))
        if (
            known.step is not None
            and split_of(tuple(sorted(_rotate_color(t, turns) for t in known.step.after))) == "train"
        ):
            case = _rotate_colors(case, turns)
        return case


def _sample_other_prompt(known: _GeneratedCase, rng: np.random.Generator) -> str:
    if known.case.before is None:
        return hard_negative(sample_spec(rng), rng).caption
    change = sample_change(known.things, rng, "train") if len(set(known.things)) == len(known.things) else None
    return known.case.original if change is None else change.prompt


def _mirror(case: Case) -> Case:
    """The case with left and right exchanged, in images and words."""

    def words(text: str) -> str:
        return " ".join(OTHER_SIDE.get(word, word) for word in text.split())

    before = None if case.before is None else case.before.flip(-1)
    return Case(before, case.after.flip(-1), words(case.original), words(case.used))


def _shift(case: Case, right: int, down: int) -> Case:
    """The case with both images shifted by some pixels; their edges are repeated."""

    def move(pixels: Tensor) -> Tensor:
        rows = (torch.arange(SIZE) - down).clamp(0, SIZE - 1)
        columns = (torch.arange(SIZE) - right).clamp(0, SIZE - 1)
        return pixels[:, rows][:, :, columns]

    return replace(case, before=None if case.before is None else move(case.before), after=move(case.after))


def _rotate_color(thing: Thing, turns: int) -> Thing:
    for _ in range(turns):
        thing = replace(thing, colour=NEXT_COLOR[thing.colour])
    return thing


def _rotate_colors(case: Case, turns: int) -> Case:
    """The case with the three color channels rotated `turns` times, in images and words."""

    def words(text: str) -> str:
        for _ in range(turns):
            text = " ".join(NEXT_COLOR.get(word, word) for word in text.split())
        return text

    before = None if case.before is None else case.before.roll(turns, 0)
    return Case(before, case.after.roll(turns, 0), words(case.original), words(case.used))


def _render_scene(rng: np.random.Generator) -> Case:
    spec = sample_spec(rng)
    shown = spec if rng.random() < EXACT + 0.1 else hard_negative(spec, rng)
    scene = compose(shown, rng)
    if rng.random() < 0.2:
        scene = mutate(scene, rng)
    original = spec.caption
    if spec.category in ("two", "binding") and rng.random() < REWORDED:
        original = Spec(spec.category, (spec.things[1], spec.things[0])).caption
    return Case(None, render_noisy(scene, rng), original, spec.caption)


def _render_change(rng: np.random.Generator) -> Case:
    edit = sample_edit(rng)
    after = _jitter(edit.after, rng)
    luck = rng.random()
    if luck > 0.9:
        after = edit.before
    elif luck > 0.7:
        after = _spread_color(edit, rng)
    elif luck > EXACT:
        after = mutate(after, rng)
    return Case(render_noisy(edit.before, rng), render_noisy(after, rng), edit.instruction, edit.instruction)


def _jitter(scene: Scene, rng: np.random.Generator) -> Scene:
    moved = (replace(p, x=p.x + rng.normal(0, 0.8), y=p.y + rng.normal(0, 0.8)) for p in scene.placed)
    return replace(scene, placed=tuple(moved))


def _spread_color(edit: Edit, rng: np.random.Generator) -> Scene:
    """Another thing takes the color of the target too, or instead: the most common mistakes of a recoloring."""
    scene = edit.after if rng.random() < 0.5 else edit.before
    placed = list(scene.placed)
    i = int(rng.integers(len(placed)))
    placed[i] = _with_color(placed[i], edit.change.colour or edit.change.target.colour, rng)
    return replace(scene, placed=tuple(placed))


def _with_color(placed: Placed, color: str, rng: np.random.Generator) -> Placed:
    return replace(placed, thing=Thing(color, placed.thing.shape), rgb=shade(color, rng))


def mutate(scene: Scene, rng: np.random.Generator) -> Scene:
    """One thing changed in color, shape or place, two that exchange colours, one thing too many, or one missing."""
    placed = list(scene.placed)
    i, j = (int(k) for k in rng.integers(len(placed), size=2))
    old, other = placed[i], placed[j]
    match ("color", "shape", "shape", "exchange", "copy", "place", "more", "less")[rng.integers(8)]:
        case "color":
            placed[i] = _with_color(old, list(COLOURS)[rng.integers(len(COLOURS))], rng)
        case "shape":
            placed[i] = replace(old, thing=Thing(old.thing.colour, SHAPES[rng.integers(len(SHAPES))]))
        case "exchange":
            placed[i] = _with_color(old, other.thing.colour, rng)
            placed[j] = _with_color(other, old.thing.colour, rng)
        case "copy":
            placed[i] = replace(old, thing=Thing(old.thing.colour, other.thing.shape))
        case "place":
            placed[i] = _find_place(old.thing, [*placed[:i], *placed[i + 1 :]], rng) or old
        case "more":
            extra = _find_place(ALL_THINGS[rng.integers(len(ALL_THINGS))], placed, rng)
            placed += [extra] if extra and len(placed) < 4 else []
        case "less":
            placed = [*placed[:i], *placed[i + 1 :]]
    return replace(scene, placed=tuple(placed))


def _find_place(thing: Thing, others: list[Placed], rng: np.random.Generator) -> Placed | None:
    for _ in range(10):
        candidate = place(thing, len(others) + 1, rng)
        if fits(candidate, others):
            return candidate
    return None


def render_noisy(scene: Scene, rng: np.random.Generator) -> Tensor:
    """The scene as uint8, sometimes blurred and noisy, as the generator's images are."""
    image = torch.from_numpy(render(scene))
    if rng.random() < 0.4:
        blurred = torch.nn.functional.avg_pool2d(image[None], 3, 1, 1, count_include_pad=False)[0]
        image = torch.lerp(image, blurred, float(rng.random()))
    noise = torch.from_numpy(rng.standard_normal((3, SIZE, SIZE)).astype(np.float32))
    return to_bytes(image + 0.04 * float(rng.random()) * noise)


def expected_detections(scene: Scene) -> list[Detection]:
    """The things that the verifier should detect in the image of the scene."""
    return [Detection(p.thing, p.x, p.y + CENTROID[p.thing.shape] * p.radius, 1.0) for p in scene.placed]
