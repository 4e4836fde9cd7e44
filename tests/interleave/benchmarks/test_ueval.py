import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from imgen_common.errors import UserError
from imgen_common.judging.questions import Unreadable
from interleave.benchmarks.base import Item, Output, Prompts
from interleave.benchmarks.official.ueval import Ueval, parse_met

UEVAL = Ueval()
TRUE, FALSE, UNSURE = '{"criteria_met": true}', '{"criteria_met": false}', '{"criteria_met": "not sure"}'
FAILED = None
"""No answer that can be read in all tries."""


def row(number: int | str, task: str | None = "art", text: Any = ("a", "b"), image: Any = ("c",)) -> dict[str, Any]:
    rubrics = {"text_rubrics": text, "image_rubrics": image}
    return {"id": number, "prompt": f"Question {number}?", "task": task, **rubrics}


def write(file: Path, rows: list[Any]) -> Path:
    file.write_text(json.dumps(rows))
    return file


def paint(file: Path, color: str = "red") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (3, 2), color).save(file, "PNG")
    return file


def one_item(tmp_path: Path, **fields: Any) -> Item:
    return UEVAL.load(write(tmp_path / "one.json", [row(1, **fields)]))[0]


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "met"),
    [
        (TRUE, True),
        (FALSE, False),
        (UNSURE, False),
        ('{"criteria_met": 1}', False),  # a number is not met, but
        ('{"criteria_met": "1"}', True),  # its text is
        ('{"criteria_met": "Yes"}', True),
        ('{"criteria_met": " TRUE\\n"}', True),
        ('{"criteria_met": "y"}', True),
        ('{"criteria_met": "no"}', False),
        ('{"criteria_met": "0"}', False),
        ('{"criteria_met": "truly"}', False),
        ('{"criteria_met": null}', False),
        ('{"criteria_met": [true]}', False),
        ('{"explanation": "it is there"}', False),  # without the key
        ("{}", False),
        (f"```json\n{TRUE}\n``` but {FALSE}", True),  # the block before what comes after it,
        (f"{FALSE}\n```json\n{TRUE}\n```", True),  # and before what comes first
        (f'{FALSE}\n```json\n{{\n"criteria_met": true\n}}\n```', True),
        (f"```json\n{{damaged}}\n``` {TRUE}", True),  # a block that cannot be read is passed over
        (f"A set {{x}} of things. {TRUE} or {FALSE}", True),  # an object with a known key before all braces
        (f"{TRUE} {FALSE} {{", True),  # the first of them, whatever follows
        ('{"explanation": "a } b", "criteria_met": true}', True),  # whose text ends it too early: all braces are read
        ('{"reason": "r", "criteria_met": true}', True),  # no known key is the first one
        ('{"explanation": "50\\% done", "criteria_met": "yes"}', True),  # \% is repaired,
        # and a backslash that is written as two stays
        ('{"explanation": "a\\\\d 50\\%", "criteria_met": "yes"}', True),
    ],
)
def test_value_of_an_answer(answer: str, met: bool) -> None:
    assert parse_met(answer) is met


@pytest.mark.parametrize(
    "answer",
    ["", "true", "criteria_met: true", '} {"criteria_met": true', "{'criteria_met': True}"],
)
def test_answers_without_an_object(answer: str) -> None:
    with pytest.raises(Unreadable) as raised:
        parse_met(answer)
    assert "\n" not in str(raised.value)


def test_deeply_nested_answers_are_refused() -> None:
    with pytest.raises(Unreadable):
        parse_met('{"a":' * 100_000 + "1" + "}" * 100_000)


# --- scores and figures ----------------------------------------------------------------------------------------------

