import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imgen_common.errors import UserError
from imgen_common.judging.questions import Question, Unreadable
from interleave.benchmarks.base import Item, Output, Prompts
from interleave.benchmarks.config import BenchmarkConfig
from interleave.benchmarks.official.rise import DATA_FILES, Rise
from interleave.benchmarks.official.rise_rules import CATEGORIES, COLUMNS, PROMPTS, parse_mark, parse_scores
from interleave.benchmarks.run import BenchmarkWork

RISE = Rise()
TEMPORAL, CAUSAL, SPATIAL, LOGICAL = CATEGORIES
NAN = float("nan")


def save(file: Path, seed: int = 0, size: tuple[int, int] = (48, 32), mode: str = "RGB") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], len(mode))
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8), mode).save(file)
    return file


def row(category: str, number: int, **keys: Any) -> dict[str, Any]:
    name = f"{category}_{number}"
    made = {
        "index": name,
        "category": category,
        "instruction": f"Do {number}.",
        "image": f"{category}_images/{number}.png",
    }
    if category != LOGICAL and "reference_img" not in keys:
        made["reference"] = f"It is done: {number}."
    return made | keys


def write(folder: Path, rows: list[Any], name: str = DATA_FILES[1], images: str = "") -> Path:
    """A data folder with each item's images."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(rows))
    for number, item in enumerate(rows):
        for key in ("image", "reference_img"):
            if isinstance(item, dict) and isinstance(file := item.get(key), str):
                save(folder / images / file, 2 * number + (key == "image"))
    return folder


def item(category: str, columns: tuple[str, ...] = (), **keys: Any) -> Item:
    """An item whose data has these columns, too."""
    made = row(category, 1, **keys)
    return Item(made["index"], (made["instruction"],), category, {**made, COLUMNS: sorted({*made, *columns})})


def answers(*texts: str | None) -> dict[str, Any]:
    """Values in the order consistency, reasoning, plausibility; None: not asked, a dash: asked, and not read."""
    given = dict(zip(("consistency", "reasoning", "plausibility"), texts, strict=False))
    return {name: mark(text) for name, text in given.items() if text is not None}


def mark(text: str, *, is_logical: bool = True) -> int | None:
    """What an answer is worth; None: it cannot be read."""
    try:
        return parse_mark(f"Why.\n**Final Score:** **{text}**", is_logical=is_logical)
    except Unreadable:
        return None


# --- what an answer says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "numbers"),
    [
        ("**Final Score**: **1**", [1]),
        ("Final Score: 3/5", [3]),
        ("**Final Score:** **1-5** -> **3**", [1]),
        ("so it is.\n\n**Final Score:** **4**\n", [4]),
        ("final score 5", [5]),
        ("Final Score:\n\n**2**", [2]),
        ("**Final Score: 5, 4**", [5, 4]),  # both are read, so the item has a number too many
        ("Final Score is not sure. Final Score: 2", [2]),  # the first that digits follow
        ("Final Score: 2\nFinal Score: 5", [2]),
        ("Final Scores: 1, 0", [1, 0]),  # the second pattern
        ("Final Score: **0**", [0]),
        ("Final Score: 4.5", [4]),  # a point ends it
    ],
)
def test_the_first_final_score_with_digits_is_read(answer: str, numbers: list[int]) -> None:
    assert parse_scores(answer) == numbers


@pytest.mark.parametrize(
    "answer",
    [
        "Score: 5",
        "",
        "Failed to obtain answer via API. ",
        "**Final Score:** **X**",
        "Final Score = 5",
        "Final Score: -",
        "Final Scores: none",
        "Final Score: " + "9" * 5000,
    ],
)
def test_an_answer_without_a_number_cannot_be_read(answer: str) -> None:
    with pytest.raises(Unreadable):
        parse_scores(answer)


@pytest.mark.parametrize(
    ("text", "of_five", "logical"),
    [
        ("1", 1, 1),
        ("5", 5, 5),
        ("3/5", 3, 3),
        ("0", None, 0),  # out of range: such an answer fails, and neither lifts nor lowers a mean unseen
        ("6", None, 6),  # of logical items more than 1 counts as 1
        ("99999999999", None, 99999999999),
        ("5, 4", None, None),  # more than one number
        ("1\n2", None, None),
        ("-", None, None),
    ],
)
def test_an_answer_is_one_number_in_its_range(text: str, of_five: int | None, logical: int | None) -> None:
    assert mark(text, is_logical=False) == of_five
    assert mark(text) == logical


def test_the_range_is_that_of_the_items_kind(tmp_path: Path) -> None:
    text = "Final Score: 0"
    (logical, *_) = asked(tmp_path / "a", [row(LOGICAL, 1, reference_txt="7")])
    assert logical.parse(text) == 0
    for question in asked(tmp_path / "b", [row(TEMPORAL, 1)]):
        with pytest.raises(Unreadable, match="the score 0 is not from 1 to 5"):
            question.parse(text)


# --- what an item is worth -------------------------------------------------------------------------------------------

FREE: dict[str, Any] = {"consistency_free": True}
COLUMN = ("consistency_free",)


@pytest.mark.parametrize(
    ("item", "answers", "accuracy", "score", "upstream"),
    [
        # the worked examples of the facts
        (item(TEMPORAL), answers("4", "5", "5"), 0, 4.7, 4.7),  # .3*4 + .5*5 + .2*5 = 1.2 + 2.5 + 1
        (item(TEMPORAL), answers("5", "5", "5"), 1, 5, 5),
        (item(TEMPORAL, COLUMN), answers("3", "5", "5"), 0, 4.4, 5),  # .9 + 2.5 + 1; upstream .8*5 + .2*5
        (item(TEMPORAL, **FREE), answers(None, "5", "5"), 1, 5, 5),
        (item(LOGICAL, reference_txt="7"), answers("1", "0"), 0, 1.1, 1.1),  # (5, 1): (1.5 + .7) / 2
        (item(LOGICAL, reference_txt="7"), answers("0", "1"), 0, 3.8, 3.8),  # (1, 5): .3 + 3.5
        (item(LOGICAL, reference_txt="7"), answers("1", "1"), 1, 5, 5),
        (item(CAUSAL), answers("5", "1", "5"), 0, 1.5, 1.5),  # (1.5 + .5 + 1) / 2
        # further ones
        (item(SPATIAL), answers("1", "2", "3"), 0, 1.9, 1.9),  # .3 + 1 + .6
        (item(CAUSAL), answers("1", "1", "1"), 0, 1, 1),  # 1 / 2, but at least 1
        (item(CAUSAL), answers("5", "5", "4"), 0, 4.8, 4.8),  # 1.5 + 2.5 + .8
        (item(TEMPORAL, COLUMN), answers("5", "1", "5"), 0, 1.5, 1),  # upstream (.8 + 1) / 2 = .9, so 1
        (item(TEMPORAL, COLUMN), answers("1", "4", "2"), 0, 2.7, 3.6),  # .3 + 2 + .4; upstream 3.2 + .4
        (item(TEMPORAL, COLUMN, consistency_free=NAN), answers("3", "5", "5"), 0, 4.4, 5),
        (item(TEMPORAL, COLUMN, consistency_free=None), answers("3", "5", "5"), 0, 4.4, 5),
        (item(SPATIAL, **FREE), answers(None, "4", "5"), 0, 4.2, 4.2),  # 3.2 + 1
        (item(SPATIAL, **FREE), answers(None, "1", "5"), 0, 1, 1),  # (.8 + 1) / 2 = .9
        (item(CAUSAL, consistency_free="yes"), answers(None, "5", "3"), 0, 4.6, 4.6),  # 4 + .6
        (item(CAUSAL, consistency_free=0), answers(None, "5", "5"), 1, 5, None),  # upstream NaN: .3 * nothing
        (item(LOGICAL, COLUMN, reference_txt="7"), answers("0", "1"), 0, 3.8, 3.8),  # no slip for logical items
        (item(LOGICAL, reference_img="r.png"), answers("0", "0"), 0, 1, 1),  # (.3 + .7) / 2, but at least 1
        (item(LOGICAL, reference_img="r.png"), answers("5", "3"), 1, 5, 5),  # more than 1 counts as 1
        (item(LOGICAL, reference_txt="7", **FREE), answers(None, "1"), 1, 5, 5),  # upstream ends here
        (item(LOGICAL, reference_txt="7", **FREE), answers(None, "0"), 0, 1, 1),  # 1 / 2, but at least 1
        # failed: no score, and upstream's accuracy of 0 only where failures count
        (item(TEMPORAL), answers("5", "-", "5"), 0, None, None),
        (item(TEMPORAL), answers("5", "5"), 0, None, None),  # one is not there
        (item(TEMPORAL), {}, 0, None, None),
        (item(TEMPORAL), answers("5, 5", "5", "5"), 0, None, None),  # four numbers
        (item(TEMPORAL, **FREE), answers(None, "5 5", "5"), 0, None, None),  # three, but for two dimensions
        (item(LOGICAL, reference_txt="7"), answers("1", "-"), 0, None, None),
        (item(LOGICAL, reference_txt="7"), answers("1", "1 0"), 0, None, None),  # three numbers, but for two dimensions
        (item(LOGICAL, reference_txt="7"), answers("1 1", "1 1"), 0, None, None),  # four numbers
        (item(LOGICAL, reference_txt="7", **FREE), answers(None, "1 0"), 0, None, None),
    ],
)
def test_items_are_worth_what_they_are_upstream(
    item: Item, answers: dict[str, Any], accuracy: int, score: float | None, upstream: float | None
) -> None:
    found = RISE.score(item, answers, as_zero=False)
    assert found.get("accuracy") == (None if score is None else accuracy)
    for name, value in (("score", score), ("score_upstream", upstream)):
        assert found.get(name) == (None if value is None else pytest.approx(value, abs=1e-12)), name
    assert RISE.score(item, answers, as_zero=True)["accuracy"] == accuracy
    if score is not None:
        assert RISE.score(item, answers, as_zero=True) == found


@pytest.mark.parametrize(
    ("item", "answers", "expected"),
    [
        # .3*5 + .5*1 + .2*4 = 2.8, halved, since reasoning is 1
        (item(TEMPORAL), answers("5", "-", "4"), {"consistency": 5, "reasoning": 1, "plausibility": 4, "score": 1.4}),
        (item(TEMPORAL), {}, {"consistency": 1, "reasoning": 1, "plausibility": 1, "score": 1}),
        # consistency 1: .3 + 2.5 + 1
        (item(SPATIAL), answers("5 5", "5", "5"), {"consistency": 1, "reasoning": 5, "plausibility": 5, "score": 3.8}),
        (item(CAUSAL, **FREE), answers(None, "5", "-"), {"reasoning": 5, "plausibility": 1, "score": 4.2}),  # 4 + .2
        (item(LOGICAL, reference_txt="7"), answers("-", "1"), {"consistency": 1, "reasoning": 5, "score": 3.8}),
        (item(LOGICAL, reference_txt="7"), {}, {"consistency": 1, "reasoning": 1, "score": 1}),
    ],
)
def test_a_failed_answer_can_count_as_the_worst(
    item: Item, answers: dict[str, Any], expected: dict[str, float]
) -> None:
    found = dict(RISE.score(item, answers, as_zero=True))
    assert found.pop("score_upstream") == pytest.approx(expected["score"])  # none of their data has the column wrongly
    assert found == pytest.approx({"accuracy": 0.0, **expected})


def test_figures_are_percentages_over_items_not_over_categories() -> None:
    rows = [
        (item(TEMPORAL, COLUMN), answers("5", "5", "5")),  # 5
        (item(TEMPORAL, COLUMN), answers("3", "5", "5")),  # 4.4; upstream 5
        (item(TEMPORAL, COLUMN), answers("-", "5", "5")),  # failed
        (item(CAUSAL, **FREE), answers(None, "3", "5")),  # 2.4 + 1 = 3.4
        (item(LOGICAL, COLUMN, reference_txt="7"), answers("0", "1")),  # 3.8
    ]
    found = RISE.figures([(made, RISE.score(made, given, as_zero=False)) for made, given in rows])
    assert list(found)[:5] == ["accuracy", "accuracy_temporal", "accuracy_causal", "accuracy_logical", "score"]
    expected = {
        "accuracy": 25,  # 1 of 4, without the failed one
        "accuracy_temporal": 50,
        "accuracy_causal": 0,
        "accuracy_logical": 0,
        "score": 25 * (16.6 / 4 - 1),  # (5 + 4.4 + 3.4 + 3.8) / 4
        "score_temporal": 25 * (9.4 / 2 - 1),
        "score_causal": 60,
        "score_logical": 70,
        "score_upstream": 25 * (17.2 / 4 - 1),
        "score_upstream_temporal": 100,
        "score_upstream_causal": 60,
        "score_upstream_logical": 70,
        "reasoning": 25 * (18 / 4 - 1),  # 5, 5, 3, 5
        "reasoning_temporal": 100,
        "reasoning_causal": 50,
        "reasoning_logical": 100,
        "consistency": 50,  # 5, 3, 1: the free one has none
        "consistency_temporal": 75,
        "consistency_logical": 0,
        "plausibility": 100,  # 5, 5, 5
        "plausibility_temporal": 100,
        "plausibility_causal": 100,
    }
    assert dict(found) == pytest.approx(expected)
    worst = RISE.figures([(made, RISE.score(made, given, as_zero=True)) for made, given in rows])
    assert worst["accuracy"] == 20  # 1 of 5, as upstream
    assert worst["accuracy_temporal"] == pytest.approx(100 / 3)
    assert worst["score"] == pytest.approx(25 * (20.4 / 5 - 1))  # the failed one: .3 + 2.5 + 1 = 3.8
    assert RISE.figures([]) == {}


def test_the_headline_of_the_full_set_weighs_items() -> None:
    """85 temporal items right of 360: 23.6 %, where the mean of categories would be 25 %."""
    counts = {TEMPORAL: 85, CAUSAL: 90, SPATIAL: 100, LOGICAL: 85}
    rows = [
        (item(kind, reference_txt="7"), {"accuracy": float(kind == TEMPORAL)})
        for kind, count in counts.items()
        for _ in range(count)
    ]
    assert RISE.figures(rows)["accuracy"] == pytest.approx(100 * 85 / 360)


# --- what the judge is asked -----------------------------------------------------------------------------------------

ECHO = Prompts({name: f"{name}|{'|'.join(f'{{{place}}}' for place in places)}" for name, places in PROMPTS.items()})
"""Prompts that say their own names and what was filled in."""


def asked(tmp_path: Path, rows: list[dict[str, Any]], place: int = 0) -> list[Question]:
    made = RISE.load(write(tmp_path / "data", rows))[place]
    output = Output(("words", save(tmp_path / "first.png", 98), "more", save(tmp_path / "last.png", 99)))
    return list(RISE.questions(made, output, ECHO, {}))


def shown(tmp_path: Path, rows: list[dict[str, Any]], place: int = 0) -> list[tuple[str, str, str]]:
    """Of each question its name, its text, and its images: I the input, R the reference, O the result."""
    questions = asked(tmp_path, rows, place)
    folder = tmp_path / "data"
    names = {"I": folder / rows[place]["image"], "O": tmp_path / "last.png"}
    if isinstance(reference := rows[place].get("reference_img"), str):
        names["R"] = folder / reference
    signs = {as_upstream(file): sign for sign, file in names.items()}
    found = []
    for question in questions:
        text, *images = question.message
        assert isinstance(text, str)
        found.append((question.name, text, "".join(signs[image.tobytes()] for image in images)))  # type: ignore[union-attr]
    return found


def as_upstream(file: Path, side: int = 768) -> bytes:
    """The pixels that the authors' code sends."""
    image: Image.Image = Image.open(file)
    if image.mode in ("RGBA", "P"):
        image = image.convert("RGB")
    image.load()
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return Image.open(buffer).convert("RGB").tobytes()


