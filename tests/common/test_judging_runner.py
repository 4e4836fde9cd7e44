"""A judge is asked each question once, what it said is kept, and nothing that failed passes for an answer."""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imgen_common.errors import UserError
from imgen_common.http import HttpError
from imgen_common.judging.agreement import compare_judges, rank_correlation, weighted_kappa
from imgen_common.judging.answers import Answer, AnswerLog, read_answers
from imgen_common.judging.cost import Cost, Prices, all_questions, describe_cost, estimate_cost
from imgen_common.judging.questions import JudgeError, JudgeReply, Message, Question, Unreadable
from imgen_common.judging.runner import Judging

RED = Image.new("RGB", (64, 32), "red")


@dataclass
class FakeJudge:
    """Says what `say(text, number)` gives for its n-th call, or raises it."""

    say: Callable[[str, int], str | Exception]
    id: str = "fake"
    calls: list[str] = field(default_factory=list)

    async def ask(self, system: str, message: Message, seed: int) -> JudgeReply:
        text = system + "".join(part for part in message if isinstance(part, str))
        self.calls.append(text)
        said = self.say(text, len(self.calls))
        is_cut_off = isinstance(said, str) and said.endswith("...")
        if isinstance(said, Exception):
            raise said
        pixels = sum(part.width * part.height for part in message if not isinstance(part, str))
        ending = "cut off" if is_cut_off else ""
        return JudgeReply(said, round(len(text) / 4 + pixels / 1024), round(len(said) / 4), ending, is_cut_off)

    async def close(self) -> None:
        pass


def parse(answer: str) -> int:
    """A number from 1 to 5, alone."""
    answer = answer.removesuffix("...")
    if answer.strip() not in tuple("12345"):
        raise Unreadable(f"no number from 1 to 5: {answer[:20]!r}")
    return int(answer)


def question(name: str, text: str, tries: int = 3) -> Question:
    return Question(name, (text, RED), parse, tries=tries)


def judge_all(judge: FakeJudge, folder: Path, items: Mapping[str, Sequence[Question]], part: str = "") -> Any:
    judging = Judging(judge, AnswerLog(folder, part), "prompts", concurrency=2)
    return asyncio.run(judging.judge_all({name: lambda values, asked=asked: asked for name, asked in items.items()}))


# --- answers and failures --------------------------------------------------------------------------------------------

SAID: dict[str, tuple[list[str | Exception], int | None, str | None, int]] = {
    "reads": (["4"], 4, None, 1),
    "out of range, then reads": (["9", "0", "5"], 5, None, 3),
    "out of range": (["9"] * 3, None, "unreadable", 3),
    "prose": (["I would say four."] * 3, None, "unreadable", 3),
    "code fence": (["```\n4\n```"] * 3, None, "unreadable", 3),
    "another language": (["vier", "四", "4"], 4, None, 3),
    "refuses": ([JudgeError("refused", "I cannot\njudge this")], None, "refused", 1),
    "times out": ([JudgeError("timeout", "slow")] * 3, None, "timeout", 3),
    "times out, then reads": ([JudgeError("timeout", "slow"), "2"], 2, None, 2),
    "nothing": ([""] * 3, None, "unreadable", 3),
    "thinks of another": (["<think>\n1\n</think>\n\n4"], 4, None, 1),
    "all words are thoughts": (["<think>4</think>"] * 3, None, "malformed_response", 3),  # of the server's parser
    "is cut off in thoughts without a mark, then reads": (["4...", "<think>1</think>4"], 4, None, 2),
    "thinks to no end, then reads": (["<think>\n1", "perhaps 1</think>5"], 5, None, 2),
}


@pytest.mark.parametrize("case", SAID)
def test_what_a_judge_says_is_a_value_or_a_failure_of_its_kind(case: str, tmp_path: Path) -> None:
    said, value, kind, num_calls = SAID[case]
    judge = FakeJudge(lambda text, number: said[number - 1])
    found = judge_all(judge, tmp_path, {"item": [question("q", "how good?")]})["item"]["q"]
    assert (found.value, found.error_kind, found.num_calls) == (value, kind, num_calls)
    assert found.raws == tuple(text for text in said[:num_calls] if isinstance(text, str))
    assert (found.error is None) == (kind is None)
    assert "\n" not in (found.error or "")
    assert read_answers(tmp_path) == [found]