ITEMS: list[tuple[str | None, list[str | None] | None, list[str | None] | None, dict[str, float], dict[str, float]]] = [
    # task, answers on text and on image rubrics, scores with failures as not met, scores without failures
    ("art", [TRUE, TRUE, FALSE, UNSURE], [TRUE, FALSE], {"text": 0.5, "image": 0.5}, {"text": 0.5, "image": 0.5}),
    ("life", ['{"criteria_met": "Yes"}', '{"criteria_met": "n"}'], [], {"text": 0.5}, {"text": 0.5}),
    ("tech", None, ['{"criteria_met": 1}', '{"criteria_met": "1"}'], {"image": 0.5}, {"image": 0.5}),
    # two answers without a value: 0 of 2; of the images one of two is met, or of one
    ("exercise", ["{}", '{"criteria_met": null}'], [TRUE, FAILED], {"text": 0, "image": 0.5}, {"text": 0, "image": 1}),
    ("space", [FAILED, FAILED], [TRUE, TRUE, TRUE], {"text": 0, "image": 1}, {"image": 1}),
    ("textbook", [TRUE, FALSE, UNSURE], [UNSURE], {"text": 1 / 3, "image": 0}, {"text": 1 / 3, "image": 0}),
    ("diagram", [TRUE], [TRUE, TRUE, FALSE], {"text": 1, "image": 2 / 3}, {"text": 1, "image": 2 / 3}),
    ("paper", [FALSE, FALSE, FALSE], None, {"text": 0}, {"text": 0}),
    ("", [TRUE, FALSE], [TRUE], {"text": 0.5, "image": 1}, {"text": 0.5, "image": 1}),  # counts as `other`
    ("music", [TRUE], [FALSE], {"text": 1, "image": 0}, {"text": 1, "image": 0}),  # so does an unknown one
    (" Art ", [FALSE], [TRUE, TRUE, TRUE, TRUE], {"text": 0, "image": 1}, {"text": 0, "image": 1}),  # is `art`
    ("life", None, None, {}, {}),
    ("life", [TRUE], [FAILED], {"text": 1, "image": 0}, {"text": 1}),
    ("tech", [TRUE, TRUE], ['{"criteria_met": "maybe"}'], {"text": 1, "image": 0}, {"text": 1, "image": 0}),
]


def scored(tmp_path: Path, as_zero: bool) -> list[tuple[Item, dict[str, float]]]:
    """The items with their scores from the words of the judge."""

    def rubrics(answers: list[str | None] | None) -> list[str] | None:
        return None if answers is None else [f"rubric {number}" for number in range(len(answers))]

    rows = [row(n, task, rubrics(text), rubrics(image)) for n, (task, text, image, _, _) in enumerate(ITEMS)]
    result = []
    for item, (_, text, image, _, _) in zip(UEVAL.load(write(tmp_path / "data.json", rows)), ITEMS, strict=True):
        answers = {
            f"{kind} {number}": None if answer is FAILED else parse_met(answer)
            for kind, given in (("text", text), ("image", image))
            for number, answer in enumerate(given or [], 1)
        }
        result.append((item, dict(UEVAL.score(item, answers, as_zero=as_zero))))
    return result


@pytest.mark.parametrize("as_zero", [True, False])
def test_scores_of_items(tmp_path: Path, as_zero: bool) -> None:
    expected = [with_zero if as_zero else without for *_, with_zero, without in ITEMS]
    assert [scores for _, scores in scored(tmp_path, as_zero)] == [pytest.approx(scores) for scores in expected]


def test_a_question_that_was_never_asked_counts_as_failed(tmp_path: Path) -> None:
    item = one_item(tmp_path)  # two text rubrics, one image rubric
    assert UEVAL.score(item, {"text 2": True}, as_zero=True) == {"text": 0.5, "image": 0}
    assert UEVAL.score(item, {"text 2": True}, as_zero=False) == {"text": 1}


def test_figures_with_failures_as_not_met(tmp_path: Path) -> None:
    figures = UEVAL.figures(scored(tmp_path, True))
    assert figures == pytest.approx(
        {
            # .5 .5 0 0 1/3 1 0 .5 1 0 1 1: 5.8333 over 12 items
            "text": 48.6111,
            # .5 .5 .5 1 0 2/3 1 0 1 0 0: 5.1667 over 11 items
            "image": 46.9697,
            "mean": 47.7904,
            "art": 50,  # text (.5 + 0) / 2 = .25, image (.5 + 1) / 2 = .75
            "life": 37.5,  # text (.5 + 1) / 2 = .75, image 0
            "tech": 62.5,  # text 1, image (.5 + 0) / 2 = .25
            "exercise": 25,  # 0 and .5
            "space": 50,  # 0 and 1
            "textbook": 16.6667,  # 1/3 and 0
            "diagram": 83.3333,  # 1 and 2/3
            "paper": 0,  # text 0 alone
            "other": 62.5,  # text (.5 + 1) / 2 = .75, image (1 + 0) / 2 = .5
            "macro": 43.0556,  # the nine above: 387.5 / 9
            # .5 .5 .5 .25 .5 1/6 5/6 0 .75 .5 .5 .5 .5: 6 over 13 items
            "item_mean": 46.1538,
        },
        abs=1e-3,
    )
    assert list(figures)[:4] == ["text", "image", "mean", "art"]
    assert list(figures)[-3:] == ["other", "macro", "item_mean"]


