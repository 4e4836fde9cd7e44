"""A service under load, kills, images that keep a decoder busy, half-sent requests, clients that leave, and nonsense.

Every whole request is answered, each image is its own, and the service counts as its clients do.
"""

import asyncio
import base64
import io
import json
import os
import random
import signal
import socket
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

import httpx
import pytest
import serving
from fuzzing import mutations
from PIL import Image
from serving import Clients, Service, eventually, gathered, image_of
from serving_generator import make_logging, picture_of

from interleave.protocols import GenerationRequest

NUM_CLIENTS, NUM_ROUNDS = 24, 20
NUM_KILLS, NUM_HALVES, NUM_LEAVING = 6, 100, 60


def scans(repeats: int) -> str:
    """A progressive JPEG of one megapixel whose last scan stands there many times."""
    buffer = io.BytesIO()
    Image.new("RGB", (1000, 1000), "red").save(buffer, "JPEG", progressive=True)
    whole = buffer.getvalue()
    last = whole.rfind(b"\xff\xda")
    return base64.b64encode(whole[:last] + whole[last:-2] * repeats + b"\xff\xd9").decode()


class Crowd:
    """Clients of a service, and what they got."""

    def __init__(self, service: Service) -> None:
        self.service, self.statuses = service, Counter[int]()
        self._rng = random.Random(0)
        self._bodies = mutations([b'{"prompt": "p", "seed": 7, "images": ["AAAA"], "params": {"width": 8}}'], 10**6)
        self._bombs = [scans(repeats) for repeats in (10, 100, 3000)]

    async def ask(self, clients: Clients, number: int) -> None:
        """A client: good requests, bombs and nonsense in turn."""
        for round_ in range(NUM_ROUNDS):
            request = GenerationRequest(f"prompt {number} {round_}", (), self._rng.getrandbits(62))
            match self._rng.randrange(4):
                case 0:
                    bomb = {"prompt": "bomb", "images": [self._rng.choice(self._bombs)]}
                    answer = await self._post(clients, json.dumps(bomb).encode())
                    assert answer.status_code in (200, 422, 429), answer.text
                case 1:
                    answer = await self._post(clients, next(self._bodies))
                    assert answer.status_code in (200, 400, 413, 422, 429), answer.text
                case _:
                    body = {"prompt": request.prompt, "seed": request.seed}
                    answer = await self._post(clients, json.dumps(body).encode())
                    assert answer.status_code in (200, 429), answer.text
                    if answer.status_code == 200:
                        assert image_of(answer).tobytes() == picture_of(request).tobytes()

    async def leave(self, clients: Clients) -> None:
        """Clients that ask for slow images and go."""
        for number in range(NUM_LEAVING):
            body = {"prompt": f"slow 60 left {number}"}
            if number % 2:
                body["images"] = [self._bombs[0]]  # type: ignore[assignment]
            task = asyncio.create_task(clients.post_body(json.dumps(body).encode()))
            await asyncio.sleep(self._rng.random() * 0.2)
            task.cancel()
            with suppress(asyncio.CancelledError):
                self.statuses[(await task).status_code] += 1

    async def half_send(self) -> None:
        """Connections whose request never ends."""
        url = httpx.URL(self.service.url)
        opened = []
        for _ in range(NUM_HALVES):
            with suppress(OSError):
                opened.append(socket.create_connection((url.host, url.port), timeout=serving.PATIENCE))
                opened[-1].sendall(
                    b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * self._rng.randrange(9000)
                )
            await asyncio.sleep(0.02)
        for one in opened:
            one.close()

    async def kill(self) -> None:
        """Kills a worker from time to time."""
        for _ in range(NUM_KILLS):
            await asyncio.sleep(0.5)
            with suppress(ProcessLookupError):
                os.kill(int(self.service.logged("load")[-1]), signal.SIGKILL)

    async def _post(self, clients: Clients, body: bytes) -> httpx.Response:
        answer = await clients.post_body(body)
        self.statuses[answer.status_code] += 1
        return answer


@pytest.mark.exhaustive
def test_every_request_is_answered_and_counted(tmp_path: Path) -> None:
    settings = {"devices": ("cpu", "cpu"), "requests_per_worker": 16, "max_deaths": 20, "head_timeout": 1.0}
    limits = {"max_connections": 64, "max_pixels": 10**6, "max_queue": 400}
    config, log = serving.COMMON.model_copy(update=settings | limits), tmp_path / "log"
    with serving.local(config, partial(make_logging, log, 0.005), log) as service:
        service.wait_until_ready()
        crowd = Crowd(service)

        async def everything(clients: Clients) -> None:
            asking = (crowd.ask(clients, number) for number in range(NUM_CLIENTS))
            await asyncio.gather(*asking, crowd.leave(clients), crowd.half_send(), crowd.kill())

        gathered(service, everything)
        eventually(lambda: "interleave_running 0.0" in service.get("/metrics").text)
        counted = Counter[int]()
        for line in service.get("/metrics").text.splitlines():
            if line.startswith("interleave_requests_total{"):
                counted[int(line.split('"')[1])] = round(float(line.split()[1]))
        left = counted.pop(499, 0)
        assert counted == crowd.statuses
        assert counted[200] > 0
        assert counted[422] > 0
        assert 0 < left <= NUM_LEAVING
        print(f"{sum(crowd.statuses.values())} answered, {left} left: {dict(crowd.statuses)}")
        service.wait_until_ready()
        image_of(service.post("after all"))
        deaths = len(service.logged("load")) - 2
        assert deaths >= 1
