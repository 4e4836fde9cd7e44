"""Stories: their words, their plans, and the verification of their images."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imgen_common.shapes.edits import sample_edit
from imgen_common.shapes.render import render
from imgen_common.shapes.scene import ALL_THINGS, COLOURS, SHAPES, Placed, Scene, Spec, Thing, compose, shade, split_of
from imgen_common.shapes.steps import EDIT_KINDS, MAX_DRIFT, Change, Draw, Step, Story
from imgen_common.shapes.stories import (
    plan_is_correct,
    read_prompt,
    same_step,
    sample_story,
    step_holds,
    verify_story,
)
from imgen_common.shapes.verify import detect
from imgen_common.shapes.wording import COLOUR_FACTS, SHAPE_FACTS, colour_facts, shape_facts, tell

SPLITS = ("train", "tune", "test")
EXAMPLE = "draw a red circle, then add a blue square on its right, then make the circle green"
RED_CIRCLE, GREEN_CIRCLE, BLUE_SQUARE = Thing("red", "circle"), Thing("green", "circle"), Thing("blue", "square")
EXAMPLE_STEPS: tuple[Step, ...] = (
    Draw(Spec("single", (RED_CIRCLE,))),
    Change("add", (RED_CIRCLE,), BLUE_SQUARE, place="right of", anchor=RED_CIRCLE),
    Change("recolour", (RED_CIRCLE, BLUE_SQUARE), RED_CIRCLE, colour="green"),
)
seeds = st.integers(0, 2**32 - 1)


def story(seed: int, split: str = "train", riddle: bool = False, num_steps: int | None = None) -> Story:
    assert split in SPLITS
    return sample_story(np.random.default_rng(seed), split, num_steps, riddle)  # type: ignore[arg-type]


def put(colour: str, shape: str, x: float, y: float) -> Placed:
    return Placed(Thing(colour, shape), x, y, 4.5, shade(colour, np.random.default_rng(0)))


def verify_step(before: torch.Tensor | None, after: torch.Tensor, step: Step) -> bool:
    return step_holds(None if before is None else detect(before[None])[0], detect(after[None])[0], step)


def picture(*placed: Placed) -> torch.Tensor:
    return torch.from_numpy(render(Scene(0.1, placed)))


@settings(max_examples=60)
@given(seeds, st.sampled_from(SPLITS), st.booleans())
def test_every_image_of_a_story_belongs_to_its_split(seed: int, split: str, riddle: bool) -> None:
    made = story(seed, split, riddle)
    assert all(split_of(tuple(sorted(step.after))) == split for step in made.steps)
    assert isinstance(made.steps[0], Draw)
    assert all(isinstance(step, Change) for step in made.steps[1:])


@settings(max_examples=60)
@given(seeds, st.booleans())
def test_the_steps_follow_on_each_other_and_stay_in_the_generators_world(seed: int, riddle: bool) -> None:
    made = story(seed, riddle=riddle)
    for before, after in zip(made.steps, made.steps[1:], strict=False):
        assert isinstance(after, Change)
        assert Counter(after.before) == Counter(before.after)
        assert len(set(after.after)) == len(after.after)
        assert 1 <= len(after.after) <= 3


@settings(max_examples=50)
@given(seeds, st.booleans())
def test_a_storys_prompts_are_a_correct_plan_and_any_shorter_or_other_one_is_not(seed: int, riddle: bool) -> None:
    made = story(seed, riddle=riddle)
    prompts = made.prompts
    assert plan_is_correct(prompts, made)
    assert not plan_is_correct(prompts[:-1], made)
    assert not plan_is_correct([*prompts, "remove the circle"], made)
    for i, prompt in enumerate(prompts):
        other = next(c for c in COLOURS if c not in prompt)
        word = next((w for w in prompt.split() if w in COLOURS), None)
        wrong = prompt.replace(word, other) if word else "draw what you like"
        assert not plan_is_correct([*prompts[:i], wrong, *prompts[i + 1 :]], made)


@settings(max_examples=50)
@given(seeds)
def test_reading_a_prompt_gives_the_step_back(seed: int) -> None:
    made = story(seed)
    before: tuple[Thing, ...] | None = None
    for step in made.steps:
        assert same_step(read_prompt(step.prompt, before), step)
        before = step.after


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_every_edit_instruction_is_read(kind: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        edit = sample_edit(rng, kind=kind)  # type: ignore[arg-type]
        step = read_prompt(edit.instruction, edit.before.things)
        assert isinstance(step, Change)
        assert step.prompt == edit.instruction
        assert Counter(step.after) == Counter(edit.after.things)


@pytest.mark.parametrize(
    ("prompt", "before"),
    [
        ("make it red", (RED_CIRCLE,)),
        ("remove the circle", (BLUE_SQUARE,)),
        ("remove the circle", (RED_CIRCLE, GREEN_CIRCLE)),
        ("remove the red circle", (RED_CIRCLE, RED_CIRCLE)),
        ("add a red circle on the left", (RED_CIRCLE,)),
        ("make the circle red", (RED_CIRCLE,)),
        ("add a red circle", (BLUE_SQUARE,)),
        ("remove the circle", None),
        ("a red circle", (RED_CIRCLE,)),
    ],
)
def test_what_cannot_be_done_is_no_step(prompt: str, before: tuple[Thing, ...] | None) -> None:
    assert read_prompt(prompt, before) is None


def test_equivalent_captions_are_the_same_step() -> None:
    want = Draw(Spec("relation", (RED_CIRCLE, BLUE_SQUARE), "left of"))
    assert same_step(read_prompt("a blue square right of a red circle", None), want)
    assert not same_step(read_prompt("a blue square left of a red circle", None), want)
    assert not same_step(read_prompt("a red circle and a blue square", None), want)


def test_an_open_place_may_be_any_place() -> None:
    want = Change("add", (RED_CIRCLE,), BLUE_SQUARE)
    assert same_step(read_prompt(want.prompt, want.before), want)
    assert same_step(read_prompt("add a blue square above the circle", want.before), want)
    assert not same_step(want, EXAMPLE_STEPS[1])


def test_the_example_can_be_told() -> None:
    wanted = {
        "", "draw", "draw a red circle", ", then ", "add", "on its right", "add a blue square on its right",
        "make {a} {c}", "the circle",
    }  # fmt: skip
    told = tell(EXAMPLE_STEPS, lambda options: next((o for o in options if o in wanted), options[0]))
    assert told == EXAMPLE
    assert [step.prompt for step in EXAMPLE_STEPS] == [
        "a red circle",
        "add a blue square right of the circle",
        "make the circle green",
    ]


def test_riddles_name_no_thing_that_they_ask_for_and_no_pair_of_facts_crosses_splits() -> None:
    for thing in ALL_THINGS:
        pairs = [set(shape_facts(thing, split)) for split in SPLITS]
        assert all(pairs)
        assert sum(map(len, pairs)) == len(set.union(*pairs))
        facts = [set(colour_facts(thing.colour, thing.shape, split)) for split in SPLITS]
        assert all(facts)
        assert sum(map(len, facts)) == len(set.union(*facts))
    for seed in range(100):
        request = story(seed, "test", riddle=True, num_steps=1).request.lower()
        rest = request.replace("red mixed", "").replace("blue mixed", "").replace("green mixed", "")
        rest = rest.replace("with blue", "").replace("with yellow", "")
        assert not any(word in rest.split() for word in (*COLOURS, *SHAPES))


def test_every_colour_and_shape_has_facts_of_its_own() -> None:
    assert set(COLOUR_FACTS) == set(COLOURS)
    assert set(SHAPE_FACTS) == set(SHAPES)
    for facts in (COLOUR_FACTS, SHAPE_FACTS):
        everything = [fact for group in facts.values() for fact in group]
        assert len(everything) == len(set(everything))


def test_requests_hardly_repeat() -> None:
    assert len({story(seed, "test").request for seed in range(300)}) >= 290


def test_a_true_story_holds_and_each_mistake_is_found() -> None:
    first = picture(put("red", "circle", 9, 16))
    second = picture(put("red", "circle", 9, 16), put("blue", "square", 23, 15))
    third = picture(put("green", "circle", 10, 16), put("blue", "square", 23, 15))
    told = Story(EXAMPLE, EXAMPLE_STEPS)
    assert verify_story(torch.stack([first, second, third]), told) == [True, True, True]
    assert verify_story(torch.stack([first, second]), told) == [True, True, False]
    assert verify_story(torch.zeros(0, 3, 32, 32), told) == [False, False, False]
    drifted = picture(put("green", "circle", 9, 16 + MAX_DRIFT + 2), put("blue", "square", 23, 15))
    assert verify_story(torch.stack([first, second, drifted]), told) == [True, True, False]
    left = picture(put("red", "circle", 23, 16), put("blue", "square", 9, 15))
    assert verify_story(torch.stack([first, left, third]), told) == [True, False, False]
    with pytest.raises(ValueError, match="4 images"):
        verify_story(torch.stack([first, second, third, third]), told)


def test_a_later_step_cannot_be_right_on_a_wrong_image() -> None:
    wrong = picture(put("red", "cross", 9, 16))
    second = picture(put("red", "circle", 9, 16), put("blue", "square", 23, 15))
    assert verify_story(torch.stack([wrong, second]), Story(EXAMPLE, EXAMPLE_STEPS)) == [False, False, False]


@settings(max_examples=15)
@given(seeds)
def test_the_oracle_accepts_exact_edits_and_refuses_the_image_before(seed: int) -> None:
    edit = sample_edit(np.random.default_rng(seed))
    step = read_prompt(edit.instruction, edit.before.things)
    assert step is not None
    before, after = (torch.from_numpy(render(scene)) for scene in (edit.before, edit.after))
    assert verify_step(before, after, step)
    assert not verify_step(before, before, step)
    assert not step_holds(None, detect(after[None])[0], step)


@settings(max_examples=15)
@given(seeds)
def test_the_oracle_judges_a_first_image_by_its_caption(seed: int) -> None:
    made = story(seed, num_steps=1).steps[0]
    assert isinstance(made, Draw)
    after = torch.from_numpy(render(compose(made.spec, np.random.default_rng(seed))))
    assert verify_step(None, after, made)
    assert not verify_step(None, torch.zeros(3, 32, 32), made)