WO = {"reasoning_wo_ins": NAN}


@pytest.mark.parametrize(
    ("made", "others", "expected"),
    [
        (
            row(TEMPORAL, 1),
            [],
            [
                "consistency consist|Do 1. IO",
                "reasoning reasoning|Do 1.|It is done: 1. O",
                "plausibility generation| O",
            ],
        ),
        (
            row(CAUSAL, 1, reasoning_img=True),
            [],
            [
                "consistency consist|Do 1. IO",
                "reasoning reasoning_w_input|Do 1.|It is done: 1. IO",
                "plausibility generation| O",
            ],
        ),
        (
            row(TEMPORAL, 1, reasoning_img=NAN, consistency_free=1.0),
            [],
            ["reasoning reasoning|Do 1.|It is done: 1. O", "plausibility generation| O"],
        ),
        (
            row(TEMPORAL, 1, reasoning_img=None, consistency_free=None),
            [],
            [
                "consistency consist|Do 1. IO",
                "reasoning reasoning|Do 1.|It is done: 1. O",
                "plausibility generation| O",
            ],
        ),
        (
            row(SPATIAL, 1),
            [],
            [
                "consistency spatial_cons|Do 1. IO",
                "reasoning spatial_ref|Do 1.|It is done: 1. O",
                "plausibility spatial_qual| O",
            ],
        ),
        (
            row(SPATIAL, 1, reasoning_img="yes"),
            [],
            [
                "consistency spatial_cons|Do 1. IO",
                "reasoning spatial_ref_w_input|Do 1.|It is done: 1. IO",
                "plausibility spatial_qual| O",
            ],
        ),
        (  # the reference takes the place of the input in the first call, too, and wins over reasoning_img
            row(SPATIAL, 1, reference_img="spatial_reasoning_images/1_ref.png", reasoning_img=1),
            [],
            [
                "consistency spatial_cons|Do 1. RO",
                "reasoning spatial_ref_img|Do 1. RO",
                "plausibility spatial_qual| O",
            ],
        ),
        (
            row(SPATIAL, 1, reference_img="spatial_reasoning_images/1_ref.png", consistency_free="x"),
            [],
            ["reasoning spatial_ref_img|Do 1. RO", "plausibility spatial_qual| O"],
        ),
        (
            row(LOGICAL, 1, reference_txt="Seven."),
            [],
            ["consistency logical_cons_ans|Do 1.|Seven. IO", "reasoning logical_txt|Seven. O"],
        ),
        (  # a text wins over an image
            row(LOGICAL, 1, reference_txt="Seven.", reference_img="logical_reasoning_images/1_ref.png"),
            [],
            ["consistency logical_cons_ans|Do 1.|Seven. IO", "reasoning logical_txt|Seven. O"],
        ),
        (
            row(LOGICAL, 1, reference_txt=NAN, reference_img="logical_reasoning_images/1_ref.png"),
            [],
            ["consistency logical_cons|Do 1. RO", "reasoning logical_img|Do 1. RO"],
        ),
        (  # another item's key makes a column, so that this one is asked without its task
            row(LOGICAL, 1, reference_img="logical_reasoning_images/1_ref.png"),
            [row(TEMPORAL, 2, **WO)],
            ["consistency logical_cons|Do 1. RO", "reasoning logical_img_wo_q| RO"],
        ),
        (
            row(LOGICAL, 1, reference_txt="Seven.", reasoning_wo_ins=1),
            [],
            ["consistency logical_cons_ans|Do 1.|Seven. IO", "reasoning logical_txt|Seven. O"],
        ),
        (  # upstream ends at such an item
            row(LOGICAL, 1, reference_img="logical_reasoning_images/1_ref.png", consistency_free=1),
            [],
            ["reasoning logical_img|Do 1. RO"],
        ),
    ],
)
def test_the_questions_of_every_kind_of_item(
    tmp_path: Path, made: dict[str, Any], others: list[dict[str, Any]], expected: list[str]
) -> None:
    assert [" ".join(question) for question in shown(tmp_path, [made, *others])] == expected


