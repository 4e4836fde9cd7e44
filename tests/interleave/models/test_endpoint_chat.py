"""An OpenAI-compatible endpoint that behaves, and one that does not."""

import asyncio
import base64
import contextlib
import io
import json
import math
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from backends import FakeGenerator
from PIL import Image
from pydantic import ValidationError

from imgen_common.config import load
from imgen_common.errors import UserError
from imgen_common.http import RetryPolicy
from interleave.agents.critic import ChatCritic
from interleave.agents.parsing import parse_verdict
from interleave.agents.planner import ChatPlanner
from interleave.agents.prompts import load_template
from interleave.loop.config import (
    LoopConfig,
    ModelCritic,
    NoCritic,
    RandomCritic,
    RationalRewardsCritic,
    RunConfig,
    SelfCritic,
)
from interleave.loop.run import check_endpoints
from interleave.models.chat.endpoint import EndpointChat, EndpointChatConfig
from interleave.protocols import BackendError, Components, HashedImage, Reply
from interleave.records import Verdict

RED = HashedImage.from_pil(Image.new("RGB", (4, 4), "red"))
QUICK = RetryPolicy(max_tries=2, initial_backoff=1e-6, deadline=5)


def completion(text: Any = "hello", **choice: Any) -> dict[str, Any]:
    first = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"} | choice
    return {"choices": [first], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}


def endpoint(handler: Callable[[httpx.Request], httpx.Response], **settings: Any) -> EndpointChat:
    config = EndpointChatConfig(**{"url": "http://example.test/v1", "model": "m", "retry": QUICK} | settings)
    return EndpointChat(config, httpx.MockTransport(handler))


def ask(model: EndpointChat, message: Any = ("hi",), seed: int = 3) -> Reply:
    async def main() -> Reply:
        try:
            return await model.chat(message, seed)
        finally:
            await model.close()
            await model.close()

    return asyncio.run(main())


def failure(model: EndpointChat) -> BackendError:
    with pytest.raises(BackendError) as caught:
        ask(model)
    return caught.value


def test_what_is_sent_and_what_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "secret")
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json=completion("fine"))

    model = endpoint(handler, key_env="SOME_KEY", temperature=0.5, extra={"top_k": 9})
    reply = ask(model, (RED, "look at ", "this"))
    assert (reply.text, reply.num_prompt_tokens, reply.num_completion_tokens, reply.truncated) == ("fine", 7, 3, False)
    body = json.loads(seen[0].content)
    assert str(seen[0].url) == "http://example.test/v1/chat/completions"
    assert seen[0].headers["authorization"] == "Bearer secret"
    assert (body["model"], body["temperature"], body["seed"], body["top_k"]) == ("m", 0.5, 3, 9)
    parts = body["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_url", "text", "text"]
    sent = base64.b64decode(parts[0]["image_url"]["url"].partition(",")[2])
    assert HashedImage.from_pil(Image.open(io.BytesIO(sent))).id == RED.id
    assert "detail" not in parts[0]["image_url"]
    ask(close := endpoint(handler, image_detail="high"), (RED, "look"))
    assert json.loads(seen[1].content)["messages"][0]["content"][0]["image_url"]["detail"] == "high"
    assert "detail=high" in close.id


def test_large_images_are_sent_smaller() -> None:
    noise = HashedImage.from_pil(Image.effect_noise((300, 200), 5).convert("RGB"))
    sent: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content)["messages"][0]["content"][0]["image_url"]["url"])
        return httpx.Response(200, json=completion())

    settings = ({}, {"max_pixels": 15000}, {"max_image_bytes": 40000}, {"max_image_bytes": 16384})
    models = [endpoint(handler, **one) for one in settings]
    for model in models:
        ask(model, (noise, "look"))
    assert len({model.id for model in models}) == 4
    kinds, data = zip(*(address.split(";base64,") for address in sent), strict=True)
    files = [base64.b64decode(one) for one in data]
    assert kinds == ("data:image/png", "data:image/png", "data:image/jpeg", "data:image/jpeg")
    sizes = [Image.open(io.BytesIO(file)).size for file in files]
    assert sizes[:3] == [(300, 200), (150, 100), (300, 200)]
    assert sizes[3][0] < 300
    assert len(files[2]) < 40000 < len(files[0])
    assert len(files[3]) <= 16384


