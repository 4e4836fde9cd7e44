"""Generators behind HTTP: the pool of replicas against the real service, and an images endpoint that misbehaves."""

import asyncio
import base64
import contextlib
import io
import json
import struct
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import httpx
import pytest
from hosting import InProcess, hosted
from PIL import Image
from pydantic import ValidationError

from imgen_common.errors import UserError
from imgen_common.http import HttpError, RetryPolicy
from interleave.models.chat.endpoint import EndpointChatConfig
from interleave.models.generators import service
from interleave.models.generators.cache import CachedGenerator
from interleave.models.generators.images_api import ImagesApiConfig, ImagesApiGenerator
from interleave.models.generators.pipeline import GenerationSettings
from interleave.models.generators.scripted import ScriptedGenerator, color_bands
from interleave.models.generators.service import ServiceConfig, ServiceGenerator, ServiceInfo
from interleave.protocols import BackendError, GenerationRequest, Generator, HashedImage
from interleave.serve import ServeConfig, listener_url, open_listener

QUICK = RetryPolicy(max_tries=2, initial_backoff=1e-6, deadline=60)
RED, BLUE = (HashedImage.from_pil(Image.new("RGB", (8, 8), colour)) for colour in ("red", "blue"))
JOB = GenerationRequest("a red circle", (), 3)


def together(generator: Generator, *jobs: GenerationRequest) -> list[HashedImage | BaseException]:
    """What the generator answers to all jobs at once; it is closed afterwards."""

    async def main() -> list[HashedImage | BaseException]:
        try:
            return await asyncio.gather(*map(generator.generate, jobs), return_exceptions=True)
        finally:
            await generator.close()
            await generator.close()

    return asyncio.run(main())


def failure(generator: Generator, job: GenerationRequest = JOB) -> BackendError:
    (answer,) = together(generator, job)
    assert isinstance(answer, BackendError), answer
    return answer


def drawn(generator: Generator, job: GenerationRequest = JOB) -> HashedImage:
    (answer,) = together(generator, job)
    assert isinstance(answer, HashedImage), answer
    return answer


# --- our own service -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_images_come_back_to_those_who_asked_from_all_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "secret")
    first, second = (InProcess(ScriptedGenerator(latency=0.05, max_sources=2)) for _ in range(2))
    with hosted(first, token="secret") as one, hosted(second, token="secret") as two:
        config = ServiceConfig(urls=(one, two + "/"), token_env="SOME_TOKEN", params=GenerationSettings(width=12))
        generator = config.build()
        assert (generator.id, generator.max_sources, generator.params) == ("scripted", 2, {"width": 12})
        jobs = [GenerationRequest(f"prompt {i}", (RED, BLUE)[: i % 3], i) for i in range(24)]
        answers = together(generator, *jobs)
        with pytest.raises(UserError, match="set OTHER"):
            config.model_copy(update={"token_env": "OTHER"}).build()
    for job, answer in zip(jobs, answers, strict=True):
        assert isinstance(answer, HashedImage), answer
        assert answer == HashedImage.from_pil(color_bands(job).resize((12, 64), Image.Resampling.NEAREST))
    assert min(len(first.drawn), len(second.drawn)) >= 6
    assert len(first.drawn) + len(second.drawn) == 24


def test_a_name_that_a_service_does_not_take_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def describe(_: Any, url: str) -> HttpError:
        return HttpError("refused", f"{url}: status 400: Invalid host header", status=400)

    monkeypatch.setattr("interleave.models.generators.service._describe", describe)
    with pytest.raises(UserError, match=r"Invalid host header; a service .* add this to its allowed_hosts"):
        ServiceConfig().build()


def test_a_replica_that_goes_is_replaced_by_another_and_taken_back_when_it_returns() -> None:
    first, second = InProcess(ScriptedGenerator()), InProcess(ScriptedGenerator())
    with hosted(second) as two, contextlib.ExitStack() as stack:
        one = stack.enter_context(hosted(first))
        port = int(one.rpartition(":")[2])
        generator = ServiceGenerator.connect(ServiceConfig(urls=(one, two), retry=QUICK, probe_every=0.05))

        async def main() -> None:
            for i in range(4):
                await generator.generate(GenerationRequest("before", (), i))
            await asyncio.to_thread(stack.close)
            for i in range(4):
                await generator.generate(GenerationRequest("while", (), i))
            back = hosted(first, port)
            await asyncio.to_thread(back.__enter__)
            while first.drawn[-1].prompt != "after":
                await generator.generate(GenerationRequest("after", (), 0))
            await generator.close()
            await asyncio.to_thread(back.__exit__, None, None, None)

        asyncio.run(asyncio.wait_for(main(), 60))
    assert [task.prompt for task in first.drawn] == ["before", "before", "after"]
    prompts = [task.prompt for task in second.drawn]
    assert prompts[:6] == ["before"] * 2 + ["while"] * 4
    assert set(prompts[6:]) <= {"after"}  # none, where the first was taken back before anything was asked


