"""Endpoints of every make: what their answers hold, which errors they report how, how they are reached, and what is
never shown of a key."""

import asyncio
import json
import os
import ssl
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from imgen_common.errors import UserError
from imgen_common.http import HttpClient, HttpError, Refusal, RetryPolicy, check_url
from imgen_common.http.addresses import proxy_of
from imgen_common.http.chat import Completion, complete, read_completion, split_reasoning
from imgen_common.judging.questions import JudgeError

KEY = "sk-very/secret+key"
VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "ssl_cert_file", "ssl_cert_dir")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def client(handler: Callable[[httpx.Request], httpx.Response] | None = None) -> HttpClient:
    transport = None if handler is None else httpx.MockTransport(handler)
    return HttpClient("service", "SOME_KEY", RetryPolicy(), transport=transport)


def request(made: HttpClient, base: str = "http://host/v1", path: str = "/x") -> bytes:
    async def main() -> bytes:
        try:
            return await made.request("POST", base, path, seconds=5)
        finally:
            await made.close()

    return asyncio.run(main())


def failure(made: HttpClient, base: str = "http://host/v1", path: str = "/x") -> HttpError:
    with pytest.raises(HttpError) as caught:
        request(made, base, path)
    return caught.value


# --- chat completions ---


def answer(message: Any, **choice: Any) -> bytes:
    return json.dumps({"choices": [{"message": message} | choice]}).encode()


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": "a"}, "a"),
        ({"content": "b", "reasoning_content": "a"}, "<think>a</think>b"),
        ({"content": "b", "reasoning_details": [{"text": "a"}, {"summary": "n"}, {"data": "?"}]}, "<think>an</think>b"),
        ({"content": "b", "reasoning": "a", "reasoning_details": [{"text": "a"}]}, "<think>a</think>b"),
        ({"content": "b", "reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]}, "<think></think>b"),
        ({"content": "b", "reasoning_details": [{"text": 3}, "?"]}, "b"),
        ({"content": "b", "reasoning_details": "a"}, "b"),
        ({"content": "b", "reasoning": "a", "reasoning_content": None}, "<think>a</think>b"),
        ({"content": "b", "reasoning": "a", "reasoning_content": ""}, "<think>a</think>b"),
        ({"content": "b", "reasoning_content": ""}, "<think></think>b"),
        ({"content": "<think>a</think>b", "reasoning": "a"}, "<think>a</think>b"),
        ({"content": "a</think>b"}, "<think>a</think>b"),
        *(
            ({"content": content}, "<think>a</think>b")
            for content in (
                "<|START_THINKING|>a<|END_THINKING|><|START_RESPONSE|>b<|END_RESPONSE|>",
                "[THINK]a[/THINK]b",
                "a</seed:think>b",
                "◁think▷a◁/think▷b",
                "<|channel>thought\na<channel|>b",
                "\n<thought>a</thought>b",
                "<reasoning>a</reasoning>b",
                "<|channel|>analysis<|message|>a<|channel|>final<|message|>b<|return|>",
            )
        ),
        ({"content": "<|START_THINKING|>a"}, "<think>a"),
        ({"content": "a [THINK] sign"}, "a [THINK] sign"),
        ({"content": "<score>1</score><reasoning>b</reasoning>"}, "<score>1</score><reasoning>b</reasoning>"),
        ({"content": "</think>\n\nb", "reasoning_content": ""}, "<think></think>\n\nb"),
        ({"content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "output_text", "text": "b"}]}, "ab"),
        (
            {
                "content": [
                    {"type": "thinking", "thinking": [{"ids": [1]}, {"text": "a"}]},
                    {"type": "text", "text": "b"},
                ]
            },
            "<think>a</think>b",
        ),
        ({"content": None, "reasoning": "a"}, "<think>a</think>"),
        ({"content": "b \ud83d", "reasoning": "a \ude00"}, "<think>a \ufffd</think>b \ufffd"),
        ({"content": "no", "refusal": None}, "no"),
        ({"content": "no", "refusal": ""}, "no"),
    ],
)
def test_the_text_of_an_answer(message: Any, text: str) -> None:
    assert read_completion(answer(message)).text == text


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a", ("", "a")),
        ("<think>a</think>b", ("a", "b")),
        ("a</think>b</think>c", ("a", "b</think>c")),
        ("So: <think>a</think>b", ("a", "b")),
        ("<think>a", ("a", "")),
        ("<think>a</think><think>b", ("a\nb", "")),
        ("<think>a</think>\n<think>b</think>c", ("a\nb", "c")),
        ("say <think> twice", ("", "say <think> twice")),
    ],
)
def test_reasoning_is_split_from_the_answer(text: str, parts: tuple[str, str]) -> None:
    assert split_reasoning(text) == parts