def test_questions_are_as_the_authors_ask_them(tmp_path: Path) -> None:
    for question in asked(tmp_path, [row(TEMPORAL, 1)]):
        assert (question.system, question.tries) == ("", 1)
        assert question.parse("**Final Score:** **4**") == 4
    assert RISE.judge.model == "gpt-4.1-2025-04-14"
    assert RISE.judge.settings == {"temperature": 0, "max_tokens": 4096, "image_detail": "high"}


def test_braces_in_an_instruction_are_no_places(tmp_path: Path) -> None:
    made = row(TEMPORAL, 1, instruction="Write {reference} and {0} on it.", reference="{instruct}")
    assert [text for _, text, _ in shown(tmp_path, [made])] == [
        "consist|Write {reference} and {0} on it.",
        "reasoning|Write {reference} and {0} on it.|{instruct}",
        "generation|",
    ]


def test_an_output_without_an_image_is_not_shown_to_the_judge(tmp_path: Path) -> None:
    (made,) = RISE.load(write(tmp_path, [row(TEMPORAL, 1)]))
    assert RISE.questions(made, Output(("Sorry.",)), ECHO, {}) == ()


@pytest.mark.parametrize(
    ("size", "mode", "expected"),
    [
        ((1600, 400), "RGB", (768, 192)),
        ((400, 1600), "RGBA", (192, 768)),
        ((767, 3), "RGB", (767, 3)),
        ((5, 768), "RGBA", (5, 768)),
    ],
)
def test_images_are_as_the_authors_send_them(
    tmp_path: Path, size: tuple[int, int], mode: str, expected: tuple[int, int]
) -> None:
    """Shrunk, never enlarged; the colors below transparency; through JPEG."""
    (made,) = RISE.load(write(tmp_path / "data", [row(TEMPORAL, 1)]))
    file = save(tmp_path / "made.png", 5, size, mode)
    image = RISE.questions(made, Output((file,)), ECHO, {})[2].message[1]
    assert isinstance(image, Image.Image)
    assert (image.mode, image.size) == ("RGB", expected)
    assert image.tobytes() == as_upstream(file)


