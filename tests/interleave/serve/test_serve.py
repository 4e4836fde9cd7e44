"""The service under load, attack and loss, the same for its engines."""

import asyncio
import base64
import gzip
import io
import json
import os
import random
import signal
import socket
import struct
import textwrap
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
import serving
from PIL import Image
from serving import Clients, Service, encoded, eventually, gathered, http_get, http_post, image_of
from serving_generator import picture_of

from interleave.protocols import GenerationRequest, HashedImage

Get = Callable[[str], Service]


@pytest.fixture(scope="module", params=["local", pytest.param("ray", marks=pytest.mark.slow)])
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Get]:
    """Services by name, started when first asked for; each engine runs the whole suite."""
    running: dict[str, Service] = {}
    with ExitStack() as stack:
        if request.param == "ray":
            import serving_ray

            start = stack.enter_context(serving_ray.cluster())
        else:
            start = serving.local

        def get(name: str) -> Service:
            if name not in running:
                log = tmp_path_factory.mktemp(name) / "log"
                running[name] = stack.enter_context(start(*serving.case(name, log), log))
                if name != "broken":
                    running[name].wait_until_ready()
            return running[name]

        yield get


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_clients", [60, pytest.param(240, marks=pytest.mark.exhaustive)])
def test_each_of_many_clients_gets_the_image_of_its_own_prompt_and_seed(service: Get, num_clients: int) -> None:
    roomy = service("roomy")
    before = len(roomy.logged("draw"))

    async def one(clients: Clients, number: int) -> None:
        for round_ in range(2):
            job = GenerationRequest(f"prompt {number} {round_}", (), random.Random(number).getrandbits(62))
            answer = await clients.post(job.prompt, job.seed)
            assert image_of(answer).tobytes() == picture_of(job).tobytes()
            assert answer.json()["seed"] == job.seed

    gathered(roomy, lambda clients: asyncio.gather(*(one(clients, number) for number in range(num_clients))))
    drawn = Counter(roomy.logged("draw")[before:])
    assert drawn == Counter(f"prompt {number} {round_}" for number in range(num_clients) for round_ in range(2))


def test_sources_reach_the_generator_in_order(service: Get) -> None:
    red, blue = (HashedImage.from_pil(Image.new("RGB", (8, 8), colour)) for colour in ("red", "blue"))
    wrapped = "\n".join(textwrap.wrap(encoded(red.image).rstrip("="), 76))  # as the program base64 writes it
    images = [wrapped, f"data:image/png;base64,{encoded(blue.image)}"]
    answer = service("roomy").post("edit", images=images, seed=5)
    assert image_of(answer).tobytes() == picture_of(GenerationRequest("edit", (red, blue), 5)).tobytes()


def test_a_request_sets_the_size_of_its_own_image_only(service: Get) -> None:
    assert image_of(service("roomy").post(params={"height": 40, "width": 30})).size == (30, 40)
    assert image_of(service("roomy").post()).size == (10, 10)


def test_info_and_metrics_tell_what_is_served(service: Get) -> None:
    roomy = service("roomy")
    roomy.post()
    info = roomy.get("/v1/info").json()
    assert (info["model"], info["max_sources"], info["queue"]["max"]) == ("logging", 2, 400)
    text = roomy.get("/metrics").text
    assert 'interleave_requests_total{status="200"}' in text
    assert "interleave_ready 1.0" in text
    assert "interleave_batch_size_count 0.0" not in text


# --- limits ----------------------------------------------------------------------------------------------------------


def test_a_full_queue_answers_429_and_loses_nobody_it_let_in(service: Get) -> None:
    narrow = service("narrow")
    answers = gathered(
        narrow,
        lambda clients: asyncio.gather(*(clients.post(f"slow 0.3 {i}", seed=i) for i in range(30))),
    )
    counts = Counter(answer.status_code for answer in answers)
    assert set(counts) == {200, 429}
    assert counts[200] >= 4, "one that is drawn and three that wait"
    for i, answer in enumerate(answers):
        if answer.status_code == 200:
            assert image_of(answer).tobytes() == picture_of(GenerationRequest(f"slow 0.3 {i}", (), i)).tobytes()
        else:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["kind"] == "rate_limited"
    assert image_of(narrow.post()), "it serves on"


def test_what_no_one_waits_for_is_not_computed(service: Get) -> None:
    narrow = service("narrow")

    async def leave(clients: Clients) -> None:
        running = asyncio.create_task(clients.post("slow 3 running and left"))
        while "slow 3 running and left" not in narrow.logged("begin"):
            await asyncio.sleep(0.02)
        waiting = asyncio.create_task(clients.post("waiting and left"))
        await asyncio.to_thread(eventually, lambda: metric(narrow, "interleave_queue_length") == 1)
        for task in (waiting, running):
            task.cancel()
        await asyncio.gather(waiting, running, return_exceptions=True)

    gathered(narrow, leave)
    image_of(narrow.post("after those who left"))
    assert "waiting and left" not in narrow.logged("begin")
    assert "slow 3 running and left" not in narrow.logged("draw")
    assert metric(narrow, "interleave_cancelled_total") == 2


