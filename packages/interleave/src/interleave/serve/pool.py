"""Worker processes of this machine, one per device: their queue, their supervision, and the messages between them.

Service and worker share a socket.  A message is a JSON header behind its length in four bytes, and then its blobs:

    service to worker   {"id", "prompt", "seed", "settings", "sizes"} + pixels of source images     {"cancel": id}
    worker to service   {"ready": model info}  or  {"failed": reason}, the last message
                        {"id", "seconds", "batches"} + PNG    {"id", "failure": [kind, message]}     {"id", "cancelled"}

A worker whose socket closes ends itself; a service whose socket closes takes the worker for dead: the operating system
closes it at once, however the process ended.
"""

import asyncio
import itertools
import json
import logging
import multiprocessing
import signal
import socket
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

from imgen_common.errors import UserError
from interleave.serve.config import ServeConfig
from interleave.serve.worker import (
    GenerationFailure,
    GenerationResult,
    GenerationTask,
    GeneratorFactory,
    ModelInfo,
    RawImage,
    Worker,
    build_worker_generator,
)

if TYPE_CHECKING:
    from interleave.serve.metrics import Metrics  # which workers need not load

log = logging.getLogger("interleave.serve")
MAX_RESTART_DELAY = 30.0
MAX_LOADING_DEATHS = 3
STOP_TIMEOUT = 5.0
READ_LIMIT = 2**20


def _encode_message(header: dict[str, Any], blobs: Sequence[bytes] = ()) -> bytes:
    text = json.dumps(header | {"blobs": [len(blob) for blob in blobs]}).encode()
    return b"".join([len(text).to_bytes(4, "big"), text, *blobs])


async def _read_message(reader: asyncio.StreamReader) -> tuple[dict[str, Any], tuple[bytes, ...]] | None:
    """The next message; None when the other end is closed."""
    try:
        size = int.from_bytes(await reader.readexactly(4), "big")
        header = json.loads(await reader.readexactly(size))
        return header, tuple([await reader.readexactly(length) for length in header.pop("blobs")])
    except (asyncio.IncompleteReadError, OSError):
        return None


# --- in the worker's process -----------------------------------------------------------------------------------------


