import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from imgen_common.errors import UserError
from imgen_common.judging.questions import Unreadable
from interleave.benchmarks.base import Item, Output, Prompts, Scores
from interleave.benchmarks.official.wise import WiseLegacy, WiseVerified

VERIFIED, LEGACY = WiseVerified(), WiseLegacy()
BOTH = [VERIFIED, LEGACY]
Benchmark = WiseVerified | WiseLegacy
FAILED = None
"""No answer that can be read in all tries, or no image."""
NAMES = ("Cultural knowledge", "time", "Space", "Biology", "Physical Knowledge", "Chemistry")
"""The categories as the data has them."""
LAST = {"wise": (400, 520, 640, 760, 880, 1000), "wise_legacy": (400, 567, 700, 800, 900, 1000)}
MARKS = ("consistency", "realism", "aesthetic_quality")
FILES = ("cultural_common_sense", "spatio-temporal_reasoning", "natural_science")


def rows(benchmark: Benchmark) -> list[dict[str, Any]]:
    """1,000 items as the official data has them."""
    result = []
    for number in range(1, 1001):
        index = next(index for index, last in enumerate(LAST[benchmark.name]) if number <= last)
        texts = {"Prompt": f"Prompt {number}", "Explanation": f"Because {number}"}
        result.append({**texts, "Category": NAMES[index], "Subcategory": "x", "prompt_id": number})
    return result


def write(file: Path, given: Sequence[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(given))
    return file


def write_parts(folder: Path, benchmark: Benchmark) -> Path:
    """The three files of an edition, as in the authors' repository; returns their folder."""
    given, ends = rows(benchmark), (0, 400, 640 if benchmark is VERIFIED else 700, 1000)
    for part, start, end in zip(FILES, ends, ends[1:], strict=False):
        suffix = "_verified" if benchmark is VERIFIED else ""
        write(folder / f"{part}{suffix}.json", given[start:end])
    return folder


def paint(file: Path, color: str = "red") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (3, 2), color).save(file, "PNG")
    return file


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Item]]:
    """The items of each edition."""
    folder = tmp_path_factory.mktemp("data")
    return {each.name: each.load(write(folder / f"{each.name}.json", rows(each))) for each in BOTH}


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Score: 1", 1),
        ("Score: 0", 0),
        ("**Score**: 1", 1),
        ("**Score: 1**", 1),
        ("Score: 1\nScore: 0", 1),
        ("final SCORE 0.", 0),
        ("Score:\n1", 1),
        ("Score1", 1),
        ("Score: 2, no: Score: 0", 0),  # the first that is a 0 or 1
        ("1", 1),
        ("The image is right.\n  0  \n", 0),
        ("Score = 1\n1", 1),
        ("<think>Score: 0</think>\nScore: 1", 1),
        ("<think>0\n</think>1", 1),
        ("1</think>", 1),  # without an opening mark only the closing one goes
    ],
)
def test_verified_answers(answer: str, score: int) -> None:
    assert VERIFIED.parse(answer) == score


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "**Score:** 0",  # the colon before the stars
        "Score: 10",
        "Score: 2",
        "Score = 1",
        "Score: one",
        "Score\uff1a1",  # a full-width colon
        "0\n1",  # two lines
        "1.0",
        "<think>Score: 1</think>",
    ],
)
def test_verified_answers_that_cannot_be_read(answer: str) -> None:
    with pytest.raises(Unreadable):
        VERIFIED.parse(answer)


@pytest.mark.parametrize(
    ("answer", "marks"),
    [
        ("Consistency: 2\nRealism: 1\nAesthetic Quality: 0", (2, 1, 0)),
        ("**Consistency**: 1 **Realism**: 2 **Aesthetic Quality**: 2", (1, 2, 2)),
        ("aesthetic quality 1, REALISM 0, consistency:2", (2, 0, 1)),
        ("Consistency: 1\nConsistency: 2\nRealism: 0\nAesthetic Quality: 1", (2, 0, 1)),  # the last one
        ("Consistency: 1.5\nRealism: 2\nAesthetic Quality: 0", (1, 2, 0)),
        ("Consistency: 9\nRealism: 7\nAesthetic Quality: 3", (9, 7, 3)),  # any digit
        ("Consistency: 21\nRealism: 1\nAesthetic Quality: 1", (2, 1, 1)),  # of two digits the first
        ("2\n1\n0", (2, 1, 0)),
        ("Marks:\n 1 \n0\nnote\n2\n1", (1, 0, 2)),  # the first three
    ],
)
def test_legacy_answers(answer: str, marks: tuple[int, int, int]) -> None:
    assert LEGACY.parse(answer) == dict(zip(MARKS, marks, strict=True))