def test_without_a_key_none_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INTERLEAVE_API_KEY", raising=False)
    seen: list[httpx.Request] = []
    ask(endpoint(lambda request: seen.append(request) or httpx.Response(200, json=completion())))
    assert "authorization" not in seen[0].headers


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_refusals_say_why_once_and_without_the_key(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERLEAVE_API_KEY", "topsecret")
    calls: list[int] = []

    def handler(request: httpx.Request) -> httpx.Response:
        calls.append(1)
        return httpx.Response(status, json={"error": {"message": "no\n\x1b[31m such, topsecret" + "!" * 9999}})

    found = failure(endpoint(handler))
    assert found.kind == ("denied" if status in (401, 403, 404) else "refused")
    assert len(calls) == 1
    assert f"http://example.test/v1: status {status}: no [31m such" in str(found)
    assert len(str(found)) < 500
    assert not set("\x1b\n") & set(str(found))
    assert "topsecret" not in str(found)
    assert ("INTERLEAVE_API_KEY" in str(found)) == (status in (401, 403))


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 529])
def test_a_busy_server_is_asked_again(status: int) -> None:
    answers = [httpx.Response(status, headers={"retry-after": "0"}), httpx.Response(200, json=completion("later"))]
    assert ask(endpoint(lambda request: answers.pop(0))).text == "later"
    found = failure(endpoint(lambda request: httpx.Response(status)))
    assert found.kind == ("rate_limited" if status < 500 else "server_error")


@pytest.mark.parametrize(
    "body",
    [
        *(b"<html>", b"", b"[]", b"{}", b"[" * 100_000, b"\xff", b'{"choices": []}'),
        b'{"choices": [{"message": {"content": null}}]}',
    ],
)
def test_malformed_answers_are_requested_again_then_reported(body: bytes) -> None:
    answers = [httpx.Response(200, content=body), httpx.Response(200, json=completion("good"))]
    assert ask(endpoint(lambda request: answers.pop(0))).text == "good"
    assert failure(endpoint(lambda request: httpx.Response(200, content=body))).kind == "malformed_response"


def test_an_answer_without_end_is_cut() -> None:
    found = failure(endpoint(lambda r: httpx.Response(200, content=b"x" * 5000), max_answer_bytes=2048))
    assert found.kind == "malformed_response"
    assert "2048 bytes" in str(found)


def test_no_connection() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("no route to host")

    assert failure(endpoint(handler)).kind == "unreachable"
    with pytest.raises(UserError, match=r"http://example.test/v1: cannot be reached \(no route to host\); start the"):
        asyncio.run(endpoint(handler).check())


