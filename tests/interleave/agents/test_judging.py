"""Judges: marks are read strictly, samples averaged, failures typed, and no image is judged twice."""

import asyncio
import gc
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from backends import FakeJudge
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from imgen_common.errors import UserError
from imgen_common.judging.answers import read_answers
from imgen_common.judging.questions import Question, Unreadable
from interleave.agents import scoring
from interleave.agents.judge import ChatJudge, ModelJudgeConfig, judge_agreement, parse_scores
from interleave.agents.miniature import VerifierJudge
from interleave.agents.prompts import load_template
from interleave.agents.scoring import CachedJudge, ImageScoring, Look, check_judge
from interleave.models.chat.endpoint import EndpointChat, EndpointChatConfig
from interleave.models.chat.scripted import ScriptedChat, ScriptedChatConfig
from interleave.protocols import BackendError, CriticInput, HashedImage, Message, Reply
from interleave.records import Scores
from interleave.storage.images import ImageStore

RED, BLUE, WIDE = (
    HashedImage.from_pil(Image.new("RGB", size, colour))
    for size, colour in (((8, 8), "red"), ((8, 8), "blue"), ((16, 4), "red"))
)
LOOK = CriticInput(RED, BLUE, "make it blue", "make it very blue")


def score(*marks: Any, **more: Any) -> str:
    return json.dumps({"score": list(marks), "reasoning": "because", **more})


# --- marks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "marks"),
    [
        (score(7, 8), (7, 8)),
        (score(0, 10), (0, 10)),
        (score(2.5, 9), (2.5, 9)),
        (json.dumps({"score": [1, 2]}), (1, 2)),
        (score(1, 2, more="x"), (1, 2)),
        (f"```json\n{score(3, 4)}\n```", (3, 4)),
        (f"\n  {score(3, 4)}  \n", (3, 4)),
        (f"<think>7, or {score(9, 9)}?</think>\n{score(3, 4)}", (3, 4)),
        (f"hm, [1, 2]</think>```json\n{score(3, 4)}```", (3, 4)),
        (f"<think></think><answer>{score(3, 4)}</answer>", (3, 4)),
        ('{"score": [3, 4], "reasoning": "sharp,\nbut\tdull"}', (3, 4)),
        (f"I think {score(3, 4)}", (3, 4)),
        (f"Here is my rating:\n```json\n{score(3, 4)}\n```\nI hope it helps.", (3, 4)),
        ('```\n{"reasoning": "a\r\nb", "score": [3, 4.0]}\n```', (3, 4)),
        ('{"score": [3, 4], "reasoning": "so, }",}', (3, 4)),
        ('```json\n{"score": [3, 4,],}\n```', (3, 4)),
        ("{'score': [3, 4]}", (3, 4)),
    ],
)
def test_marks_that_can_be_read(answer: str, marks: tuple[float, float]) -> None:
    assert parse_scores(answer) == marks


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (score(15, 3), "from 0 to 10, not 15"),
        (score(3, -0.5), "from 0 to 10, not -0.5"),
        (score("7", 8), 'from 0 to 10, not "7"'),
        (score(True, 8), "from 0 to 10, not true"),
        (score(None, 8), "from 0 to 10, not null"),
        (score([7], 8), "from 0 to 10"),
        ('{"score": [NaN, 8]}', "from 0 to 10"),
        ('{"score": [1e999, 8]}', "from 0 to 10"),
        (score(7), "a list of two"),
        (score(7, 8, 9), "a list of two"),
        ('{"score": 7}', "a list of two"),
        ('{"scores": [7, 8]}', "a list of two"),
        ("[7, 8]", "a list of two"),
        ("7", "a list of two"),
        ("null", "a list of two"),
        ("", "not JSON"),
        ("The score is 7 and 8.", "not JSON"),
        (f"{score(7, 8)}, or {score(8, 8)}", "not JSON"),
        (f"I think {score(7, 8)} {{", "not JSON (more than one object)"),
        ('{"score": [7, 8]', "not JSON"),
        (f"<think>{score(7, 8)}", "the answer is empty: all words stand in the reasoning; is the server's"),
        (f"<think>{score(7, 8)}</think>", "the answer is empty: all words stand in the reasoning"),
        (f'{{"score": [{"[" * 300}{"]" * 300}, 8]}}', "not list"),
        (f"<answer>{score(7, 8)}", "not closed"),
        ('{"score": [7, 8],', "not JSON"),
        ('{"score": [7, 8},', "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_marks_that_cannot_be_read_are_never_guessed(answer: str, reason: str) -> None:
    with pytest.raises(Unreadable, match=re.escape(reason)):
        parse_scores(answer)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["score", "x"]), inner, max_size=2),
    max_leaves=8,
)