def test_why_an_answer_ended_is_kept() -> None:
    assert read_completion(answer({"content": "a"}, finish_reason="tool_calls")).finish_reason == "tool_calls"
    assert read_completion(answer({"content": None}, finish_reason="length")) == Completion("", finish_reason="length")
    assert read_completion(answer(None, finish_reason="length")).is_cut_off
    assert [
        read_completion(answer({"content": "a"}, finish_reason=one)).is_cut_off for one in ("MAX_TOKENS", "stop")
    ] == [
        True,
        False,
    ]
    assert read_completion(answer({"content": "a"}, finish_reason=7)).finish_reason is None
    for reason in ("model_context_window_exceeded", "max_output_tokens", "token_limit"):
        assert read_completion(answer({"content": "a"}, finish_reason=reason)).is_cut_off


@pytest.mark.parametrize("reason", ["insufficient_system_resource", "network_error", "error", "abort"])
@pytest.mark.parametrize("message", [{"content": 'so {"score": [9, 9]}, but the'}, {"content": None}, None])
def test_an_answer_that_its_server_breaks_off_is_none(reason: str, message: Any) -> None:
    with pytest.raises(HttpError, match=f"finish_reason {reason}") as caught:
        read_completion(answer(message, finish_reason=reason))
    assert (caught.value.kind, caught.value.can_retry) == ("server_error", True)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (answer({"content": None, "refusal": "I cannot."}), "the model refuses: I cannot."),
        (answer({"content": [{"type": "refusal", "refusal": "No."}]}), "the model refuses: No."),
        (answer({"content": None}, finish_reason="content_filter"), "content filter (finish_reason content_filter)"),
        (answer({"content": "A kni"}, finish_reason="content_filter"), "A kni"),
        (answer({"content": None}, finish_reason="content-filter"), "(finish_reason content-filter)"),
        (answer({"content": "Sorry."}, finish_reason="guardrail_intervened"), "guardrail_intervened): Sorry."),
        (answer({"content": ""}, finish_reason="content_filter: PROHIBITED_CONTENT"), "PROHIBITED_CONTENT"),
        (answer({"content": None}, finish_reason="SAFETY"), "SAFETY"),
        (answer({"content": "No.", "refusal": None}, finish_reason="refusal"), "No."),
        (answer({"content": None}, finish_reason="sensitive"), "finish_reason sensitive"),
        (answer({"content": None}, finish_reason="RECITATION"), "finish_reason RECITATION"),
        (answer({"content": None}, finish_reason="IMAGE_SAFETY"), "finish_reason IMAGE_SAFETY"),
        (answer({"content": None}, finish_reason="IMAGE_PROHIBITED_CONTENT"), "finish_reason IMAGE_PROHIBITED_CONTENT"),
        (answer(None, finish_reason="content_filter: PROHIBITED_CONTENT"), "PROHIBITED_CONTENT"),
        (b'{"choices": [], "promptFeedback": {"blockReason": "OTHER"}}', 'prompt is blocked: {"blockReason": "OTHER"}'),
        (b'{"choices": [], "prompt_filter_results": [{"violence": {"filtered": true}}]}', "the prompt is blocked: ["),
    ],
)
def test_a_refusal_is_typed_and_has_its_words(body: bytes, words: str) -> None:
    with pytest.raises(Refusal) as caught:
        read_completion(body)
    assert (caught.value.kind, caught.value.can_retry) == ("refused", False)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        ({"error": {"message": "no such model", "type": "invalid"}}, "refused", "no such model"),
        ({"error": "quota is spent"}, "refused", "quota is spent"),
        ({"error": {"message": "slow down", "code": 429}}, "rate_limited", "slow down"),
        ({"error": {"message": "upstream", "code": "502"}, "choices": None}, "server_error", "upstream"),
        ({"object": "error", "message": "too long", "code": 400}, "refused", "too long"),
        ({"errors": [{"message": "bad key", "code": 10000}], "success": False}, "refused", "bad key"),
        ({"choices": [{"error": {"message": "cut", "code": 503}, "message": {"content": "a"}}]}, "server_error", "cut"),
        ({"error": [{"loc": ["body", "seed"], "msg": "Extra", "type": "x"}]}, "refused", ": seed: Extra"),
        (
            {"error": {"detail": [{"loc": ["body", "a", 0], "msg": "Bad"}, {"loc": ["body", "b"], "msg": "Worse"}]}},
            "refused",
            ": a.0: Bad; b: Worse",
        ),
        ({"error": {"deep": [1]}}, "refused", '{"error": {"deep": [1]}}'),
        ({"choices": None, "base_resp": {"status_code": 1027, "status_msg": "sensitive"}}, "refused", ": sensitive"),
        ({"code": 336501, "msg": "Rate limit", "choices": []}, "rate_limited", "Rate limit"),
        ({"error_code": 336003, "error_msg": "the messages"}, "refused", "the messages"),
        ({"error": {"type": "overloaded_error", "message": "Overloaded"}}, "server_error", "Overloaded"),
        ({"error": {"type": "server_error", "message": "We failed", "code": None}}, "server_error", "We failed"),
        ({"error": {"type": "rate_limit_error", "message": "too many"}}, "rate_limited", "too many"),
        ({"error": {"code": "rate_limit_exceeded", "message": "slow"}}, "rate_limited", "slow"),
        ({"code": "Throttling.AllocationQuota", "message": "later"}, "rate_limited", "later"),
        ({"error": {"type": "invalid_request_error", "message": "the server_error key"}}, "refused", "key"),
        ({"choices": None}, "malformed_response", '{"choices":null}'),
        ({"choices": [], "detail": "warming up"}, "malformed_response", "warming up"),
        ({"choices": [{"message": None}]}, "malformed_response", "not a chat completion"),
        ({"error": None, "choices": [{"message": {"content": 3}}]}, "malformed_response", "content is int"),
    ],
)
def test_an_error_under_status_200_is_read_with_its_words(body: Any, kind: str, words: str) -> None:
    made = client(lambda request: httpx.Response(200, json=body))
    with pytest.raises(HttpError) as caught:
        asyncio.run(complete(made, "http://host/v1", b"{}", 5))
    assert caught.value.kind == kind
    assert str(caught.value).startswith("http://host/v1: ")
    assert words in str(caught.value)


