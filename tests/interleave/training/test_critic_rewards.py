"""The reward of GRPO: the table of the released code row by row, and what may never happen to it."""

import asyncio
import json
import random
from dataclasses import replace
from typing import Any

import pytest
import virtual_time
from backends import FakeGenerator, FakeJudge
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from interleave.agents.partial_parsing import has_format
from interleave.protocols import BackendError, CriticInput, HashedImage
from interleave.records import Scores
from interleave.training.config import ScorerConfig
from interleave.training.reward import WEIGHTS, CriticScorer, RecordedAttempt, RewardParts, reward_functions

WHITE, RED, BLUE = (HashedImage.from_pil(Image.new("RGB", (4, 4), colour)) for colour in ("white", "red", "blue"))


def row(success: bool = False, semantics: float = 5, quality: float = 5, name: str = "r") -> RecordedAttempt:
    return RecordedAttempt(name, "a cat", "a big cat", RED, BLUE, False, success, semantics, quality)


def answer(success: Any, prompt: Any = "a better cat", think: str = "<think>t</think>") -> str:
    return f"{think}<answer>{json.dumps({'previous_step_success': success, 'refine_prompt': prompt})}</answer>"


class Fixed(FakeJudge):
    """Gives the same two scores to every image."""

    def __init__(self, sc: float, pq: float, latency: float = 0.0) -> None:
        super().__init__(lambda shown: sc)
        self.sc, self.pq, self.latency, self.looks = sc, pq, latency, list[CriticInput]()

    async def score(self, shown: CriticInput) -> Scores:
        self.looks.append(shown)
        await asyncio.sleep(self.latency)
        return Scores(semantics=self.sc, quality=self.pq, judge_id="fixed")


def marks(text: str, of: RecordedAttempt, new: tuple[float, float] = (5, 5), **kwargs: Any) -> RewardParts | None:
    return asyncio.run(CriticScorer(FakeGenerator(), Fixed(*new), ScorerConfig(**kwargs)).score(text, of))


def reward_of(parts: RewardParts) -> float:
    return sum(weight * vars(parts)[name] for name, weight in WEIGHTS.items())


FORMED = {(1, 1, False): answer(False), (1, 0, False): answer(True), (1, 1, True): answer(True)}
FORMED |= {(1, 0, True): answer(False), (0, 1, False): answer(False, think=""), (0, 0, False): answer("no")}
FORMED |= {(0, 1, True): answer(True, think=""), (0, 0, True): answer([True])}


@pytest.mark.parametrize(
    ("f", "a", "success", "new", "old", "s", "q", "reward"),
    [
        (1, 1, False, (10, 10), (0, 0), 1.0, 1.0, 1.00),
        (1, 0, False, (0, 0), (10, 10), 0.0, 0.0, 0.50),
        (0, 0, False, (5, 5), (5, 5), 0.5, 0.5, 0.20),
        (1, 1, False, (7, 6), (3, 6), 0.7, 0.5, 0.86),
        (1, 1, False, (3, 6), (7, 6), 0.3, 0.5, 0.74),
        (0, 1, False, (8, 8), (4, 4), 0.7, 0.7, 0.38),
        (1, 0, False, (4, 6), (4, 6), 0.5, 0.5, 0.70),
        (1, 1, True, (9, 9), (1, 1), 0.5, 0.5, 0.80),
        (1, 0, True, (9, 9), (1, 1), 0.5, 0.5, 0.70),
        (0, 1, True, (9, 9), (1, 1), 0.5, 0.5, 0.30),
        (0, 0, True, (9, 9), (1, 1), 0.5, 0.5, 0.20),
        (1, 0, False, (8, 6), (4, 6), 0.7, 0.5, 0.76),
    ],
)
def test_the_table(
    f: int, a: int, success: bool, new: tuple[float, float], old: tuple[float, float], s: float, q: float, reward: float
) -> None:
    found = marks(FORMED[f, a, success], row(success, *old), new)
    assert found is not None
    assert (found.format, found.accuracy) == (f, a)
    assert (found.semantics, found.quality) == pytest.approx((s, q))
    assert reward_of(found) == pytest.approx(reward)