def test_a_deadline_drops_the_request(service: Get) -> None:
    narrow = service("narrow")
    answer = narrow.post("slow 20 too late", headers={"X-Deadline-Seconds": "0.3"})
    assert (answer.status_code, answer.json()["error"]["kind"]) == (504, "timeout")
    assert "within 0.3 s; give a longer X-Deadline-Seconds" in answer.json()["error"]["message"]
    image_of(narrow.post("after the deadline"))
    assert "slow 20 too late" not in narrow.logged("draw")


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "soon"])
def test_a_deadline_that_is_no_time_is_refused(service: Get, given: str) -> None:
    assert service("roomy").post(headers={"X-Deadline-Seconds": given}).status_code == 400


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": serving.SECRET_TOKEN}])
def test_without_the_token_nothing_is_served_but_whether_it_lives(service: Get, header: dict[str, str]) -> None:
    url = service("roomy").url
    for answer in (
        http_post(f"{url}/v1/generate", json={"prompt": "p"}, headers=header),
        http_get(f"{url}/v1/info", headers=header),
        http_get(f"{url}/metrics", headers=header),
    ):
        assert (answer.status_code, answer.json()["error"]["kind"]) == (401, "unauthorized")
    assert http_get(f"{url}/healthz", headers=header).status_code == 200
    assert http_get(f"{url}/readyz", headers=header).status_code == 200


def test_a_body_that_is_too_large_is_refused_however_it_is_sent(service: Get) -> None:
    roomy = service("roomy")
    body = json.dumps({"prompt": "x" * 2_000_000}).encode()
    pieces = (body[i : i + 10_000] for i in range(0, len(body), 10_000))
    headers = roomy.headers | {"Content-Type": "application/json"}
    for content in (body, pieces):
        answer = http_post(f"{roomy.url}/v1/generate", content=content, headers=headers)
        assert (answer.status_code, answer.json()["error"]["kind"]) == (413, "too_large")


def test_a_body_announced_as_too_large_is_not_even_read(service: Get) -> None:
    roomy = service("roomy")
    url = httpx.URL(roomy.url)
    with socket.create_connection((url.host, url.port), timeout=10) as connection:
        connection.sendall(
            f"POST {url.path.rstrip('/')}/v1/generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Authorization: {roomy.headers['Authorization']}\r\nContent-Length: 999999999\r\n\r\n".encode()
        )
        assert b" 413 " in connection.recv(100)


