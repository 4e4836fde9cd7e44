"""What every generator, chat model and judge must do; a new one joins by one line in `components`."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from components import CHAT_MODELS, GENERATORS, JUDGES, Maker
from PIL import Image

from interleave.agents.scoring import JudgeConfig
from interleave.models.chat import ChatConfig
from interleave.models.generators import GeneratorConfig
from interleave.protocols import BackendError, CriticInput, GenerationRequest, HashedImage

RED, BLUE = (HashedImage.from_pil(Image.new("RGB", (32, 32), color)) for color in ("red", "blue"))
SHOWN = CriticInput(RED, BLUE, "draw a blue circle", "draw a blue circle")


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """One event loop for all, because connections belong to a loop."""
    with asyncio.Runner() as runner:
        yield runner


def open_component(make: Maker, runner: asyncio.Runner, place: Path) -> Iterator[Any]:
    """A component, which is closed twice: the second time must do nothing."""
    with ExitStack() as stack:
        component: Any = make(stack, place)
        yield component
        runner.run(component.close())
        runner.run(component.close())


@pytest.fixture(scope="module", params=GENERATORS)
def generator(request: pytest.FixtureRequest, runner: asyncio.Runner, tmp_path_factory: Any) -> Iterator[Any]:
    yield from open_component(GENERATORS[request.param], runner, tmp_path_factory.mktemp("generator"))


@pytest.fixture(scope="module", params=CHAT_MODELS)
def chat_model(request: pytest.FixtureRequest, runner: asyncio.Runner, tmp_path_factory: Any) -> Iterator[Any]:
    yield from open_component(CHAT_MODELS[request.param], runner, tmp_path_factory.mktemp("chat_model"))


@pytest.fixture(scope="module", params=JUDGES)
def judge(request: pytest.FixtureRequest, runner: asyncio.Runner, tmp_path_factory: Any) -> Iterator[Any]:
    yield from open_component(JUDGES[request.param], runner, tmp_path_factory.mktemp("judge"))


@pytest.mark.parametrize(
    ("config", "makers"), [(GeneratorConfig, GENERATORS), (ChatConfig, CHAT_MODELS), (JudgeConfig, JUDGES)]
)
def test_every_kind_is_tested(config: Any, makers: dict[str, Maker]) -> None:
    members = get_args(get_args(config)[0])
    assert {member.model_fields["kind"].default for member in members} == set(makers)


def test_a_generator_is_described(generator: Any) -> None:
    assert isinstance(generator.id, str)
    assert generator.id
    assert json.loads(json.dumps(dict(generator.params))) == dict(generator.params)
    assert generator.max_sources >= 0


def test_equal_requests_give_equal_images(generator: Any, runner: asyncio.Runner) -> None:
    """And requests at once each give their own, but for rounding in a batch."""
    requests = [GenerationRequest(prompt, (), seed) for prompt in ("a red circle", "a cross") for seed in (1, 2)]

    async def generate_together() -> list[HashedImage]:
        return await asyncio.gather(*map(generator.generate, requests))

    alone = [runner.run(generator.generate(request)) for request in requests]
    assert runner.run(generator.generate(requests[0])) == alone[0]
    assert len({image.id for image in alone}) == len(alone)
    for one, other in zip(alone, runner.run(generate_together()), strict=True):
        assert np.abs(np.asarray(one.image, np.int16) - np.asarray(other.image, np.int16)).max() <= 1


def test_too_many_sources_are_refused(generator: Any, runner: asyncio.Runner) -> None:
    request = GenerationRequest("a red circle", (RED,) * (generator.max_sources + 1), 1)
    with pytest.raises(BackendError) as caught:
        runner.run(generator.generate(request))
    assert caught.value.kind == "refused"


def test_equal_messages_give_equal_answers(chat_model: Any, runner: asyncio.Runner) -> None:
    messages = [("is it red?", RED), ("is it blue?", BLUE, "say yes or no"), ("say something",)]

    async def chat_together() -> list[Any]:
        return await asyncio.gather(*(chat_model.chat(message, 3) for message in messages))

    assert chat_model.id
    alone = [runner.run(chat_model.chat(message, 3)).text for message in messages]
    assert [reply.text for reply in runner.run(chat_together())] == alone


def test_a_judge_scores_from_0_to_10(judge: Any, runner: asyncio.Runner) -> None:
    first, again = runner.run(judge.score(SHOWN)), runner.run(judge.score(SHOWN))
    assert first == again
    assert first.judge_id == judge.id
    assert 0 <= first.semantics <= 10
    assert 0 <= first.quality <= 10
