import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from imgen_common.errors import UserError
from imgen_common.judging.questions import Question, Unreadable
from interleave.benchmarks.base import Content, Item, Output, Prompts
from interleave.benchmarks.official.comm import Comm
from interleave.benchmarks.official.comm_rules import (
    MENTIONED,
    PIECE,
    item_scores,
    parse_descriptions,
    read_steps,
    read_story,
    show_descriptions,
    show_image,
    step_texts,
    with_marks,
    with_whole_tags,
    write_story,
)

COMM = Comm()
ECHO = Prompts({name: f"words of {name}" for name in MENTIONED})
P = [Path(f"{number}.png") for number in range(12)]


def save(file: Path, seed: int = 0, size: tuple[int, int] = (48, 32), mode: str = "RGB") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], len(mode))
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8), mode).save(file)
    return file


def write(data: Path, name: str, text: str, num_images: int = 0, **keys: Any) -> Path:
    """An item's folder, with its images in origin/."""
    names = [f"input_{number}.png" for number in range(1, num_images + 1)]
    for number, image in enumerate(names):
        save(data / name / "origin" / image, number)
    row = {"model_input": text, "input_image_list": names, **keys}
    (data / name).mkdir(parents=True, exist_ok=True)
    (data / name / "results.json").write_text(json.dumps(row))
    return data


def item(task: int) -> Item:
    return Item(f"a_task{task}", ("Tell.",), f"task {task}", {"model_input": "Tell.", "input_image_list": []})


# --- how a story is read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("(1) Chop. (2) Fry.", ["Chop.", "Fry."]),
        ("Sure! (1) Chop. \n\n (2) Fry. ", ["Chop.", "Fry."]),  # what comes before is lost
        ("Chop. Fry.", []),  # so is a story without a number
        ("", []),
        ("(1) Take (2 cups) of it", ["Take (2 cups) of it"]),
        ("(1) Take (2) cups", ["Take", "cups"]),
        ("(1) Take (2)cups (3) Go", ["Take", "Go"]),  # `(2)` ends a step, but begins none without a space
        ("(1)Chop. (2) Fry.", ["Fry."]),
        ("(7) Late. (7) Twice.", ["Late.", "Twice."]),
        ("(1) (2) Fry.", ["", "Fry."]),
        ("(1)\nChop\nit.\n", ["Chop\nit."]),
        ("(one) Chop", []),
        ("(1) ", [""]),
    ],
)
def test_steps_begin_at_a_number_and_a_space(text: str, steps: list[str]) -> None:
    assert list(step_texts(text)) == steps


@given(st.lists(st.sampled_from(["(1)", "(22) ", "(", "3", ")", " ", "\n", "a", "\t", "\x85", "\u2003", "(4)\n"])))
@example([])
def test_steps_are_those_of_the_official_expression(pieces: list[str]) -> None:
    text = "".join(pieces)
    official = re.findall(r"\(\d+\)\s(.*?)\s*(?=\(\d+\)|$)", text, re.DOTALL)
    assert list(step_texts(text)) == official


def test_reading_takes_no_quadratic_time() -> None:
    """The official expression would take hours."""
    assert list(step_texts("(1) " + " " * 300_000 + "x")) == [" " * 300_000 + "x"]
    for tag in ("[img]", "[imgblock]"):
        (step,), num_images = read_steps("(1) " + tag * 100_000, [])
        assert (step, num_images) == (("(1)", *[tag[1:-1]] * 100_000), 0)
        assert with_marks(tag * 100_000) == tag * 100_000


@given(st.lists(st.sampled_from(["[img]", "[/img]", "[imgblock]", "[/imgblock]", "a", "\n", "<IMAGE>", "[", " "])))
def test_pieces_of_steps_are_those_of_the_official_expression(pieces: list[str]) -> None:
    text = "(1) x" + "".join(pieces)
    official = re.compile(r"\[img\].*?\[/img\]|\[imgblock\].*?\[/imgblock\]|<IMAGE>|[^\[\]<]+")
    (said,) = step_texts(text)
    kinds = [
        [piece if "[" not in piece else piece[:4] for piece in found]
        for found in (official.findall(said), PIECE.findall(with_whole_tags(said)))
    ]
    assert kinds[0] == kinds[1]
    marks = re.compile(r"\[img\].*?\[/img\]|\[imgblock\].*?\[/imgblock\]|<IMAGE>")
    same = {piece: with_marks(piece) for piece in marks.findall(said)}
    assert with_marks(said) == marks.sub(lambda mark: same[mark[0]], said)