def test_a_judge_that_is_not_there_stops_with_what_is_done(tmp_path: Path) -> None:
    down = JudgeError("unreachable", "no connection", is_outage=True)
    judge = FakeJudge(lambda text, number: "3" if number <= 4 else down)
    items = {f"i{n}": [question("q", f"item {n}")] for n in range(10)}
    with pytest.raises(UserError, match=r"the judge fake does not answer \(unreachable: no connection\).*run the same"):
        judge_all(judge, tmp_path, items)
    kept = {answer.item for answer in read_answers(tmp_path)}
    assert 3 <= len(kept) <= 4
    again = FakeJudge(lambda text, number: "3")
    found = judge_all(again, tmp_path, items)
    assert len(again.calls) == 10 - len(kept)
    assert {answers["q"].value for answers in found.values()} == {3}


def test_equal_questions_are_asked_once_and_never_again(tmp_path: Path) -> None:
    judge = FakeJudge(lambda text, number: "2")
    items = {"a": [question("q", "same"), question("r", "same")], "b": [question("q", "same")]}
    found = judge_all(judge, tmp_path, items)
    assert 1 <= len(judge.calls) <= 2  # the two items may ask at the same moment
    assert {(i, q): a.value for i, answers in found.items() for q, a in answers.items()} == {
        ("a", "q"): 2, ("a", "r"): 2, ("b", "q"): 2,
    }  # fmt: skip
    assert sum(answer.num_calls for answers in found.values() for answer in answers.values()) == len(judge.calls)
    lines = (tmp_path / "answers.jsonl").read_text()
    never = FakeJudge(lambda text, number: pytest.fail("asked again"))
    assert judge_all(never, tmp_path, items) == found
    assert (tmp_path / "answers.jsonl").read_text() == lines
    other = FakeJudge(lambda text, number: "5", id="other judge")
    assert judge_all(other, tmp_path, {"a": [question("q", "same")]})["a"]["q"].value == 5


def test_failures_of_the_moment_are_asked_again_and_final_ones_are_not(tmp_path: Path) -> None:
    too_large = JudgeError.of_http(HttpError("refused", "raise the server's limit", can_retry=False, status=413))
    failures: list[str | Exception] = [JudgeError("refused", "no"), JudgeError("timeout", "slow"), "?", too_large]
    items = {f"i{n}": [question("q", f"item {n}", tries=1)] for n in range(4)}
    judge = FakeJudge(lambda text, number: failures[int(text[-1])])
    first = judge_all(judge, tmp_path, items)
    kinds = [first[f"i{n}"]["q"].error_kind for n in range(4)]
    assert kinds == ["refused", "timeout", "unreadable", "bad_request"]
    again = FakeJudge(lambda text, number: "1")
    second = judge_all(again, tmp_path, items)
    assert again.calls == ["item 1", "item 3"]
    assert second["i1"]["q"].value == second["i3"]["q"].value == 1
    found = {answer.item: answer.value for answer in read_answers(tmp_path)}
    assert found == {"i0": None, "i1": 1, "i2": None, "i3": 1}


def test_half_a_line_that_a_kill_left_is_taken_away(tmp_path: Path) -> None:
    judge = FakeJudge(lambda text, number: "2")
    items = {"a": [question("q", "one")], "b": [question("q", "two")]}
    judge_all(judge, tmp_path, items)
    file = tmp_path / "answers.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    again = FakeJudge(lambda text, number: "2")
    judge_all(again, tmp_path, items)
    assert len(again.calls) == 1
    assert all(json.loads(line) for line in file.read_text().splitlines())
    assert {answer.item for answer in read_answers(tmp_path)} == {"a", "b"}


