"""The judge against a server on this machine: its questions, what is made of answers, and what is never shown."""

import asyncio
import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from PIL import Image

from flowbp.evaluation.vlm_judge import (
    KEY_VARIABLE,
    QUESTIONS,
    Criterion,
    EndpointJudge,
    check_judge,
    check_url,
    make_question,
    parse_score,
)
from imgen_common.errors import UserError
from imgen_common.http import RetryPolicy
from imgen_common.judging.answers import Answer
from imgen_common.judging.questions import JudgeError, Unreadable
from imgen_common.judging.runner import ask_question

RED = Image.new("RGB", (64, 32), (255, 0, 0))
SECRET = "sk-very-secret"


class Server:
    """Answers the n-th question as `reply(n, body)` says: (status, text of the answer)."""

    def __init__(self) -> None:
        self.reply: Callable[[int, Any], tuple[int, str]] = lambda number, body: (200, "Final Score: 4")
        self.raw: bytes | None = None
        self.bodies: list[Any] = []
        self.keys: list[str | None] = []
        self.paths: list[str] = []
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    number = len(outer.bodies)
                    outer.bodies.append(body)
                    outer.keys.append(self.headers["Authorization"])
                    outer.paths.append(self.path)
                status, text = outer.reply(number, body)
                content = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
                self.send_response(status)
                self.end_headers()
                self.wfile.write(content if outer.raw is None else outer.raw)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with serving() as one:
        yield one


@contextmanager
def serving() -> Iterator[Server]:
    one = Server()
    thread = threading.Thread(target=one.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield one
    finally:
        one.http.shutdown()
        one.http.server_close()
        thread.join()


def ask(url: str, prompt: str = "a wall", criterion: Criterion = "ur_align", max_tries: int = 16) -> Answer:
    """The answer of the judge at an address to the question about a red image."""

    async def main() -> Answer:
        judge = EndpointJudge(url, "UnifiedReward", policy=RetryPolicy(max_tries=max_tries, initial_backoff=0.01))
        try:
            return await ask_question(judge, make_question(criterion, RED, prompt))
        finally:
            await judge.close()

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("All is there.\nFinal Score: 3.75", 3.75),
        ("**Final Score:** 4", 4),
        ("**Final Score: 4.5**", 4.5),
        ("It agrees. final score: 2/5.", 2),
        ("Final Score: 4\nFinal Score: 4", 4),
        ("Final Score: 4\nFinal Score: 3", None),
        ("Final Score: 3 Final Score: 4", None),
        ("Final Score: 0.5", None),
        ("Final Score: 5.5", None),
        ("Final Score: 45", None),
        ("Final Score: 4/10", None),
        ("Final Score: -3", None),
        ("Final Score: <mark>", None),
        ("The score is 4.", None),
        ("", None),
    ],
)
def test_scores_are_read_strictly(answer: str, score: float | None) -> None:
    if score is None:
        with pytest.raises(Unreadable):
            parse_score(answer)
    else:
        assert parse_score(answer) == score