@pytest.mark.parametrize(
    ("answer", "missing"),
    [
        ("", "consistency, realism, aesthetic_quality"),
        ("Consistency (0-2): 2\nRealism: 1\nAesthetic Quality: 1", "consistency"),
        ("**Consistency:** 2\nRealism: 1\nAesthetic Quality: 1", "consistency"),
        ("Consistency: 2\n1\n1\n1", "realism, aesthetic_quality"),  # lines count only without any name
        ("2\n1", "consistency, realism, aesthetic_quality"),
        ("3\n1\n0", "consistency, realism, aesthetic_quality"),  # a line of 3 is no mark
        ("Consistency: 2\nRealism: 1\nAesthetics: 1", "aesthetic_quality"),
        ("Consistency\uff1a2\nRealism: 1\nAesthetic Quality: 1", "consistency"),
    ],
)
def test_legacy_answers_that_cannot_be_read(answer: str, missing: str) -> None:
    with pytest.raises(Unreadable, match=f"^no mark of {missing} in the answer$"):
        LEGACY.parse(answer)


# --- scores and figures ----------------------------------------------------------------------------------------------


def scored(
    benchmark: Benchmark, items: Sequence[Item], answers: dict[int, str | None], as_zero: bool
) -> list[tuple[Item, Scores]]:
    """Items by their ids, with their scores from the words of the judge."""
    result = []
    for number, answer in answers.items():
        values = {} if answer is FAILED else {"score": benchmark.parse(answer)}
        result.append((items[number - 1], benchmark.score(items[number - 1], values, as_zero=as_zero)))
    return result


VERIFIED_ANSWERS = {
    1: "Score: 1",
    2: "**Score**: 1",
    400: "Score: 0",
    401: "**Score: 1**",
    520: "Score: 1\nScore: 0",
    521: FAILED,
    640: "score 0",
    641: "1",
    760: "The image is right.\n 0 \n",
    761: "<think>Score: 0</think>Score: 1",
    880: "Score:1.",
    881: FAILED,
    1000: "Score:\n1",
}


@pytest.mark.parametrize(
    ("as_zero", "expected"),
    [
        # space 0 of 2 and chemistry 1 of 2; .4 * 2/3 + .12 * (1 + 0 + .5 + 1 + .5) = .26667 + .36
        (
            True,
            {
                "culture": 2 / 3,
                "time": 1,
                "space": 0,
                "biology": 0.5,
                "physics": 1,
                "chemistry": 0.5,
                "overall": 0.62667,
            },
        ),
        # space 0 of 1 and chemistry 1 of 1; .26667 + .12 * 3.5 = .26667 + .42
        (
            False,
            {"culture": 2 / 3, "time": 1, "space": 0, "biology": 0.5, "physics": 1, "chemistry": 1, "overall": 0.68667},
        ),
    ],
)
def test_verified_figures(items: dict[str, list[Item]], as_zero: bool, expected: dict[str, float]) -> None:
    figures = VERIFIED.figures(scored(VERIFIED, items["wise"], VERIFIED_ANSWERS, as_zero))
    assert figures == pytest.approx(expected, abs=1e-5)
    assert list(figures) == list(expected)