def test_processes_write_files_of_their_own_and_read_all(tmp_path: Path) -> None:
    judge = FakeJudge(lambda text, number: "2")
    judge_all(judge, tmp_path, {"a": [question("q", "one")]}, "1-of-2")
    judge_all(judge, tmp_path, {"b": [question("q", "one")]}, "2-of-2")
    assert len(judge.calls) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.1-of-2.jsonl", "answers.2-of-2.jsonl"]
    assert [(answer.item, answer.num_calls) for answer in read_answers(tmp_path)] == [("a", 1), ("b", 0)]


def test_two_processes_do_not_ask_for_the_same_part(tmp_path: Path) -> None:
    """Both would pay for every question, and the second would cut off the line that the first is writing."""
    judge, items = FakeJudge(lambda text, number: "2"), {"a": [question("q", "one")]}
    with (
        AnswerLog(tmp_path, "1-of-2").held(),
        pytest.raises(UserError, match=r"answers\.1-of-2\.jsonl: another process asks"),
    ):
        judge_all(judge, tmp_path, items, "1-of-2")
    assert judge.calls == []
    judge_all(judge, tmp_path, items, "1-of-2")
    assert len(judge.calls) == 1


def test_of_an_items_question_the_newest_answer_counts_whichever_its_file(tmp_path: Path) -> None:
    """The whole failed for a moment; a part then asks again.  By their names, the file of the part comes first."""
    failed = dict.fromkeys(("error", "error_kind"), "timeout")
    for part, date, rest in (
        ("", "2026-01-01T00:00:05+00:00", failed),
        ("1-of-2", "2026-01-01T00:00:09+00:00", {"value": 3}),
        ("2-of-2", "2026-01-01T00:00:09+00:00", failed),
    ):
        AnswerLog(tmp_path, part).add(answer("a", "q", None).model_copy(update={"date": date, **rest}))
    assert [kept.value for kept in read_answers(tmp_path)] == [3]
    kept = AnswerLog(tmp_path).find("aq", "a", "q")
    assert kept is not None
    assert kept.value == 3


# --- questions that need an answer -----------------------------------------------------------------------------------


def chain(item: str, values: Mapping[str, Any]) -> list[Question]:
    first = Question("first", (f"{item}: describe",), str, answer_tokens=2, example="a thing")
    if values.get("first") is None:
        return [first]
    return [first, Question("second", (f"{item}: match {values['first']}",), parse, answer_tokens=1)]


def test_a_question_that_needs_an_answer_waits_for_it(tmp_path: Path) -> None:
    judge = FakeJudge(lambda text, number: "4" if "match" in text else "a red cat")
    judging = Judging(judge, AnswerLog(tmp_path), "prompts")
    found = asyncio.run(judging.judge_item("item", partial(chain, "item")))
    assert judge.calls == ["item: describe", "item: match a red cat"]
    assert {name: answer.value for name, answer in found.items()} == {"first": "a red cat", "second": 4}
    refusing = FakeJudge(lambda text, number: JudgeError("refused", "no"))
    judging = Judging(refusing, AnswerLog(tmp_path), "prompts")
    assert list(asyncio.run(judging.judge_item("other", partial(chain, "other")))) == ["first"]


# --- costs -----------------------------------------------------------------------------------------------------------


def test_the_estimate_is_what_the_judge_then_counts(tmp_path: Path) -> None:
    """400 and 800 characters, an image of 64x32 pixels, which is 2 tokens, answers of 4 characters."""
    items = {f"i{n}": partial(chain, f"i{n} " + "word " * (80 + 80 * (n % 2))) for n in range(6)}
    asked = [one for next_questions in items.values() for one in all_questions(next_questions)]
    cost = estimate_cost(asked, Prices(prompt=2.0, completion=8.0, seconds_per_call=6.0), concurrency=3)
    judge = FakeJudge(lambda text, number: "3" if "match" in text else "a thing.")
    found = asyncio.run(Judging(judge, AnswerLog(tmp_path), "prompts").judge_all(items))
    answers = [answer for by_name in found.values() for answer in by_name.values()]
    assert cost.calls == len(judge.calls) == 12
    assert cost.prompt_tokens == pytest.approx(sum(a.num_prompt_tokens for a in answers), rel=0.1)
    assert cost.money == pytest.approx((2 * cost.prompt_tokens + 8 * cost.completion_tokens) / 1e6)
    assert cost.hours == pytest.approx(12 * 6 / 3 / 3600)
    assert describe_cost(cost, Prices(prompt=2.0)).startswith("12 calls of the judge, about ")