@given(st.text(max_size=60) | values.map(json.dumps) | st.lists(values, max_size=3).map(lambda v: score(*v)))
def test_reading_marks_keeps_the_range_or_refuses(answer: str) -> None:
    with suppress(Unreadable):
        assert all(0 <= mark <= 10 for mark in parse_scores(answer))


# --- a chat model as judge -------------------------------------------------------------------------------------------


def test_scores_in_a_list_of_one_object_are_read() -> None:
    assert parse_scores('```json\n[{"reasoning": "so", "score": [8, 7]}]\n```') == (8, 7)
    for answer in ('[{"score": [8, 7]}, {"score": [1, 2]}]', "[]", "[[8, 7]]"):
        with pytest.raises(Unreadable, match="score must be a list of two numbers"):
            parse_scores(answer)


def judge_of(say: Callable[[Message, int], Any], num_samples: int = 1, tries: int = 3, name: str = "m") -> ChatJudge:
    return ChatJudge(
        ScriptedChat(say, name=name),
        load_template("judge_semantics"),
        load_template("judge_quality"),
        num_samples,
        tries,
    )


def pictures(message: Message) -> list[HashedImage]:
    return [part for part in message if isinstance(part, HashedImage)]


def is_quality(message: Message) -> bool:
    """The question on the image alone."""
    return len(pictures(message)) == 1


def test_two_questions_the_lower_mark_of_each() -> None:
    asked: list[Message] = []

    def say(message: Message, seed: int) -> str:
        asked.append(message)
        return score(6, 9) if is_quality(message) else score(8, 3)

    scores = asyncio.run(judge_of(say).score(LOOK))
    assert (scores.semantics, scores.quality, scores.num_samples) == (3, 6, 1)
    task, alone = sorted(asked, key=is_quality)
    assert pictures(task) == [RED, BLUE]
    assert pictures(alone) == [BLUE]
    words = "".join(part for part in task if isinstance(part, str))
    assert "make it blue" in words
    assert "make it very blue" not in words  # the critic's own prompt could flatter


def test_the_image_is_judged_at_the_size_of_the_one_before() -> None:
    sizes: list[tuple[int, int]] = []

    def say(message: Message, seed: int) -> str:
        sizes.extend(picture.image.size for picture in pictures(message))
        return score(5, 5)

    asyncio.run(judge_of(say).score(CriticInput(RED, WIDE, "x", "x")))
    assert sizes == [(8, 8)] * 3


def test_samples_have_seeds_of_their_own_and_are_averaged() -> None:
    seeds: dict[bool, list[int]] = {True: [], False: []}

    def say(message: Message, seed: int) -> str:
        mine = seeds[is_quality(message)]
        mine.append(seed)
        return score(10, len(mine))

    scores = asyncio.run(judge_of(say, num_samples=4).score(LOOK))
    assert (scores.semantics, scores.quality, scores.num_samples) == (2.5, 2.5, 4)
    for mine in seeds.values():
        assert len(set(mine)) == 4
    assert asyncio.run(judge_of(lambda m, s: score(10, s % 11), num_samples=4).score(LOOK)) == asyncio.run(
        judge_of(lambda m, s: score(10, s % 11), num_samples=4).score(LOOK)
    )