LEGACY_ANSWERS = {
    1: ("Consistency: 2\nRealism: 1\nAesthetic Quality: 0", 0.8),  # (1.4 + .2 + 0) / 2
    2: (FAILED, 0),
    400: ("**Consistency**: 1 **Realism**: 2 **Aesthetic Quality**: 2", 0.65),  # (.7 + .4 + .2) / 2
    401: ("consistency 0, REALISM 2; aesthetic quality: 2", 0.3),  # (0 + .4 + .2) / 2
    567: ("2\n2\n2", 1),
    568: ("Consistency: 1\nConsistency: 2\nRealism: 0\nAesthetic Quality: 1", 0.75),  # (1.4 + 0 + .1) / 2
    700: ("Consistency: 1.5\nRealism: 2\nAesthetic Quality: 0", 0.55),  # (.7 + .4 + 0) / 2
    701: ("Consistency: 9\nRealism: 0\nAesthetic Quality: 0", 3.15),  # 6.3 / 2
    800: (FAILED, 0),
    801: (" 1 \n0\n2\n1", 0.45),  # (.7 + 0 + .2) / 2
    900: (FAILED, 0),
    901: ("0\nno\n0\n0", 0),
    1000: ("Consistency:2Realism:2Aesthetic Quality:1", 0.95),  # (1.4 + .4 + .1) / 2
}


@pytest.mark.parametrize("as_zero", [True, False])
def test_legacy_scores(items: dict[str, list[Item]], as_zero: bool) -> None:
    answers = {number: answer for number, (answer, _) in LEGACY_ANSWERS.items()}
    found = [scores for _, scores in scored(LEGACY, items["wise_legacy"], answers, as_zero)]
    for (answer, wiscore), scores in zip(LEGACY_ANSWERS.values(), found, strict=True):
        if answer is FAILED and not as_zero:
            assert scores == {}
        else:
            assert scores["wiscore"] == pytest.approx(wiscore)
            assert set(scores) == {"consistency", "realism", "aesthetic_quality", "wiscore"}


@pytest.mark.parametrize(
    ("as_zero", "expected"),
    [
        (
            True,
            {
                "culture": 1.45 / 3,
                "time": 0.65,
                "space": 0.65,
                "biology": 1.575,  # (3.15 + 0) / 2
                "physics": 0.225,  # (.45 + 0) / 2
                "chemistry": 0.475,  # (0 + .95) / 2
                # .4 * .48333 + .167 * .65 + .133 * .65 + .1 * 2.275 = .19333 + .10855 + .08645 + .2275
                "overall": 0.61583,
            },
        ),
        (
            False,
            {
                "culture": 0.725,  # 1.45 / 2
                "time": 0.65,
                "space": 0.65,
                "biology": 3.15,
                "physics": 0.45,
                "chemistry": 0.475,
                "overall": 0.8925,  # .29 + .10855 + .08645 + .1 * 4.075
            },
        ),
    ],
)
def test_legacy_figures(items: dict[str, list[Item]], as_zero: bool, expected: dict[str, float]) -> None:
    answers = {number: answer for number, (answer, _) in LEGACY_ANSWERS.items()}
    figures = LEGACY.figures(scored(LEGACY, items["wise_legacy"], answers, as_zero))
    assert figures == pytest.approx(expected, abs=1e-5)


def test_published_verified_figure(items: dict[str, list[Item]]) -> None:
    met = (196, 47, 66, 46, 58, 27)  # of 400 and five times 120: .4900 .3917 .5500 .3833 .4833 .2250
    seen: dict[str, int] = {}
    result = []
    for item in items["wise"]:
        seen[item.category] = seen.get(item.category, 0) + 1
        index = ("culture", "time", "space", "biology", "physics", "chemistry").index(item.category)
        result.append((item, {"score": float(seen[item.category] <= met[index])}))
    figures = VERIFIED.figures(result)
    assert [round(value, 4) for value in figures.values()] == [0.49, 0.3917, 0.55, 0.3833, 0.4833, 0.225, 0.44]


