"""Whatever is in a file, an option, a request or a connection, it is read or refused: no other exception, no hang.

Each reader gets mutations of valid inputs, the same ones in every run: few in the default tier, many in the exhaustive.
"""

import asyncio
import base64
import io
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from fuzzing import mutations
from hosting import InProcess
from PIL import Image
from uvicorn.server import ServerState

from flowbp.config import TrainConfig
from imgen_common import hub
from imgen_common.config import load
from imgen_common.errors import UserError
from imgen_common.images import decode
from interleave.agents.prompts import load_template
from interleave.datasets.config import DataConfig
from interleave.loop.config import RunConfig
from interleave.loop.requests import read_requests
from interleave.models.generators.scripted import ScriptedConfig
from interleave.serve import ServeConfig
from interleave.serve.app import create_app
from interleave.serve.connections import LimitedConnection
from interleave.serve.metrics import Metrics
from interleave.storage.images import ImageStore
from interleave.storage.trace import TRACE, read_trace

MAX_SECONDS = 20.0
"""Processor time that one input may take; the slowest is reported."""
CONFIGS: tuple[type[Any], ...] = (TrainConfig, RunConfig, DataConfig, ServeConfig)
YAML = [  # the first line says of which class
    b"#0\nmethod: {preset: draft_k, name: draft_1, active: {num_active_steps: 1}}\nrewards:\n"
    b"- ref: builtin:shapes/reward\n  loss: {kind: hinge}\nmax_train_steps: 60\noptim:\n  learning_rate: 3e-4\n",
    b"#0\nseed: 3\noptim: &a {learning_rate: 1e-4}\nname: 'a b'\n",
    b"#0\nname: x\nseed: 3\noptim: &o {learning_rate: .0001}\nmethod: refl\n",
    b"#1\ncritic: {kind: none}\nloop:\n  max_attempts: 5  # a comment\n  concurrency: 64\n",
    b"#1\nplanner:\n  kind: model\n  model:\n    kind: endpoint\n    url: http://127.0.0.1:8000/v1\n    model: m\n"
    b"    retry: {deadline: 300}\n  text_template: planner_text\n",
    b"#2\nprompts:\n  kind: shapes\n  split: train\n  count: 400\n  riddles: 0.3\nteacher: shapes\n"
    b"judge: {kind: shapes_verifier}\nrun:\n  loop: {max_attempts: 3}\n",
    b"#3\ngenerator: {kind: scripted, latency: 0.5}\nport: 0\nallowed_hosts: [a.example, '*.b']\ndevices: [cpu, cpu]\n",
]
SETS = [  # the first digit says of which class
    *(
        b"0seed=3",
        b"0optim.learning_rate=1e-4",
        b"0rewards.0.weight=1e-1",
        b"0method={preset: refl}",
        b"0method.name=x",
    ),
    *(b"1loop.max_attempts=5", b"1critic.kind=none", b"2prompts.count=4", b"3port=8012", b"3devices=[cpu, 'cuda:0']"),
]
REQUESTS = [
    b'{"text": "draw a red circle", "id": "a", "images": [], "category": "c"}\n{"text": "two"}\n',
    b'{"text": "edit", "images": ["one.png", "two.png"]}\n\n',
    b'\xef\xbb\xbf{"text": "\\ud83d\\ude00 caf\\u00e9"}\r\n',
]
RECORDS = [
    b'{"type": "plan", "trajectory_id": "t", "request": {"id": "r", "text": "t"}, "planner": null, "plan": null}\n',
    b'{"type": "attempt", "trajectory_id": "t", "step": 1, "attempt": 1, "op": "t2i", "original_prompt": "p", '
    b'"prompt_used": "p", "seed": 1, "generator": {"id": "g", "params": {}}, '
    b'"timings": {"a": 1.5}, "status": "unjudged"}\n',
    b'{"type": "trajectory", "id": "t", "request": {"id": "r", "text": "t"}, "planner": null, "plan": {"steps": '
    b'[{"index": 1, "prompt": "p"}]}, "selected": {"1": 1}, "status": "complete"}\n',
]
REFERENCES = [
    b"builtin:shapes/flow",
    b"org/name@main",
    b"./folder",
    b"~/models/a",
    b"/abs/olute",
    b"a.txt",
    b"planner_v1",
]
BODIES = [
    b'{"prompt": "a red circle", "seed": 7, "params": {"width": 8, "height": 8}}',
    b'{"prompt": "p", "images": [], "params": {"guidance_scale": 1.5, "negative_prompt": null}}',
    b'{"prompt": "p", "images": ["' + base64.b64encode(b"no image") + b'"]}',
]
HEADS = [
    b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 15\r\n\r\n"
    b'{"prompt": "p"}GET /metrics HTTP/1.1\r\nHost: [::1]:80\r\nX-Deadline-Seconds: 1\r\n\r\n',
    b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
    b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"pro\r\na;x=y\r\nmpt": "p"}\r\n0\r\nT: x\r\n\r\n',
    b"HEAD /readyz HTTP/1.0\r\nConnection: keep-alive\r\nAuthorization: Bearer x\r\n\r\n",
]