# --- the data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DATA_FILES)
@pytest.mark.parametrize("images", ["", "data"])
@pytest.mark.parametrize("is_file", [False, True])
def test_both_versions_are_read(
    tmp_path: Path, name: str, images: str, is_file: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = "logical_reasoning_images/2_ref.png"
    rows = [row(TEMPORAL, 1, subtask="Growth"), row(LOGICAL, 2, reference_img=reference), row(CAUSAL, 3, index=7)]
    folder = write(tmp_path / "rise", rows, name, images)
    monkeypatch.chdir(tmp_path)
    found = RISE.load(Path("rise") / name if is_file else Path("rise"))
    base = folder / images
    assert [(one.id, one.category, one.content, one.root) for one in found] == [
        ("temporal_reasoning_1", TEMPORAL, (base / "temporal_reasoning_images/1.png", "Do 1."), base),
        ("logical_reasoning_2", LOGICAL, (base / "logical_reasoning_images/2.png", "Do 2."), base),
        ("7", CAUSAL, (base / "causal_reasoning_images/3.png", "Do 3."), base),
    ]
    columns = ["category", "image", "index", "instruction", "reference", "reference_img", "subtask"]
    assert [one.row for one in found] == [{**made, COLUMNS: columns} for made in rows]
    assert json.loads(json.dumps(found[0].row)) == found[0].row


GOOD = row(TEMPORAL, 1)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([GOOD, {key: value for key, value in GOOD.items() if key != "index"}], "item 2: has no 'index'"),
        ([{key: value for key, value in GOOD.items() if key != "category"}], "item 1: has no 'category'"),
        ([{key: value for key, value in GOOD.items() if key != "instruction"}], "item 1: has no 'instruction'"),
        ([{key: value for key, value in GOOD.items() if key != "image"}], "item 1: has no 'image'"),
        ([GOOD, GOOD | {"image": None}], "item 2: has no 'image'"),
        ([GOOD, GOOD | {"instruction": "other"}], "item 2: has the index 'temporal_reasoning_1' of .*item 1"),
        ([GOOD | {"index": 1}, GOOD | {"index": "1"}], "item 2: has the index '1' of .*item 1"),
        ([GOOD | {"category": "temporal"}], "unknown category 'temporal'; allowed: temporal_reasoning, causal"),
        ([GOOD | {"image": ["a.png", "b.png"]}], "item 1: image must be a text, got"),
        ([GOOD | {"instruction": 3}], "item 1: instruction must be a text, got 3"),
        ([GOOD | {"index": True}], "item 1: index must be a text, got True"),
        ([GOOD | {"index": "../1"}], "cannot be the name of a file"),
        ([GOOD | {"index": ".."}], "cannot be the name of a file"),
        ([row(TEMPORAL, 1, reference=NAN)], r"item 1 \(temporal_reasoning_1\): has no reference"),
        ([row(SPATIAL, 1, reference=None)], "has no reference and no reference_img"),
        ([row(LOGICAL, 1)], "has no reference_txt and no reference_img"),
        ([row(LOGICAL, 1, reference_txt=NAN, reference_img=None)], "has no reference_txt and no reference_img"),
        ([row(LOGICAL, 1, reference_img=3)], "3 is not the name of an image"),
        ([GOOD, "Do it."], "item 2: must be an object with index, category, instruction, image"),
        ([], "must be a list of items"),
    ],
)
def test_a_mistake_in_an_item_is_named(tmp_path: Path, rows: list[Any], said: str) -> None:
    with pytest.raises(UserError, match=rf"{DATA_FILES[1]}.*{said}"):
        RISE.load(write(tmp_path, rows))