def run_worker(end: socket.socket, config: ServeConfig, build_generator: GeneratorFactory) -> None:
    """A worker process: loads the generator, then runs tasks until the service closes the socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the service decides
    logging.basicConfig(format="%(name)s: worker: %(message)s")
    try:
        worker = Worker(config, build_generator)
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}; see the log of the service"
        log.error("the model does not load", exc_info=not isinstance(error, UserError))
        end.sendall(_encode_message({"failed": reason}))
    else:
        asyncio.run(_answer_tasks(end, worker))


async def _answer_tasks(end: socket.socket, worker: Worker) -> None:
    reader, writer = await asyncio.open_unix_connection(sock=end, limit=READ_LIMIT)
    running: dict[int, asyncio.Task[GenerationResult | GenerationFailure]] = {}

    def reply(number: int, task: "asyncio.Task[GenerationResult | GenerationFailure]") -> None:
        del running[number]
        if task.cancelled():
            writer.write(_encode_message({"id": number, "cancelled": True}))
            return
        match task.result():
            case GenerationFailure(kind, message):
                writer.write(_encode_message({"id": number, "failure": [kind, message]}))
            case GenerationResult(png, seconds, batches):
                writer.write(_encode_message({"id": number, "seconds": seconds, "batches": batches}, [png]))

    writer.write(_encode_message({"ready": asdict(worker.model_info)}))
    while (message := await _read_message(reader)) is not None:
        header, pixels = message
        if "cancel" in header:
            if header["cancel"] in running:
                running[header["cancel"]].cancel()
            continue
        number = header["id"]
        images = tuple(
            RawImage(width, height, one) for (width, height), one in zip(header["sizes"], pixels, strict=True)
        )
        task = GenerationTask(header["prompt"], images, header["seed"], header["settings"])
        running[number] = asyncio.create_task(worker.generate(task))
        running[number].add_done_callback(partial(reply, number))
    for work in running.values():
        work.cancel()
    await worker.close()


# --- in the service --------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _QueuedTask:
    """A task in the pool.  deaths: workers that died while they ran it."""

    task: GenerationTask
    answer: asyncio.Future[GenerationResult | GenerationFailure]
    deaths: int = 0


class _WorkerProcess:
    """The process of one device, restarted when it dies."""

    def __init__(self, pool: "WorkerPool", config: ServeConfig, build_generator: GeneratorFactory) -> None:
        self._pool, self._config, self._build_generator = pool, config, build_generator
        self._process: BaseProcess | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._numbers = itertools.count()
        self._deaths = self._loading_deaths = 0
        self.running: dict[int, _QueuedTask] = {}
        self.model_info: ModelInfo | None = None
        self._refused = False
        self.failed: str | None = None
        """Why its model does not load, as of the last tries; None once it is loaded, and in the first ones."""

    def has_room(self, entry: _QueuedTask) -> bool:
        """Whether it may be given `entry` now: a task that may kill it is run alone."""
        alone = self._is_last_chance(entry) or any(map(self._is_last_chance, self.running.values()))
        return self.model_info is not None and len(self.running) < (1 if alone else self._config.requests_per_worker)

    def send_task(self, entry: _QueuedTask) -> None:
        number, task = next(self._numbers), entry.task
        self.running[number] = entry
        header = {"id": number, "prompt": task.prompt, "seed": task.seed, "settings": task.settings}
        header["sizes"] = [(image.width, image.height) for image in task.images]
        self._send(_encode_message(header, [image.pixels for image in task.images]))

    def cancel(self, entry: _QueuedTask) -> bool:
        """Cancels a task if the process has it; its place is free once the process confirms that."""
        numbers = [number for number, running in self.running.items() if running is entry]
        for number in numbers:
            self._send(_encode_message({"cancel": number}))
        return bool(numbers)

    async def supervise(self) -> None:
        """Keeps a process alive; one whose model does not load is tried again too, as what it lacks may come."""
        while True:
            was_ready = await self._run_process()
            lost, self.running = list(self.running.values()), {}
            self._note_death(was_ready, len(lost))
            self._pool.take_back(lost)
            delay = min(self._config.restart_delay * 2 ** min(self._deaths - 1, 16), MAX_RESTART_DELAY)
            if self.failed is not None:
                log.error("no model: %s; next try in %g s", self.failed, delay)
            await asyncio.sleep(delay)

    async def stop(self) -> None:
        """Ends the process, by force after `STOP_TIMEOUT` seconds."""
        if self._writer is not None:
            self._writer.close()
        if self._process is not None:
            await asyncio.to_thread(self._process.join, STOP_TIMEOUT)
            self._process.kill()
            await asyncio.to_thread(self._process.join)

    def _note_death(self, was_ready: bool, num_lost: int) -> None:
        code = None if self._process is None else self._process.exitcode
        self._pool.metrics.restarts.inc()
        self._deaths += 1
        if self._refused:
            return
        log.warning("a worker died (exit code %s) with %d tasks", code, num_lost)
        self._loading_deaths = 0 if was_ready else self._loading_deaths + 1
        if self._loading_deaths >= MAX_LOADING_DEATHS:
            self.failed = f"the worker died {self._loading_deaths} times while loading, last with exit code {code}"

    def _is_last_chance(self, entry: _QueuedTask) -> bool:
        return 0 < entry.deaths == self._config.max_deaths - 1

    def _send(self, data: bytes) -> None:
        if self._writer is not None:  # a write to a dead process is lost; `_run_process` notices the death
            self._writer.write(data)

    async def _run_process(self) -> bool:
        """Runs one process from start to end; returns whether it became ready."""
        ours, theirs = socket.socketpair()
        context = multiprocessing.get_context("spawn")
        self._process, self._refused = None, False
        process = context.Process(target=run_worker, args=(theirs, self._config, self._build_generator), daemon=True)
        with theirs:
            try:
                process.start()
            except OSError:
                log.exception("a worker could not be started")
                ours.close()
                return False
        self._process = process
        reader, self._writer = await asyncio.open_unix_connection(sock=ours, limit=READ_LIMIT)
        while (message := await _read_message(reader)) is not None:
            self._handle_message(*message)
        was_ready, self.model_info = self.model_info is not None, None
        await self.stop()
        return was_ready

    def _handle_message(self, header: dict[str, Any], blobs: tuple[bytes, ...]) -> None:
        if "ready" in header:
            self.model_info, self.failed = ModelInfo(**header["ready"]), None
            self._pool.model_info = self._pool.model_info or self.model_info
            log.info("a worker is ready (%s)", self.model_info.model)
        elif "failed" in header:
            self.failed, self._refused = header["failed"], True
        else:
            answer = self.running.pop(header["id"]).answer
            self._deaths = 0
            if not answer.done() and "failure" in header:
                answer.set_result(GenerationFailure(*header["failure"]))
            elif not answer.done():
                answer.set_result(GenerationResult(blobs[0], header["seconds"], tuple(header["batches"])))
        self._pool.dispatch()


class WorkerPool:
    """A `Backend`: the workers and the waiting tasks, oldest first."""

    def __init__(
        self, config: ServeConfig, metrics: "Metrics", build_generator: GeneratorFactory = build_worker_generator
    ) -> None:
        self.metrics = metrics
        self._max_deaths, self._tasks_per_worker = config.max_deaths, config.requests_per_worker
        self._waiting: deque[_QueuedTask] = deque()
        self._workers = [_WorkerProcess(self, one, build_generator) for one in _worker_configs(config)]
        self._supervisors: list[asyncio.Task[None]] = []
        self.model_info: ModelInfo | None = None
        """The model, as reported by the first worker that was ready."""

    @property
    def not_ready_reason(self) -> str | None:
        if any(worker.model_info is not None for worker in self._workers):
            return None
        if self._is_lost:
            return f"the model cannot be loaded, and is tried again: {self._workers[0].failed}"
        return "the model is being loaded"

    @property
    def capacity(self) -> int:
        return len(self._workers) * self._tasks_per_worker

    @property
    def num_running(self) -> int:
        return sum(len(worker.running) for worker in self._workers)

    async def start(self) -> None:
        self._supervisors = [asyncio.create_task(worker.supervise()) for worker in self._workers]

    async def stop(self) -> None:
        for supervisor in self._supervisors:
            supervisor.cancel()
        await asyncio.gather(*self._supervisors, return_exceptions=True)
        await asyncio.gather(*(worker.stop() for worker in self._workers))

    async def generate(self, task: GenerationTask) -> GenerationResult | GenerationFailure:
        """The image, from the worker with the fewest tasks."""
        entry = _QueuedTask(task, asyncio.get_running_loop().create_future())
        self._waiting.append(entry)
        self.dispatch()
        try:
            return await entry.answer
        finally:
            if entry.answer.cancelled() and not any(worker.cancel(entry) for worker in self._workers):
                with suppress(ValueError):
                    self._waiting.remove(entry)
                self.dispatch()

    def dispatch(self) -> None:
        """Gives waiting tasks to workers that have room."""
        if self._is_lost:
            while self._waiting:
                self._give_up(
                    self._waiting.popleft(),
                    GenerationFailure("not_ready", "the model cannot be loaded; ask again later"),
                )
        while self._waiting:
            free = [worker for worker in self._workers if worker.has_room(self._waiting[0])]
            if not free:
                return
            min(free, key=lambda worker: len(worker.running)).send_task(self._waiting.popleft())

    def take_back(self, entries: Sequence[_QueuedTask]) -> None:
        """Puts the tasks of a dead worker back to the head of the queue, or gives them up."""
        for entry in reversed(entries):
            entry.deaths += 1
            if entry.deaths >= self._max_deaths:
                self._give_up(entry, GenerationFailure("worker_died", f"{entry.deaths} workers died at this request"))
            elif not entry.answer.done():
                self._waiting.appendleft(entry)
        self.dispatch()

    @property
    def _is_lost(self) -> bool:
        return all(worker.failed is not None for worker in self._workers)

    def _give_up(self, entry: _QueuedTask, why: GenerationFailure) -> None:
        if not entry.answer.done():
            entry.answer.set_result(why)


def _worker_configs(config: ServeConfig) -> list[ServeConfig]:
    """The configuration of each worker, with the generator on its device."""
    if not config.devices or config.generator.kind == "scripted":
        return [config] * max(1, len(config.devices))
    generators = [config.generator.model_copy(update={"device": device}) for device in config.devices]
    return [config.model_copy(update={"generator": generator}) for generator in generators]