def test_the_question(server: Server) -> None:
    assert ask(server.url, "a red wall").value == 4.0
    (body,) = server.bodies
    assert server.paths == ["/v1/chat/completions"]
    assert (body["model"], body["temperature"]) == ("UnifiedReward", 0)
    picture, words = body["messages"][0]["content"]
    kind, _, data = picture["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64"
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (shown.format, shown.size, shown.getpixel((0, 0))) == ("PNG", (512, 512), (255, 0, 0))
    assert "a red wall" in words["text"]
    assert "Final Score:" in words["text"]
    assert server.keys == [None]


def test_the_two_aspects_ask_for_different_things(server: Server) -> None:
    ask(server.url, "{curly} braces", "ur_iq")
    assert "{curly} braces" in server.bodies[0]["messages"][0]["content"][1]["text"]
    assert len(set(QUESTIONS.values())) == 2


def test_an_answer_without_a_score_is_kept_and_is_no_number(server: Server) -> None:
    said = "I would rather not say. " * 40
    server.reply = lambda number, body: (200, said)
    found = ask(server.url)
    assert (found.value, found.error_kind, found.raws) == (None, "unreadable", (said,))
    assert len(server.bodies) == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(server: Server, status: int) -> None:
    server.reply = lambda number, body: (status, "") if number < 2 else (200, "Final Score: 2")
    assert ask(server.url).value == 2.0
    assert len(server.bodies) == 3


def test_tries_have_an_end(server: Server) -> None:
    server.reply = lambda number, body: (500, "")
    found = ask(server.url, max_tries=3)
    assert (found.value, found.error_kind, found.is_final) == (None, "server_error", False)
    assert "status 500" in (found.error or "")
    assert len(server.bodies) == 3


@pytest.mark.parametrize(("status", "text"), [(401, ""), (404, ""), (429, "insufficient_quota")])
def test_a_key_a_name_or_a_quota_that_is_not_accepted_ends_all(server: Server, status: int, text: str) -> None:
    server.reply = lambda number, body: (status, text)
    with pytest.raises(JudgeError, match=str(status)) as failure:
        ask(server.url)
    assert failure.value.is_outage
    assert len(server.bodies) == 1


def test_a_refusal_of_one_question_is_kept_and_not_repeated(server: Server) -> None:
    server.raw = json.dumps({"choices": [{"message": {"content": None, "refusal": "no"}}]}).encode()
    found = ask(server.url)
    assert (found.error_kind, found.is_final, "no" in (found.error or "")) == ("refused", True, True)
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("raw", "said"),
    [(raw, "not a chat completion") for raw in (b"<html>", b"[]", b'{"choices": []}')]
    + [(b'{"choices": [{"message": {"content": null}}]}', "the model answered nothing")],
)
def test_what_is_no_chat_completion(server: Server, raw: bytes, said: str) -> None:
    server.raw = raw
    found = ask(server.url, max_tries=2)
    assert (found.error_kind, found.is_final) == ("malformed_response", False)
    assert said in (found.error or "")


def test_nobody_answers(server: Server) -> None:
    with pytest.raises(JudgeError, match=r"http://127\.0\.0\.1:1/v1: cannot be reached") as failure:
        ask("http://127.0.0.1:1/v1", max_tries=2)
    assert failure.value.is_outage
    for url, status in (("http://127.0.0.1:1/v1", 200), (server.url, 401), (server.url, 400), (server.url, 500)):
        server.reply = lambda number, body, status=status: (status, "")
        with pytest.raises(UserError, match=r"^judge 'm': .*check --judge, the model's name and FLOWBP_JUDGE_KEY"):
            asyncio.run(check_judge(url, "m"))
    for status in (503, 200):  # it loads, or answers
        server.reply = lambda number, body, status=status: (status, "Hm.")
        asyncio.run(check_judge(server.url, "m"))


def test_keys_that_a_judge_does_not_take_are_left_out(server: Server) -> None:
    def picky(number: int, body: Any) -> tuple[int, str]:
        return (400, "") if {"max_tokens", "temperature"} & body.keys() else (200, "Final Score: 4")

    server.reply = picky
    with pytest.raises(UserError, match=r"leave it out: --set judge.extra={temperature: null, max_completion_tokens"):
        asyncio.run(check_judge(server.url, "m"))
    extra = {"temperature": None, "max_completion_tokens": 9000}
    asyncio.run(check_judge(server.url, "m", extra))
    assert server.bodies[-1].keys() == {"model", "messages", "max_completion_tokens"}
    assert EndpointJudge(server.url, "m", extra).id != EndpointJudge(server.url, "m").id


def test_the_key_is_sent_and_nowhere_shown(
    server: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    server.reply = lambda number, body: (403, SECRET)
    with pytest.raises(JudgeError) as error:
        ask(server.url)
    assert server.keys == [f"Bearer {SECRET}"]
    output = capfd.readouterr()
    assert SECRET not in f"{error.value} {output.out} {output.err}"


def test_addresses() -> None:
    assert check_url("http://localhost:8000/v1") == "http://localhost:8000/v1"
    for bad in (None, "", "localhost:8000", "ftp://host/v1", "http://"):
        with pytest.raises(UserError, match="must be the base URL"):
            check_url(bad)
    with pytest.raises(UserError) as error:
        check_url(f"https://user:{SECRET}@host/v1")
    assert SECRET not in str(error.value)


def test_lines_may_end_as_on_windows() -> None:
    assert parse_score("It is good.\r\nFinal Score: 4\r\n") == 4
