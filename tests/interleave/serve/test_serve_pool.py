"""What is the worker processes' own: messages, poison, batches, devices, and how a service begins and ends."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import serving
from hosting import InProcess, hosted
from hypothesis import given
from hypothesis import strategies as st
from serving import PATIENCE, eventually, gathered, http_get, http_post, image_of, status_of
from serving_generator import make_late, make_logging, picture_of

from imgen_common.errors import UserError
from interleave.models.generators.pipeline import PipelineConfig
from interleave.models.generators.scripted import ScriptedConfig, color_bands
from interleave.protocols import GenerationRequest
from interleave.serve import TOKEN, ServeConfig, is_loopback, listener_url, open_listener, required_secret
from interleave.serve.app import digest
from interleave.serve.pool import _encode_message, _read_message, _worker_configs
from interleave.serve.worker import GenerationFailure, GenerationResult, GenerationTask, RawImage, Worker

headers = st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.lists(st.integers()))


@given(st.lists(st.tuples(headers, st.lists(st.binary(max_size=2000)))))
def test_messages_arrive_as_they_were_sent(messages: list[tuple[dict, list[bytes]]]) -> None:
    async def read() -> list:
        reader = asyncio.StreamReader()
        for header, blobs in messages:
            reader.feed_data(_encode_message({**header, "blobs": None}, blobs))
        reader.feed_data(_encode_message({}, [b"cut off"])[:-1])
        reader.feed_eof()
        return [await _read_message(reader) for _ in range(len(messages) + 1)]

    expected = [({k: v for k, v in header.items() if k != "blobs"}, tuple(blobs)) for header, blobs in messages]
    assert asyncio.run(read()) == [*expected, None]


def test_workers_of_a_scripted_generator_load_no_torch() -> None:
    code = "import sys, interleave.serve.pool; sys.exit(bool({'torch', 'fastapi', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_each_device_gets_a_worker() -> None:
    config = ServeConfig(devices=("cuda:0", "cuda:1"))
    assert [placed.generator.device for placed in _worker_configs(config)] == ["cuda:0", "cuda:1"]
    assert _worker_configs(ServeConfig()) == [ServeConfig()]
    assert len(_worker_configs(ServeConfig(generator=ScriptedConfig(), devices=("cpu",) * 3))) == 3


# --- worker ----------------------------------------------------------------------------------------------------------


def test_a_worker_answers_with_the_image_or_why_there_is_none() -> None:
    config = ServeConfig(generator=ScriptedConfig(width=20, height=10))

    async def draw() -> tuple[GenerationResult | GenerationFailure, GenerationResult | GenerationFailure]:
        worker = Worker(config)
        drawn = await worker.generate(GenerationTask("p", (), 7, {"width": 40}))
        failed = await worker.generate(GenerationTask("p", (RawImage(1, 1, bytes(3)),) * 2, 7, {}))
        return drawn, failed

    drawn, failed = asyncio.run(draw())
    assert isinstance(drawn, GenerationResult)
    assert isinstance(failed, GenerationFailure)
    assert (
        serving.opened(drawn.png).tobytes()
        == color_bands(GenerationRequest("p", (), 7), 20, 10).resize((40, 10), 0).tobytes()
    )
    assert failed.kind == "refused"
    assert failed.message != "the generator failed (refused)"


@pytest.mark.parametrize("num_requests", [1, 3])
def test_a_service_that_stops_before_an_image_is_ready_says_so(
    num_requests: int, capfd: pytest.CaptureFixture[str]
) -> None:
    backend = InProcess(ScriptedConfig(latency=600).build())
    with ThreadPoolExecutor(num_requests) as pool:
        with hosted(backend) as url:
            ask = partial(http_post, f"{url}/v1/generate", json={"prompt": "p"})
            answers = [pool.submit(ask) for _ in range(num_requests)]
            eventually(lambda: len(backend.begun) == num_requests)
        for answer in answers:
            assert answer.result().status_code == 503
            assert answer.result().json()["error"]["kind"] == "not_ready"
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
def test_like_requests_to_a_pipeline_are_generated_together_and_settings_are_their_own() -> None:
    settings = [{"num_inference_steps": 2}] * 3 + [{"num_inference_steps": 3}]

    async def draw() -> tuple[
        list[GenerationResult | GenerationFailure],
        GenerationResult | GenerationFailure,
        GenerationResult | GenerationFailure,
    ]:
        worker = Worker(ServeConfig(generator=PipelineConfig(device="cpu", num_inference_steps=1)))
        tasks = [GenerationTask("a red circle", (), seed, given) for seed, given in enumerate(settings)]
        together = await asyncio.gather(*map(worker.generate, tasks))
        alone = await worker.generate(tasks[0])
        refused = await worker.generate(GenerationTask("p", (), 0, {"negative_prompt": "blue"}))
        await worker.close()
        return together, alone, refused

    together, alone, refused = asyncio.run(draw())
    assert sorted(size for drawn in together for size in drawn.batches) == [1, 3]
    assert together[0].png == alone.png
    assert len({drawn.png for drawn in together}) == 4
    assert refused == GenerationFailure("refused", refused.message)
    assert "negative_prompt" in refused.message


# --- deaths ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_request_that_kills_its_workers_is_given_up_and_those_beside_it_are_answered(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serving.local(serving.COMMON, partial(make_logging, log, 0.3), log) as service:
        service.wait_until_ready()
        prompts = ["beside 1", "crash", "beside 2"]
        answers = gathered(service, lambda clients: asyncio.gather(*map(clients.post, prompts)))
        for prompt, answer in zip(prompts, answers, strict=True):
            if prompt == "crash":
                assert (answer.status_code, answer.json()["error"]["kind"]) == (500, "worker_died")
            else:
                assert image_of(answer).tobytes() == picture_of(GenerationRequest(prompt, (), 0)).tobytes()
        assert service.logged("begin").count("crash") == serving.COMMON.max_deaths
        assert "interleave_worker_restarts_total 3.0" in service.get("/metrics").text
        service.wait_until_ready()


@pytest.mark.parametrize(
    ("dies", "said"),
    [
        pytest.param(True, "died 3 times while loading, last with exit code 9", marks=pytest.mark.slow),
        pytest.param(False, "no such model yet", marks=pytest.mark.exhaustive),
    ],
)
def test_a_model_that_does_not_load_is_tried_again(dies: bool, said: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serving.local(serving.COMMON, partial(make_late, log, dies), log) as service:
        eventually(lambda: said in service.get("/readyz").text)
        assert service.post().status_code == 503
        assert service.get("/healthz").status_code == 200
        service.wait_until_ready()
        image_of(service.post())
        assert len(service.logged("load")) == 5
        assert "interleave_worker_restarts_total 4.0" in service.get("/metrics").text


# --- beginning and end -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "host"),
    [
        *((True, host) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost")),
        *((False, host) for host in ("0.0.0.0", "::", "10.0.0.1", "localhost.example.org", "")),
    ],
)
def test_only_loopback_needs_no_token(host: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_loopback(host) == expected
    monkeypatch.setenv(TOKEN, " \n")
    if expected:
        assert required_secret(host) is None
    else:
        with pytest.raises(UserError, match=TOKEN):
            required_secret(host)
    monkeypatch.setenv(TOKEN, "word\n")
    assert required_secret(host) == digest("word")


def test_an_address_that_is_taken_is_said() -> None:
    with open_listener("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert listener_url(listener) == f"http://127.0.0.1:{port}"
        with pytest.raises(UserError, match=f"127.0.0.1 port {port}"):
            open_listener("127.0.0.1", port)


@pytest.fixture
def served() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`serve` in a process of its own, and its URL."""
    generator = "{'kind': 'scripted', 'latency': 1.5}"
    code = f"from interleave.serve import serve, ServeConfig; serve(ServeConfig(port=0, generator={generator}))"
    environment = {name: value for name, value in os.environ.items() if name != TOKEN}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        eventually(lambda: status_of(f"{url}/readyz") == 200)
        yield process, url
        process.kill()