@pytest.mark.parametrize(
    ("money", "shown"), [(0.0, "written, 30 min 00 s"), (0.0012, ", 0.0012 USD,"), (1.234, ", 1.23 USD,")]
)
def test_a_small_price_is_shown(money: float, shown: str) -> None:
    assert shown in describe_cost(Cost(1, 1000, 100, money, 0.5), Prices())


def test_images_count_by_their_pixels() -> None:
    def one(side: int) -> Question:
        return Question("q", (Image.new("RGB", (side, side)), "12345678"), parse, system="1234")

    counts = [estimate_cost([one(side)], Prices(), 1).prompt_tokens for side in (32, 64, 1024)]
    assert counts == [3 + 1, 3 + 4, 3 + 1024]  # 12 characters are 3 tokens


# --- two judges ------------------------------------------------------------------------------------------------------


def answer(item: str, name: str, value: Any) -> Answer:
    return Answer(item=item, question=name, key=item + name, judge="j", prompts="p", date="d", value=value)


def test_agreement_by_hand() -> None:
    """Of four pairs (1,1), (1,0), (0,0), (0,0) three are the same: observed 0.75; the first says 1 in half, the second
    in a quarter: by chance 0.5 x 0.25 + 0.5 x 0.75 = 0.5; kappa = (0.75 - 0.5) / (1 - 0.5) = 0.5.  Their correlation is
    (1/4 - 1/2 x 1/4) / sqrt(1/4 x 3/16) = 1 / sqrt(3)."""
    left = [answer(f"i{n}", "text 1", value) for n, value in enumerate((True, True, False, False))]
    right = [answer(f"i{n}", "text 1", value) for n, value in enumerate((True, False, False, False))]
    (found,) = compare_judges(left, right)
    assert (found.name, found.num, found.same) == ("text", 4, 0.75)
    assert found.kappa == pytest.approx(0.5)
    assert found.correlation == pytest.approx(1 / np.sqrt(3))
    assert found.difference == -0.25
    assert found.differing == (("i1 (text 1)", 1.0, 0.0),)


def test_marks_are_compared_by_their_names_and_failures_are_left_out() -> None:
    """a: 5,3 and 5,1; b: 2,2 and 4,2; c has failed with one judge, d is of one judge only."""
    left = [answer("a", "m", {"style": 5, "trend": 3}), answer("b", "m", {"style": 2, "trend": 2})]
    left.append(answer("c", "m", None))
    right = [answer("a", "m", {"style": 5, "trend": 1}), answer("b", "m", {"style": 4, "trend": 2})]
    right += [answer("c", "m", {"style": 1, "trend": 1}), answer("d", "m", 1)]
    found = {one.name: one for one in compare_judges(left, right)}
    assert {name: (one.num, one.same, one.difference) for name, one in found.items()} == {
        "m style": (2, 0.5, 1.0),
        "m trend": (2, 0.5, -1.0),
    }


def test_kappa_and_ranks_of_special_cases() -> None:
    same = np.array([1.0, 2.0, 3.0])
    assert weighted_kappa(same, same) == 1
    assert weighted_kappa(same, same[::-1]) == pytest.approx(1 - (8 / 3) / (4 / 3))
    assert np.isnan(weighted_kappa(np.ones(3), np.ones(3)))
    assert rank_correlation(same, same**3) == pytest.approx(1)
    assert rank_correlation(np.array([1.0, 1.0, 2.0]), np.array([3.0, 3.0, 9.0])) == pytest.approx(1)
    assert np.isnan(rank_correlation(same, np.ones(3)))
    assert np.isnan(rank_correlation(np.ones(1), np.ones(1)))