@pytest.mark.parametrize("kind", ["unreachable", "timeout", "out_of_memory", "malformed_response"])
def test_a_failure_has_no_reward(kind: Any) -> None:
    scorer = CriticScorer(FakeGenerator(fails=lambda job: BackendError(kind, "x")), Fixed(5, 5))
    functions = reward_functions(scorer)
    rows = [row(), row(success=True, name="other")]

    async def all_four() -> list[list[float | None]]:
        texts = [[{"role": "assistant", "content": answer(True)}]] * 2
        return await asyncio.gather(*(f(completions=texts, row=rows, prompts=["p"] * 2) for f in functions))

    values = asyncio.run(all_four())
    assert [f.__name__ for f in functions] == ["format", "accuracy", "semantics", "quality"]
    assert [v[0] for v in values] == [None] * 4
    assert [v[1] for v in values] == [1.0, 1.0, 0.5, 0.5]
    assert scorer.counts.unscored == 1
    assert scorer.counts.reasons == {kind: 1}


def test_a_success_costs_nothing() -> None:
    generator, judge = FakeGenerator(), Fixed(5, 5)
    scorer = CriticScorer(generator, judge)
    for text in (answer(True), answer(False), "mumble", ""):
        asyncio.run(scorer.score(text, row(success=True)))
    assert generator.jobs == []
    assert judge.looks == []


def test_equal_answers_cost_one_image_and_the_critics_words_are_not_shown_to_the_judge() -> None:
    generator, judge = FakeGenerator(), Fixed(5, 5)
    scorer = CriticScorer(generator, judge)

    async def group() -> None:
        await asyncio.gather(*(scorer.score(answer(False, p), row()) for p in ["x", "x", "y", "x"] * 4))

    asyncio.run(group())
    assert sorted(job.prompt for job in generator.jobs) == ["x", "y"]
    assert {shown.original_prompt for shown in judge.looks} == {"a cat"}
    assert all(job.seed == 0 and job.sources == (RED,) for job in generator.jobs)


def test_which_prompt_is_used() -> None:
    def drawn(text: str, of: RecordedAttempt) -> list[tuple[str, int]]:
        generator = FakeGenerator()
        asyncio.run(CriticScorer(generator, Fixed(5, 5)).score(text, of))
        return [(job.prompt, len(job.sources)) for job in generator.jobs]

    assert drawn(answer(False, "new"), row()) == [("new", 1)]
    assert drawn(answer(False, ""), row()) == [("a big cat", 1)]
    assert drawn(answer(False, None), row()) == [("a big cat", 1)]
    assert drawn("mumble", row()) == [("a big cat", 1)]
    assert drawn("mumble", replace(row(), prompt_used="")) == [("a cat", 1)]
    assert drawn(answer(False, "new"), replace(row(), is_t2i=True, before=WHITE)) == [("new", 0)]
    assert drawn(answer(True, "a big cat"), row()) == [("a big cat", 1)]


def test_unchanged_success_may_be_skipped() -> None:
    generator = FakeGenerator()
    scorer = CriticScorer(generator, Fixed(9, 9), ScorerConfig(skip_unchanged=True))
    found = asyncio.run(scorer.score(answer(True, "a big cat"), row()))
    assert found == RewardParts(1, 0, 0.5, 0.5)
    assert generator.jobs == []


BAD = ["", "x", "[]", "null", '"quoted"', "[1, 2]", '{"previous_step_success": [true], "refine_prompt": {}}', "{" * 900]