@pytest.mark.parametrize(
    ("text", "num_images", "num_before", "steps"),
    [
        ("(1) Chop. <IMAGE> (2) Fry.<IMAGE>", 2, 0, [("(1)", "Chop.", P[0]), ("(2)", "Fry.", P[1])]),
        ("(3) Late. (9) Later.", 0, 0, [("(1)", "Late."), ("(2)", "Later.")]),  # numbered anew
        ("(1) a < b [and] c", 0, 0, [("(1)", "a", "b", "and", "c")]),  # signs are lost
        ("(1) a<IMAGE>b<IMAGE>c", 2, 0, [("(1)", "a", P[0], "b", P[1], "c")]),
        ("(1) a <IMAGE> b (2) c", 0, 0, [("(1)", "a"), ("(2)", "c")]),  # a mark without an image ends its step
        ("(1) a <IMAGE> b <IMAGE> c (2) d <IMAGE> e", 1, 0, [("(1)", "a", P[0], "b"), ("(2)", "d")]),
        ("(1) a [IMG0] b [/IMGB] c", 1, 0, [("(1)", "a", "b", P[0], "c")]),  # another model's tags
        ("(1) [imgblock]x[/imgblock] [img]y[/img]", 0, 0, [("(1)", "[img]y[/img]")]),
        ("(1) <image> b", 0, 0, [("(1)", "image> b")]),  # marks are upper case
        # of ten images the input has eight: after the second, nothing is shown
        ("(1) a <IMAGE> (2) b <IMAGE> c (3) d", 5, 8, [("(1)", "a", P[0]), ("(2)", "b", P[1])]),
        ("(1) a <IMAGE> b (2) c", 1, 9, [("(1)", "a", P[0])]),
        ("(1) " + "<IMAGE>" * 12 + " b (2) c", 12, 0, [("(1)", *P[:10])]),
        ("(1) <IMAGE> <IMAGE>", 1, 0, [("(1)", P[0])]),
    ],
)
def test_images_take_the_places_of_marks_until_there_are_ten(
    text: str, num_images: int, num_before: int, steps: list[Content]
) -> None:
    found, used = read_steps(text, P[:num_images], num_before)
    assert found == steps
    assert used == sum(isinstance(part, Path) for step in steps for part in step)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (("Chop.", P[0], "Fry.", P[1]), "(1) Chop. <IMAGE> (2) Fry. <IMAGE>"),
        ((P[0], P[1]), "(1) <IMAGE> (2) <IMAGE>"),
        ((P[0], "Chop.", P[1], P[2]), "(1) <IMAGE> (2) Chop. <IMAGE> <IMAGE>"),
        ((" ", "Chop.\n", "  ", P[0]), "(1) Chop. <IMAGE>"),
        (("(1) Chop. ", P[0], "(2) Fry.", P[1]), "(1) Chop. <IMAGE>(2) Fry.<IMAGE>"),  # it is numbered
        (("\n(3) ", P[0]), "\n(3) <IMAGE>"),
        (("(2 cups) of it", P[0]), "(1) (2 cups) of it <IMAGE>"),
        (("Say <IMAGE>!", P[0]), "(1) Say IMAGE>! <IMAGE>"),  # no mark that would take the image
        ((), ""),
    ],
)
def test_a_story_is_numbered_unless_it_is(content: Content, text: str) -> None:
    assert write_story(content) == text


@pytest.mark.parametrize(
    ("text", "num_images", "content"),
    [
        ("(1) Chop. <IMAGE> (2) Fry. <IMAGE>", 2, ("(1) Chop. ", P[0], " (2) Fry. ", P[1])),
        ("Sure. (4) Chop. <IMAGE>", 3, ("(1) Chop. ", P[0])),
        ("(1) a <IMAGE> b <IMAGE> c", 1, ("(1) a ", P[0], " b <IMAGE> c")),
        ("(1) a [/IMGB] b", 1, ("(1) a [", P[0], "] b")),
        ("Just words <IMAGE>", 1, ()),
    ],
)
def test_a_story_of_others_is_read(text: str, num_images: int, content: Content) -> None:
    assert read_story(text, P[:num_images]) == content
    images = [part for part in content if isinstance(part, Path)]
    assert read_steps(write_story(content), images) == read_steps(text, P[:num_images])


# --- what the judge is asked -----------------------------------------------------------------------------------------


def pixels(file: Path) -> bytes:
    """Those that the authors' code sends of an RGB image."""
    image = Image.open(file)
    if max(image.size) > 512:
        scale = max(image.size) / 512
        image = image.resize((int(image.width / scale), int(image.height / scale)))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return Image.open(buffer).tobytes()


def shown(question: Question, names: Mapping[str, Path]) -> list[str]:
    """The message, with an image as its name."""
    signs = {pixels(file): name for name, file in names.items()}
    return [part if isinstance(part, str) else signs[part.tobytes()] for part in question.message]


def images(folder: Path, count: int) -> list[Path]:
    return [save(folder / f"made_{number}.png", 100 + number) for number in range(count)]