@pytest.mark.parametrize("code", ["insufficient_quota", "rate_limit_exceeded"])
def test_a_quota_that_is_used_up_is_not_waited_for(code: str) -> None:
    body = {"error": {"message": "You exceeded it", "type": code, "code": code}}
    made = client(lambda request: httpx.Response(429, json=body, headers={"Retry-After": "86400"}))
    with pytest.raises(HttpError) as caught:
        asyncio.run(complete(made, "http://host/v1", b"{}", 5))
    is_used_up = code == "insufficient_quota"
    assert (caught.value.kind, caught.value.can_retry) == (("refused", False) if is_used_up else ("rate_limited", True))
    assert "You exceeded it" in str(caught.value)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (500, {"message": "rejected by the safety system", "type": "upstream_error", "code": "moderation_blocked"}),
        (400, {"message": "violates our policy", "code": "content_policy_violation"}),
        (400, {"message": "may be sensitive", "code": "InputTextSensitiveContentDetected.PolicyViolation"}),
        (400, {"message": "litellm.ContentPolicyViolationError: rejected by the safety system", "code": "400"}),
        (503, {"message": "may contain inappropriate content", "code": "DataInspectionFailed"}),
        (403, {"message": "flagged", "code": 403, "metadata": {"reasons": ["violence"], "flagged_input": "a"}}),
    ],
)
def test_a_filter_refuses_one_request_whatever_its_status(status: int, error: dict[str, Any]) -> None:
    made = client(lambda request: httpx.Response(status, json={"error": error}))
    with pytest.raises(Refusal, match=rf"status {status}: {error['message']}$"):
        asyncio.run(complete(made, "http://host/v1", b"{}", 5))