def test_an_unreadable_answer_is_asked_for_again_with_another_seed() -> None:
    seeds: list[int] = []

    def say(message: Message, seed: int) -> str:
        if is_quality(message):
            return score(9, 9)
        seeds.append(seed)
        return score(4, 4) if len(seeds) == 3 else score(4, 40)

    assert asyncio.run(judge_of(say).score(LOOK)).semantics == 4
    assert len(set(seeds)) == 3


def test_a_judge_that_stays_out_of_range_fails_by_name() -> None:
    with pytest.raises(BackendError, match=r"(semantics|quality) 1: .*not 40") as failure:
        asyncio.run(judge_of(lambda m, s: score(4, 40), tries=2).score(LOOK))
    assert failure.value.kind == "malformed_response"
    down = judge_of(lambda m, s: BackendError("unreachable", "nobody there"))
    with pytest.raises(BackendError, match="nobody there") as failure:
        asyncio.run(down.score(LOOK))
    assert failure.value.kind == "unreachable"


def test_its_name_tells_what_marks_depend_on(tmp_path: Path) -> None:
    other = tmp_path / "mine.txt"
    other.write_text("Is {original_instruction} done?", encoding="utf-8")
    config = ModelJudgeConfig(model=ScriptedChatConfig(answers=(score(1, 1),)))
    ids = [
        config.model_copy(update=change).build().id
        for change in ({}, {"num_samples": 2}, {"semantics_template": str(other)}, {"quality_template": str(other)})
    ]
    assert len(set(ids)) == 4
    assert judge_of(lambda m, s: "", name="a").id != judge_of(lambda m, s: "", name="b").id
    assert config.build().id == ids[0]


def test_judges_by_configuration() -> None:
    made = ModelJudgeConfig(model=ScriptedChatConfig(answers=(score(6, 7),)), num_samples=2).build()
    assert asyncio.run(made.score(LOOK)) == Scores(semantics=6, quality=6, judge_id=made.id, num_samples=2)
    assert isinstance(scoring.VerifierJudgeConfig().build(), VerifierJudge)


# --- many images ------------------------------------------------------------------------------------------------------


def looks_in(folder: Path, num: int) -> list[Look]:
    """A red image before, and images of `num` shades of blue after."""
    images = ImageStore(folder / "images")
    shades = [HashedImage.from_pil(Image.new("RGB", (8, 8), (0, 0, n))) for n in range(num)]
    return [(images.put(RED), images.put(shade), f"shade {n}") for n, shade in enumerate(shades)]


def score_all(folder: Path, judge: Any, looks: list[Look], share: float = 1.0, **more: Any) -> Any:
    return asyncio.run(ImageScoring(judge, folder, 1, share, "resume it", **more).score_all(looks))


def test_many_images_are_scored_as_one_by_one_and_the_words_are_kept(tmp_path: Path) -> None:
    """Answers depend on the seed alone, so that both ways must ask with the same ones."""
    judge, looks = judge_of(lambda m, seed: score(seed % 11, seed % 7), num_samples=2), looks_in(tmp_path, 3)
    asked: list[Question] = []
    found, failed = score_all(tmp_path, judge, [*looks, looks[0]], on_questions=asked.extend)
    images = ImageStore(tmp_path / "images")
    shown = [CriticInput(images.get(before), images.get(after), text, "") for before, after, text in looks]
    alone = [asyncio.run(judge.score(one)) for one in shown]
    assert found == [*alone, alone[0]]
    assert (len(asked), failed) == (12, {})
    (folder,) = (tmp_path / "scores").iterdir()
    answers = read_answers(folder)
    assert len(answers) == 12
    assert {(answer.judge, answer.prompts) for answer in answers} == {(judge.id, judge.prompts)}
    for answer in answers:
        assert json.loads(answer.raws[-1])["score"] == answer.value
    never = judge_of(lambda m, seed: pytest.fail("asked again"), num_samples=2)
    assert score_all(tmp_path, never, looks, on_questions=lambda questions: pytest.fail("costs")) == (alone, {})