def test_a_continued_story_takes_three_questions(tmp_path: Path) -> None:
    text = "A cake: (1) Mix. <IMAGE>(2) Stir.<IMAGE> Go on."
    (made,) = COMM.load(write(tmp_path / "data", "c_task3", text, 2))
    out = images(tmp_path, 2)
    output = Output(("Bake.", out[0], "Eat <it>.", out[1]))
    origin = tmp_path / "data" / "c_task3" / "origin"
    names = {"I0": origin / "input_1.png", "I1": origin / "input_2.png", "O2": out[0], "O3": out[1]}
    first, second = COMM.questions(made, output, ECHO, {})
    before = ["INPUT:", "(1)", "Mix.", " <Img_0>", "I0", "</Img_0>"]
    before += ["(2)", "Stir.", " <Img_1>", "I1", "</Img_1>", "Go on."]
    after = ["OUTPUT:", "(1)", "Bake.", " <Img_2>", "O2", "</Img_2>"]
    after += ["(2)", "Eat", "it>.", " <Img_3>", "O3", "</Img_3>"]
    assert (first.name, first.system) == ("coherence", "words of document_completeness_image_coherence")
    assert shown(first, names) == before + after
    assert (second.name, second.system) == ("descriptions", "words of texts_to_image_descriptions")
    assert shown(second, names) == before + [part for part in after if part not in names]
    found = second.parse(described({"Content of Image 2": "An oven", "Content of Image 3": "A plate"}))
    assert found == ["An oven", "A plate"]
    *again, third = COMM.questions(made, output, ECHO, {"coherence": None, "descriptions": found})
    assert [question.key("j") for question in again] == [first.key("j"), second.key("j")]
    assert (third.name, third.system) == ("match", "words of descriptions_gt_images_consistency")
    assert shown(third, names) == [
        "<Description_0> Description:An oven </Description_0> ",
        *("<Img_0>", "O2", "</Img_0>"),
        "<Description_1> Description:A plate </Description_1> ",
        *("<Img_1>", "O3", "</Img_1>"),
    ]
    assert third.parse('{"Consistency": {"overall_score": 7}}') == {"irs": 7}
    assert [question.tries for question in (first, second, third)] == [3, 3, 3]


def test_no_third_question_without_the_second(tmp_path: Path) -> None:
    (made,) = COMM.load(write(tmp_path / "data", "c_task4", "Tell."))
    output = Output(("Bake.", *images(tmp_path, 1)))
    for answers in ({}, {"coherence": {"style": 3}}, {"descriptions": None}, {"descriptions": []}):
        assert [question.name for question in COMM.questions(made, output, ECHO, answers)] == [
            "coherence",
            "descriptions",
        ]


def test_the_topic_of_a_story_is_shown_as_it_is(tmp_path: Path) -> None:
    text = "Tell of (1) cakes <b> [x]."
    (made,) = COMM.load(write(tmp_path / "data", "c_task4", text))
    first, second = COMM.questions(made, Output(("Once.",)), ECHO, {})
    assert first.message == second.message == ("INPUT:", text, "OUTPUT:", "(1)", "Once.")
    assert set(first.parse(coherent())) == {
        *("style", "entity", "trend", "overall_consistency", "completeness", "image_quality")
    }


def test_images_of_a_topic_are_not_counted(tmp_path: Path) -> None:
    """Its text is shown as it is, marks and all, so that the output's first image has the number 0."""
    (made,) = COMM.load(write(tmp_path / "data", "c_task4", "Tell: (1) <IMAGE>", 1))
    assert [part if isinstance(part, str) else Path for part in made.content] == ["Tell: (1) ", Path]
    first, second = COMM.questions(made, Output(("Once.", *images(tmp_path, 1))), ECHO, {})
    assert [part for part in first.message if isinstance(part, str)] == [
        *("INPUT:", "Tell: (1) <IMAGE>", "OUTPUT:", "(1)", "Once.", " <Img_0>", "</Img_0>")
    ]
    assert second.parse(described({"Content of Image 0": "x"})) == ["x"]


def test_a_story_without_a_number_is_judged_as_empty(tmp_path: Path) -> None:
    data = write(tmp_path / "data", "c_task4", "Tell.")
    predict(tmp_path / "made", "c_task4", "No numbers <IMAGE>", 1)
    items = COMM.load(data)
    output = COMM.read_outputs(tmp_path / "made", items)["c_task4"]
    assert COMM.questions(items[0], output, ECHO, {})[0].message == ("INPUT:", "Tell.", "OUTPUT:")


def test_images_beyond_ten_are_not_shown(tmp_path: Path) -> None:
    text = "".join(f"({number}) <IMAGE> " for number in range(1, 10))
    (made,) = COMM.load(write(tmp_path / "data", "c_task3", text, 9))
    output = Output(("One.", *images(tmp_path, 2), "Two."))
    message = COMM.questions(made, output, ECHO, {})[0].message
    assert message[message.index("OUTPUT:") + 1 :][:3] == ("(1)", "One.", " <Img_9>")
    assert message[-1] == "</Img_9>"


def test_ten_images_in_an_input_leave_a_continuation_out(tmp_path: Path) -> None:
    """Only of task 3, and only where they are in steps."""
    text = "".join(f"({number}) <IMAGE> " for number in range(1, 11))
    data = tmp_path / "data"
    for task in (1, 3, 4):
        write(data, f"c_task{task}", text, 10)
    write(data, "d_task3", "<IMAGE>" + text.replace("(1) <IMAGE>", ""), 10)  # the scorer reads nine of them
    assert [made.id for made in COMM.load(data)] == ["c_task1", "c_task4", "d_task3"]