@pytest.mark.parametrize("content", ["{", "", '{"index": 1}', "3", "[" * 100_000, "[1"])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / DATA_FILES[0]).write_text(content)
    with pytest.raises(UserError, match=DATA_FILES[0]):
        RISE.load(tmp_path)


def test_a_folder_without_the_data_says_what_to_get(tmp_path: Path) -> None:
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match=r"data_total\.json.*PhoenixZ/RISEBench on the Hugging Face Hub.*data\.zip"):
            RISE.load(folder)
    for name in DATA_FILES:
        write(tmp_path, [GOOD], name)
    with pytest.raises(UserError, match="two versions; give one of the files"):
        RISE.load(tmp_path)
    assert len(RISE.load(tmp_path / DATA_FILES[0])) == 1


@pytest.mark.parametrize(
    ("content", "said"), [(None, "no such image"), (b"no image", "not an image"), ("folder", "no such image")]
)
@pytest.mark.parametrize("key", ["image", "reference_img"])
def test_an_image_that_cannot_be_read_is_named(
    tmp_path: Path, content: bytes | str | None, said: str, key: str
) -> None:
    rows = [GOOD, row(LOGICAL, 2, reference_img="logical_reasoning_images/2_ref.png")]
    write(tmp_path, rows)
    file = tmp_path / rows[1][key]
    file.unlink()
    if content == "folder":
        file.mkdir()
    elif isinstance(content, bytes):
        file.write_bytes(content)
    with pytest.raises(UserError, match=rf"item 2: .*{re.escape(file.name)}: {said}.*; download it again"):
        RISE.load(tmp_path)