def test_figures_without_failures(tmp_path: Path) -> None:
    assert UEVAL.figures(scored(tmp_path, False)) == pytest.approx(
        {
            "text": 53.0303,  # without the 0 of `space`: 5.8333 over 11 items
            "image": 56.6667,  # `exercise` has 1 in place of .5, `life` none in place of 0: 5.6667 over 10 items
            "mean": 54.8485,
            "art": 50,
            "life": 75,  # text alone
            "tech": 62.5,
            "exercise": 50,  # 0 and 1
            "space": 100,  # image alone
            "textbook": 16.6667,
            "diagram": 83.3333,
            "paper": 0,
            "other": 62.5,
            "macro": 55.5556,  # 500 / 9
            "item_mean": 55.7692,  # 6 + .25 + .5 + .5 over 13 items
        },
        abs=1e-3,
    )


def test_the_summary_of_three_items(tmp_path: Path) -> None:
    items = UEVAL.load(write(tmp_path / "data.json", [row(number) for number in range(3)]))
    rows = zip(items, [{"text": 0.5, "image": 0.5}, {"text": 1.0}, {"text": 0.0, "image": 1.0}], strict=True)
    figures = UEVAL.figures(list(rows))
    assert figures["text"] == pytest.approx(50)
    assert figures["image"] == pytest.approx(75)
    assert figures["mean"] == pytest.approx(62.5)
    assert figures["item_mean"] == pytest.approx(200 / 3)  # (.5 + 1 + .5) / 3


def test_no_figures_without_scores(tmp_path: Path) -> None:
    assert UEVAL.figures([]) == {}
    assert UEVAL.figures([(one_item(tmp_path), {})]) == {}


# --- questions -------------------------------------------------------------------------------------------------------

PROMPTS = Prompts(
    {
        "text": "T {question} | {text_answer} | {rubric_item}",
        "image_open": "O {question} | {text_answer} | {rubric_item}",
        "image_closed": 'C {question} {"criteria_met": true} | {rubric_item}',
    }
)


def test_questions_are_one_a_rubric(tmp_path: Path) -> None:
    item = one_item(tmp_path, text=["r1", {"criterion": "r2"}], image=["r3"])
    red, blue = paint(tmp_path / "a.png"), paint(tmp_path / "b.png", "blue")
    questions = UEVAL.questions(item, Output(("one.", red, "two", blue)), PROMPTS, {})
    assert [question.name for question in questions] == ["text 1", "text 2", "image 1"]
    assert [question.message[0] for question in questions] == [
        "T Question 1? | one.two | r1",  # the texts of the steps without anything between them
        "T Question 1? | one.two | r2",
        "O Question 1? | one.two | r3",
    ]
    assert [len(question.message) for question in questions] == [1, 1, 3]  # words first, then all images
    assert [image.getpixel((0, 0)) for image in questions[2].message[1:]] == [(255, 0, 0), (0, 0, 255)]  # type: ignore[union-attr]
    assert {question.system for question in questions} == {""}
    assert [question.parse(TRUE) for question in questions] == [True, True, True]
    assert {question.tries for question in questions} == {10}


@pytest.mark.parametrize("task", ["art", "life", "tech", "exercise", "music", "", None])
def test_open_tasks_show_the_text(tmp_path: Path, task: str | None) -> None:
    questions = UEVAL.questions(one_item(tmp_path, task=task), Output(("words",)), PROMPTS, {})
    assert questions[-1].message == ("O Question 1? | words | c",)


@pytest.mark.parametrize("task", ["space", "textbook", "diagram", "paper", " Space "])
def test_closed_tasks_do_not(tmp_path: Path, task: str) -> None:
    questions = UEVAL.questions(one_item(tmp_path, task=task), Output(("words",)), PROMPTS, {})
    assert questions[-1].message == ('C Question 1? {"criteria_met": true} | c',)