def test_texts_for_images_take_one_question(tmp_path: Path) -> None:
    text = "Images: (1) <IMAGE> (2) <IMAGE> <IMAGE> (3) <IMAGE> Write texts."
    (made,) = COMM.load(write(tmp_path / "data", "c_task1", text, 4))
    assert made.content[0] == "Images: (1) "
    origin = tmp_path / "data" / "c_task1" / "origin"
    names = {f"I{number}": origin / f"input_{number}.png" for number in range(1, 5)}
    (question,) = COMM.questions(made, Output(("Mix [it].", "Bake.")), ECHO, {})
    assert (question.name, question.system) == ("text", "words of task_1")
    assert shown(question, names) == [" (1) Mix it .", "I1", " (2) Bake.", "I2", "I3"]  # no third text: no third image
    answer = {"Completeness": {"overall_score": 4}, "Text Fidelity to Image": {"Score": 6}}
    assert question.parse(json.dumps(answer)) == {"completeness": 4, "text_fidelity": 6}
    assert COMM.questions(made, Output(()), ECHO, {}) == ()


def test_images_for_texts_are_shown_in_the_second_question_too(tmp_path: Path) -> None:
    (made,) = COMM.load(write(tmp_path / "data", "c_task2", "Texts: (1) Mix. (2) Bake. Draw them."))
    out = images(tmp_path, 3)
    names = {f"O{number}": file for number, file in enumerate(out)}
    questions = COMM.questions(made, Output(tuple(out)), ECHO, {"descriptions": ["A", "B", "C"]})
    assert [(question.name, question.system) for question in questions] == [
        ("coherence", "words of document_completeness_image_coherence_task2"),
        ("descriptions", "words of texts_to_image_descriptions_task2"),
        ("match", "words of descriptions_gt_images_consistency"),
    ]
    expected = [" (1) Mix.", "<Img_0>", "O0", "</Img_0>", " (2) Bake. Draw them.", "<Img_1>", "O1", "</Img_1>"]
    assert shown(questions[0], names) == shown(questions[1], names) == expected  # no third text
    match = [
        (f"<Description_{n}> {text} </Description_{n}> ", f"<Img_{n}>", f"O{n}", f"</Img_{n}>")
        for n, text in enumerate("ABC")
    ]
    assert shown(questions[2], names) == [part for pair in match for part in pair]
    assert set(questions[0].parse(coherent())) == {"style", "entity", "trend", "overall_consistency", "image_quality"}
    assert COMM.questions(made, Output(()), ECHO, {}) == ()


def test_a_description_may_stand_alone_but_no_image(tmp_path: Path) -> None:
    file = save(tmp_path / "a.png")
    parts = show_descriptions(["A", "B"], [file])
    assert [part for part in parts if isinstance(part, str)] == [
        *("<Description_0> A </Description_0> ", "<Img_0>", "</Img_0>", "<Description_1> B </Description_1> ")
    ]
    with pytest.raises(ValueError, match="1 descriptions for 2 images"):
        show_descriptions(["A"], [file, file])


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1024, 300), (512, 150)), ((300, 513), (299, 512)), ((512, 20), (512, 20)), ((3000, 2), (512, 1))],
)
def test_images_are_as_the_scorer_sends_them(tmp_path: Path, size: tuple[int, int], expected: tuple[int, int]) -> None:
    """The last would have no height there: 512 * 2 / 3000 = 0.3."""
    file = save(tmp_path / "a.png", 1, size)
    image = show_image(file)
    assert (image.mode, image.size) == ("RGB", expected)
    if expected[1] > 1:
        assert image.tobytes() == pixels(file)