@settings(max_examples=40)
@given(
    bodies=st.lists(st.one_of(st.sampled_from(BAD), st.text(max_size=40)), min_size=1, max_size=6),
    think=st.booleans(),
    seed=st.integers(0, 99),
)
def test_bad_answers_never_raise_and_never_change_others(bodies: list[str], think: bool, seed: int) -> None:
    head = "<think>t</think>" if think else ""
    texts = [f"{head}<answer>{body}</answer>" for body in bodies] + [answer(False, "good")]
    scorer = CriticScorer(FakeGenerator(), Fixed(8, 6))
    functions = reward_functions(scorer)

    async def reward(order: list[int]) -> list[tuple[float | None, ...]]:
        rows = [row(name=f"r{i}") for i in order]
        values = [await f(completions=[texts[i] for i in order], row=rows) for f in functions]
        return list(zip(*values, strict=True))

    order = list(range(len(texts)))
    plain = asyncio.run(reward(order))
    assert len(plain) == len(texts)
    assert plain[-1] == pytest.approx((1, 1, 0.65, 0.55))
    random.Random(seed).shuffle(order)
    again = CriticScorer(FakeGenerator(), Fixed(8, 6))
    functions[:] = reward_functions(again)
    assert asyncio.run(reward(order)) == [plain[i] for i in order]


@settings(max_examples=40)
@given(st.floats(0, 10), st.floats(0, 10), st.floats(0, 10), st.floats(0, 10), st.booleans())
def test_rewards_are_bounded_and_grow_with_the_scores(
    sc: float, pq: float, old: float, more: float, said: bool
) -> None:
    first, better = (marks(answer(said), row(False, old, old), (s, pq)) for s in (sc, min(10.0, sc + more)))
    assert first is not None
    assert better is not None
    assert 0 <= reward_of(first) <= reward_of(better) <= 1


def test_the_released_rule_for_the_form_is_laxer() -> None:
    cases = {
        answer(False): (1, 1),
        answer(False, think=""): (0, 1),
        answer(False, ""): (0, 1),
        answer(0): (0, 0),
        "<think>t</think><answer>{'previous_step_success': False, 'refine_prompt': 'x'}</answer>": (0, 1),
        "<answer>no</answer>": (0, 0),
        answer(False, think="")[:-9] + "</answer><think>late</think>": (0, 0),
    }
    assert {k: (has_format(k), has_format(k, "released")) for k in cases} == cases


def test_too_many_failures_ask_for_a_stop() -> None:
    down = [False]
    generator = FakeGenerator(fails=lambda job: BackendError("unreachable", "x") if down[0] else None)
    scorer = CriticScorer(generator, Fixed(5, 5), ScorerConfig(max_unscored=0.5, window=8))

    def score(count: int) -> None:
        for i in range(count):
            asyncio.run(CriticScorer.score(scorer, answer(False, f"p{scorer.counts.answers}"), row(name=str(i))))

    score(6)
    assert not scorer.has_failed_too_often
    down[0] = True
    scorer._room = None
    score(4)
    assert not scorer.has_failed_too_often
    score(2)
    assert scorer.unscored_rate == 0.75
    assert scorer.has_failed_too_often


def test_a_hung_generator_is_not_waited_for() -> None:
    scorer = CriticScorer(FakeGenerator(latency=30), Fixed(5, 5), ScorerConfig(deadline=0.05))
    assert asyncio.run(scorer.score(answer(False), row())) is None
    assert scorer.counts.reasons == {"timeout": 1}


def test_128_answers_take_as_long_as_the_limit_on_concurrency_says() -> None:
    """1 s an image and 0.5 s a judgment, 16 at once: 96 distinct answers take 9 s."""
    scorer = CriticScorer(FakeGenerator(latency=1.0), Fixed(5, 5, latency=0.5), ScorerConfig(concurrency=16))
    functions = reward_functions(scorer)
    texts = [answer(False, f"prompt {i % 96}") for i in range(128)]

    async def stage() -> None:
        rows = [row(name=f"r{i % 96 // 8}") for i in range(128)]
        await asyncio.gather(*(f(completions=texts, row=rows) for f in functions))

    _, seconds = virtual_time.run(stage())
    assert scorer.counts.images == 96
    assert seconds == pytest.approx(9)
