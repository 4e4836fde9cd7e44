"""What holds before anything is authorized: host names, heads without end, bodies that nobody asked for, crowds."""

import json
import resource
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import httpx
import pytest
from hosting import InProcess, hosted
from pydantic import ValidationError
from serving import PATIENCE, eventually

from interleave.models.generators.scripted import ScriptedConfig
from interleave.serve import ServeConfig
from interleave.serve.connections import FILES_BESIDE, MAX_HEAD_BYTES, allowed_connections

LIMITS = {"head_timeout": 0.2, "body_timeout": 0.5, "max_connections": 4}
CONFIG = ServeConfig(shutdown_timeout=0, **LIMITS, allowed_hosts=("images.example", "*.lan"))
TOKEN = "a token"
get = partial(httpx.get, verify=False, timeout=PATIENCE)
HEAD = b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def open_service() -> Iterator[str]:
    with hosted(InProcess(ScriptedConfig().build()), config=CONFIG) as url:
        yield url


@pytest.fixture(scope="module")
def closed_service() -> Iterator[str]:
    with hosted(InProcess(ScriptedConfig().build()), token=TOKEN, config=CONFIG) as url:
        yield url


@contextmanager
def connection(url: str) -> Iterator[socket.socket]:
    parsed = httpx.URL(url)
    with socket.create_connection((parsed.host, parsed.port), timeout=PATIENCE) as opened:
        yield opened


def until_closed(opened: socket.socket) -> bytes:
    """All that the service says until it closes the connection."""
    said = b""
    with suppress(ConnectionError):
        while piece := opened.recv(2**16):
            said += piece
    return said


def test_no_more_connections_are_promised_than_files_may_be_open(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [256, 256]
    monkeypatch.setattr(resource, "getrlimit", lambda which: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda which, pair: limits.__setitem__(slice(0, 2), pair))
    assert allowed_connections(512) == 256 - FILES_BESIDE
    assert allowed_connections(100) == 100
    limits[1] = 4096
    assert allowed_connections(512) == 512
    assert limits == [512 + FILES_BESIDE, 4096]


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        *(
            (host, True)
            for host in ("localhost", "LOCALHOST:9", "127.0.0.1:1", "[::1]", "images.example", "a.b.lan:80")
        ),
        *(
            (host, False)
            for host in ("evil.example", "localhost.evil.example", "images.example.evil", "evil-lan", "", "[")
        ),
        *((host, False) for host in ("www.localhost", "localhost@evil.example", "127.0.0.1.evil.example:8011")),
    ],
)
def test_without_a_token_only_names_of_this_machine_are_served(open_service: str, host: str, allowed: bool) -> None:
    with httpx.Client(verify=False, headers={"host": host}) as client:
        for path in ("/healthz", "/readyz", "/v1/info", "/metrics", "/v1/generate"):
            assert (client.get(open_service + path).status_code != 400) == allowed


def test_with_a_token_any_name_is_served(closed_service: str) -> None:
    headers = {"host": "images.example.org", "authorization": f"Bearer {TOKEN}"}
    assert get(f"{closed_service}/v1/info", headers=headers).status_code == 200


@pytest.mark.parametrize("name", ["a.*.example", "*example", "two words", "", "**"])
def test_a_pattern_of_host_names_is_checked(name: str) -> None:
    with pytest.raises(ValidationError):
        ServeConfig(allowed_hosts=(name,))


@pytest.mark.parametrize(
    "endless",
    [b"GET / HTTP/1.1\r\nX: " + b"x" * 2**20, b"GET /" + b"x" * 2**20, b"GET / HTTP/1.1\r\n" + b"X: 1\r\n" * 2**18],
    ids=["a header", "a target", "headers"],
)
def test_a_head_is_bounded_in_bytes(closed_service: str, endless: bytes) -> None:
    with connection(closed_service) as opened:
        with suppress(ConnectionError):
            opened.sendall(endless)
        assert until_closed(opened)[:12] in (b"HTTP/1.1 400", b"")  # where it was still sending, it may not see it