XAI = {"code": "The caller does not have permission", "error": "Content violates usage guidelines. Failed check: BIO"}


def behind(said: Any, code: int) -> dict[str, Any]:
    """An error of the server behind a gateway, as OpenRouter has it."""
    return {"error": {"message": "Provider returned error", "code": code, "metadata": {"raw": said}}}


@pytest.mark.parametrize("status", [403, 200])
@pytest.mark.parametrize("body", [XAI, behind(json.dumps(XAI), 403)])
def test_a_filter_that_answers_as_to_a_wrong_key_refuses_one_request(status: int, body: dict[str, Any]) -> None:
    made = client(lambda request: httpx.Response(status, json=body))
    with pytest.raises(Refusal, match=r"Content violates usage guidelines. Failed check: BIO$") as caught:
        asyncio.run(complete(made, "http://host/v1", b"{}", 5))
    assert not JudgeError.of_http(caught.value).is_outage
    key = client(lambda request: httpx.Response(403, json={"error": "Incorrect API key"}))
    assert JudgeError.of_http(failure(key)).is_outage


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, {"type": "invalid_request_error", "message": "Your credit balance is too low to access the API."}),
        (400, {"message": "Access denied, is your account in good standing?", "code": "Arrearage"}),
        (400, {"message": "Billing hard limit has been reached", "code": "billing_hard_limit_reached"}),
        (403, {"message": "API key: Key limit exceeded, total limit", "code": 403}),
        (412, {"message": "Account me/x is suspended, possibly due to reaching the monthly limit"}),
        (429, {"message": "please check your plan", "type": "exceeded_current_quota_error"}),
        (200, {"message": "insufficient balance", "code": "1008"}),
    ],
)
def test_used_up_credit_is_an_outage_for_a_judge_whatever_its_status(status: int, error: dict[str, Any]) -> None:
    made = client(lambda request: httpx.Response(status, json={"error": error}))
    with pytest.raises(HttpError, match=str(error["message"])[:20]) as caught:
        asyncio.run(complete(made, "http://host/v1", b"{}", 5))
    judged = JudgeError.of_http(caught.value)
    assert (judged.is_outage, caught.value.can_retry, caught.value.status) == (True, False, 402)


def test_words_of_a_request_that_is_not_taken_are_no_used_up_credit() -> None:
    detail = [{"loc": ["body", "size"], "msg": "invalid", "input": {"prompt": "a man with insufficient funds"}}]
    made = client(lambda request: httpx.Response(422, json={"detail": detail}))
    assert not JudgeError.of_http(failure(made)).is_outage


def test_a_gateways_message_has_the_words_of_the_server_behind_it() -> None:
    said = json.dumps({"error": {"message": "at most 1 image", "type": "invalid_request_error"}})
    for raw in (said, json.loads(said), "at most 1 image"):
        made = client(lambda request, raw=raw: httpx.Response(400, json=behind(raw, 400)))
        assert str(failure(made)).endswith("status 400: Provider returned error: at most 1 image")
    for nothing in (None, "", {}):
        made = client(lambda request, raw=nothing: httpx.Response(400, json=behind(raw, 400)))
        assert str(failure(made)).endswith("status 400: Provider returned error")


