"""The built-in models know the words of their world and say which others a text holds."""

import pytest

from imgen_common.shapes.stories import sample_story
from imgen_common.shapes.vocabulary import describe_unknown_words, find_left_out
from imgen_common.streams import numpy_generator

PLANNER, GENERATOR = "builtin:shapes/planner", "builtin:shapes/generator"


@pytest.mark.parametrize("riddle", [False, True])
def test_every_request_of_the_world_is_known(riddle: bool) -> None:
    for index in range(60):
        story = sample_story(numpy_generator(7, "words", index), "test", riddle=riddle)
        assert describe_unknown_words(PLANNER, story.request) is None
        assert find_left_out(story.request, story.prompts) == []
        for step in story.steps:
            assert describe_unknown_words(GENERATOR, step.prompt) is None


@pytest.mark.parametrize(
    ("ref", "text", "unknown"),
    [
        (PLANNER, "a short story about a cat", "4 words 'short', 'story', 'about', 'cat'"),
        (PLANNER, "draw a red circle and a dog, dog", "word 'dog'"),
        (GENERATOR, "ein roter Kreis", "3 words 'ein', 'roter', 'Kreis'"),
        (GENERATOR, "\u8d64\u3044\u5186 of a red circle", "word '\u8d64\u3044\u5186'"),
        (PLANNER, "Draw a RED circle", "word 'RED'; write it in small letters"),
        (GENERATOR, "a b cc dd ee ff gg hh", "7 words 'b', 'cc', 'dd', 'ee', 'ff', ..."),
        (PLANNER, "draw a yellow star and a blue wind", "2 words 'star', 'wind'"),
        (PLANNER, "draw 2 red circles", "word '2'"),
        (GENERATOR, "1 2 3", "3 words '1', '2', '3'"),
    ],
)
def test_unknown_words_are_named(ref: str, text: str, unknown: str) -> None:
    said = describe_unknown_words(ref, text)
    assert said is not None
    assert said.endswith(f"does not know the {unknown}")
    assert "circles, squares, triangles and crosses in red" in said


def test_other_models_are_not_asked() -> None:
    assert describe_unknown_words("org/model", "a cat") is None


@pytest.mark.parametrize("text", ["\U0001f534\U0001f534", "?!"])
def test_what_has_no_words_is_not_known(text: str) -> None:
    assert "there is no word in what it is given" in str(describe_unknown_words(PLANNER, text))


def test_what_a_plan_leaves_out_is_named() -> None:
    request = "Two red circles, then a blue square, then green triangles"
    assert find_left_out(request, ["two red circles", "make the circles blue"]) == ["square", "green", "triangle"]
    assert find_left_out(request, ["two red circles", "add a blue square", "add three green triangles"]) == []
    assert find_left_out("a circle the colour of red mixed with blue", ["a purple circle"]) == []