def test_who_leaves_closes_the_request() -> None:
    backend = InProcess(ScriptedGenerator(latency=60.0))
    with hosted(backend) as url:
        generator = ServiceGenerator.connect(ServiceConfig(urls=(url,)))

        async def main() -> None:
            task = asyncio.create_task(generator.generate(JOB))
            while not backend.begun:
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert await asyncio.to_thread(backend.cancelled.wait, 30)
            await generator.close()

        asyncio.run(main())
    assert len(backend.begun) == 1


@pytest.mark.slow
def test_the_deadline_is_passed_on_and_kept() -> None:
    backend = InProcess(ScriptedGenerator(latency=60.0))
    with hosted(backend) as url:
        quick = RetryPolicy(deadline=1.0)
        assert failure(ServiceGenerator.connect(ServiceConfig(urls=(url,), retry=quick))).kind == "timeout"
    assert not backend.drawn


def test_failures_of_the_service_are_typed() -> None:
    def fails(job: GenerationRequest) -> BackendError | None:
        return BackendError("out_of_memory", "secret") if job.prompt == "large" else None

    with hosted(InProcess(ScriptedGenerator(fails=fails))) as url:
        config = ServiceConfig(urls=(url,), retry=QUICK)
        assert failure(ServiceGenerator.connect(config), GenerationRequest("large", (), 1)).kind == "out_of_memory"
        refused = failure(ServiceGenerator.connect(config), GenerationRequest("a", (RED, BLUE), 1))
        assert refused.kind == "refused"
        assert "takes 1 at most" in str(refused)
        wrong = config.model_copy(update={"params": GenerationSettings(num_inference_steps=1000)})
        assert failure(ServiceGenerator.connect(wrong)).kind == "refused"


def test_without_a_service_the_command_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_listener("127.0.0.1", 0) as taken:
        url = listener_url(taken)
    with pytest.raises(UserError, match="start `interleave serve`"):
        ServiceConfig(urls=(url,), startup=0).build()
    with pytest.raises(UserError, match="must be like"):
        ServiceConfig(urls=("ftp://x",), startup=0).build()
    said = r"generator\.params\.strength: is set by the service .*; allowed: num_inf"
    with hosted(InProcess(ScriptedGenerator())) as url, pytest.raises(UserError, match=said):
        ServiceConfig(urls=(url,), params=GenerationSettings(strength=0.5)).build()
    loading = {url: HttpError("server_error", "status 503: the model is being loaded", status=503)}
    monkeypatch.setattr(service, "_describe_all", AsyncMock(return_value=loading))
    with pytest.raises(UserError, match=r"loaded\); start `interleave serve` or raise generator\.startup"):
        ServiceConfig(urls=(url,), startup=0).build()
    monkeypatch.undo()
    first, second = InProcess(ScriptedGenerator(params={"a": 1})), InProcess(ScriptedGenerator(params={"a": 2}))
    with hosted(first) as one, hosted(second) as two, pytest.raises(UserError, match="replicas of one model"):
        ServiceConfig(urls=(one, two)).build()


Handler = Callable[[httpx.Request], httpx.Response]