def test_a_model_that_calls_tools_and_a_server_that_streams_are_told_so() -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}]
    with pytest.raises(Refusal, match="calls a tool instead of answering; serve it without tools"):
        read_completion(answer({"content": None, "tool_calls": calls}))
    assert read_completion(answer({"content": "a", "tool_calls": calls})).text == "a"
    busy = b": OPENROUTER PROCESSING\n\n"
    for start in (b"", busy, b"event: message\n", busy * 2 + b"event: message\n"):
        with pytest.raises(HttpError, match=r"streams its answers, .*remove `stream` from `extra`") as error:
            read_completion(start + b'data: {"choices": [{"delta": {"content": "a"}}]}\n\ndata: [DONE]\n')
        assert not error.value.can_retry
    assert read_completion(busy * 2 + answer({"content": "a"})).text == "a"
    with pytest.raises(HttpError, match="not a chat completion"):
        read_completion(busy)
    with pytest.raises(HttpError, match="streams its answers") as error:
        read_completion(b'{"message": {"content": "a"}, "done": false}\n{"done": true}\n')
    assert not error.value.can_retry


@pytest.mark.parametrize("name", ["content", "reasoning_content"])
def test_a_token_in_escapes_of_json_is_not_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in KEY)
    body = answer({"content": "", name: "KEY"}).replace(b"KEY", escaped.encode())
    made = client(lambda request: httpx.Response(200, content=body))
    read = asyncio.run(complete(made, "http" + "://host/v1", b"{}", 9.0))
    assert KEY not in f"{read.content}{read.reasoning}"
    assert "..." in f"{read.content}{read.reasoning}"


def test_refusals_never_open_the_breaker() -> None:
    made = client(lambda request: httpx.Response(200, content=answer({"content": None, "refusal": "No."})))
    asked = 0

    async def send(seconds: float) -> Completion:
        nonlocal asked
        asked += 1
        return await complete(made, "http://host/v1", b"{}", seconds)

    async def main() -> list[Any]:
        return [await asyncio.gather(made.call(send), return_exceptions=True) for _ in range(20)]

    assert {type(one) for (one,) in asyncio.run(main())} == {Refusal}
    assert asked == 20


# --- addresses ---


@pytest.mark.parametrize("base", ["http://host", "http://host/openai", "http://host/api/"])
def test_an_address_without_its_version_is_told_apart(base: str) -> None:
    for handler in (lambda r: httpx.Response(404, text="Not Found"), lambda r: httpx.Response(405)):
        assert "give it with /v1 at its end" in str(failure(client(handler), base, "/chat/completions"))
    page = client(lambda request: httpx.Response(200, text="<html>"))
    lm_studio = httpx.Response(200, json={"error": "Unexpected endpoint or method. (POST /chat/completions)"})
    with pytest.raises(HttpError, match=r"Unexpected endpoint.*give it with /v1 at its end"):
        asyncio.run(complete(client(lambda request: lm_studio), base, b"{}", 5))
    with pytest.raises(HttpError, match="give it with /v1 at its end"):
        asyncio.run(complete(page, base, b"{}", 5))


def test_ollamas_own_address_is_told_apart() -> None:
    missing = client(lambda request: httpx.Response(404, text="Not Found"))
    assert "Ollama's with /v1 in the place of /api" in str(failure(missing, "http://host/api", "/chat/completions"))
    assert "Ollama" not in str(failure(missing, "http://host/openai", "/chat/completions"))


def test_an_address_with_its_version_is_left_alone() -> None:
    missing = client(lambda request: httpx.Response(404, text="no such model"))
    assert "/v1 at its end" not in str(failure(missing, "http://host/api/v3", "/chat/completions"))
    assert "/v1 at its end" not in str(failure(missing, "http://host", "/v1/generate"))


@pytest.mark.parametrize("url", ["http://host/sk-live-0123/v1", "https://host/v1/hf_abcdefghi"])
def test_a_key_in_the_path_of_an_address_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(UserError, match="a part of its path is a key") as caught:
        check_url(url)
    assert not {"live", "abcdefghi"} & set(str(caught.value).replace("-", "_").split("_"))


