"""The judge against a server on this machine: its questions, what is made of answers, and what is never shown."""

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from PIL import Image

from flowbp.evaluation.vlm_judge import KEY_VARIABLE, QUESTIONS, Judge, Judgment, check_url, parse_score
from imgen_common.errors import UserError

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
    one = Server()
    thread = threading.Thread(target=one.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield one
    one.http.shutdown()
    one.http.server_close()
    thread.join()


def judge(server: Server, **more: Any) -> Judge:
    return Judge("ur_align", server.url, "UnifiedReward", initial_backoff=0.01, **more)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("All is there.\nFinal Score: 3.75", 3.75),
        ("**Final Score:** 4", 4),
        ("**Final Score: 4.5**", 4.5),
        ("It agrees. final score: 2/5.", 2),
        ("Final Score: 4\nFinal Score: 4", 4),
        ("Final Score: 4\nFinal Score: 3", None),
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
    assert parse_score(answer) == score


def test_the_question(server: Server) -> None:
    assert judge(server)([RED], ["a red wall"]) == [Judgment(4.0)]
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
    Judge("ur_iq", server.url, "m")([RED], ["{curly} braces"])
    assert "{curly} braces" in server.bodies[0]["messages"][0]["content"][1]["text"]
    assert len(set(QUESTIONS.values())) == 2


def test_scores_keep_the_order_of_the_images(server: Server) -> None:
    server.reply = lambda number, body: (
        200,
        body["messages"][0]["content"][1]["text"].split("mark: ")[1].split("\n")[0],
    )
    prompts = [f"mark: Final Score: {1 + i / 10}" for i in range(12)]
    assert [one.score for one in judge(server, max_concurrency=3)([RED] * 12, prompts)] == [
        1 + i / 10 for i in range(12)
    ]


def test_an_answer_without_a_score_is_kept_and_is_no_number(server: Server) -> None:
    server.reply = lambda number, body: (200, "I would rather not say. " * 40)
    (found,) = judge(server)([RED], ["a wall"])
    assert found.score is None
    assert found.answer.endswith("I would rather not say. ")
    assert len(found.answer) <= 400
    assert len(server.bodies) == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(server: Server, status: int) -> None:
    server.reply = lambda number, body: (status, "") if number < 2 else (200, "Final Score: 2")
    assert judge(server)([RED], ["a wall"]) == [Judgment(2.0)]
    assert len(server.bodies) == 3


def test_tries_have_an_end(server: Server) -> None:
    server.reply = lambda number, body: (500, "")
    with pytest.raises(UserError, match=r"status 500.*\(tried 3 times\); check --judge"):
        judge(server, max_tries=3)([RED], ["a wall"])
    assert len(server.bodies) == 3


def test_a_refusal_is_not_repeated(server: Server) -> None:
    server.reply = lambda number, body: (401, "")
    with pytest.raises(UserError, match="401"):
        judge(server)([RED], ["a wall"])
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    "raw", [b"<html>", b"[]", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}']
)
def test_what_is_no_chat_completion(server: Server, raw: bytes) -> None:
    server.raw = raw
    with pytest.raises(UserError, match="not a chat completion"):
        judge(server)([RED], ["a wall"])


def test_nobody_answers() -> None:
    with pytest.raises(UserError, match=r"judge 'm': http://127\.0\.0\.1:1/v1: cannot be reached"):
        Judge("ur_iq", "http://127.0.0.1:1/v1", "m", max_tries=2, initial_backoff=0.01)([RED], ["a wall"])


def test_the_key_is_sent_and_nowhere_shown(
    server: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    server.reply = lambda number, body: (403, SECRET)
    one = judge(server)
    with pytest.raises(UserError) as error:
        one([RED], ["a wall"])
    assert server.keys == [f"Bearer {SECRET}"]
    output = capfd.readouterr()
    assert SECRET not in f"{error.value} {one} {output.out} {output.err}"


def test_addresses() -> None:
    assert check_url("http://localhost:8000/v1") == "http://localhost:8000/v1"
    for bad in (None, "", "localhost:8000", "ftp://host/v1", "http://"):
        with pytest.raises(UserError, match="must be the base URL"):
            check_url(bad)
    with pytest.raises(UserError) as error:
        check_url(f"https://user:{SECRET}@host/v1")
    assert SECRET not in str(error.value)