def test_transparent_images_do_not_fail(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(file)
    assert show_image(file).getpixel((3, 3)) == (255, 255, 255)


# --- what an answer says ---------------------------------------------------------------------------------------------


def coherent(**changes: Any) -> str:
    """The answer of a judge that gives 8 everywhere but where told; `...`: the key is missing."""
    names = ("style_consistency", "entity_consistency", "trend_consistency", "overall_consistency")
    numbers = dict.fromkeys((*names, "Completeness", "Image_Quality"), 8) | changes
    overall = {name: numbers[name] for name in names if numbers[name] is not ...}
    scores: dict[str, Any] = {
        "Image_Coherence": {"pair_scores": {}, "overall_score": {"justification": "so"} | overall}
    }
    for name in ("Completeness", "Image_Quality"):
        scores[name] = {"Justification": "so"} | ({} if numbers[name] is ... else {"Score": numbers[name]})
    return f"Here it is:\n```json\n{json.dumps({'scores': scores})}\n```\n"


def described(texts: Any) -> str:
    return json.dumps({"Tasks": {"Create an Interleaved Text-Image Document": texts}})


def coherence_of(answer: str, tmp_path: Path) -> Any:
    (made,) = COMM.load(write(tmp_path, "c_task4", "Tell."))
    return COMM.questions(made, Output(("Once.",)), ECHO, {})[0].parse(answer)


@pytest.mark.parametrize("value", [0, 10, 7.5, None, "NA"])
def test_numbers_from_0_to_10_null_and_na_are_read(tmp_path: Path, value: Any) -> None:
    expected = {
        "style": 8,
        "entity": value,
        "trend": 8,
        "overall_consistency": 8,
        "completeness": 8,
        "image_quality": 8,
    }
    assert coherence_of(coherent(entity_consistency=value), tmp_path) == expected


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (coherent(trend_consistency=...), "no key 'trend_consistency'"),
        (coherent(Completeness=...), "no key 'Score'"),
        (coherent(style_consistency=11), "no number from 0 to 10"),
        (coherent(style_consistency=-1), "no number from 0 to 10"),
        (coherent(style_consistency="8"), "no number from 0 to 10"),
        (coherent(style_consistency=True), "no number from 0 to 10"),
        (coherent(style_consistency=float("nan")), "no number from 0 to 10"),
        (coherent(style_consistency=[8]), "no number from 0 to 10"),
        ('{"scores": 3}', "no key 'Image_Coherence'"),
        ('{"a": 1} and {"b": 2}', "not JSON"),  # from the first brace to the last
        ("{" + '"a": [' * 100_000 + "}", "not JSON"),
        ("} {", "no JSON object"),
        ("I cannot judge this.", "no JSON object"),
        ("", "no JSON object"),
    ],
)
def test_other_answers_cannot_be_read(tmp_path: Path, answer: str, said: str) -> None:
    with pytest.raises(Unreadable, match=said) as caught:
        coherence_of(answer, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("texts", "num_images", "found"),
    [
        ({"Content of Image 2": "a"}, 1, ["a"]),
        ({"Content of Image 3": "b", "Content of Image 2": "a"}, 2, ["a", "b"]),
        ({"Content of Image 2": "a", "Content of Image 3": "b"}, 0, ["a", "b"]),  # more than images
        ({"Content of Image 2": "nice \ud83d", "Content of Image 3": "\ud83d\ude00"}, 2, ["nice \ufffd", "\U0001f600"]),
        ({}, 0, []),
    ],
)
def test_descriptions_are_numbered_from_the_first_image(texts: Any, num_images: int, found: list[str]) -> None:
    assert parse_descriptions(described(texts), 2, num_images) == found


@pytest.mark.parametrize(
    ("answer", "num_images", "said"),
    [
        (described({"Content of Image 0": "a"}), 1, "no text `Content of Image 2`"),
        (described({"Content of Image 2": "a", "Content of Image 4": "b"}), 2, "no text `Content of Image 3`"),
        (described({"Content of Image 2": {"text": "a"}}), 1, "no text `Content of Image 2`"),
        (described({"Content of Image 2": "a"}), 2, "1 descriptions for 2 images"),
        (described({}), 1, "0 descriptions for 1 images"),
        (described(["a"]), 1, "no object"),
        ('{"Tasks": {}}', 1, "no key 'Create an Interleaved"),
        ("[]", 1, "no JSON object"),
    ],
)
def test_descriptions_that_lack_one_cannot_be_read(answer: str, num_images: int, said: str) -> None:
    with pytest.raises(Unreadable, match=said):
        parse_descriptions(answer, 2, num_images)


# --- what an item is worth -------------------------------------------------------------------------------------------

NAMES = ("style", "entity", "trend", "overall_consistency", "completeness", "image_quality")


def answered(*numbers: Any, irs: Any = ...) -> dict[str, Any]:
    """The answers about an item of task 3 or 4, in the order of the facts; `...`: not there."""
    first = {name: number for name, number in zip(NAMES, numbers, strict=True) if number is not ...}
    return {"coherence": first, "descriptions": ["x"], "match": None if irs is ... else {"irs": irs}}


X1 = answered(9, 8, 7, 8, 10, 9, irs=6)
X2 = answered(7, "NA", None, 7, 8, 9, irs=0)
X3 = answered(5, 5, ..., 5, 5, 5, irs=5)
FAILED = {"coherence": None, "descriptions": None}


def figures(given: list[tuple[Item, dict[str, Any]]], *, as_zero: bool = False) -> dict[str, float]:
    return dict(COMM.figures([(made, COMM.score(made, answers, as_zero=as_zero)) for made, answers in given]))


def of_task_4(found: Mapping[str, float]) -> list[float]:
    order = ("style", "entity", "trend", "overall_consistency", "completeness", "image_quality", "irs")
    assert [found[name] for name in order] == [found[f"task4_{name}"] for name in order]
    return [found[name] for name in order]


def test_the_worked_examples() -> None:
    three = [(item(4), answers) for answers in (X1, X2, X3)]
    assert of_task_4(figures(three)) == [8, 4, 3.5, 7.5, 9, 9, 3]  # x3 is skipped: (9 + 7) / 2, (8 + 0) / 2, ...
    with_failure = [(item(4), answers) for answers in (X1, FAILED, X3)]
    assert of_task_4(figures(with_failure)) == [9, 8, 7, 8, 10, 9, 6]
    zeros = of_task_4(figures(three, as_zero=True))
    assert zeros == pytest.approx([16 / 3, 8 / 3, 7 / 3, 5, 6, 6, 2])