@pytest.mark.parametrize(
    "url", ["http://host/v1/chat/completions", "http://host/v1/images/generations/", "http://host/v1/images/edits"]
)
def test_an_address_with_the_method_behind_it_is_told_apart(url: str) -> None:
    with pytest.raises(UserError, match=r"give the address before it: http://host/v1$"):
        check_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://user:pass-word@host/v1",
        "http://:pass-word@host",
        "http://pass-word@host",
        "http://user:pass/-word?#@host",
        "https://host/v1?api_key=pass-word",
        "https://host/v1#pass-word",
        "http://host/v1#",
        "http://host/v1?",
        "user:pass-word@host",
        "http://host:pass-word@/",
    ],
)
def test_a_secret_in_an_address_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(UserError, match="must be like") as caught:
        check_url(url)
    assert "word" not in str(caught.value).replace("without name, password", "")


# --- keys ---


@pytest.mark.parametrize(
    "answered",
    [
        httpx.Response(307, headers={"location": f"http://other/?key={KEY}"}),
        httpx.Response(302, headers={"location": "http://other/sk-very%2Fsecret%2Bkey/v1"}),
        httpx.Response(302, headers={"location": f"http://me:{KEY}@other/v1"}),
        httpx.Response(400, json={"error": {"message": f"wrong: {KEY}"}}),
        httpx.Response(500, text=f"Bearer {KEY}"),
        httpx.Response(401, json={"detail": [{"input": KEY}]}),
    ],
)
def test_a_key_that_an_endpoint_repeats_is_not_shown(answered: httpx.Response, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)
    error = failure(client(lambda request: answered))
    assert "secret" not in f"{error} {error!r} {error.body!r}"


def test_a_key_in_a_good_answer_is_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)
    said = client(lambda request: httpx.Response(200, json={"text": f"your key is {KEY}"}))
    assert json.loads(request(said)) == {"text": "your key is ..."}
    monkeypatch.setenv("SOME_KEY", 'with"quote')
    said = client(lambda request: httpx.Response(200, json={"text": 'it is with"quote'}))
    assert json.loads(request(said)) == {"text": "it is ..."}