def test_a_judge_that_goes_down_in_the_middle_is_asked_only_what_is_left(tmp_path: Path) -> None:
    """Of three images, two questions each, five questions are answered before the outage."""
    calls: list[Message] = []

    def say(message: Message, seed: int) -> str | BackendError:
        calls.append(message)
        return BackendError("unreachable", "gone") if len(calls) == 6 else score(6, 7)

    looks = looks_in(tmp_path, 3)
    with pytest.raises(UserError, match=r"does not answer \(unreachable: gone\); what it answered is kept: resume it"):
        score_all(tmp_path, judge_of(say), looks)
    counts: list[int] = []

    def count(questions: Iterable[Question]) -> None:
        counts.append(len(list(questions)))

    found, _ = score_all(tmp_path, judge_of(say), looks, on_questions=count)
    assert [one and one.semantics for one in found] == [6, 6, 6]
    assert (counts, len(calls)) == ([1], 7)


def test_what_cannot_be_read_or_is_refused_is_counted_by_image(tmp_path: Path) -> None:
    def say(message: Message, seed: int) -> str | BackendError:
        blue = max(p.image.getpixel((0, 0))[2] for p in pictures(message))  # type: ignore[index]
        return BackendError("refused", "no") if blue == 1 else score(6, 70 if blue == 2 else 7)

    looks = looks_in(tmp_path, 4)
    found, failed = score_all(tmp_path, judge_of(say), looks, 0.5)
    assert [one is None for one in found] == [False, True, True, False]
    assert failed == {"refused": 1, "unreadable": 1}
    with pytest.raises(UserError, match=r"failed on 1 of 2 items \(1 refused; the last: no\), at most 0 may fail"):
        score_all(tmp_path, judge_of(say), looks, 0.2)
    assert score_all(tmp_path, judge_of(say), looks, 0.5) == (found, failed)


def test_scores_that_an_earlier_version_kept_are_used(tmp_path: Path) -> None:
    judge, looks = judge_of(lambda m, seed: pytest.fail("asked again")), looks_in(tmp_path, 1)
    kept = Scores(semantics=3, quality=4, judge_id=judge.id)
    # name and content as they were: sha256 of [judge, before, after, what was asked]
    key = hashlib.sha256(json.dumps([judge.id, *looks[0]]).encode()).hexdigest()
    file = tmp_path / "scores" / key[:2] / f"{key}.json"
    file.parent.mkdir(parents=True)
    file.write_text(kept.model_dump_json())
    assert score_all(tmp_path, judge, looks) == ([kept], {})


def test_a_key_that_is_no_longer_accepted_stops_the_scoring(tmp_path: Path) -> None:
    """It is no refusal of the image, which would be kept as an answer."""
    model = EndpointChat(
        EndpointChatConfig(url="http://example.test/v1"), httpx.MockTransport(lambda request: httpx.Response(401))
    )
    judge = ChatJudge(model, load_template("judge_semantics"), load_template("judge_quality"))
    with pytest.raises(UserError, match=r"does not answer \(refused: .*status 401"):
        score_all(tmp_path, judge, looks_in(tmp_path, 2))
    assert [file.read_text() for file in tmp_path.glob("scores/*/*")] == [""]


# --- cache -----------------------------------------------------------------------------------------------------------


class Counting(FakeJudge):
    """Counts its calls, which take a moment, and fails as long as it is told to."""

    def __init__(self, name: str = "counting", failing: bool = False) -> None:
        super().__init__(lambda shown: 5.0, id=name)
        self.calls, self.failing, self.closed = 0, failing, False

    async def score(self, shown: CriticInput) -> Scores:
        self.calls += 1
        await asyncio.sleep(0.01)
        if self.failing:
            raise BackendError("rate_limited", "later")
        return await super().score(shown)

    async def close(self) -> None:
        self.closed = True


def test_equal_questions_are_asked_once(tmp_path: Path) -> None:
    inner = Counting()
    cached = CachedJudge(inner, tmp_path)

    async def all_at_once() -> list[Scores]:
        return await asyncio.gather(*(cached.score(LOOK) for _ in range(8)))

    assert len(set(asyncio.run(all_at_once()))) == 1
    assert (inner.calls, cached.misses, cached.hits) == (1, 1, 7)
    fresh = CachedJudge(Counting(), tmp_path)
    assert asyncio.run(fresh.score(LOOK)) == Scores(semantics=5, quality=5, judge_id="counting")
    assert (fresh.misses, fresh.hits) == (0, 1)
    assert cached.id == "counting"
    asyncio.run(cached.close())
    assert inner.closed