def test_a_head_just_below_the_limit_is_read(closed_service: str) -> None:
    more = b"X: " + b"x" * (MAX_HEAD_BYTES - 500) + b"\r\n"
    with connection(closed_service) as opened:
        opened.sendall(b"GET /healthz HTTP/1.1\r\nHost: h\r\nConnection: close\r\n" + more + b"\r\n")
        assert until_closed(opened).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "sent", [b"", b"G", b"GET / HTTP/1.1\r\nHost: h\r\n", b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\nGET /"]
)
def test_a_head_is_bounded_in_time(closed_service: str, sent: bytes) -> None:
    with connection(closed_service) as opened:
        opened.sendall(sent)
        assert b"HTTP/1.1 408" in until_closed(opened)


@pytest.mark.parametrize("announced", [b"Content-Length: 999999999\r\n", b"Transfer-Encoding: chunked\r\n"])
def test_a_body_that_nobody_reads_does_not_hold_the_connection(closed_service: str, announced: bytes) -> None:
    with connection(closed_service) as opened:
        opened.sendall(HEAD + announced + b"\r\n" + b"5\r\nabcde\r\n" * 1000)
        assert until_closed(opened).startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize("sent", [b"Content-Length: 99\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n5\r\n{"])
def test_a_body_is_bounded_in_time(open_service: str, sent: bytes) -> None:
    with connection(open_service) as opened:
        opened.sendall(HEAD + sent)
        assert until_closed(opened).startswith(b"HTTP/1.1 408")


def test_who_still_sends_sees_its_answer(closed_service: str) -> None:
    answer = httpx.post(
        f"{closed_service}/v1/generate",
        content=(bytes(2**16) for _ in range(100)),
        headers={"content-type": "application/json"},
        timeout=PATIENCE,
        verify=False,
    )
    assert (answer.status_code, answer.json()["error"]["kind"]) == (401, "unauthorized")


def test_a_body_of_tiny_chunks_is_refused_and_one_of_small_chunks_is_read(open_service: str) -> None:
    body = json.dumps({"prompt": "p" * 8000}).encode()
    for size, status in ((1, 400), (2, 200), (100, 200)):
        pieces = (body[i : i + size] for i in range(0, len(body), size))
        with connection(open_service) as opened:
            chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
            opened.sendall(HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
            assert until_closed(opened).startswith(b"HTTP/1.1 %d" % status)


def test_a_crowd_that_says_nothing_keeps_nobody_out(closed_service: str) -> None:
    parsed = httpx.URL(closed_service)
    crowd = [socket.create_connection((parsed.host, parsed.port), timeout=PATIENCE) for _ in range(20)]
    try:
        assert get(f"{closed_service}/healthz").status_code == 200
    finally:
        for one in crowd:
            one.close()


def is_closed(opened: socket.socket) -> bool:
    if not select.select([opened], [], [], 0)[0]:
        return False
    with suppress(ConnectionError):
        return opened.recv(1) == b""
    return True


@pytest.mark.parametrize("num", [5, 12])
def test_there_are_no_more_connections_than_allowed(num: int) -> None:
    """Further ones take the places of those that say nothing, and wait for none that is served."""
    config = CONFIG.model_copy(update={"head_timeout": 9999, "body_timeout": 9999})
    with hosted(InProcess(ScriptedConfig().build()), config=config) as url, ExitStack() as opened:
        crowd = [opened.enter_context(connection(url)) for _ in range(num)]
        eventually(lambda: sum(map(is_closed, crowd)) == num - 4)
        for _ in range(4):
            served = opened.enter_context(connection(url))
            served.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: 99\r\n\r\n")
            assert served.recv(100).startswith(b"HTTP/1.1 100")
        assert all(map(is_closed, crowd))
        with connection(url) as refused:
            assert until_closed(refused).startswith(b"HTTP/1.1 503")


@pytest.mark.parametrize(
    "rest",
    [b"zz\r\n", b"5\r\nabc", b"ffffffffffffffffffffff\r\n", b"-1\r\n\r\n", b"0\r\n" + b"x: y\r\n" * 20_000],
)
def test_a_broken_body_ends_its_connection_only(open_service: str, rest: bytes) -> None:
    with connection(open_service) as opened:
        opened.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + rest)
        opened.shutdown(socket.SHUT_WR)
        assert until_closed(opened)[:12] in (b"HTTP/1.1 400", b"")
    assert get(f"{open_service}/healthz").status_code == 200