@pytest.mark.parametrize(
    ("task", "answers", "expected"),
    [
        (3, X1, {"style": 9, "entity": 8, "trend": 7, "completeness": 10, "image_quality": 9, "irs": 6}),
        (4, X2, {"style": 7, "entity": 0, "trend": 0, "completeness": 8, "image_quality": 9, "irs": 0}),
        (4, answered(1.5, 2, 3, 4, 5, 6, irs="NA"), {"style": 1.5, "entity": 2, "trend": 3, "irs": 0}),
        (4, answered(1, 2, 3, 4, None, 6, irs=None), {"completeness": 0, "irs": 0}),
        (2, answered(1, 2, 3, 4, ..., 6, irs=7), {"style": 1, "image_quality": 6, "irs": 7}),
        (1, {"text": {"completeness": 4, "text_fidelity": "NA"}}, {"completeness": 4, "text_fidelity": 0}),
        (1, {"text": {"completeness": None, "text_fidelity": 9}}, {"completeness": 0, "text_fidelity": 9}),
    ],
)
def test_null_and_na_are_zero(task: int, answers: dict[str, Any], expected: dict[str, float]) -> None:
    for as_zero in (False, True):
        found = COMM.score(item(task), answers, as_zero=as_zero)
        assert {name: found[name] for name in expected} == expected
        assert ("completeness" in found, "irs" in found) == (task != 2, task != 1)


@pytest.mark.parametrize(
    ("task", "answers"),
    [
        (4, X3),
        (4, FAILED),
        (4, {}),
        (3, answered(1, 2, 3, 4, 5, 6)),  # the third call failed
        (3, answered(1, 2, 3, 4, ..., 6, irs=7)),
        (3, {"match": {"irs": 3}}),
        (2, answered(1, 2, 3, 4, ..., ..., irs=7)),
        (1, {"text": None}),
        (1, {"text": {"completeness": 4}}),
    ],
)
def test_an_item_without_a_number_is_absent_or_zero(task: int, answers: dict[str, Any]) -> None:
    assert COMM.score(item(task), answers, as_zero=False) == {}
    zeros = COMM.score(item(task), answers, as_zero=True)
    assert set(zeros.values()) == {0.0}
    assert len(zeros) == {1: 2, 2: 6, 3: 7, 4: 7}[task]


def test_figures_are_by_task_and_of_the_published_two() -> None:
    given = [
        (item(3), answered(2, 2, 2, 2, 2, 2, irs=2)),
        (item(3), answered(4, 4, 4, 4, 4, 4, irs=5)),
        (item(4), answered(9, 9, 9, 9, 9, 9, irs=8)),
        (item(2), answered(1, 1, 1, 1, ..., 1, irs=1)),
        (item(1), {"text": {"completeness": 6, "text_fidelity": 7}}),
        (item(1), {"text": None}),
    ]
    found = figures(given)
    seven = ["style", "entity", "trend", "completeness", "image_quality", "irs", "overall_consistency"]
    assert list(found) == [
        *seven,
        *(f"task3_{name}" for name in seven),
        *(f"task4_{name}" for name in seven),
        *("task1_completeness", "task1_text_fidelity"),
        *(f"task2_{name}" for name in seven if name != "completeness"),
    ]
    assert (found["style"], found["irs"], found["task3_irs"]) == (5, 5, 3.5)  # 15 / 3, 15 / 3, 7 / 2
    assert (found["task4_irs"], found["task2_style"], found["task1_text_fidelity"]) == (8, 1, 7)
    assert figures(given, as_zero=True)["task1_text_fidelity"] == 3.5
    assert list(figures(given[3:4])) == [f"task2_{name}" for name in seven if name != "completeness"]
    assert figures([]) == {}
    assert COMM.judge.settings == {"temperature": 1.0}


def test_what_is_parsed_is_what_is_scored(tmp_path: Path) -> None:
    """From the words of a judge to numbers."""
    (made,) = COMM.load(write(tmp_path / "data", "c_task4", "Tell."))
    output = Output(("Bake.", *images(tmp_path, 1)))
    answers: dict[str, Any] = {}
    replies = {
        "coherence": coherent(trend_consistency="NA", Completeness=3),
        "descriptions": described({"Content of Image 0": "An oven"}),
        "match": '{"Consistency": {"image_1_score": 6, "overall_score": 6}}',
    }
    while missing := [q for q in COMM.questions(made, output, ECHO, answers) if q.name not in answers]:
        answers |= {question.name: question.parse(replies[question.name]) for question in missing}
    assert item_scores(made, json.loads(json.dumps(answers)), False) == {
        **{"style": 8, "entity": 8, "trend": 0, "completeness": 3, "image_quality": 8, "irs": 6},
        "overall_consistency": 8,
    }