def test_it_is_asked_from_one_event_loop_after_the_other() -> None:
    """As in a notebook; a connection that is kept open belongs to the loop that opened it."""

    class Answers(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            body = json.dumps({"choices": [{"message": {"content": "yes"}}]}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    async def ask(chat: EndpointChat) -> list[str]:
        replies = await asyncio.gather(*(chat.chat((str(number),), 0) for number in range(3)))
        return [reply.text for reply in replies]

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        chat = EndpointChat(EndpointChatConfig(url=f"http://127.0.0.1:{server.server_port}/v1", concurrency=1))
        for _ in range(2):
            assert asyncio.run(ask(chat)) == ["yes"] * 3
        asyncio.run(chat.close())
        server.shutdown()


def test_a_slow_server() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("slow")

    assert failure(endpoint(handler)).kind == "timeout"


@pytest.mark.parametrize("given", ["Bearer {}", "bearer  {}", '"{}"', "'Bearer {}'"])
def test_a_key_with_its_scheme_is_sent_and_hidden_without(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERLEAVE_API_KEY", given.format("sk-proj-very-secret"))

    def handler(request: httpx.Request) -> httpx.Response:
        assert request.headers["Authorization"] == "Bearer sk-proj-very-secret"
        return httpx.Response(401, json={"error": {"message": "Incorrect key provided: sk-proj-very-secret."}})

    with pytest.raises(UserError, match=r"Incorrect key provided: \.\.\.") as error:
        asyncio.run(endpoint(handler).check())
    assert "very-secret" not in str(error.value)


def test_the_key_follows_no_redirect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERLEAVE_API_KEY", "secret")
    hosts: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        hosts.append(request.url.host)
        return httpx.Response(307, headers={"location": "http://other.test/v1/chat/completions"})

    found = failure(endpoint(handler))
    assert found.kind == "refused"
    assert "it points to http://other.test/v1/chat/completions: give that address as url" in str(found)
    assert hosts == ["example.test"]


@pytest.mark.parametrize(
    "url", ["ftp://x/v1", "x", "http://", "http://name:key@x/v1", "http://x/v1?key=1", "http://x:y/", "http://[x"]
)
def test_bad_addresses(url: str) -> None:
    with pytest.raises(UserError, match="must be like"):
        EndpointChat(EndpointChatConfig(url=url))


@pytest.mark.parametrize("key", ["gehe\u00efm", "se\ncret", "\u043a\u043b\u044e\u0447"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERLEAVE_API_KEY", key)
    with pytest.raises(UserError, match="INTERLEAVE_API_KEY: holds characters that no token has") as caught:
        EndpointChat(EndpointChatConfig())
    assert key not in str(caught.value)


def test_white_space_around_a_key_is_no_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERLEAVE_API_KEY", "secret\n")
    seen: list[httpx.Request] = []
    ask(endpoint(lambda request: seen.append(request) or httpx.Response(200, json=completion())))
    assert seen[0].headers["authorization"] == "Bearer secret"


def test_a_check_says_what_to_mend(capsys: pytest.CaptureFixture[str]) -> None:
    def check(answer: httpx.Response) -> None:
        asyncio.run(endpoint(lambda request: answer).check())

    for answer, message in [
        (httpx.Response(401), "http://example.test/v1: status 401: ; set INTERLEAVE_API_KEY to a valid key"),
        (
            httpx.Response(404, json={"message": "no model m"}),
            "status 404: no model m; start the server, or correct url",
        ),
        (httpx.Response(500), "status 500"),
        (
            httpx.Response(400, json={"error": {"message": "Model Not Exist"}}),
            r"Model Not Exist; correct model \('m'\)",
        ),
        (httpx.Response(400, json={"message": "x/y is not a valid model ID"}), r"ID; correct model \('m'\)"),
        (httpx.Response(402, json={"error": "Payment Required"}), "; pay for more, or raise the limit of the account"),
        (httpx.Response(400, json={"error": "Your credit balance is too low"}), "too low; pay for more, or raise"),
        (httpx.Response(200, text="<html>"), "not a chat completion"),
        (
            httpx.Response(200, json={"choices": [{"message": {"role": "assistant"}, "finish_reason": "stop"}]}),
            r"answered nothing \(finish_reason stop\); run this again; if it does again, raise max_new_tokens",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            check(answer)
    check(httpx.Response(200, json=completion()))
    check(httpx.Response(429))
    split_off = {"message": {"content": None, "reasoning": "<answer>yes</answer>"}, "finish_reason": "stop"}
    check(httpx.Response(200, json={"choices": [split_off]}))
    assert "all words stand in the reasoning" in capsys.readouterr().err


def test_null_leaves_a_key_of_the_request_out() -> None:
    seen: list[Any] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(json.loads(request.content))
        return httpx.Response(200, json=completion())

    extra = {"max_tokens": None, "temperature": None, "max_completion_tokens": 99}
    model = endpoint(handler, extra=extra, send_seed=False)
    ask(model)
    assert not {"max_tokens", "temperature", "seed"} & set(seen[0])
    assert seen[0]["max_completion_tokens"] == 99
    assert model.id != endpoint(handler).id


def test_cut_answers_and_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    reply = ask(endpoint(lambda request: httpx.Response(200, json=completion(parts, finish_reason="length"))))
    assert (reply.text, reply.truncated) == ("ab", True)


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_that_a_server_split_off_goes_back(name: str) -> None:
    def text(content: str | None, finish: str) -> tuple[str, bool]:
        message = {"role": "assistant", "content": content, name: "so"}
        answer = {"choices": [{"message": message, "finish_reason": finish}]}
        reply = ask(endpoint(lambda request: httpx.Response(200, json=answer)))
        return reply.text, reply.truncated

    assert text("<answer>1</answer>", "stop") == ("<think>so</think><answer>1</answer>", False)
    assert text("<think>I</think>", "stop") == ("<think>I</think>", False)
    assert text(None, "length") == ("<think>so</think>", True)


@pytest.mark.parametrize(
    ("behaviour", "kind", "says"),
    [
        ("closed", "unreachable", "cannot be reached"),
        ("silent", "timeout", "no answer within"),
        ("trickle", "timeout", "no answer within"),
        ("endless", "malformed_response", "more than 4096 bytes"),
        ("cut", "malformed_response", "its answer was cut short"),
        ("not http", "unreachable", "cannot be reached"),
    ],
)
def test_servers_on_a_real_socket(behaviour: str, kind: str, says: str) -> None:
    start = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write({"silent": b"", "not http": b"220 mail.test ESMTP\r\n"}.get(behaviour, start))
            while behaviour in ("trickle", "endless", "silent"):
                writer.write({"trickle": b"x", "endless": b"x" * 1000, "silent": b""}[behaviour])
                await writer.drain()
                await asyncio.sleep(0 if behaviour == "endless" else 0.02)
        writer.close()

    async def main() -> BackendError:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        if behaviour == "closed":
            server.close()
        calls = RetryPolicy(max_tries=2, initial_backoff=1e-6, timeout=0.3)
        model = EndpointChat(EndpointChatConfig(url=f"http://127.0.0.1:{port}/v1", retry=calls, max_answer_bytes=4096))
        with pytest.raises(BackendError) as caught:
            await model.chat(("hi",), 0)
        await model.close()
        server.close()
        return caught.value

    found = asyncio.run(main())
    assert found.kind == kind
    assert says in str(found)
    assert "127.0.0.1" in str(found)


@pytest.mark.parametrize(
    "choice",
    [
        {"message": {"content": None, "refusal": "I will not."}},
        {"message": {"content": "I will not."}, "finish_reason": "content_filter"},
        {"message": {"content": [{"type": "refusal", "refusal": "I will not."}]}},
    ],
)
def test_a_refusal_keeps_its_words_is_asked_once_and_harms_no_other(choice: dict[str, Any]) -> None:
    asked: list[int] = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append(1)
        return httpx.Response(200, json={"choices": [choice]} if len(asked) <= 9 else completion("fine"))

    async def main() -> tuple[list[Any], Reply]:
        model = endpoint(handler)
        refused = [await asyncio.gather(model.chat(("hi",), 0), return_exceptions=True) for _ in range(9)]
        return refused, await model.chat(("hi",), 0)

    refused, reply = asyncio.run(main())
    assert {(one.kind, "I will not." in str(one)) for (one,) in refused} == {("refused", True)}
    assert (reply.text, reply.finish_reason, len(asked)) == ("fine", "stop", 10)


@pytest.mark.parametrize("content", ["I looked.</think><answer>{}</answer>", "</think>\n<answer>{}</answer>"])
@pytest.mark.parametrize("mode", ["strict", "tolerant"])
def test_a_template_that_opens_the_thought_is_read_in_both_modes(content: str, mode: Any) -> None:
    verdict = json.dumps({"previous_step_success": True, "refine_prompt": "a cat"})
    said = completion(content.replace("{}", verdict))
    reply = ask(endpoint(lambda request: httpx.Response(200, json=said)))
    assert isinstance(parse_verdict(reply.text, mode), Verdict)


@pytest.mark.parametrize("mode", ["strict", "tolerant"])
def test_reasoning_that_is_empty_is_a_thought(mode: Any) -> None:
    verdict = json.dumps({"previous_step_success": True, "refine_prompt": "a cat"})
    message = {"content": f"<answer>{verdict}</answer>", "reasoning_content": ""}
    reply = ask(endpoint(lambda request: httpx.Response(200, json={"choices": [{"message": message}]})))
    assert parse_verdict(reply.text, mode) == Verdict(success=True, refined_prompt="a cat")


def picky(*refused: str) -> Callable[[httpx.Request], httpx.Response]:
    """A server that takes some keys of a request not."""

    def handler(request: httpx.Request) -> httpx.Response:
        found = [key for key in refused if key in json.loads(request.content)]
        if found:
            return httpx.Response(400, json={"error": {"message": f"Unsupported parameter: {found[0]}"}})
        tokens = [{"token": "hello", "top_logprobs": [{"token": "hello", "logprob": -0.1}]}]
        more = {"logprobs": {"content": tokens}} if "logprobs" in json.loads(request.content) else {}
        return httpx.Response(200, json=completion(**more))

    return handler


@pytest.mark.parametrize(
    ("key", "mended"),
    [
        ("max_tokens", {"extra": {"max_completion_tokens": 512}}),
        ("temperature", {"extra": {"temperature": None}}),
        ("seed", {"send_seed": False}),
        ("top_p", {"extra": {"top_p": None}}),
        ("logprobs", {"top_logprobs": 0}),
    ],
)
def test_the_check_asks_as_the_run_will(key: str, mended: dict[str, Any]) -> None:
    settings = {"top_logprobs": 3}
    with pytest.raises(UserError, match=rf"Unsupported parameter: {key}; leave out .*send_seed: false"):
        asyncio.run(endpoint(picky(key), **settings).check())
    asyncio.run(endpoint(picky(key), **(settings | mended)).check())


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("At most 1 image(s) may be provided in one prompt.", "--limit-mm-per-prompt"),
        ("image input is not supported", "name one that reads them"),
        ("Prompting with images is incompatible with system messages.", "name a model whose chat template takes a"),
        ("System role not supported", "name a model whose chat template takes a system turn"),
        ("This model only supports streaming, please set stream to true", "answers are read whole here"),
        ("parameter.enable_thinking must be set to false for non-streaming calls", "extra: {enable_thinking: false}"),
        ("API key not valid. Please pass a valid API key.", "set INTERLEAVE_API_KEY to a valid key"),
        ("the upstream server answered: The model `Qwen/Qwen2.5-VL` does not exist.", "correct model ("),
        ("'max_tokens' is too large: 4096. The model's maximum context length is 2048", "set max_new_tokens lower"),
        ("the request exceeds the available context size, try increasing it", "serve the model with a longer context"),
        ("prompt is too long: 210000 tokens > 200000 maximum", "set max_new_tokens lower"),
    ],
)
@pytest.mark.parametrize("status", [400, 422, 500])
def test_the_check_says_what_to_do_about_the_servers_words(words: str, remedy: str, status: int) -> None:
    refusing = endpoint(lambda request: httpx.Response(status, json={"error": {"message": words}}))
    with pytest.raises(UserError) as caught:
        asyncio.run(refusing.check())
    assert words in str(caught.value)
    assert remedy in str(caught.value)
    assert "send_seed" not in str(caught.value)


@pytest.mark.parametrize("given", [{}, {"logprobs": None}, {"logprobs": {"content": []}}])
def test_the_check_finds_a_server_without_log_probabilities(given: dict[str, Any]) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=completion(**given))

    with pytest.raises(UserError, match=r"answers without the log-probabilities that top_logprobs: 5 asks for; set"):
        asyncio.run(endpoint(handler, top_logprobs=5).check())
    asyncio.run(endpoint(handler).check())


@pytest.mark.parametrize(
    ("critic", "is_known"),
    [
        (NoCritic(), False),
        (RandomCritic(), False),
        (RationalRewardsCritic(), False),
        (ModelCritic(model=EndpointChatConfig(url="http://host/v1", model="m")), False),
        (ModelCritic(model=EndpointChatConfig(url="http://host/v1", model="m", top_logprobs=5)), True),
        (ModelCritic(model=EndpointChatConfig(url="http://host/v1", model="m"), num_samples=4), True),
        (ModelCritic(), True),
        (SelfCritic(), True),
    ],
)
def test_a_choice_by_probability_needs_probabilities(critic: Any, is_known: bool) -> None:
    loop = LoopConfig(select="best_by_verdict_probability")
    with contextlib.nullcontext() if is_known else pytest.raises(ValidationError, match="top_logprobs above 0"):
        RunConfig(critic=critic, loop=loop)
    assert RunConfig(critic=critic).critic == critic


def test_a_choice_by_the_judge_needs_one() -> None:
    with pytest.raises(ValidationError, match="best_by_judge needs a judge; configure one"):
        RunConfig(loop=LoopConfig(select="best_by_judge"))


def test_the_check_of_a_critic_shows_two_images() -> None:
    seen: list[Any] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(json.loads(request.content)["messages"][0]["content"])
        return httpx.Response(200, json=completion())

    def built() -> EndpointChat:
        return endpoint(handler)

    text, images = load_template("planner_text"), load_template("planner_images")
    parts = Components(
        ChatPlanner(built(), text, images), ChatCritic(built(), load_template("critic")), FakeGenerator()
    )
    asyncio.run(check_endpoints(parts))
    assert [[part["type"] for part in content] for content in seen] == [["text"], ["image_url", "image_url", "text"]]
    seen.clear()
    asyncio.run(check_endpoints(parts, num_images=2))
    assert [part["type"] for part in seen[0]] == ["image_url", "image_url", "text"]


def test_a_key_that_a_model_repeats_is_in_no_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERLEAVE_API_KEY", "sk-topsecret")
    said = completion("your key is sk-topsecret", finish_reason="sk-topsecret")
    reply = ask(endpoint(lambda request: httpx.Response(200, json=said)))
    assert "topsecret" not in repr(reply)
    assert reply.text == "your key is ..."


@pytest.mark.parametrize(
    "settings",
    [
        {"extra": {"api_key": "pass-word"}},
        {"extra": {"headers": {"X-Api-Key": "pass-word"}}},
        {"extra": {"options": [{"password": "pass-word"}]}},
        {"extra": {"authorization": "pass-word"}},
        {"extra": {"user": "sk-pass-word"}},
        {"model": "sk-pass-word"},
        {"model": "hf_pass-word"},
        {"key_env": "sk-pass-word"},
        {"key_env": "hf_pass-word"},
        {"key_env": "$pass-word"},
        {"url": "http://me:pass-word@host/v1"},
        {"url": "http://host/v1?token=pass-word"},
    ],
)
@pytest.mark.parametrize("kind", ["model", "generator"])
def test_a_secret_in_a_configuration_is_refused_and_not_shown(settings: dict[str, Any], kind: str) -> None:
    tree = {"generator": {"kind": "images_api"} | settings}
    if kind == "model":
        tree = {"planner": {"kind": "model", "model": {"kind": "endpoint"} | settings}}
    with pytest.raises(UserError) as caught:
        RunConfig(**tree)  # type: ignore[arg-type]
    assert "pass-word" not in str(caught.value)
    assert "environment" in str(caught.value)


def test_a_key_in_place_of_its_variable_is_refused_and_not_shown() -> None:
    for given in ("hf_abc123", "'a'", "MY_KEY ", ""):
        with pytest.raises(UserError, match="must be the name of a variable of the environment") as caught:
            EndpointChatConfig(key_env=given)
        assert "abc123" not in str(caught.value)
    assert EndpointChatConfig(key_env="_KEY_2").key_env == "_KEY_2"


def test_other_keys_of_a_request_are_no_secrets() -> None:
    for name in ("hf_models/Qwen3-VL", "hf_llama", "sk-judge"):
        assert EndpointChatConfig(model=name, url="http://host/hf_proxy/v1").model == name
    extra = {"prompt_cache_key": "a", "max_completion_tokens": 9, "stop_token_ids": [1], "api_key": None}
    assert EndpointChatConfig(extra=extra).extra == extra
    with pytest.raises(UserError, match=r"--set generator.api_key=\.\.\.: unknown key") as caught:
        load(RunConfig, [], ["generator.kind=images_api", "generator.api_key=pass-word"])
    assert "pass-word" not in str(caught.value)


def test_probabilities_of_tokens() -> None:
    top = [{"token": t, "logprob": math.log(p)} for t, p in (("false", 0.6), ("true", 0.2))]
    tokens = [{"token": "so ", "logprob": 0.0, "top_logprobs": []}, {"token": "false", "top_logprobs": top}]
    seen: list[Any] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(json.loads(request.content))
        return httpx.Response(200, json=completion(logprobs={"content": tokens}))

    reply = ask(endpoint(handler, top_logprobs=3))
    assert (seen[0]["logprobs"], seen[0]["top_logprobs"]) == (True, 3)
    assert [token for token, _ in reply.token_probabilities] == ["so ", "false"]
    assert reply.token_probabilities[1][1] == pytest.approx({"false": 0.6, "true": 0.2})
    assert ask(endpoint(lambda r: httpx.Response(200, json=completion(logprobs=None)))).token_probabilities == ()


@pytest.mark.parametrize("logprob", ["800", "3.0", "Infinity", "NaN", "null", '"-1"', "true", "-1" + "0" * 400])
def test_log_probabilities_that_are_none_do_not_spoil_an_answer(logprob: str) -> None:
    top = f'[{{"token": "true", "logprob": {logprob}}}, {{"token": "false", "logprob": -1}}]'
    logprobs = f'{{"content": [{{"token": "true", "top_logprobs": {top}}}]}}'
    body = f'{{"choices": [{{"message": {{"content": "a"}}, "logprobs": {logprobs}}}]}}'
    reply = ask(endpoint(lambda request: httpx.Response(200, text=body), top_logprobs=2))
    assert (reply.text, reply.token_probabilities) == ("a", ())


@pytest.mark.parametrize("top", ["[1]", "[[]]", "[{}]", "3", '{"a": 1}'])
def test_alternatives_in_another_form_do_not_spoil_an_answer(top: str) -> None:
    logprobs = f'{{"content": [{{"token": "a", "top_logprobs": {top}}}]}}'
    body = f'{{"choices": [{{"message": {{"content": "a"}}, "logprobs": {logprobs}}}]}}'
    reply = ask(endpoint(lambda request: httpx.Response(200, text=body), top_logprobs=2))
    assert (reply.text, reply.token_probabilities) == ("a", ())


def test_log_probabilities_that_rounding_puts_above_0_are_those_of_1() -> None:
    tokens = [{"token": "true", "top_logprobs": [{"token": "true", "logprob": 1e-6}]}]
    reply = ask(endpoint(lambda r: httpx.Response(200, json=completion(logprobs={"content": tokens})), top_logprobs=2))
    assert reply.token_probabilities == (("true", {"true": 1.0}),)