@pytest.mark.parametrize(
    ("benchmark", "name", "means", "overall"),
    [
        (VERIFIED, "score", (1, 0, 0, 0, 0, 0), 0.4),
        (VERIFIED, "score", (0.5, 0.5, 0.5, 0.5, 0.5, 0.5), 0.5),
        (VERIFIED, "score", (0, 1, 0, 0, 0, 0), 0.12),
        (LEGACY, "wiscore", (0.44, 0.60, 0.67, 0.32, 0.50, 0.27), 0.47431),
        (LEGACY, "wiscore", (0.72, 0.70, 0.82, 0.72, 0.78, 0.69), 0.73296),
        (LEGACY, "wiscore", (0, 0, 1, 0, 0, 0), 0.133),
    ],
)
def test_overall(
    items: dict[str, list[Item]], benchmark: Benchmark, name: str, means: Sequence[float], overall: float
) -> None:
    firsts = [items[benchmark.name][last - 1] for last in LAST[benchmark.name]]
    result = benchmark.figures([(item, {name: mean}) for item, mean in zip(firsts, means, strict=True)])
    assert result["overall"] == pytest.approx(overall)


@pytest.mark.parametrize("benchmark", BOTH)
def test_categories_without_items_are_left_out(items: dict[str, list[Item]], benchmark: Benchmark) -> None:
    result = scored(benchmark, items[benchmark.name], {1: FAILED, 401: FAILED, 1000: FAILED}, True)
    assert benchmark.figures(result) == {"culture": 0, "time": 0, "chemistry": 0}
    assert benchmark.figures([]) == {}


# --- questions -------------------------------------------------------------------------------------------------------

PROMPTS = Prompts({"system": "Be strict.", "user": 'P "{Prompt}" E "{Explanation}" {x}'})


@pytest.mark.parametrize("benchmark", BOTH)
def test_one_question_an_image(tmp_path: Path, items: dict[str, list[Item]], benchmark: Benchmark) -> None:
    first, last = paint(tmp_path / "a.png"), paint(tmp_path / "b.png", "blue")
    item = items[benchmark.name][6]
    (question,) = benchmark.questions(item, Output(("words", first, last)), PROMPTS, {})
    text, image = question.message
    assert text == 'P "Prompt 7" E "Because 7" {x}'
    assert image.getpixel((0, 0)) == (0, 0, 255)  # type: ignore[union-attr]
    assert (question.name, question.system, question.tries) == ("score", "Be strict.", 3)
    answer, value = ("1", 1) if benchmark is VERIFIED else ("2\n1\n0", dict(zip(MARKS, (2, 1, 0), strict=True)))
    assert question.parse(answer) == value
    assert benchmark.questions(item, Output((first,)), PROMPTS, {"score": None}) == []
    assert benchmark.questions(item, Output(("words",)), PROMPTS, {}) == []  # without an image there is nothing to ask


def test_an_image_may_be_as_large_as_the_loop_keeps_it(tmp_path: Path, items: dict[str, list[Item]]) -> None:
    """A PNG of 4096x4096 has about 40 MiB."""
    file, item = tmp_path / "a.png", items["wise"][0]
    with paint(file).open("ab") as content:
        content.truncate(33 * 2**20)
    (question,) = VERIFIED.questions(item, Output((file,)), PROMPTS, {})
    assert isinstance(question.message[1], Image.Image)
    VERIFIED.write_outputs({item.id: Output((file,))}, [item], tmp_path / "outputs")
    assert VERIFIED.read_outputs(tmp_path / "outputs", [item])


@pytest.mark.parametrize("benchmark", BOTH)
def test_our_own_prompts_ask_for_the_official_answers(
    tmp_path: Path, items: dict[str, list[Item]], benchmark: Benchmark
) -> None:
    prompts = benchmark.read_prompts(None)
    assert not prompts.is_official
    (question,) = benchmark.questions(items[benchmark.name][6], Output((paint(tmp_path / "a.png"),)), prompts, {})
    text = str(question.message[0])
    assert 'PROMPT: "Prompt 7"' in text
    assert 'EXPLANATION: "Because 7"' in text
    assert question.system
    answers = "\n".join(line for line in text.splitlines() if line[-1:].isdigit())
    if benchmark is VERIFIED:
        assert [VERIFIED.parse(line) for line in answers.splitlines()] == [0, 1]
    else:
        assert set(LEGACY.parse(answers)) == {"consistency", "realism", "aesthetic_quality"}


# --- prompts of the authors' repository ------------------------------------------------------------------------------