# --- the data --------------------------------------------------------------------------------------------------------


def test_items_are_read_with_images_in_their_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    write(data, "b_task3", "Cake: (1) Mix. <IMAGE>(2) <IMAGE> Go on.", 2, output_gt_image_list=["gt.png"])
    write(data, "a_b_task4", "Tell of cakes.")
    (data / "notes").mkdir()
    (data / "task4.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    first, second = COMM.load(Path("data"))
    assert (first.id, first.category, first.content) == ("a_b_task4", "task 4", ("Tell of cakes.",))
    origin = data / "b_task3" / "origin"
    content = ("Cake: (1) Mix. ", origin / "input_1.png", "(2) ", origin / "input_2.png", " Go on.")
    assert (second.id, second.category, second.content) == ("b_task3", "task 3", content)
    assert (second.root, second.row["output_gt_image_list"]) == (data / "b_task3", ["gt.png"])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"input_image_list": []}, "model_input must be a text, got nothing"),
        ({"model_input": "x"}, "input_image_list must be a list of file names, got nothing"),
        ({"model_input": ["x"], "input_image_list": []}, "model_input must be a text, got a list"),
        ({"model_input": "x", "input_image_list": "a.png"}, "input_image_list must be a list of file names, got a str"),
        ({"model_input": "x", "input_image_list": [3]}, "input_image_list must be a list of file names"),
        (
            {"model_input": "x", "input_image_list": [], "output_gt_image_list": 3},
            "output_gt_image_list must be a list",
        ),
        ([], "must be an object with model_input and input_image_list, got a list"),
        ({"model_input": "<IMAGE> <IMAGE>", "input_image_list": ["a.png"]}, "2 <IMAGE> marks .* for 1 images"),
        ({"model_input": "x", "input_image_list": ["a.png"]}, "0 <IMAGE> marks .* for 1 images"),
        ({"model_input": "<IMAGE>", "input_image_list": ["../a.png"]}, "'../a.png' leads out of the folder"),
        ({"model_input": "<IMAGE>", "input_image_list": [""]}, "'' is not the name of an image"),
        ({"model_input": " \n", "input_image_list": []}, "model_input is empty"),
    ],
)
def test_a_mistake_in_an_item_is_named(tmp_path: Path, row: Any, said: str) -> None:
    write(tmp_path, "a_task1", "x")
    (tmp_path / "a_task1" / "results.json").write_text(json.dumps(row))
    with pytest.raises(UserError, match=rf"a_task1/results\.json: {said}"):
        COMM.load(tmp_path)


@pytest.mark.parametrize("content", [None, "", "{", "\0"])
def test_a_damaged_file_is_named(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "a_task4").mkdir()
    if content is not None:
        (tmp_path / "a_task4" / "results.json").write_text(content)
    with pytest.raises(UserError, match=r"a_task4/results\.json"):
        COMM.load(tmp_path)


@pytest.mark.parametrize("content", [None, b"no image", b""])
def test_an_image_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    write(tmp_path, "a_task1", "(1) <IMAGE> (2) <IMAGE>", 2)
    file = tmp_path / "a_task1" / "origin" / "input_2.png"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"a_task1: .*input_2\.png: n.*; download it again, or leave the item out"):
        COMM.load(tmp_path)


def test_pickles_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "test_data.pth"
    file.write_bytes(b"\x80\x04N.")
    for data in (file, tmp_path):
        with pytest.raises(UserError, match=r"test_data\.pth: a torch pickle, which runs code .*<data_id>_task<N>"):
            COMM.load(data)


def test_a_folder_without_items_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none: no such folder; .*weisuxi/CoMM on the Hugging Face Hub"):
        COMM.load(tmp_path / "none")
    (tmp_path / "a_task5").mkdir()
    with pytest.raises(UserError, match=r"no folder <data_id>_task<N> in it; .*results\.json"):
        COMM.load(tmp_path)
    write(tmp_path, "a_task4", "Tell.")
    with pytest.raises(UserError, match="is the folder of one item; give the folder above it"):
        COMM.load(tmp_path / "a_task4")
    with pytest.raises(UserError, match="no folder <data_id>_task<N> in it"):
        COMM.load(tmp_path / "a_task4" / "results.json")


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_our_own_prompts_ask_for_what_is_read(tmp_path: Path) -> None:
    prompts = COMM.read_prompts(None)
    assert not prompts.is_official
    assert set(prompts.texts) == set(MENTIONED)
    forms = {
        name: text[text.index("{") :].replace("K+1", "1").replace("K", "0") for name, text in prompts.texts.items()
    }
    output = Output(("Bake.", *images(tmp_path, 2)))
    for task, text, num_images in ((1, "(1) <IMAGE>", 1), (2, "(1) Mix.", 0), (4, "Tell.", 0)):
        (made,) = COMM.load(write(tmp_path / f"{task}", f"c_task{task}", text, num_images))
        asked = COMM.questions(made, output, prompts, {"descriptions": ["x", "y"]})
        assert len(asked) == (1 if task == 1 else 3)
        for question in asked:
            (name,) = [name for name, text in prompts.texts.items() if text == question.system]
            assert question.parse(forms[name]), name  # the form of the answer that the prompt shows can be read