def test_scores_that_cannot_be_kept_are_given_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cache").touch()  # in the place of the folder
    assert asyncio.run(CachedJudge(Counting(), tmp_path / "cache").score(LOOK)).semantics == 5
    assert "warning: the cache of scores keeps nothing: " in capsys.readouterr().err


def test_what_the_judge_sees_is_what_counts(tmp_path: Path) -> None:
    inner = Counting()
    cached = CachedJudge(inner, tmp_path)
    for shown in (
        LOOK,
        CriticInput(RED, BLUE, "make it blue", "other words of the critic"),
        CriticInput(BLUE, RED, "make it blue", "x"),
        CriticInput(RED, RED, "make it blue", "x"),
        CriticInput(RED, BLUE, "make it red", "x"),
    ):
        asyncio.run(cached.score(shown))
    assert inner.calls == 4
    other = Counting("another judge")
    asyncio.run(CachedJudge(other, tmp_path).score(LOOK))
    assert other.calls == 1


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff", b'{"sc": 11, "pq": 0, "judge_id": "j"}', b'{"sc": 1}'])
def test_a_damaged_file_is_asked_for_again(tmp_path: Path, damage: bytes) -> None:
    asyncio.run(CachedJudge(Counting(), tmp_path).score(LOOK))
    (file,) = tmp_path.rglob("*.json")
    file.write_bytes(damage)
    inner = Counting()
    assert asyncio.run(CachedJudge(inner, tmp_path).score(LOOK)).semantics == 5
    assert inner.calls == 1
    assert Scores.model_validate_json(file.read_bytes()).semantics == 5


def test_failures_are_not_kept(tmp_path: Path) -> None:
    inner = Counting(failing=True)
    cached = CachedJudge(inner, tmp_path)

    async def twice() -> list[Scores | BaseException]:
        return await asyncio.gather(*(cached.score(LOOK) for _ in range(2)), return_exceptions=True)

    answers = asyncio.run(twice())
    assert [isinstance(answer, BackendError) and answer.kind for answer in answers] == ["rate_limited"] * 2
    assert inner.calls == 1
    assert list(tmp_path.rglob("*.json")) == []
    inner.failing = False
    assert asyncio.run(cached.score(LOOK)).semantics == 5
    assert inner.calls == 2