@pytest.mark.parametrize("name", ["../secret.png", "/secret.png", "a/../../secret.png"])
def test_no_path_leads_out_of_the_data(tmp_path: Path, name: str) -> None:
    save(tmp_path / "secret.png")
    folder = write(tmp_path / "data", [GOOD])
    (folder / DATA_FILES[1]).write_text(json.dumps([GOOD, row(CAUSAL, 2, image=name)]))
    with pytest.raises(UserError, match=r"item 2: .*leads out of the folder"):
        RISE.load(folder)


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_our_own_prompts_ask_for_what_is_read() -> None:
    prompts = RISE.read_prompts(None)
    assert not prompts.is_official
    assert set(prompts.texts) == set(PROMPTS)
    for name, text in prompts.texts.items():
        assert set(re.findall(r"\{(\w+)\}", text)) == set(PROMPTS[name]), name
        numbers = (0, 1) if name.startswith("logical") else (1, 5)
        for number in numbers:
            assert parse_scores(text.replace("**X**", f"**{number}**")) == [number], name


def authors_copy(folder: Path, leave_out: str = "", without: str = "") -> Path:
    """A stand-in for the authors' `utils.py`: constants, an import that is not there, code that must not run."""
    lines = ["import nothing_like_it", "raise SystemExit"]
    for name, places in PROMPTS.items():
        text = f"Words of {name}.\n" + "\n".join(f"{{{place}}}" for place in places if place != without)
        if name != leave_out:
            lines.append(f'prompt_{name} = """{text}"""')
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "utils.py").write_text("\n".join([*lines, "", "def encode():", "    return 1"]))
    return folder