def pool(*handlers: Handler, **settings: Any) -> ServiceGenerator:
    """A generator over replicas that answer as `handlers` say."""
    hosts = {f"replica{i}": handler for i, handler in enumerate(handlers)}
    config = ServiceConfig(**{"urls": tuple(f"http://{host}" for host in hosts), "retry": QUICK} | settings)
    transport = httpx.MockTransport(lambda request: hosts[request.url.host](request))
    return ServiceGenerator(config, ServiceInfo("m", {}, 1), transport)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def bomb() -> bytes:
    """A small file that says it is 50000x50000 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def good(request: httpx.Request) -> httpx.Response:
    image = base64_of(png(RED.image))
    return httpx.Response(200, json={"image": image, "seed": 3, "seconds": 0.1, "model": "m"})


def answering(status: int = 200, **more: Any) -> Handler:
    return lambda request: httpx.Response(status, **more)


BAD_ANSWERS: dict[str, httpx.Response] = {
    "not JSON": httpx.Response(200, content=b"<html>"),
    "no picture": httpx.Response(200, json={"model": "m"}),
    "a number": httpx.Response(200, json={"model": "m", "image": 3}),
    "not base64": httpx.Response(200, json={"model": "m", "image": "§"}),
    "text": httpx.Response(200, json={"model": "m", "image": base64_of(b"hello")}),
    "bomb": httpx.Response(200, json={"model": "m", "image": base64_of(bomb())}),
    "other model": httpx.Response(200, json={"model": "n", "image": base64_of(png(RED.image))}),
    "a list": httpx.Response(200, json=[1]),
    "null": httpx.Response(200, content=b"null"),
    "too long": httpx.Response(200, content=b" " * 2000),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_a_service_that_answers_garbage_is_typed(name: str) -> None:
    assert failure(pool(lambda request: BAD_ANSWERS[name], max_answer_bytes=1024)).kind == "malformed_response"


@pytest.mark.parametrize(
    "bad", [answering(429), answering(503), answering(502), answering(500, json={"error": 1}), answering(200)]
)
def test_another_replica_is_asked_at_once(bad: Handler) -> None:
    asked = []

    def noted(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        return bad(request)

    generator = pool(noted, good, retry=RetryPolicy(initial_backoff=60, max_backoff=60, deadline=30))
    assert all(answer == RED for answer in together(generator, *[JOB] * 6))
    assert "/v1/generate" in asked


def test_a_broken_connection_is_asked_again_elsewhere() -> None:
    def gone(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("no route")

    assert drawn(pool(gone, good)) == RED
    assert failure(pool(gone)).kind == "unreachable"


def test_a_replica_that_comes_later_with_other_settings_gets_no_calls(capsys: pytest.CaptureFixture[str]) -> None:
    """It was still loading at the start, or was started again meanwhile."""
    steps, asked = [4], Counter[str]()

    def late(request: httpx.Request) -> httpx.Response:
        asked[request.url.path] += 1
        info = {"model": "m", "params": {"num_inference_steps": steps[0]}, "max_sources": 1}
        return good(request) if request.url.path == "/v1/generate" else httpx.Response(200, json=info)

    hosts = {"replica0": good, "replica1": late}
    config = ServiceConfig(urls=("http://replica0", "http://replica1"), retry=QUICK, probe_every=0.001)
    transport = httpx.MockTransport(lambda request: hosts[request.url.host](request))
    generator = ServiceGenerator(
        config, ServiceInfo("m", {"num_inference_steps": 28}, 1), transport, down={"http://replica1"}
    )

    async def main() -> None:
        while asked["/v1/info"] < 3:
            await generator.generate(JOB)
        assert not asked["/v1/generate"]
        steps[0] = 28
        while not asked["/v1/generate"]:
            await generator.generate(JOB)
        await generator.close()

    asyncio.run(main())
    said = capsys.readouterr().err
    assert said.count("http://replica1: generates with m {'num_inference_steps': 4}, not with m") == 1


def test_a_full_service_is_asked_again_when_it_says() -> None:
    answers = [httpx.Response(429, headers={"Retry-After": "0"}), good(None)]  # type: ignore[arg-type]
    assert drawn(pool(lambda request: answers.pop(0))) == RED
    assert failure(pool(answering(429))).kind == "rate_limited"


@pytest.mark.parametrize("status", [400, 401, 413, 422])
def test_what_is_refused_is_asked_once(status: int) -> None:
    asked = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(status, json={"error": {"kind": "invalid", "message": "no\nway"}})

    refused = failure(pool(handler, handler))
    assert refused.kind == ("denied" if status == 401 else "refused")
    assert "no way" in str(refused)
    assert len(asked) == 1


def test_a_request_that_kills_workers_is_sent_to_no_other_replica() -> None:
    asked = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(500, json={"error": {"kind": "worker_died", "message": "3 workers died at this request"}})

    said = failure(pool(handler, handler))
    assert (said.kind, len(asked)) == ("model_error", 1)
    assert "3 workers died at this request" in str(said)


# --- an images endpoint ----------------------------------------------------------------------------------------------


def endpoint(handler: Handler, **settings: Any) -> ImagesApiGenerator:
    config = ImagesApiConfig(**{"url": "http://example.test/v1/", "model": "m", "retry": QUICK} | settings)
    return ImagesApiGenerator(config, httpx.MockTransport(handler))


def image_answer(image: Image.Image = RED.image) -> httpx.Response:
    return httpx.Response(200, json={"created": 1, "data": [{"b64_json": base64_of(png(image))}]})


def test_words_are_sent_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "secret")
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return image_answer()

    settings = {"size": "64x64", "quality": "low", "extra": {"steps": 4}, "send_seed": True, "key_env": "SOME_KEY"}
    assert drawn(endpoint(handler, **settings)) == RED
    assert str(seen[0].url) == "http://example.test/v1/images/generations"
    assert seen[0].headers["authorization"] == "Bearer secret"
    assert json.loads(seen[0].content) == {
        "model": "m", "prompt": "a red circle", "n": 1, "size": "64x64", "quality": "low", "steps": 4, "seed": 3,
        "response_format": "b64_json",
    }  # fmt: skip
    monkeypatch.delenv("SOME_KEY")
    drawn(endpoint(handler, response_format=None, key_env="SOME_KEY"))
    assert json.loads(seen[1].content) == {"model": "m", "prompt": "a red circle", "n": 1}
    assert "authorization" not in seen[1].headers


def test_edits_are_sent_as_a_form() -> None:
    """Read by the parser of a real server."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    seen: list[tuple[dict[str, Any], list[str]]] = []

    async def edits(request: Request) -> JSONResponse:
        form = await request.form()
        pictures: list[HashedImage] = []
        for one in form.getlist("image[]"):
            assert not isinstance(one, str)
            pictures.append(HashedImage.from_pil(Image.open(io.BytesIO(await one.read()))))
        words = {name: value for name, value in form.items() if isinstance(value, str)}
        seen.append((words, [picture.id for picture in pictures]))
        return JSONResponse({"data": [{"b64_json": base64_of(png(pictures[-1].image))}]})

    app = Starlette(routes=[Route("/v1/images/edits", edits, methods=["POST"])])
    config = ImagesApiConfig(url="http://example.test/v1", model="m", max_references=2, extra={"on": True}, retry=QUICK)
    generator = ImagesApiGenerator(config, httpx.ASGITransport(app))
    assert drawn(generator, GenerationRequest("make it blue", (RED, BLUE), 3)) == BLUE
    words = {"model": "m", "prompt": "make it blue", "n": "1", "response_format": "b64_json", "on": "true"}
    assert seen == [(words, [RED.id, BLUE.id])]
    assert failure(ImagesApiGenerator(config), GenerationRequest("a", (RED,) * 3, 1)).kind == "refused"