@pytest.mark.parametrize("word", ["EMPTY", "secret"])
def test_a_key_that_is_a_word_changes_no_answer(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", word)
    said = f"an {word} room"
    assert request(client(lambda request: httpx.Response(200, text=said))) == said.encode()
    assert word not in str(failure(client(lambda request: httpx.Response(401, text=said))))


# --- proxies and certificates ---


@pytest.mark.parametrize(
    ("environment", "url", "proxy"),
    [
        ({}, "http://host/v1", None),
        ({"HTTP_PROXY": "http://proxy:3128"}, "http://host/v1", "http://proxy:3128"),
        ({"HTTP_PROXY": "http://proxy:3128"}, "https://host/v1", None),
        ({"ALL_PROXY": "proxy:3128"}, "https://host/v1", "http://proxy:3128"),
        ({"HTTP_PROXY": "http://proxy"}, "http://localhost:8000/v1", None),
        ({"HTTP_PROXY": "http://proxy"}, "http://0.0.0.0:8000/v1", None),
        ({"HTTP_PROXY": "http://proxy"}, "http://[::]:8000/v1", None),
        ({"HTTP_PROXY": "http://proxy"}, "http://127.3.2.1:8000/v1", None),
        ({"ALL_PROXY": "http://proxy"}, "http://[::1]:8000/v1", None),
        ({"HTTP_PROXY": "http://proxy", "NO_PROXY": "host,other"}, "http://host/v1", None),
        ({"HTTP_PROXY": "http://proxy", "no_proxy": ".lan"}, "http://gpu.lan:8000/v1", None),
        ({"HTTP_PROXY": "http://proxy", "NO_PROXY": "*"}, "http://host/v1", None),
        ({"HTTP_PROXY": "http://proxy", "NO_PROXY": "other"}, "http://host/v1", "http://proxy"),
        ({"HTTP_PROXY": "http://proxy", "NO_PROXY": "localhost, *.Corp.test"}, "http://gpu.corp.test:8000/v1", None),
        ({"HTTP_PROXY": "http://proxy", "NO_PROXY": "*.corp.test"}, "http://notcorp.test/v1", "http://proxy"),
        ({"HTTP_PROXY": "http://proxy", "NO_PROXY": "a.b,10.0.0.0/8"}, "http://10.1.2.3:8000", None),
        ({"HTTP_PROXY": "http://proxy", "NO_PROXY": "fd00::/8"}, "http://[fd00::1]/v1", None),
        ({"HTTP_PROXY": "http://proxy", "NO_PROXY": "10.0.0.0/8"}, "http://11.1.2.3/v1", "http://proxy"),
    ],
)
def test_which_proxy_is_asked(
    environment: dict[str, str], url: str, proxy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert proxy_of(url) == proxy


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("ALL_PROXY", "socks5://me:pass-word@proxy:1080", "needs the package socksio"),
        ("HTTP_PROXY", "socks5h://proxy", "needs the package socksio"),
        ("HTTP_PROXY", "ftp://me:pass-word@proxy", "must be http, https or socks5"),
        ("ALL_PROXY", "http://", "must be http, https or socks5"),
        ("HTTP_PROXY", "http://me:pass-word@proxy:99999", "a port up to 65535"),
        ("HTTP_PROXY", "proxy:80a", "a port up to 65535"),
        ("HTTP_PROXY", "http://[::1", "must be http, https or socks5"),
        ("SSL_CERT_FILE", "/not/there.pem", "SSL_CERT_FILE=/not/there.pem: is not there"),
        ("SSL_CERT_DIR", "/not/there", "SSL_CERT_DIR=/not/there: is not there"),
        ("SSL_CERT_FILE", __file__, "SSL_CERT_FILE: cannot be used"),
        ("SSL_CERT_DIR", f"/not/there{os.pathsep}/nor/here", "SSL_CERT_DIR=/not/there"),
        ("SSLKEYLOGFILE", "/not/there/keys", "SSLKEYLOGFILE: cannot be used"),
    ],
)
def test_an_environment_that_cannot_be_used_is_named(
    variable: str, value: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=says) as caught:
        request(client(), "http://service.test/v1" if "PROXY" in variable else "https://service.test/v1")
    assert "word" not in str(caught.value)


def test_a_proxy_that_is_not_there_is_blamed_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://me:pass-word@127.0.0.1:1")
    error = failure(client(), "http://service.test/v1")
    assert error.kind == "unreachable"
    assert "http://service.test/v1 through the proxy ...@127.0.0.1:1: cannot be reached" in str(error)
    assert "NO_PROXY" in str(error)
    assert "pass-word" not in str(error)