def test_the_authors_prompts_are_read(tmp_path: Path) -> None:
    prompts = RISE.read_prompts(authors_copy(tmp_path))
    assert prompts.is_official
    assert prompts.texts["consist"] == "Words of consist.\n{instruct}"
    assert prompts.texts["logical_img_wo_q"] == "Words of logical_img_wo_q.\n"
    assert prompts.hash != RISE.read_prompts(None).hash
    assert str(tmp_path) not in prompts.source


def test_a_copy_without_a_prompt_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"utils\.py: no text prompt_spatial_qual in it"):
        RISE.read_prompts(authors_copy(tmp_path / "a", leave_out="spatial_qual"))
    with pytest.raises(UserError, match="prompt_reasoning: has no place for 'reference'"):
        RISE.read_prompts(authors_copy(tmp_path / "b", without="reference"))
    with pytest.raises(UserError, match=r"utils\.py"):
        RISE.read_prompts(tmp_path)


# --- the layout of the authors' scorer -------------------------------------------------------------------------------


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    return RISE.load(write(tmp_path / "data", [row(TEMPORAL, 1), row(CAUSAL, 2), row(SPATIAL, 3)]))


@pytest.mark.parametrize("below", ["", "images"])
def test_outputs_of_others_are_read(tmp_path: Path, items: list[Item], below: str) -> None:
    images = tmp_path / "outputs" / "model" / "images"
    for name in ("temporal_reasoning_1.jpeg", "temporal_reasoning_1.jpg", "temporal_reasoning_1.png"):
        save(images / TEMPORAL / name)
    for name in ("causal_reasoning_2.jpeg", "causal_reasoning_2.jpg", "causal_reasoning_3.png"):
        save(images / CAUSAL / name)
    assert RISE.read_outputs(tmp_path / "outputs" / "model" / below, items) == {
        "temporal_reasoning_1": Output((images / TEMPORAL / "temporal_reasoning_1.png",)),
        "causal_reasoning_2": Output((images / CAUSAL / "causal_reasoning_2.jpg",)),
    }