BAD_IMAGES: dict[str, tuple[httpx.Response, str]] = {
    "not JSON": (httpx.Response(200, content=b"<html>"), "malformed_response"),
    "no data": (httpx.Response(200, json={"data": []}), "malformed_response"),
    "null": (httpx.Response(200, json={"data": [None]}), "malformed_response"),
    "an error inside": (httpx.Response(200, json={"error": {"message": "the cat sat on it"}}), "refused"),
    "nothing in it": (httpx.Response(200, json={"data": [{}]}), "malformed_response"),
    "text": (httpx.Response(200, json={"data": [{"b64_json": base64_of(b"hello")}]}), "malformed_response"),
    "bomb": (httpx.Response(200, json={"data": [{"b64_json": base64_of(bomb())}]}), "malformed_response"),
    "too long": (httpx.Response(200, content=b" " * 2000), "malformed_response"),
    "wrong key": (httpx.Response(401, json={"error": {"message": "bad key"}}), "denied"),
    "moderated": (httpx.Response(400, json={"error": {"message": "not allowed"}}), "refused"),
    "elsewhere": (httpx.Response(302, headers={"Location": "http://other.test"}), "refused"),
    "full": (httpx.Response(429), "rate_limited"),
    "ill": (httpx.Response(500), "server_error"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_an_endpoint_that_misbehaves_is_typed(name: str) -> None:
    answer, kind = BAD_IMAGES[name]
    assert failure(endpoint(lambda request: answer, max_answer_bytes=1024)).kind == kind


@pytest.mark.parametrize("status", [200, 400, 401, 500])
def test_the_words_of_an_error_are_passed_on_without_the_key(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setenv("INTERLEAVE_API_KEY", "very-secret")

    def echo(request: httpx.Request) -> httpx.Response:
        return httpx.Response(status, json={"error": f"the cat sat on {request.headers['authorization']}"})

    said = failure(endpoint(echo))
    assert "the cat sat on Bearer ..." in str(said)
    assert "very-secret" not in str(said) + repr(said.__cause__)


def test_what_passes_is_asked_again() -> None:
    answers = [httpx.Response(500), image_answer()]
    assert drawn(endpoint(lambda request: answers.pop(0))) == RED

    def gone(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("slow")

    assert failure(endpoint(gone)).kind == "timeout"


def test_addresses_are_fetched_only_where_allowed_and_without_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERLEAVE_API_KEY", "secret")
    seen: list[httpx.Request] = []

    def handler(scheme: str, content: bytes, name: str = "a.png") -> Handler:
        def answer(request: httpx.Request) -> httpx.Response:
            seen.append(request)
            if request.url.path == "/short":  # as Together answers
                return httpx.Response(302, headers={"location": "https://other.test/a.png?sig=1%2F2"})
            if request.method == "GET":
                return httpx.Response(200, content=content)
            return httpx.Response(200, json={"data": [{"url": f"{scheme}://files.test/{name}"}]})

        return answer

    assert drawn(endpoint(handler("https", png(BLUE.image), "short"), allow_addresses=True)) == BLUE
    assert str(seen[-1].url) == "https://other.test/a.png?sig=1%2F2"
    assert ["authorization" in request.headers for request in seen] == [True, False, False]
    assert drawn(endpoint(handler("https", png(BLUE.image)), allow_addresses=True)) == BLUE
    for scheme, allowed in (("https", False), ("http", True), ("file", True)):  # all other images would be lost as well
        (said,) = together(endpoint(handler(scheme, png(BLUE.image)), allow_addresses=allowed), JOB)
        assert isinstance(said, UserError)
        assert "set response_format: b64_json" in str(said)
    assert failure(endpoint(handler("https", bomb()), allow_addresses=True)).kind == "malformed_response"
    large = endpoint(handler("https", b" " * 3000), allow_addresses=True, max_answer_bytes=1024)
    assert failure(large).kind == "malformed_response"


@pytest.mark.parametrize(
    ("get", "said", "gets"),
    [
        (httpx.ConnectError("Name or service not known"), "cannot be reached", 3),
        (httpx.ReadTimeout("slow"), "no answer within", 3),
        (httpx.Response(503, text="busy"), "status 503: busy", 3),
        (httpx.Response(404, text="gone"), "status 404: gone", 1),
        (httpx.Response(403, text="<Code>AccessDenied</Code>"), "status 403", 1),
        (httpx.Response(302, headers={"location": "http://other.test/b.png?sig=SIGNATURE"}), "status 302", 1),
        (httpx.Response(302, headers={"location": "https://files.test/a.png?sig=SIGNATURE"}), "moved on more than", 6),
        (httpx.Response(200, text="<html>Just a moment...</html>"), "not an image of an allowed format", 1),
    ],
    ids=["no host", "slow", "busy", "gone", "not allowed", "without TLS", "in a circle", "a page"],
)
def test_a_file_that_cannot_be_fetched_does_not_buy_another_image(
    get: httpx.Response | Exception, said: str, gets: int
) -> None:
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.method)
        if request.method == "POST":
            return httpx.Response(200, json={"data": [{"url": "https://files.test/a.png?sig=SIGNATURE"}]})
        if isinstance(get, Exception):
            raise get
        return get

    retry = {"max_tries": 3, "initial_backoff": 0.001}
    found = failure(endpoint(answer, allow_addresses=True, retry=retry))
    message = str(found)
    assert found.kind != "denied"
    assert (seen.count("POST"), seen.count("GET")) == (1, gets)
    assert said in message
    assert message.count("https://files.test/a.png: ") == (said in message and "allowed format" not in said)
    assert "set it to get the image itself" in message
    for wrong in ("SIGNATURE", "INTERLEAVE_API_KEY", "/v1", "as url"):
        assert wrong not in message


def wrapped_lines(text: str) -> str:
    return "\r\n".join(text[i : i + 76] for i in range(0, len(text), 76)) + "\n"


@pytest.mark.parametrize(
    "written",
    [
        lambda text: f"data:image/png;base64,{text}",
        wrapped_lines,
        lambda text: f"data:image/png;base64,{wrapped_lines(text)}",
        lambda text: text.rstrip("="),
        lambda text: text.translate(str.maketrans("+/", "-_")).rstrip("="),
        lambda text: f" {text} ",
    ],
)
def test_an_image_in_any_writing_of_base64_is_read(written: Callable[[str], str]) -> None:
    image = HashedImage.from_pil(Image.effect_noise((17, 9), 50).convert("RGB"))
    encoded = written(base64_of(png(image.image)))
    assert drawn(endpoint(answering(json={"data": [{"b64_json": encoded}]}))) == image
    assert drawn(endpoint(answering(content=png(image.image)))) == image  # the file itself
    uri = f"data:image/png;base64,{base64_of(png(image.image))}"
    assert drawn(endpoint(answering(json={"data": [{"b64_json": "", "url": uri}]}))) == image
    assert drawn(pool(answering(json={"model": "m", "image": encoded}))) == image
    if encoded.startswith("data:"):
        assert drawn(endpoint(answering(json={"data": [{"url": encoded}]}))) == image


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        ({"error": {"message": "not allowed by our policy"}}, "refused", "not allowed by our policy"),
        ({"error": {"message": "later", "code": 429}}, "rate_limited", "later"),
        ({"data": None, "error": {"message": "broke", "status": 500}}, "server_error", "broke"),
        ({"data": [{"error": {"code": "content_policy_violation", "message": "no"}}]}, "refused", ": no"),
        ({"data": None, "base_resp": {"status_code": 1026, "status_msg": "input new_sensitive"}}, "refused", "new_s"),
        ({"data": [{"url": "x"}], "has_nsfw_concepts": [True]}, "refused", "blacked out or held back"),
        ({"data": [{"is_image_safe": False, "url": None}]}, "refused", "blacked out or held back"),
        ({"data": [{"b64_json": "x", "nsfw_content_detected": True}]}, "refused", "blacked out or held back"),
        ({"error": {"code": 0, "message": "no such style"}}, "refused", "no such style"),
        ({"data": None}, "malformed_response", "no image in the answer"),
        ({"id": "job-1", "status": "queued"}, "malformed_response", "no image in the answer"),
        ({"task_id": 7, "polling_url": "/7"}, "malformed_response", "no image in the answer"),
        ({"data": [{"b64_json": None, "url": 7}]}, "malformed_response", "no image in the answer"),
        ({"detail": "the model loads"}, "malformed_response", "the model loads"),
    ],
)
def test_errors_of_an_images_endpoint_under_status_200(body: Any, kind: str, words: str) -> None:
    failed = failure(endpoint(answering(json=body)))
    assert failed.kind == kind
    assert words in str(failed)


@pytest.mark.parametrize(
    ("body", "tries"),
    [
        ({"id": "1", "status": "queued"}, 1),
        ({"polling_url": "/7"}, 1),
        ({"data": [{"b64_json": ""}]}, 1),
        ({"data": [{"b64_json": "%"}]}, 1),
        ({"data": [{"b64_json": base64.b64encode(png(RED.image)[:60]).decode()}]}, 1),
        ({"artifacts": [{"base64": "eA=="}]}, 1),
        ({"result": {"image": "eA=="}, "success": True}, 1),
        ({"output": {"image": "https://a.test/1.png"}, "usage": {"image_count": 1}}, 1),
        (b'event: image_generation.completed\ndata: {"b64_json": "eA=="}\n\n', 1),
        (b"GIF89a\1\0\1\0\0\0\0;", 1),
        (b"<html>starting</html>", 3),
        ({"detail": "the model loads"}, 3),
    ],
)
def test_what_may_be_charged_for_is_asked_for_once(body: Any, tries: int) -> None:
    asked: list[int] = []
    retry = RetryPolicy(max_tries=3, initial_backoff=0.001)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    said = failure(endpoint(lambda request: asked.append(1) or httpx.Response(200, content=content), retry=retry))
    assert ("it streams its answers" in str(said)) == (content[:6] == b"event:")
    assert len(asked) == tries


def test_an_image_behind_lines_that_kept_the_connection_open_is_read() -> None:
    answer = json.dumps({"data": [{"b64_json": base64.b64encode(png(RED.image)).decode()}]}).encode()
    for before in (b": keep-alive\n\n" * 3, b"\n \n"):
        made = endpoint(lambda request, before=before: httpx.Response(200, content=before + answer))
        assert drawn(made) == RED


@pytest.mark.parametrize("error", [{"message": "", "type": "", "code": None}, {"code": 0, "message": "success"}])
def test_an_error_that_says_nothing_is_none(error: Any) -> None:
    encoded = base64.b64encode(png(RED.image)).decode()
    answer = httpx.Response(200, json={"data": [{"b64_json": encoded}], "error": error})
    assert drawn(endpoint(lambda request: answer)) == RED


@pytest.mark.parametrize("broken", [httpx.RemoteProtocolError("cut"), httpx.ReadError("reset")])
def test_an_image_whose_answer_is_cut_short_is_not_asked_for_again(broken: Exception) -> None:
    asked: list[int] = []

    class Cut(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield b'{"data": [{"b64_json": "'
            raise broken

    said = failure(endpoint(lambda request: asked.append(1) or httpx.Response(200, stream=Cut())))
    assert (said.kind, len(asked)) == ("malformed_response", 1)
    assert "its answer was cut short" in str(said)


@pytest.mark.parametrize("broken", [httpx.RemoteProtocolError("no response"), httpx.ReadError("reset")])
def test_an_image_whose_connection_is_lost_after_a_while_is_not_asked_for_again(
    broken: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imgen_common.http.retry.LOST_SECONDS", 0.0)
    asked: list[int] = []

    def lose(request: httpx.Request) -> httpx.Response:
        asked.append(1)
        raise broken

    assert failure(endpoint(lose, retry=RetryPolicy(initial_backoff=0.001))).kind == "unreachable"
    assert len(asked) == 1


@pytest.mark.slow
def test_a_services_own_deadline_is_named() -> None:
    backend = InProcess(ScriptedGenerator(latency=60.0))
    with hosted(backend, config=ServeConfig(deadline=0.2)) as url:
        said = str(failure(ServiceGenerator.connect(ServiceConfig(urls=(url,)))))
    assert said.endswith("the image was not ready within 0.2 s; raise the service's own deadline")


@pytest.mark.parametrize("reason", ["CONTENT_FILTERED", "content_filter"])
def test_an_image_that_a_filter_blacked_out_is_refused(reason: str) -> None:
    black = base64.b64encode(png(Image.new("RGB", (8, 8)))).decode()
    answer = httpx.Response(200, json={"data": [{"b64_json": black, "finish_reason": reason}]})
    said = failure(endpoint(lambda request: answer))
    assert (said.kind, reason in str(said)) == ("refused", True)
    fine = httpx.Response(200, json={"data": [{"b64_json": black, "finish_reason": "SUCCESS"}]})
    assert drawn(endpoint(lambda request: fine)).image.size == (8, 8)


def test_a_request_that_is_too_large_for_a_proxy_is_said_in_words() -> None:
    page = "<html>\r\n<head><title>413 Request Entity Too Large</title></head><body><hr>nginx</body></html>"
    said = str(failure(endpoint(lambda request: httpx.Response(413, text=page))))
    assert "status 413: 413 Request Entity Too Large; send smaller images, or raise the server's limit (nginx" in said
    assert "<" not in said


@pytest.mark.parametrize("status", [404, 405])
def test_an_endpoint_without_edits_is_said_to_be_one(status: int) -> None:
    edit, plain = replace(JOB, sources=(RED,)), replace(JOB, sources=())
    made = endpoint(lambda request: httpx.Response(status, text="Not Found"))
    assert "(asked for /images/edits); if it makes no edits, name another generator" in str(failure(made, edit))
    assert "/images/edits" not in str(failure(made, plain))


@pytest.mark.parametrize("config", [ImagesApiConfig, EndpointChatConfig])
@pytest.mark.parametrize("number", [0, 4, "2", [1]])
def test_several_answers_to_a_request_are_not_asked_for(config: Any, number: Any) -> None:
    with pytest.raises(ValidationError, match="only the first of several answers would be used; leave it out"):
        config(extra={"n": number})
    assert config(extra={"n": 1}).extra == {"n": 1}
    assert config(extra={"n": None}).extra == {"n": None}


def test_null_leaves_a_key_of_a_request_out() -> None:
    sent: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content))
        return image_answer()

    drawn(endpoint(answer, extra={"n": None, "response_format": None, "user": "me"}), JOB)
    assert sent[0].keys() & {"n", "response_format", "user"} == {"user"}


@pytest.mark.parametrize("answer", [httpx.ReadTimeout("slow"), httpx.WriteTimeout("slow"), 504, 524, None])
def test_an_image_that_took_too_long_is_not_asked_for_again(answer: Any) -> None:
    asked: list[int] = []

    async def slow(request: httpx.Request) -> httpx.Response:
        asked.append(1)
        if isinstance(answer, Exception):
            raise answer
        if answer is None:
            await asyncio.sleep(60)
        return httpx.Response(answer, text="the origin took too long")

    retry = RetryPolicy(max_tries=3, initial_backoff=0.001, timeout=0.2)
    said = failure(endpoint(slow, retry=retry))
    assert len(asked) == 1
    assert answer in (504, 524) or "no answer within 0.2 s; if it needs longer, raise retry.timeout" in str(said)


@pytest.mark.parametrize(
    ("words", "settings", "remedy"),
    [
        ("Unknown parameter: 'response_format'.", {}, "if it does not take response_format, set response_format: null"),
        ("Additional properties are not allowed ('seed' was unexpected)", {"send_seed": True}, "set send_seed: false"),
        ("Invalid value: 'best' for quality", {"quality": "best"}, "set quality: null"),
        ("the size of the prompt is too large", {}, None),
    ],
)
@pytest.mark.parametrize("status", [400, 422])
def test_a_key_that_the_server_does_not_take_is_said(
    words: str, settings: dict[str, Any], remedy: str | None, status: int
) -> None:
    asked: list[int] = []
    answer = httpx.Response(status, json={"error": {"message": words, "type": "invalid_request_error"}})
    said = failure(endpoint(lambda request: asked.append(1) or answer, **settings))
    assert (said.kind, len(asked)) == ("refused", 1)
    assert words in str(said)
    assert ("; if it does not take" in str(said)) == (remedy is not None)
    assert remedy is None or str(said).endswith(remedy)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, {"message": "Billing hard limit has been reached", "code": "billing_hard_limit_reached"}),
        (401, {"message": "Request had invalid authentication credentials", "status": "UNAUTHENTICATED"}),  # of an hour
        (402, {}),
        (403, {"message": "Key limit exceeded (total limit). Manage it at ...", "code": 403}),
        (404, "ERR_NGROK_3200"),
    ],
)
def test_an_endpoint_that_takes_no_request_does_not_refuse_the_image(status: int, error: Any) -> None:
    """With another key, new credit or at its new address the same image is drawn."""
    assert failure(endpoint(lambda request: httpx.Response(status, json={"error": error}))).kind == "denied"