@pytest.mark.parametrize(
    ("status", "header", "kind", "said"),
    [
        (
            503,
            "X-Squid-Error: ERR_DNS_FAIL 0",
            "unreachable",
            "the proxy cannot reach it (not found); correct the proxy",
        ),
        (
            403,
            "Server: other",
            "refused",
            "if the proxy itself says so: correct the proxy, or name the host in NO_PROXY",
        ),
        (407, "X-Squid-Error: ERR_CACHE_ACCESS_DENIED 0", "refused", "give the proxy's name and password"),
    ],
)
def test_a_page_of_a_proxy_is_not_the_servers(
    status: int, header: str, kind: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        page = "<html><title>not found</title></html>"
        writer.write(f"HTTP/1.1 {status} X\r\n{header}\r\nContent-Length: {len(page)}\r\n\r\n{page}".encode())
        await writer.drain()
        writer.close()

    async def main() -> HttpError:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        monkeypatch.setenv("HTTP_PROXY", "http" + f"://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        made = client()
        try:
            with pytest.raises(HttpError) as caught:
                await made.request("GET", "http://service.test/v1", seconds=5)
            return caught.value
        finally:
            await made.close()
            server.close()

    error = asyncio.run(main())
    assert error.kind == kind
    assert said in str(error)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_an_answer_that_cannot_be_decompressed_is_no_outage(encoding: str) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"{} as it is"

    made = client(lambda _: httpx.Response(200, headers={"Content-Encoding": encoding}, content=pieces()))
    error = failure(made)
    assert error.kind == "malformed_response"
    assert "http://host/v1: an answer that cannot be decompressed" in str(error)


def test_this_machine_is_asked_directly_whatever_proxy_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    for name in ("SSL_CERT_FILE", "SSLKEYLOGFILE"):
        monkeypatch.setenv(name, "/not/there/file")  # no certificate is needed here

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await writer.drain()
        writer.close()

    async def main() -> bytes:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        made = client()
        try:
            port = server.sockets[0].getsockname()[1]
            return await made.request("GET", f"http://127.0.0.1:{port}", seconds=5)
        finally:
            await made.close()
            server.close()

    assert asyncio.run(main()) == b"ok"


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("self-signed certificate", "set SSL_CERT_FILE"),
        ("unable to get local issuer certificate", "set SSL_CERT_FILE"),
        ("certificate has expired", "it must be renewed, unless the clock"),
        ("certificate is not yet valid", "check the clock"),
        ("Hostname mismatch, certificate is not valid for 'a.test'", "under a name that its certificate has"),
        ("IP address mismatch, certificate is not valid for '10.0.0.1'", "under a name that its certificate has"),
    ],
)
def test_a_certificate_that_cannot_be_verified_has_its_remedy(said: str, remedy: str) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError(f"[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: {said} (_ssl.c:1006)")

    error = failure(client(handler))
    assert (error.kind, error.can_retry) == ("unreachable", False)
    assert remedy in str(error)


def test_a_proxy_without_tls_is_not_taken_for_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `HTTPS_PROXY=https://...` of one that speaks plain HTTP."""

    def refuse(self: object, proxy: str, is_secure: bool) -> httpx.AsyncClient:
        def handler(request: httpx.Request) -> httpx.Response:
            raise httpx.ConnectError("[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1006)")

        return httpx.AsyncClient(transport=httpx.MockTransport(handler))

    monkeypatch.setenv("HTTPS_PROXY", "https://proxy:3128")
    monkeypatch.setattr(HttpClient, "_opened", refuse)
    said = str(failure(client(), "https://host/v1"))
    assert "the proxy does not speak TLS" in said
    assert said.endswith("give the proxy's address with http://, also for https")


def test_https_to_a_server_without_tls_is_not_tried_again() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1006)")

    error = failure(client(handler), "https://host/v1")
    assert (error.kind, error.can_retry) == ("unreachable", False)
    assert "give its address with http://" in str(error)


@pytest.mark.parametrize("usage", ["lots", 3, [], None, {"prompt_tokens": "9", "completion_tokens": -1}])
def test_an_odd_count_of_tokens_does_not_spoil_an_answer(usage: object) -> None:
    body = {"choices": [{"message": {"content": "yes"}}], "usage": usage}
    read = read_completion(json.dumps(body).encode())
    assert (read.content, read.num_prompt_tokens, read.num_completion_tokens) == ("yes", 0, 0)


@pytest.mark.parametrize(
    "said",
    ["[SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED] tlsv13 alert", "[SSL: SSLV3_ALERT_HANDSHAKE_FAILURE] sslv3 alert"],
)
def test_a_server_that_wants_a_certificate_of_its_clients(said: str) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise ssl.SSLError(1, said)  # under TLS 1.3 at the first reading, which httpx does not wrap

    with pytest.raises(HttpError, match=r"refuses the TLS connection .*; if it asks for a certificate of its") as error:
        asyncio.run(complete(client(handler), "https" + "://host/v1", b"{}", 9.0))
    assert (error.value.kind, error.value.can_retry) == ("unreachable", False)


def test_a_connection_that_breaks_is_no_traceback() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise OSError(104, "Connection reset by peer")

    with pytest.raises(HttpError, match=r"cannot be reached \(.*reset by peer\)") as error:
        asyncio.run(complete(client(handler), "http" + "://host/v1", b"{}", 9.0))
    assert error.value.kind == "unreachable"
