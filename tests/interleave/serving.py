"""Services to try, and clients for them."""

import asyncio
import base64
import contextlib
import io
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from serving_generator import make_logging, make_nothing

from interleave.serve import ServeConfig, build_server, listener_url, open_listener
from interleave.serve.app import create_app, digest
from interleave.serve.metrics import Metrics
from interleave.serve.pool import WorkerPool
from interleave.serve.worker import GeneratorFactory

SECRET_TOKEN = "a token of the tests"
PATIENCE = 300.0
"""Seconds that anything may take on a machine that has much else to do."""
http_get, http_post = partial(httpx.get, timeout=PATIENCE), partial(httpx.post, timeout=PATIENCE)
COMMON = ServeConfig(max_body_bytes=300_000, max_pixels=10_000, max_prompt_chars=1000, max_side=128, restart_delay=0.05)


@dataclass(frozen=True)
class Service:
    """A service that runs, and the log of its generators."""

    url: str
    log: Path
    headers: dict[str, str] = field(default_factory=lambda: {"Authorization": f"Bearer {SECRET_TOKEN}"})

    def get(self, path: str, **more: Any) -> httpx.Response:
        return http_get(self.url + path, headers=self.headers, **more)

    def post(self, prompt: str = "a prompt", headers: dict[str, str] | None = None, **more: Any) -> httpx.Response:
        body = {"prompt": prompt, **more}
        return http_post(f"{self.url}/v1/generate", json=body, headers=self.headers | (headers or {}))

    def wait_until_ready(self) -> None:
        eventually(lambda: status_of(self.url + "/readyz") == 200)

    def logged(self, what: str) -> list[str]:
        """What generators did, of one sort, oldest first."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [text for line in lines for word, _, text in [line.partition(" ")] if word == what]


class Clients:
    """Any number of connections at once, over some pools: one pool takes long to find a free one among many."""

    def __init__(self, service: Service) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        settings = {"base_url": service.url, "headers": service.headers, "timeout": PATIENCE, "verify": False}
        self._pools = [httpx.AsyncClient(limits=limits, **settings) for _ in range(8)]

    async def post(self, prompt: str, seed: int = 0) -> httpx.Response:
        pool = self._pools[hash(prompt) % len(self._pools)]
        return await pool.post("/v1/generate", json={"prompt": prompt, "seed": seed})

    async def post_body(self, body: bytes) -> httpx.Response:
        pool = self._pools[hash(body) % len(self._pools)]
        return await pool.post("/v1/generate", content=body, headers={"content-type": "application/json"})

    async def close(self) -> None:
        await asyncio.gather(*(pool.aclose() for pool in self._pools))


def gathered(service: Service, work: Callable[[Clients], Awaitable[Any]]) -> Any:
    """What `work` returns, done with clients that are closed afterwards."""

    async def run() -> Any:
        clients = Clients(service)
        try:
            return await work(clients)
        finally:
            await clients.close()

    return asyncio.run(run())


def eventually(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, f"not after {PATIENCE} seconds"
        time.sleep(0.02)


def status_of(url: str) -> int | None:
    """The status of an answer; None where nobody answers."""
    try:
        return http_get(url).status_code
    except httpx.TransportError:
        return None


def image_of(response: httpx.Response) -> Image.Image:
    """The image of an answer."""
    assert response.status_code == 200, response.text
    return opened(base64.b64decode(response.json()["image"]))


def opened(png: bytes) -> Image.Image:
    """The image of a file."""
    return Image.open(io.BytesIO(png))


def encoded(image: Image.Image) -> str:
    """An image as requests hold it."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@contextlib.contextmanager
def local(
    config: ServeConfig, make: GeneratorFactory, log: Path, token: str | None = SECRET_TOKEN
) -> Iterator[Service]:
    """A service of worker processes, its front on a thread of this process."""
    metrics = Metrics()
    app = create_app(config, WorkerPool(config, metrics, make), metrics, digest(token) if token else None)
    with open_listener("127.0.0.1", 0) as listener:
        front = build_server(app, config)
        thread = threading.Thread(target=front.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield Service(listener_url(listener), log)
        finally:
            front.should_exit = True
            thread.join()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def case(name: str, log: Path) -> tuple[ServeConfig, GeneratorFactory]:
    """Services of the suite: `roomy` and `narrow` ones, and one that has no model."""
    match name:
        case "roomy":
            roomy = {"devices": ("cpu", "cpu"), "num_replicas": 2, "requests_per_worker": 16, "max_queue": 400}
            return COMMON.model_copy(update=roomy), partial(make_logging, log, 0.005)
        case "narrow":
            return COMMON.model_copy(update={"requests_per_worker": 1, "max_queue": 3}), partial(make_logging, log, 0.0)
        case _:
            return COMMON.model_copy(update={"restart_delay": 30.0}), make_nothing