def test_other_folders_are_refused(tmp_path: Path, items: list[Item]) -> None:
    save(tmp_path / "images" / "temporal_reasoning_1.png")
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=r"images/temporal_reasoning/temporal_reasoning_1\.png; give the folder"):
            RISE.read_outputs(folder, items)
    assert RISE.read_outputs(tmp_path, []) == {}
    file = save(tmp_path / "images" / TEMPORAL / "temporal_reasoning_1.png")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"item temporal_reasoning_1: .*temporal_reasoning_1\.png: damaged"):
        RISE.read_outputs(tmp_path, items)


def test_what_is_written_is_what_their_scorer_finds(tmp_path: Path, items: list[Item]) -> None:
    png, jpeg = save(tmp_path / "a.png", 1, mode="RGBA"), save(tmp_path / "b.jpeg", 2)
    webp = tmp_path / "c.webp"
    Image.open(save(tmp_path / "c.png", 3)).save(webp, lossless=True)
    outputs = {
        "temporal_reasoning_1": Output(("First.", jpeg, "Then.", png)),
        "causal_reasoning_2": Output((jpeg,)),
        "spatial_reasoning_3": Output((webp,)),
    }
    stale = save(tmp_path / "out/images" / CAUSAL / "causal_reasoning_2.png")  # which their scorer would prefer
    RISE.write_outputs(outputs, items, tmp_path / "out")
    folder = tmp_path / "out" / "images"
    assert not stale.exists()
    assert (folder / TEMPORAL / "temporal_reasoning_1.png").read_bytes() == png.read_bytes()
    assert (folder / CAUSAL / "causal_reasoning_2.jpg").read_bytes() == jpeg.read_bytes()
    assert (
        Image.open(folder / SPATIAL / "spatial_reasoning_3.png").tobytes() == Image.open(tmp_path / "c.png").tobytes()
    )
    assert len([file for file in folder.rglob("*") if file.is_file()]) == 3
    again = RISE.read_outputs(tmp_path / "out", items)
    assert {name: len(output.images) for name, output in again.items()} == dict.fromkeys(outputs, 1)


def test_a_folder_is_of_the_images_that_its_items_had(tmp_path: Path, items: list[Item]) -> None:
    prompts = Prompts({"consistency": "x"})
    work = BenchmarkWork(RISE, BenchmarkConfig(), items, prompts, tmp_path / "out")
    work.open()
    work.open()
    (source,) = (part for part in items[0].content if isinstance(part, Path))
    save(source, seed=9)
    work.open()  # nothing was made for the first ones
    (tmp_path / "out" / "generation").mkdir()
    save(source, seed=8)
    with pytest.raises(UserError, match="out: was begun with other items or images"):
        work.open()


def test_items_without_an_image_are_not_written(tmp_path: Path, items: list[Item]) -> None:
    outputs = {"temporal_reasoning_1": Output(("Sorry.",)), "causal_reasoning_2": Output((save(tmp_path / "a.png"),))}
    RISE.write_outputs(outputs, items, tmp_path / "out")
    assert list(RISE.read_outputs(tmp_path / "out", items)) == ["causal_reasoning_2"]
    with pytest.raises(UserError, match=r"gone\.png: cannot be read"):
        RISE.write_outputs({"causal_reasoning_2": Output((tmp_path / "gone.png",))}, items, tmp_path / "out")


def test_scores_hold_no_nan() -> None:
    made = RISE.score(item(CAUSAL, consistency_free=0), answers(None, "5", "5"), as_zero=False)
    assert not any(math.isnan(value) for value in made.values())