def test_what_is_answered_is_not_asked_again(tmp_path: Path) -> None:
    item = one_item(tmp_path)
    names = {
        question.name for question in UEVAL.questions(item, Output(()), PROMPTS, {"text 1": True, "image 1": None})
    }
    assert names == {"text 2"}


def test_an_answer_cannot_fill_places(tmp_path: Path) -> None:
    questions = UEVAL.questions(one_item(tmp_path), Output(("{rubric_item} {x}",)), PROMPTS, {})
    assert questions[0].message == ("T Question 1? | {rubric_item} {x} | a",)


def test_an_empty_reply_is_judged(tmp_path: Path) -> None:
    questions = UEVAL.questions(one_item(tmp_path), Output(()), PROMPTS, {})
    assert [question.message for question in questions] == [
        ("T Question 1? |  | a",),
        ("T Question 1? |  | b",),
        ("O Question 1? |  | c",),
    ]


def test_our_own_prompts_ask_for_the_official_answers(tmp_path: Path) -> None:
    prompts = UEVAL.read_prompts(None)
    assert not prompts.is_official
    assert set(prompts.texts) == {"text", "image_open", "image_closed"}
    for task in ("art", "space"):
        for question in UEVAL.questions(one_item(tmp_path, task=task), Output(("Once upon",)), prompts, {}):
            text = str(question.message[0])
            assert "Question 1?" in text
            assert text == text.strip()
            assert ("Once upon" in text) == (task == "art" or question.name.startswith("text"))
            examples = [line for line in text.splitlines() if line.startswith("{")]
            assert [parse_met(line) for line in examples] == [True, False, False]


# --- prompts of the authors' repository ------------------------------------------------------------------------------

SCRIPT = '''
import this_is_never_imported
raise SystemExit("never run")
TEXT_TEMPLATE = """
text <<question>> and <<text_answer>> {"json": 1}
""".strip()
TEXT_RUBRIC_TEMPLATE = "# text\\n<<rubric_item>>"
IMAGE_TEMPLATE_OPEN = "open <<question>> and <<text_answer>>"
IMAGE_TEMPLATE_CLOSED = "closed <<question>>"
IMAGE_RUBRIC_TEMPLATE = "# image\\n<<rubric_item>>"
'''


def test_prompts_of_the_authors(tmp_path: Path) -> None:
    (tmp_path / "ueval_eval.py").write_text(SCRIPT)
    prompts = UEVAL.read_prompts(tmp_path)
    assert prompts.is_official
    assert prompts.texts == {
        "text": 'text {question} and {text_answer} {"json": 1}\n\n# text\n{rubric_item}',
        "image_open": "open {question} and {text_answer}\n\n# image\n{rubric_item}",
        "image_closed": "closed {question}\n\n# image\n{rubric_item}",
    }
    assert str(tmp_path) not in prompts.source


@pytest.mark.parametrize(
    ("changed", "to", "message"),
    [
        ("IMAGE_TEMPLATE_CLOSED", "IMAGE_CLOSED", "'IMAGE_TEMPLATE_CLOSED'"),
        ("open <<question>>", "open", "IMAGE_TEMPLATE_OPEN with IMAGE_RUBRIC_TEMPLATE: has no place for 'question'"),
        ("closed <<question>>", "closed <<text_answer>>", "has no place for 'question'"),
        ('"closed <<question>>"', "make()", "'IMAGE_TEMPLATE_CLOSED'"),
        (
            "# text\\n<<rubric_item>>",
            "# text",
            "TEXT_TEMPLATE with TEXT_RUBRIC_TEMPLATE: has no place for 'rubric_item'",
        ),
    ],
)
def test_other_versions_of_the_script(tmp_path: Path, changed: str, to: str, message: str) -> None:
    assert changed in SCRIPT
    (tmp_path / "ueval_eval.py").write_text(SCRIPT.replace(changed, to))
    with pytest.raises(UserError) as raised:
        UEVAL.read_prompts(tmp_path)
    assert "ueval_eval.py: " in str(raised.value)
    assert message in str(raised.value)