@pytest.mark.slow
def test_a_stopped_service_ends_what_runs_first(served: tuple[subprocess.Popen[str], str]) -> None:
    process, url = served
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(http_post, f"{url}/v1/generate", json={"prompt": "p"})
        eventually(lambda: http_get(f"{url}/v1/info").json()["queue"]["running"] == 1)
        process.send_signal(signal.SIGTERM)
        assert answer.result().status_code == 200
    process.wait(PATIENCE)
    assert status_of(f"{url}/healthz") is None


@pytest.mark.slow
@pytest.mark.parametrize("pause", [0.02, 0.15])
def test_a_second_interrupt_ends_an_idle_service_without_a_traceback(pause: float) -> None:
    code = "import sys; from interleave.cli import main; sys.argv[0] = 'interleave'; main()"
    options = ["serve", "--set", "generator.kind=scripted", "--set", "port=0"]
    environment = {name: value for name, value in os.environ.items() if name != TOKEN}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code, *options], stdout=pipe, stderr=pipe, env=environment) as process:
        assert process.stdout is not None
        url = process.stdout.readline().decode().strip()
        eventually(lambda: status_of(f"{url}/readyz") == 200)
        process.send_signal(signal.SIGINT)
        time.sleep(pause)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=PATIENCE)[1].decode()
    assert process.returncode == 130
    assert [line for line in said.splitlines() if "worker is ready" not in line] == []


@pytest.mark.slow
def test_workers_do_not_outlive_their_front(served: tuple[subprocess.Popen[str], str]) -> None:
    process, _ = served
    workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert workers
    process.kill()
    process.wait()
    eventually(lambda: not any(map(is_alive, workers)))


def is_alive(pid: int) -> bool:
    """Whether a process runs: not gone, and not dead with nobody to bury it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False