def bomb() -> str:
    """A PNG of some hundred bytes that says it has 900 million pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(bytes(10_000))), chunk(b"IEND", b"")
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()


def cut() -> str:
    buffer = io.BytesIO()
    Image.frombytes("RGB", (50, 50), random.Random(0).randbytes(7500)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()[:3000]).decode()


def many_scans() -> bytes:
    """A progressive JPEG that takes a decoder seconds, of some kilobytes."""
    buffer = io.BytesIO()
    Image.new("RGB", (100, 100)).save(buffer, "JPEG", progressive=True)
    whole = buffer.getvalue()
    last = whole.rfind(b"\xff\xda")
    return whole[:last] + whole[last:-2] * 3000 + b"\xff\xd9"


SECRET = "do not repeat me"
BAD: dict[str, tuple[int, Any]] = {
    "bomb": (422, {"prompt": "p", "images": [bomb()]}),
    "many pixels": (422, {"prompt": "p", "images": [encoded(Image.new("RGB", (101, 100)))]}),
    "cut picture": (422, {"prompt": "p", "images": [cut()]}),
    "no picture": (422, {"prompt": "p", "images": [base64.b64encode(SECRET.encode()).decode()]}),
    "no base64": (422, {"prompt": "p", "images": [SECRET]}),
    "a letter beyond ASCII": (422, {"prompt": "p", "images": ["\u00e9"]}),
    "base64 in other letters": (422, {"prompt": "p", "images": ["\uff21\uff21\uff21\uff21"]}),
    "base64 with a zero": (422, {"prompt": "p", "images": ["AAAA\0"]}),
    "an image of no bytes": (422, {"prompt": "p", "images": [""]}),
    "many scans": (422, {"prompt": "p", "images": [base64.b64encode(many_scans()).decode()]}),
    "too many pictures": (422, {"prompt": "p", "images": [encoded(Image.new("RGB", (4, 4)))] * 3}),
    "long prompt": (422, {"prompt": SECRET * 100}),
    "long negative prompt": (422, {"prompt": "p", "params": {"negative_prompt": SECRET * 100}}),
    "no prompt": (422, {"seed": 3}),
    "prompt of another type": (422, {"prompt": [SECRET]}),
    "seed as text": (422, {"prompt": "p", "seed": SECRET}),
    "seed below 0": (422, {"prompt": "p", "seed": -1}),
    "seed too large": (422, {"prompt": "p", "seed": 2**64}),
    "unknown key": (422, {"prompt": "p", SECRET: 1}),
    "unknown setting": (422, {"prompt": "p", "params": {SECRET: 1}}),
    "setting of the service": (422, {"prompt": "p", "params": {"strength": 0.5}}),
    "setting out of range": (422, {"prompt": "p", "params": {"num_inference_steps": 101}}),
    "side out of range": (422, {"prompt": "p", "params": {"height": 129}}),
    "setting that is no number": (422, {"prompt": "p", "params": {"guidance_scale": float("nan")}}),
    "setting that the model refuses": (422, {"prompt": "p", "params": {"guidance_scale": 99}}),
    "a list": (422, [SECRET]),
    "not JSON": (400, SECRET.encode()),
    "nothing": (400, b""),
    "nested": (400, b'{"prompt": ' + b"[" * 10_000),
    "nested deeper": (413, b'{"prompt": ' + b"[" * 100_000),
    "many keys": (413, b"{" + b",".join(b'"%d": 1' % i for i in range(20_000)) + b"}"),
    "many images": (413, b'{"prompt": "p", "images": [' + b'"",' * 20_000 + b'""]}'),
    "many numbers": (413, b'{"prompt": "p", "seed": [' + b"1," * 100_000 + b"1]}"),
    "a long number": (400, b'{"prompt": "p", "seed": ' + b"9" * 100_000 + b"}"),
    "not UTF-8": (400, b'{"prompt": "\xff"}'),
    "half a character": (400, b'{"prompt": "\\ud800"}'),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_kind_and_not_repeated(service: Get, name: str) -> None:
    status, body = BAD[name]
    roomy = service("roomy")
    begun = len(roomy.logged("begin"))
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = http_post(
        f"{roomy.url}/v1/generate", content=content, headers=roomy.headers | {"Content-Type": "application/json"}
    )
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == {"kind", "message"}
    assert SECRET not in answer.text
    assert len(roomy.logged("begin")) == begun


def test_other_types_paths_and_methods_are_refused_by_kind(service: Get) -> None:
    roomy = service("roomy")
    text = http_post(f"{roomy.url}/v1/generate", content=b'{"prompt": "p"}', headers=roomy.headers)
    assert text.status_code == 415
    packed = roomy.headers | {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    answer = http_post(f"{roomy.url}/v1/generate", content=gzip.compress(b'{"prompt": "p"}'), headers=packed)
    assert (answer.status_code, "Content-Encoding: must be none, not 'gzip'" in answer.text) == (415, True)
    marked = roomy.headers | {"Content-Type": "application/json"}
    image_of(http_post(f"{roomy.url}/v1/generate", content=b'\xef\xbb\xbf{"prompt": "p"}', headers=marked))
    assert roomy.get("/v1/generate").status_code == 405
    assert roomy.get("/no/such/path").status_code == 404
    assert "error" in roomy.get("/no/such/path").json()


@pytest.mark.parametrize(("prompt", "kind"), [("fail", "out_of_memory"), ("bug", "model_error")])
def test_a_failure_is_typed_and_tells_nothing_of_the_inside(service: Get, prompt: str, kind: str) -> None:
    answer = service("roomy").post(prompt)
    assert (answer.status_code, answer.json()["error"]["kind"]) == (500, kind)
    assert "secret" not in answer.text


# --- losses ----------------------------------------------------------------------------------------------------------


def test_a_killed_worker_is_replaced_and_its_requests_are_answered(service: Get) -> None:
    roomy = service("roomy")
    pids = roomy.logged("load")

    async def work(clients: Clients) -> list[httpx.Response]:
        tasks = [asyncio.create_task(clients.post(f"slow 1 killed {i}")) for i in range(24)]
        while len([prompt for prompt in roomy.logged("begin") if "killed" in prompt]) < 24:
            await asyncio.sleep(0.02)
        os.kill(int(pids[-1]), signal.SIGKILL)
        return await asyncio.gather(*tasks)

    for i, answer in enumerate(gathered(roomy, work)):
        assert image_of(answer).tobytes() == picture_of(GenerationRequest(f"slow 1 killed {i}", (), 0)).tobytes()
    eventually(lambda: len(roomy.logged("load")) == len(pids) + 1)


def test_a_model_that_does_not_load_is_said(service: Get) -> None:
    broken = service("broken")
    eventually(lambda: "no such model" in broken.get("/readyz").text)
    assert broken.get("/readyz").status_code == 503
    assert "no such model" not in http_get(f"{broken.url}/readyz").text, "details are for those with the token"
    assert broken.get("/healthz").status_code == 200
    answer = broken.post()
    assert (answer.status_code, answer.json()["error"]["kind"]) == (503, "not_ready")


def test_no_port_of_ray_is_open_to_other_machines(service: Get, request: pytest.FixtureRequest) -> None:
    if request.node.callspec.params["service"] != "ray":
        pytest.skip("without Ray")
    from serving_ray import asks_for_a_token, listeners

    service("narrow")
    found = listeners()
    beyond = [port for address, port in found if address not in ("0100007F", "0000000000000000FFFF00000100007F")]
    assert len(found) > len(beyond), "Ray listens on loopback too"
    assert all(map(asks_for_a_token, beyond))


def metric(service: Service, name: str) -> float:
    values = [line.split()[1] for line in service.get("/metrics").text.splitlines() if line.split()[0] == name]
    return float(values[0])