SCRIPT = '''
import this_is_never_imported
raise SystemExit("never run")

def build_evaluation_messages(prompt_data: dict, image: str) -> list:
    return [
        {"role": "system", "content": [{"type": "text", "text": "Audit."}]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": f"""Judge {{this}}.
PROMPT: "{prompt_data['Prompt']}"
EXPLANATION: "{prompt_data['Explanation']}" """},
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
            ],
        },
    ]
'''


@pytest.mark.parametrize(
    ("benchmark", "name"),
    [(VERIFIED, "vllm_eval.py"), (LEGACY, "WISE_legacy/gpt_eval.py"), (LEGACY, "gpt_eval.py")],
)
def test_prompts_of_the_authors(tmp_path: Path, benchmark: Benchmark, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(SCRIPT.replace("\n", "\r\n"), newline="")
    prompts = benchmark.read_prompts(tmp_path)
    assert prompts.is_official
    user = 'Judge {this}.\nPROMPT: "{Prompt}"\nEXPLANATION: "{Explanation}" '
    assert prompts.texts == {"system": "Audit.", "user": user}


@pytest.mark.parametrize(
    ("changed", "to", "message"),
    [
        ("build_evaluation_messages", "build", "'build_evaluation_messages'"),
        ("['Explanation']", "['Reason']", "has no place for 'Explanation'"),
        ('"text": "Audit."', '"text": system()', "has 1 texts"),
        ("return [", "return (", "not Python"),
    ],
)
def test_other_versions_of_the_script(tmp_path: Path, changed: str, to: str, message: str) -> None:
    assert changed in SCRIPT
    (tmp_path / "vllm_eval.py").write_text(SCRIPT.replace(changed, to))
    with pytest.raises(UserError) as raised:
        VERIFIED.read_prompts(tmp_path)
    assert "vllm_eval.py: " in str(raised.value)
    assert message in str(raised.value)


@pytest.mark.parametrize("benchmark", BOTH)
def test_a_folder_without_the_script(tmp_path: Path, benchmark: Benchmark) -> None:
    with pytest.raises(UserError, match=r"_eval\.py; give the folder of a copy of PKU-YuanGroup/WISE"):
        benchmark.read_prompts(tmp_path)


# --- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("benchmark", BOTH)
def test_items_of_each_layout(tmp_path: Path, items: dict[str, list[Item]], benchmark: Benchmark) -> None:
    place = "data_verified" if benchmark is VERIFIED else "WISE_legacy/data"
    folder = write_parts(tmp_path / place, benchmark)
    write(folder / "natural_science_rewrite.json", rows(benchmark)[700:])
    expected = items[benchmark.name]
    for given in (tmp_path, folder, *([folder.parent] if benchmark is LEGACY else [])):
        assert benchmark.load(given) == expected
    assert [item.id for item in expected] == [str(number) for number in range(1, 1001)]
    assert expected[0].content == ("Prompt 1",)
    edges = [(expected[last - 1].category, expected[min(last, 999)].category) for last in LAST[benchmark.name]]
    names = ["culture", "time", "space", "biology", "physics", "chemistry"]
    assert edges == list(zip(names, [*names[1:], "chemistry"], strict=True))


def test_a_merged_file_comes_first(tmp_path: Path, items: dict[str, list[Item]]) -> None:
    folder = write_parts(tmp_path, VERIFIED)
    write(folder / "merge.json", rows(VERIFIED)[::-1])
    assert VERIFIED.load(folder) == items["wise"]  # by their ids, each of them once


@pytest.mark.parametrize(("benchmark", "other"), [(VERIFIED, LEGACY), (LEGACY, VERIFIED)])
def test_the_other_edition_is_refused(tmp_path: Path, benchmark: Benchmark, other: Benchmark) -> None:
    folder = write_parts(tmp_path / "parts", other)
    renamed = write(tmp_path / "all.json", rows(other))
    for given in (folder, renamed):
        with pytest.raises(UserError) as raised:
            benchmark.load(given)
        assert f"the other edition is the benchmark {other.name}" in str(raised.value)
    # the first item whose category is another one in the two editions
    assert "item 521: prompt_id 521 is of the category " in str(raised.value)


@pytest.mark.parametrize("benchmark", BOTH)
def test_an_incomplete_set_is_refused(tmp_path: Path, benchmark: Benchmark) -> None:
    with pytest.raises(
        UserError, match=r"2 of 1000 items are missing, first 3; give .* of a copy of PKU-YuanGroup/WISE"
    ):
        benchmark.load(
            write(tmp_path / "all.json", [row for row in rows(benchmark) if row["prompt_id"] not in (3, 900)])
        )
    (
        write_parts(tmp_path / "parts", benchmark) / f"natural_science{'_verified' * (benchmark is VERIFIED)}.json"
    ).unlink()
    with pytest.raises(UserError, match=r"natural_science\w*\.json: no such file"):
        benchmark.load(tmp_path / "parts")


def change(given: list[dict[str, Any]], **fields: Any) -> list[dict[str, Any]]:
    """The rows with other values in the second of them."""
    given[1] = {key: value for key, value in (given[1] | fields).items() if value is not ...}
    return given


@pytest.mark.parametrize("benchmark", BOTH)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_id": 1}, "item 2: the id '1' is there twice, first in "),
        ({"prompt_id": 0}, "item 2: prompt_id: "),
        ({"prompt_id": 1001}, "item 2: prompt_id: "),
        ({"prompt_id": "2"}, "item 2: prompt_id: "),
        ({"Explanation": ...}, "item 2: Explanation: Field required"),
        ({"Prompt": None}, "item 2: Prompt: "),
        ({"Category": "Ecology"}, "item 2: prompt_id 2 is of the category 'Ecology'"),
    ],
)
def test_bad_data(tmp_path: Path, benchmark: Benchmark, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        benchmark.load(write(tmp_path / "all.json", change(rows(benchmark), **fields)))
    assert message in str(raised.value)
    assert "PKU-YuanGroup/WISE" in str(raised.value)


@pytest.mark.parametrize("benchmark", BOTH)
def test_data_that_cannot_be_read(tmp_path: Path, benchmark: Benchmark) -> None:
    for given in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="of a copy of PKU-YuanGroup/WISE"):
            benchmark.load(given)
    (tmp_path / "all.json").write_text(json.dumps(rows(benchmark))[:-5])
    with pytest.raises(UserError, match=r"all\.json: not JSON"):
        benchmark.load(tmp_path / "all.json")


