"""A real OpenAI-compatible server, `transformers serve`, with the miniature's planner and critic behind it."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from imgen_common import hub
from imgen_common.config import load
from imgen_common.errors import UserError
from interleave.loop import run
from interleave.loop.config import RunConfig
from interleave.models.chat.endpoint import EndpointChat, EndpointChatConfig
from interleave.protocols import CriticInput, HashedImage
from interleave.records import Request

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return int(door.getsockname()[1])


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    log = tmp_path_factory.mktemp("server") / "log.txt"
    command = [str(Path(sys.executable).with_name("transformers")), "serve", "--host", "127.0.0.1", "--port", str(port)]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    with log.open("w") as out:
        server = subprocess.Popen([*command, "--device", "cpu"], stdout=out, stderr=out, env=env)
    try:
        end = time.monotonic() + 180
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except httpx.HTTPError:
                assert server.poll() is None, log.read_text()[-2000:]
                assert time.monotonic() < end, log.read_text()[-2000:]
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(20)


GREEDY = ["cache=null", "critic.num_samples=1", "critic.model.temperature=0"]


def config(url: str) -> RunConfig:
    sets = list(GREEDY)
    for part in ("planner", "critic"):
        folder = hub.resolve(f"builtin:shapes/{part}")
        sets += [f"{part}.model.kind=endpoint", f"{part}.model.url={url}", f"{part}.model.model={folder}"]
        sets += [f"{part}.model.temperature=0", f"{part}.model.max_new_tokens=300"]
    return load(RunConfig, [], sets)


def test_it_answers_as_the_local_models_do(url: str) -> None:
    """The same plan and the same verdict over HTTP as in this process."""
    text = "draw a red circle, then add a blue square on its right"
    white, red = (HashedImage.from_pil(Image.new("RGB", (32, 32), colour)) for colour in ("white", "red"))
    look = CriticInput(white, red, "a red circle", "a red circle")

    async def ask(of: RunConfig) -> tuple[object, object]:
        parts = run.build_components(of)
        assert parts.planner
        assert parts.critic
        try:
            await run.check_endpoints(parts)
            plan = await parts.planner.plan(Request(id="a", text=text), [], 0)
            verdict = await parts.critic.judge(look, 0)
        finally:
            await parts.close()
        assert plan.plan is not None, plan.raw
        assert verdict.verdict is not None, verdict.raw
        return plan.plan, verdict.verdict

    assert asyncio.run(ask(config(url))) == asyncio.run(ask(load(RunConfig, [], GREEDY)))


def test_seeds_decide_what_a_server_samples(url: str) -> None:
    sampling = {"generation_config": json.dumps({"do_sample": True, "max_new_tokens": 40})}
    folder = str(hub.resolve("builtin:shapes/planner"))
    model = EndpointChat(EndpointChatConfig(url=url, model=folder, temperature=2.0, top_p=1.0, extra=sampling))

    async def ask() -> list[str]:
        try:
            return [(await model.chat(("plan: draw a red circle",), seed)).text for seed in (1, 2, 1)]
        finally:
            await model.close()

    first, second, again = asyncio.run(ask())
    assert first == again != second


def test_a_model_that_the_server_cannot_have_is_reported_before_anything_starts(url: str) -> None:
    model = EndpointChat(EndpointChatConfig(url=url, model="no/such-model"))
    with pytest.raises(UserError, match=f"chat endpoint {url}: status .*model \\('no/such-model'\\)"):
        asyncio.run(model.check())