def test_one_who_gives_up_takes_nothing_from_the_others(tmp_path: Path) -> None:
    inner = Counting()
    cached = CachedJudge(inner, tmp_path)

    async def race() -> Scores:
        first, second = (asyncio.create_task(cached.score(LOOK)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        return await second

    assert asyncio.run(race()).semantics == 5
    assert inner.calls == 1


# --- agreement -------------------------------------------------------------------------------------------------------


def marks_of(*pairs: tuple[float, float]) -> list[Scores]:
    return [Scores(semantics=sc, quality=pq, judge_id="j") for sc, pq in pairs]


def test_agreement_in_numbers() -> None:
    first = marks_of((2, 2), (4, 4), (8, 8), (8, 8))
    same = judge_agreement(first, first)
    assert (same.num, same.semantics_difference, same.quality_difference, same.same_order) == (4, 0, 0, 1)
    assert (same.semantics_correlation, same.quality_correlation) == pytest.approx((1, 1))
    turned = judge_agreement(first, marks_of((8, 6), (6, 6), (2, 6), (2, 6)))
    assert (turned.semantics_difference, turned.quality_difference) == ((6 + 2 + 6 + 6) / 4, (4 + 2 + 2 + 2) / 4)
    assert turned.semantics_correlation == pytest.approx(-1)
    assert math.isnan(turned.quality_correlation)
    assert turned.same_order == 0
    half = judge_agreement(marks_of((1, 1), (2, 2), (3, 3)), marks_of((1, 1), (3, 3), (2, 2)))
    assert half.same_order == pytest.approx(2 / 3)
    assert math.isnan(judge_agreement(marks_of((5, 5), (5, 5)), first[:2]).same_order)


@pytest.mark.parametrize(("first", "second"), [(1, 1), (2, 3), (0, 0)])
def test_agreement_needs_the_same_images(first: int, second: int) -> None:
    with pytest.raises(ValueError, match="at least two"):
        judge_agreement(marks_of(*[(1, 1)] * first), marks_of(*[(1, 1)] * second))


pairs = st.lists(st.tuples(*[st.floats(0, 10)] * 4), min_size=2, max_size=12)


@given(pairs)
def test_agreement_does_not_depend_on_who_is_first(marks: list[tuple[float, float, float, float]]) -> None:
    first, second = marks_of(*[m[:2] for m in marks]), marks_of(*[m[2:] for m in marks])
    one, other = judge_agreement(first, second), judge_agreement(second, first)
    assert vars(one) == pytest.approx(vars(other), nan_ok=True)
    assert math.isnan(one.same_order) or 0 <= one.same_order <= 1


@pytest.mark.parametrize("num", [3, 30])
def test_a_judge_that_fails_too_often_leaves_no_error_behind(num: int, tmp_path: Path) -> None:
    """Scoring ends with one message; what the other questions raise afterwards is nobody's to handle."""
    unhandled: list[Any] = []

    class Failing:
        id = "failing"

        async def score(self, shown: CriticInput) -> Scores:
            try:
                await asyncio.sleep(0 if shown.original_prompt == "0" else 0.01)
            finally:
                raise BackendError("malformed_response", "7 answers could not be read")

        async def close(self) -> None:
            pass

    images = ImageStore(tmp_path / "images")
    looks = [(images.put(LOOK.before), images.put(LOOK.after), str(i)) for i in range(num)]

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: unhandled.append(context))
        with pytest.raises(UserError, match="the judge failing failed on 1 of"):
            await ImageScoring(Failing(), tmp_path, num, 0.0, "again").score_all(looks)
        await asyncio.sleep(0.02)
        gc.collect(1)

    asyncio.run(main())
    assert unhandled == []


def test_a_question_that_fails_ends_the_others() -> None:
    begun: list[int] = []
    ended: list[int] = []

    class Model:
        id = "m"

        async def chat(self, message: Message, seed: int) -> Reply:
            begun.append(seed)
            if len(begun) == 4:
                raise BackendError("refused", "no")
            try:
                await asyncio.sleep(60)
            finally:
                ended.append(seed)
            raise AssertionError

        async def close(self) -> None:
            pass

    judge = ChatJudge(Model(), load_template("judge_semantics"), load_template("judge_quality"), 2)

    async def main() -> list[int]:
        with pytest.raises(BackendError, match="no"):
            await judge.score(LOOK)
        return list(ended)

    assert sorted(asyncio.run(main())) == sorted(begun[:3])


def test_a_judge_behind_an_endpoint_is_checked_at_once_and_as_it_will_be_asked() -> None:
    def judge(handler: Callable[[httpx.Request], httpx.Response]) -> ChatJudge:
        model = EndpointChat(EndpointChatConfig(url="http://example.test/v1"), httpx.MockTransport(handler))
        return ChatJudge(model, load_template("judge_semantics"), load_template("judge_quality"))

    asked: list[Any] = []

    def gone(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        raise httpx.ConnectError("no route")

    with pytest.raises(UserError, match="cannot be reached"):
        asyncio.run(check_judge(judge(gone)))
    assert [part["type"] for part in asked[0]["messages"][0]["content"]] == ["image_url", "image_url", "text"]
    assert len(asked) == 1
    thinking = {"content": score(7, 8), "reasoning_content": "The image is white."}
    asyncio.run(check_judge(judge(lambda r: httpx.Response(200, json={"choices": [{"message": thinking}]}))))
    answers = asyncio.run(judge(lambda r: httpx.Response(200, json={"choices": [{"message": thinking}]})).score(LOOK))
    assert (answers.semantics, answers.quality) == (7, 7)
