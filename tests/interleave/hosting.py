"""The real HTTP service over a generator in this process."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator

from interleave.models.generators.scripted import ScriptedGenerator
from interleave.serve import ServeConfig, build_server, listener_url, open_listener
from interleave.serve.app import create_app, digest
from interleave.serve.metrics import Metrics
from interleave.serve.worker import GenerationFailure, GenerationResult, GenerationTask, Worker


class InProcess:
    """A backend of the service in this process."""

    not_ready_reason, capacity, num_running = None, 100, 0

    def __init__(self, generator: ScriptedGenerator) -> None:
        self._worker = Worker(ServeConfig(), lambda config, on_batch: generator)
        self.model_info = self._worker.model_info
        self.begun: list[GenerationTask] = []
        self.drawn: list[GenerationTask] = []
        self.cancelled = threading.Event()

    async def start(self) -> None:
        pass

    async def generate(self, task: GenerationTask) -> GenerationResult | GenerationFailure:
        self.begun.append(task)
        try:
            answer = await self._worker.generate(task)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        self.drawn.append(task)
        return answer

    async def stop(self) -> None:
        pass


QUICK = ServeConfig(shutdown_timeout=0)


@contextlib.contextmanager
def hosted(backend: InProcess, port: int = 0, token: str | None = None, config: ServeConfig = QUICK) -> Iterator[str]:
    """The real service over `backend`; its address."""
    app = create_app(config, backend, Metrics(), digest(token) if token else None)
    with open_listener("127.0.0.1", port) as listener:
        front = build_server(app, config)
        thread = threading.Thread(target=front.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener_url(listener)
        finally:
            front.should_exit = True
            thread.join()
