"""What every registered benchmark does, on its miniature edition; one that is added is tested here by being there."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imgen_common.errors import UserError
from imgen_common.judging.questions import Unreadable
from interleave.agents.judge import ChatModelJudge
from interleave.benchmarks.base import Benchmark, Item, Output
from interleave.benchmarks.registry import BENCHMARKS
from interleave.benchmarks.shapes.data import write_data
from interleave.benchmarks.shapes.judge import ShapesJudge
from interleave.cli.benchmark import TITLES

pytestmark = pytest.mark.parametrize("name", BENCHMARKS)


@pytest.fixture
def benchmark(name: str) -> Benchmark:
    return BENCHMARKS[name]


@pytest.fixture
def items(benchmark: Benchmark, tmp_path: Path) -> list[Item]:
    return benchmark.load(write_data(benchmark.name, tmp_path / "data"))


@pytest.fixture
def output(tmp_path: Path) -> Output:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "made.png")
    return Output(("(1) A text.", tmp_path / "made.png"))


def test_it_has_a_command_and_a_title(benchmark: Benchmark, name: str) -> None:
    assert benchmark.name == name
    assert name in TITLES
    assert benchmark.title
    assert benchmark.judge.model


def test_items_have_ids_of_their_own_and_something_to_do(items: list[Item]) -> None:
    assert items
    assert len({item.id for item in items}) == len(items)
    for item in items:
        assert any(isinstance(part, str) and part.strip() for part in item.content)
        assert all(part.is_file() for part in item.content if isinstance(part, Path))


def test_data_that_is_not_there_is_named_with_where_to_get_it(benchmark: Benchmark, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.*(get|give)"):
        benchmark.load(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        benchmark.load(tmp_path / "empty")


def test_our_own_questions_are_not_official(benchmark: Benchmark, tmp_path: Path) -> None:
    prompts = benchmark.read_prompts(None)
    assert prompts.texts
    assert all(prompts.texts.values())
    assert not prompts.is_official
    with pytest.raises(UserError):
        benchmark.read_prompts(tmp_path / "no copy")


def test_questions_have_names_of_their_own_and_refuse_an_empty_answer(
    benchmark: Benchmark, items: list[Item], output: Output
) -> None:
    prompts = benchmark.read_prompts(None)
    for item in items[:8]:
        asked = benchmark.questions(item, output, prompts, {})
        names = [question.name for question in asked]
        assert names
        assert len(set(names)) == len(names)
        for question in asked:
            assert len(question.key("judge")) == 64
            if question.tries > 1:
                with pytest.raises(Unreadable):
                    question.parse("")
        failed = benchmark.questions(item, output, prompts, dict.fromkeys(names))
        assert {question.name for question in failed} <= set(names)  # nothing depends on an answer that failed


def test_the_judge_of_the_miniature_answers_its_questions(
    benchmark: Benchmark, items: list[Item], output: Output
) -> None:
    judge, prompts = ChatModelJudge(ShapesJudge()), benchmark.read_prompts(None)
    for item in items[:4]:
        for question in benchmark.questions(item, output, prompts, {}):
            reply = asyncio.run(judge.ask(question.system, question.message, 0))
            assert question.parse(reply.text) is not None


def test_failures_are_left_out_or_the_worst(benchmark: Benchmark, items: list[Item]) -> None:
    assert benchmark.figures([]) == {}
    left_out = [(item, benchmark.score(item, {}, as_zero=False)) for item in items]
    worst = [(item, benchmark.score(item, {}, as_zero=True)) for item in items]
    assert not any(scores for _, scores in left_out)
    assert all(scores for _, scores in worst)
    figures = benchmark.figures(worst)
    assert figures
    assert all(value <= 0 for value in figures.values())
    assert set(benchmark.figures([row for row in left_out if row[1]])) <= set(figures)


def test_outputs_are_read_as_they_are_written(
    benchmark: Benchmark, items: list[Item], output: Output, tmp_path: Path
) -> None:
    few = items[:3]
    benchmark.write_outputs({item.id: output for item in few[:2]}, few, tmp_path / "layout")
    found = benchmark.read_outputs(tmp_path / "layout", few)
    pixels = np.asarray(Image.open(output.images[0]))
    for item in few[:2]:
        assert np.array_equal(np.asarray(Image.open(found[item.id].images[-1])), pixels)
    assert not found.get(few[2].id, Output(())).content
    with pytest.raises(UserError):
        benchmark.read_outputs(tmp_path / "nowhere", few)