def test_the_authors_prompts_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "eval" / "tot_metric" / "machine_evaluation_prompts"
    folder.mkdir(parents=True)
    for name, key in MENTIONED.items():
        (folder / f"{name}.json").write_text(f"Words of {name}: {key}")
    prompts = COMM.read_prompts(tmp_path)
    assert prompts.is_official
    assert prompts.texts["task_1"] == "Words of task_1: Text Fidelity to Image"
    assert str(tmp_path) not in prompts.source
    (folder / "task_1.json").write_text("Something else")
    with pytest.raises(UserError, match=r"task_1\.json: does not ask for 'Text Fidelity to Image'"):
        COMM.read_prompts(tmp_path)
    (folder / "task_1.json").unlink()
    with pytest.raises(UserError, match=r"task_1\.json: no such file"):
        COMM.read_prompts(tmp_path)


# --- the layout of the authors' scorer -------------------------------------------------------------------------------


def predict(folder: Path, name: str, text: str, num_images: int) -> None:
    """What another model made of an item."""
    names = [f"predict_{number}.png" for number in range(3, 3 + num_images)]
    for number, image in enumerate(names):
        save(folder / name / image, 50 + number)
    (folder / name).mkdir(parents=True, exist_ok=True)
    row = {"model_input": "", "model_output": text, "input_image_list": [], "prediction_image_list": names}
    (folder / name / "results.json").write_text(json.dumps(row))


def test_outputs_of_others_are_read(tmp_path: Path) -> None:
    for name in ("a_task4", "b_task4", "c_task4"):
        write(tmp_path / "data", name, "Tell.")
    items = COMM.load(tmp_path / "data")
    made = tmp_path / "made"
    predict(made, "a_task4", "(3) Mix. <IMAGE> (4) Bake. <IMAGE>", 3)
    predict(made, "b_task4", "No number.", 0)
    assert COMM.read_outputs(made, items) == {
        "a_task4": Output(("(1) Mix. ", made / "a_task4/predict_3.png", " (2) Bake. ", made / "a_task4/predict_4.png")),
        "b_task4": Output(()),
    }


def test_other_folders_are_refused(tmp_path: Path) -> None:
    items = COMM.load(write(tmp_path / "data", "a_task4", "Tell."))
    with pytest.raises(UserError, match=r"model_output must be a text, got nothing"):
        COMM.read_outputs(tmp_path / "data", items)
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=r"no item's results\.json in it, such as a_task4/results\.json"):
            COMM.read_outputs(folder, items)
    assert COMM.read_outputs(tmp_path, []) == {}
    predict(tmp_path / "made", "a_task4", "(1) <IMAGE>", 1)
    (tmp_path / "made" / "a_task4" / "predict_3.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"a_task4: .*predict_3\.png: not an image.*generate it again"):
        COMM.read_outputs(tmp_path / "made", items)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    data = tmp_path / "data"
    truth = ["output_gt_3.png", "gone.png"]
    write(data, "a_task3", "Cake: (1) Mix. <IMAGE> Go on.", 1, output_gt_image_list=truth)
    save(data / "a_task3" / "origin" / "output_gt_3.png", 9)
    write(data, "b_task4", "Tell.")
    items = COMM.load(data)
    first, second = images(tmp_path, 2)
    out = tmp_path / "out"
    COMM.write_outputs({"a_task3": Output(("Bake.", first, "Eat.", second)), "x_task4": Output(())}, items, out)
    assert json.loads((out / "a_task3" / "results.json").read_text()) == {
        "model_input": "Cake: (1) Mix. <IMAGE> Go on.",
        "model_output": "(1) Bake. <IMAGE> (2) Eat. <IMAGE>",
        "input_image_list": ["input_1.png"],
        "output_gt_image_list": ["output_gt_3.png"],
        "prediction_image_list": ["predict_1.png", "predict_2.png"],
    }
    files = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    beside = {"results.json", "predict_1.png", "predict_2.png", "origin/input_1.png", "origin/output_gt_3.png"}
    assert files == {f"a_task3/{name}" for name in beside}
    assert (out / "a_task3" / "predict_2.png").read_bytes() == second.read_bytes()
    assert [made.content[0] for made in COMM.load(out)] == ["Cake: (1) Mix. "]  # its own data, too
    again = COMM.read_outputs(out, items)["a_task3"]
    written = COMM.questions(items[0], Output(("Bake.", first, "Eat.", second)), ECHO, {})
    assert [q.key("j") for q in COMM.questions(items[0], again, ECHO, {})] == [q.key("j") for q in written]
    COMM.write_outputs({"a_task3": again}, items, tmp_path / "twice")
    for name in beside:
        assert (tmp_path / "twice" / "a_task3" / name).read_bytes() == (out / "a_task3" / name).read_bytes()