# --- outputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("benchmark", BOTH)
def test_outputs_can_be_read_again(tmp_path: Path, items: dict[str, list[Item]], benchmark: Benchmark) -> None:
    jpeg = tmp_path / "c.jpg"
    Image.new("RGB", (3, 2), "green").save(jpeg)
    red, blue = paint(tmp_path / "a.png"), paint(tmp_path / "b.png", "blue")
    outputs = {"1": Output(("words", red, blue)), "2": Output(("words",)), "1000": Output((jpeg,))}
    benchmark.write_outputs(outputs, items[benchmark.name], tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["1.png", "1000.png"]
    assert Image.open(tmp_path / "out" / "1000.png").format == "PNG"
    again = benchmark.read_outputs(tmp_path / "out", items[benchmark.name])
    assert set(again) == {"1", "1000"}
    assert Image.open(again["1"].images[0]).getpixel((0, 0)) == (0, 0, 255)  # the last one


@pytest.mark.parametrize("benchmark", BOTH)
def test_images_of_others(tmp_path: Path, items: dict[str, list[Item]], benchmark: Benchmark) -> None:
    with pytest.raises(UserError, match=r"name them by prompt_id, 1\.png to 1000\.png"):
        benchmark.read_outputs(tmp_path, items[benchmark.name])
    Image.new("RGB", (3, 2)).save(tmp_path / "5.png", "JPEG")  # whatever its suffix says
    paint(tmp_path / "1001.png")
    assert list(benchmark.read_outputs(tmp_path, items[benchmark.name])) == ["5"]
    (tmp_path / "6.png").write_text("no image")
    with pytest.raises(UserError, match=r"6\.png: not an image"):
        benchmark.read_outputs(tmp_path, items[benchmark.name])