def test_a_folder_without_the_script(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no ueval_eval\.py; give the folder of a copy of zlab-princeton/UEval"):
        UEVAL.read_prompts(tmp_path)


# --- data ------------------------------------------------------------------------------------------------------------

ROWS = [row(2), row(10, "space", None, ["x"]), row(1, "paper", ["y"], [])]


def test_items_of_a_file(tmp_path: Path) -> None:
    items = UEVAL.load(write(tmp_path / "data.json", ROWS))
    assert [(item.id, item.content, item.category) for item in items] == [
        ("2", ("Question 2?",), "art"),
        ("10", ("Question 10?",), "space"),
        ("1", ("Question 1?",), "paper"),
    ]


def test_items_are_the_same_whatever_the_file(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    expected = UEVAL.load(write(tmp_path / "data.json", ROWS))
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    whole = Dataset.from_list(ROWS)
    whole.to_parquet(tmp_path / "data.parquet")
    for name in ("shards", "snapshot/data"):
        (tmp_path / name).mkdir(parents=True)
    for number in (1, 2, 0):
        whole.select([number]).to_parquet(tmp_path / "shards" / f"test-0000{number}-of-00003.parquet")
    whole.select([0]).to_parquet(tmp_path / "shards" / "train-00000-of-00001.parquet")
    whole.to_parquet(tmp_path / "snapshot" / "data" / "test-00000-of-00001.parquet")
    whole.save_to_disk(tmp_path / "saved", num_shards=2)
    DatasetDict({"test": whole}).save_to_disk(tmp_path / "saved_splits")
    (tmp_path / "lines").mkdir()
    whole.to_json(tmp_path / "lines" / "test.jsonl")
    for name in ("data.jsonl", "data.parquet", "shards", "snapshot", "saved", "saved_splits", "lines"):
        assert UEVAL.load(tmp_path / name) == expected, name


def test_rubrics_may_be_objects(tmp_path: Path) -> None:
    item = one_item(tmp_path, text=[{"criterion": "a", "weight": 2}, "b"], image=None)
    assert item.row["text_rubrics"] == ["a", "b"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(1), row("1")], "data.json: item 2: the id '1' is there twice, first in "),
        ([row(1), {key: value for key, value in row(2).items() if key != "prompt"}], "item 2: prompt: Field required"),
        ([{key: value for key, value in row(2).items() if key != "image_rubrics"}], "item 1: image_rubrics: "),
        ([row(1, text="one")], "item 1: text_rubrics: "),
        ([row(1, text=["a", {"rule": "b"}])], "item 1: text_rubrics.1: "),
        ([row(True)], "item 1: id"),
        (["row"], "item 1: "),
        ([], "no item in it"),
    ],
)
def test_bad_data(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        UEVAL.load(write(tmp_path / "data.json", rows))
    assert message in str(raised.value)
    assert "zlab-princeton/UEval on the Hugging Face Hub" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.parquet", "data.arrow"])
def test_damaged_data(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"id": 1, "prompt": ')
    with pytest.raises(UserError) as raised:
        UEVAL.load(tmp_path / name)
    assert f"{name}:" in str(raised.value)
    assert "; give the split `test` of the data set zlab-princeton/UEval" in str(raised.value)


@pytest.mark.parametrize("name", ["data.json", "data.parquet"])
def test_a_pointer_of_git_lfs_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n")
    with pytest.raises(UserError, match=r"is a pointer of Git LFS.*run `git lfs pull`"):
        UEVAL.load(tmp_path / name)


@pytest.mark.parametrize("name", ["", "missing"])
def test_a_missing_folder_says_what_to_get(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="get the split `test` of the data set zlab-princeton/UEval"):
        UEVAL.load(tmp_path / name)


# --- outputs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    return UEVAL.load(write(tmp_path / "items.json", [row(number) for number in range(1, 7)]))


def test_predictions_of_others(tmp_path: Path, items: list[Item], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here, beside = paint(tmp_path / "both.png"), paint(tmp_path / "out" / "both.png", "blue")
    only_beside = paint(tmp_path / "out" / "b.png")
    predictions = [
        {"id": 1, "text_answer": "first", "image_answer": "missing.png"},  # a later one of this id wins
        {"id": "2", "text_answer": "two", "image_answer": ["both.png", None, "", "b.png"], "other": 5},
        {"id": 1, "text_answer": "last", "image_answer": str(beside)},
        {"id": "3", "image_answer": None},
        {"id": "4", "text_answer": None, "image_answer": "b.png"},
        {"id": "77", "text_answer": "no item of ours", "image_answer": "missing.png"},
        {"id": "6", "text_answer": "six"},
    ]
    outputs = UEVAL.read_outputs(write(tmp_path / "out" / "any.json", predictions), items)
    assert list(outputs) == [item.id for item in items]
    assert outputs["1"] == Output(("last", beside))
    # the working directory comes first, as for the authors' scorer, then the file's folder
    assert [image.absolute() for image in outputs["2"].images] == [here, only_beside]
    assert outputs["2"].texts == ("two",)
    assert outputs["3"] == outputs["5"] == Output(())  # an item without a prediction is an empty reply
    assert outputs["4"].texts == ()
    assert len(outputs["4"].images) == 1
    assert outputs["6"] == Output(("six",))


@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        ({"id": "1", "image_answer": ["gone.png"]}, "item 1: no image 'gone.png'"),
        ({"id": "1", "image_answer": ["x" * 5000]}, "item 1: no image 'xxx"),
        (
            {"id": "1", "image_answer": "data:image/png;base64,iVBORw0KGgo"},
            "data:...: is the content of a file, not its",
        ),
        ({"id": "1", "image_answer": "https://host/a.png?token=secret"}, "https://...: is an address, not a file"),
        ({"id": "1", "image_answer": "bad.png"}, "bad.png: "),
        ({"id": "1", "image_answer": {"path": "a.png"}}, "item 1: image_answer"),
        ({"id": "1", "text_answer": ["a"]}, "item 1: text_answer: "),
        ({"text_answer": "a"}, "item 1: id"),
        ({"id": "99", "text_answer": "a"}, "no prediction has the id of an item"),
        ("words", "item 1: "),
        # as the authors' runner writes them: all items would be judged as empty replies
        ({"id": 1, "gemini_text_ans": "a"}, "item 1: neither text_answer nor image_answer (other keys: 'gemini_text"),
    ],
)
def test_bad_predictions(tmp_path: Path, items: list[Item], prediction: Any, message: str) -> None:
    (tmp_path / "bad.png").write_bytes(paint(tmp_path / "good.png").read_bytes()[:40])
    file = write(tmp_path / "predictions.json", [prediction])
    with pytest.raises(UserError) as raised:
        UEVAL.read_outputs(file, items)
    assert message in str(raised.value)


def test_predictions_that_are_not_there(tmp_path: Path, items: list[Item]) -> None:
    with pytest.raises(UserError, match=r"predictions\.json: no such file"):
        UEVAL.read_outputs(tmp_path, items)
    (tmp_path / "predictions.json").write_text('[{"id": 1')
    with pytest.raises(UserError, match=r"predictions\.json: not JSON"):
        UEVAL.read_outputs(tmp_path, items)


def test_outputs_can_be_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = UEVAL.load(write(tmp_path / "items.json", [row("../../up"), row(2), row(3)]))
    jpeg = tmp_path / "a.jpg"
    Image.new("RGB", (3, 2), "green").save(jpeg)
    red, blue = paint(tmp_path / "r.png"), paint(tmp_path / "b.png", "blue")
    outputs = {"../../up": Output(("Step 1. ", red, "Step 2.", blue, jpeg)), "3": Output(())}
    folder = tmp_path / "written"
    UEVAL.write_outputs(outputs, items, folder)
    written = json.loads((folder / "predictions.json").read_text())
    assert [(given["id"], given["task"], given["text_answer"]) for given in written] == [
        ("../../up", "art", "Step 1. Step 2."),
        ("3", "art", ""),
    ]
    names = written[0]["image_answer"]
    assert len(names) == 3
    # the paths hold from the folder, and none leads out of it
    assert all((folder / name).resolve().is_relative_to(folder.resolve()) for name in names)
    monkeypatch.chdir(folder)
    assert [Image.open(name).format for name in names] == ["PNG"] * 3
    monkeypatch.chdir(tmp_path)
    again = UEVAL.read_outputs(folder, items)
    assert again["../../up"].texts == ("Step 1. Step 2.",)
    assert [Image.open(image).getpixel((0, 0)) for image in again["../../up"].images[:2]] == [(255, 0, 0), (0, 0, 255)]
    assert again["2"] == again["3"] == Output(())