def images() -> list[bytes]:
    """Small files of each format, with what files of photographs carry."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = []
    for form, mode, options in (
        *(("PNG", mode, {}) for mode in ("RGBA", "L", "P", "1", "LA")),
        *(("JPEG", mode, {"progressive": scans}) for mode in ("RGB", "L", "CMYK") for scans in (False, True)),
        *(("WEBP", mode, {"lossless": exact}) for mode in ("RGB", "RGBA") for exact in (False, True)),
    ):
        buffer = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(buffer, form, exif=exif, icc_profile=b"profile" * 9, **options)
        files.append(buffer.getvalue())
    frames = [Image.fromarray(pixels), Image.fromarray(255 - pixels)]
    for form in ("PNG", "WEBP"):
        buffer = io.BytesIO()
        frames[0].save(buffer, form, save_all=True, append_images=frames[1:])
        files.append(buffer.getvalue())
    return files


class Readers:
    """One method per kind of input; each returns or raises UserError."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._store = folder, ImageStore(folder / "images")
        for name in ("one.png", "two.png"):
            Image.new("RGB", (4, 4)).save(folder / name)
        backend = InProcess(ScriptedConfig(width=4, height=4).build())
        self._app: Any = create_app(ServeConfig(max_prompt_chars=500), backend, Metrics(), None)
        self._loop = asyncio.new_event_loop()
        config = uvicorn.Config(self._app, http=LimitedConnection, ws="none", log_config=None)
        config.load()
        self._config = config

    def configuration(self, data: bytes) -> None:
        (self._folder / "config.yaml").write_bytes(data)
        load(CONFIGS[data[1] % 4 if len(data) > 1 else 0], [self._folder / "config.yaml"])

    def sets(self, data: bytes) -> None:
        text = data.decode("utf-8", "surrogateescape")
        load(CONFIGS[data[0] % 4 if data else 0], [], text[1:].split("\n"))

    def requests(self, data: bytes) -> None:
        (self._folder / "requests.jsonl").write_bytes(data)
        read_requests(self._folder / "requests.jsonl", self._store)

    def records(self, data: bytes) -> None:
        (self._folder / TRACE).write_bytes(data)
        read_trace(self._folder)

    def references(self, data: bytes) -> None:
        name = data.decode("utf-8", "surrogateescape")
        for read in (hub.resolve, load_template):
            with suppress(UserError):
                read(name)

    def images(self, data: bytes) -> None:
        decode(data, max_pixels=10**6)

    def bodies(self, data: bytes) -> None:
        """Each is answered by kind, never with 500."""
        status, content = self._loop.run_until_complete(self._post(data))
        assert status in (200, 400, 413, 422), (status, content)

    async def _post(self, data: bytes) -> tuple[int, bytes]:
        sent: list[dict[str, Any]] = []
        messages = iter([{"type": "http.request", "body": data, "more_body": False}])

        async def receive() -> dict[str, Any]:
            for message in messages:
                return message
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/generate", "headers": headers, "query_string": b""}
        await self._app(scope, receive, send)
        return sent[0]["status"], sent[1]["body"]

    def connections(self, data: bytes) -> None:
        """What comes over a connection, in pieces: it is answered, or the connection is closed."""
        self._loop.run_until_complete(self._connect(data))

    async def _connect(self, data: bytes) -> None:
        state = ServerState()
        connection = LimitedConnection(4, 60.0, config=self._config, server_state=state, app_state={}, _loop=self._loop)
        transport = FakeTransport()
        connection.connection_made(transport)
        for start in range(0, len(data), 97):
            if transport.is_closing():
                break
            connection.data_received(data[start : start + 97])
            await asyncio.sleep(0)
        if state.tasks:
            await asyncio.wait(state.tasks, timeout=0.01)  # a request whose body does not come goes on waiting
        connection.connection_lost(None)
        await asyncio.wait_for(asyncio.gather(*state.tasks, return_exceptions=True), 60)
        assert transport.written.startswith(b"HTTP/1.1 ") or not transport.written


class FakeTransport(asyncio.Transport):
    """Takes what is written to a connection."""

    def __init__(self) -> None:
        super().__init__({"sockname": ("127.0.0.1", 1), "peername": ("127.0.0.1", 2)})
        self.written, self._is_closing = b"", False

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def is_closing(self) -> bool:
        return self._is_closing

    def close(self) -> None:
        self._is_closing = True

    abort = close

    def can_write_eof(self) -> bool:
        return False

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading


KINDS: dict[str, tuple[Callable[[], list[bytes]], int, int]] = {
    "configuration": (lambda: YAML, 60, 25_000),
    "sets": (lambda: SETS, 100, 40_000),
    "requests": (lambda: REQUESTS, 100, 25_000),
    "records": (lambda: RECORDS, 100, 30_000),
    "references": (lambda: REFERENCES, 30, 10_000),
    "images": (images, 100, 40_000),
    "bodies": (lambda: BODIES, 40, 15_000),
    "connections": (lambda: HEADS, 40, 15_000),
}
"""Of each kind: valid inputs, and the number of mutations in the default and in the exhaustive tier: 200,000 in all."""


@pytest.mark.parametrize("count", ["few", pytest.param("many", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_input_is_read_or_refused(kind: str, count: str, tmp_path: Path) -> None:
    seeds, few, many = KINDS[kind]
    read = getattr(Readers(tmp_path), kind)
    slowest, num_read, num_refused = 0.0, 0, 0
    for data in (*seeds(), *mutations(seeds(), few if count == "few" else many)):
        start = time.process_time()
        try:
            read(data)
            num_read += 1
        except UserError:
            num_refused += 1
        except Exception as error:
            raise AssertionError(f"{kind}: {type(error).__name__} for {data[:2000]!r}") from error
        slowest = max(slowest, time.process_time() - start)
    print(f"{kind}: {num_read} read, {num_refused} refused, the slowest in {slowest:.2f} s of processor time")
    assert num_read
    assert slowest < MAX_SECONDS