@pytest.mark.parametrize("answer", [{"created": 1, "data": []}, {"data": [{"b64_json": None}]}])
def test_a_server_whose_answers_have_no_image_is_not_down(answer: Any) -> None:
    """As those to prompts that a filter held back."""
    generator = endpoint(lambda request: httpx.Response(200, json=answer), retry=RetryPolicy(failure_threshold=1))
    assert [one.kind for one in together(generator, JOB, JOB)] == ["malformed_response"] * 2  # type: ignore[union-attr]
    assert failure(generator).kind == "malformed_response"


def test_errors_of_an_images_endpoint_open_the_breaker() -> None:
    asked: list[int] = []
    generator = endpoint(
        lambda request: asked.append(1) or httpx.Response(500), retry=RetryPolicy(max_tries=1, failure_threshold=3)
    )

    async def main() -> list[Any]:
        return [(await asyncio.gather(generator.generate(JOB), return_exceptions=True))[0].kind for _ in range(5)]

    assert asyncio.run(main()) == ["server_error"] * 3 + ["unreachable"] * 2
    assert len(asked) == 3


@pytest.mark.parametrize("revised", ["A red circle, in oil.", "赤い円", "two\nlines"])
def test_a_revised_prompt_is_kept_and_goes_through_the_cache(revised: str, tmp_path: Path) -> None:
    entry = {"b64_json": base64_of(png(RED.image)), "revised_prompt": revised}
    cached = CachedGenerator(endpoint(answering(json={"data": [entry]})), tmp_path)
    again = CachedGenerator(endpoint(answering(500)), tmp_path)
    assert [drawn(generator).revised_prompt for generator in (cached, again)] == [revised, revised]
    none = endpoint(answering(json={"data": [entry | {"revised_prompt": None}]}))
    assert drawn(none).revised_prompt is None


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="must be like"):
        ImagesApiConfig(url="example.test").build()
    assert ImagesApiConfig(model="m").build().id == "m"
