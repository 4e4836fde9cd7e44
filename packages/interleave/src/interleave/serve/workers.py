"""Worker processes of this machine, one per device: their queue, their supervision, and what goes over the wire.

Front and worker share a socket.  A message is a JSON header behind its length in four bytes, and then its blobs:

    front to worker   {"id", "prompt", "seed", "settings"} + source pictures     {"cancel": id}
    worker to front   {"ready": about}  or  {"failed": reason}, the last message
                      {"id", "seconds", "batches"} + PNG     {"id", "failure": [kind, message]}     {"id", "cancelled"}

A worker whose socket closes ends itself; a front whose socket closes takes the worker for dead, which the system tells
at once, however the process ended.
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

from imgen_common.console import quiet_libraries
from imgen_common.errors import UserError
from interleave.serve.config import ServeConfig
from interleave.serve.studio import About, Drawn, Failed, Make, Studio, Task, make_generator

if TYPE_CHECKING:
    from interleave.serve.metrics import Metrics  # which workers need not load

log = logging.getLogger("interleave.serve")
LONGEST_DELAY = 30.0
"""Seconds."""
DEATHS_WHILE_LOADING = 3
GOODBYE = 5.0
"""Seconds that a worker gets to end by itself."""
CHUNK = 2**20


def _frame(header: dict[str, Any], blobs: Sequence[bytes] = ()) -> bytes:
    text = json.dumps(header | {"blobs": [len(blob) for blob in blobs]}).encode()
    return b"".join([len(text).to_bytes(4, "big"), text, *blobs])


async def _read_frame(reader: asyncio.StreamReader) -> tuple[dict[str, Any], tuple[bytes, ...]] | None:
    """The next message; None when the other end is gone."""
    try:
        size = int.from_bytes(await reader.readexactly(4), "big")
        header = json.loads(await reader.readexactly(size))
        return header, tuple([await reader.readexactly(length) for length in header.pop("blobs")])
    except (asyncio.IncompleteReadError, OSError):
        return None


# --- the worker's side -----------------------------------------------------------------------------------------------


def work(end: socket.socket, config: ServeConfig, make: Make) -> None:
    """A worker process: load, then answer until the front is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole terminal; the front decides
    logging.basicConfig(format="%(name)s: worker: %(message)s")
    quiet_libraries()
    try:
        studio = Studio(config, make)
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}; see the service's log"
        log.error("the model does not load", exc_info=not isinstance(error, UserError))
        end.sendall(_frame({"failed": reason}))
    else:
        asyncio.run(_answer(end, studio))


async def _answer(end: socket.socket, studio: Studio) -> None:
    reader, writer = await asyncio.open_unix_connection(sock=end, limit=CHUNK)
    running: dict[int, asyncio.Task[Drawn | Failed]] = {}

    def reply(number: int, task: "asyncio.Task[Drawn | Failed]") -> None:
        del running[number]
        if task.cancelled():
            writer.write(_frame({"id": number, "cancelled": True}))
            return
        match task.result():
            case Failed(kind, message):
                writer.write(_frame({"id": number, "failure": [kind, message]}))
            case Drawn(png, seconds, batches):
                writer.write(_frame({"id": number, "seconds": seconds, "batches": batches}, [png]))

    writer.write(_frame({"ready": asdict(studio.about)}))
    while (message := await _read_frame(reader)) is not None:
        header, images = message
        if "cancel" in header:
            if header["cancel"] in running:
                running[header["cancel"]].cancel()
            continue
        number = header["id"]
        job = Task(header["prompt"], images, header["seed"], header["settings"])
        running[number] = asyncio.create_task(studio.draw(job))
        running[number].add_done_callback(partial(reply, number))
    for task in running.values():
        task.cancel()
    await studio.close()


# --- the front's side ------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Entry:
    """A task on its way.  deaths: workers that died at it."""

    task: Task
    answer: asyncio.Future[Drawn | Failed]
    deaths: int = 0


class _Worker:
    """One device's process, started again when it dies."""

    def __init__(self, pool: "Pool", config: ServeConfig, make: Make) -> None:
        self._pool, self._config, self._make = pool, config, make
        self._process: BaseProcess | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._numbers = itertools.count()
        self._deaths = self._false_starts = 0
        self.running: dict[int, _Entry] = {}
        self.about: About | None = None
        self.failed: str | None = None

    def has_room(self, entry: _Entry) -> bool:
        """Whether it may be given `entry` now: one that may kill it shares it with no other."""
        alone = self._is_last_chance(entry) or any(map(self._is_last_chance, self.running.values()))
        return self.about is not None and len(self.running) < (1 if alone else self._config.jobs_per_worker)

    def give(self, entry: _Entry) -> None:
        """Send a task."""
        number, task = next(self._numbers), entry.task
        self.running[number] = entry
        header = {"id": number, "prompt": task.prompt, "seed": task.seed, "settings": task.settings}
        self._send(_frame(header, task.images))

    def cancel(self, entry: _Entry) -> bool:
        """Tell the process to drop a task, if it has it; its place is free once the process says so."""
        numbers = [number for number, running in self.running.items() if running is entry]
        for number in numbers:
            self._send(_frame({"cancel": number}))
        return bool(numbers)

    async def supervise(self) -> None:
        """Keep a process alive, unless its model does not load."""
        while self.failed is None:
            was_ready = await self._live()
            lost, self.running = list(self.running.values()), {}
            if self.failed is None:
                self._note_death(was_ready, len(lost))
            self._pool.take_back(lost)
            if self.failed is None:
                delay = self._config.restart_delay * 2 ** min(self._deaths - 1, 16)
                await asyncio.sleep(min(delay, LONGEST_DELAY))
        log.error("a worker is given up: %s", self.failed)

    async def stop(self) -> None:
        """End the process, by force if it takes long."""
        if self._writer is not None:
            self._writer.close()
        if self._process is not None:
            await asyncio.to_thread(self._process.join, GOODBYE)
            self._process.kill()
            await asyncio.to_thread(self._process.join)

    def _note_death(self, was_ready: bool, num_lost: int) -> None:
        code = None if self._process is None else self._process.exitcode
        log.warning("a worker died (exit code %s) with %d requests", code, num_lost)
        self._pool.metrics.restarts.inc()
        self._deaths += 1
        self._false_starts = 0 if was_ready else self._false_starts + 1
        if self._false_starts >= DEATHS_WHILE_LOADING:
            self.failed = f"the worker died {self._false_starts} times while loading, last with exit code {code}"

    def _is_last_chance(self, entry: _Entry) -> bool:
        return 0 < entry.deaths == self._config.max_deaths - 1

    def _send(self, data: bytes) -> None:
        if self._writer is not None:  # a write to a process that is gone is lost, and noticed by `_live`
            self._writer.write(data)

    async def _live(self) -> bool:
        """One process from start to end; whether it became ready."""
        ours, theirs = socket.socketpair()
        context = multiprocessing.get_context("spawn")
        self._process = None
        process = context.Process(target=work, args=(theirs, self._config, self._make), daemon=True)
        with theirs:
            try:
                process.start()
            except OSError:
                log.exception("a worker could not be started")
                ours.close()
                return False
        self._process = process
        reader, self._writer = await asyncio.open_unix_connection(sock=ours, limit=CHUNK)
        while (message := await _read_frame(reader)) is not None:
            self._hear(*message)
        was_ready, self.about = self.about is not None, None
        await self.stop()
        return was_ready

    def _hear(self, header: dict[str, Any], blobs: tuple[bytes, ...]) -> None:
        if "ready" in header:
            self.about = About(**header["ready"])
            log.info("a worker is ready (%s)", self.about.model)
        elif "failed" in header:
            self.failed = header["failed"]
        else:
            answer = self.running.pop(header["id"]).answer
            self._deaths = 0
            if not answer.done() and "failure" in header:
                answer.set_result(Failed(*header["failure"]))
            elif not answer.done():
                answer.set_result(Drawn(blobs[0], header["seconds"], tuple(header["batches"])))
        self._pool.dispatch()


class Pool:
    """The workers and the tasks that wait for them, oldest first."""

    def __init__(self, config: ServeConfig, metrics: "Metrics", make: Make = make_generator) -> None:
        self.metrics = metrics
        self._max_deaths, self._jobs_per_worker = config.max_deaths, config.jobs_per_worker
        self._waiting: deque[_Entry] = deque()
        self._workers = [_Worker(self, placed, make) for placed in _placed(config)]
        self._supervisors: list[asyncio.Task[None]] = []
        self._about: About | None = None

    @property
    def about(self) -> About | None:
        """The model, as the first worker to be ready told it."""
        if self._about is None:
            self._about = next((worker.about for worker in self._workers if worker.about is not None), None)
        return self._about

    @property
    def trouble(self) -> str | None:
        """Why no worker is ready; None when one is."""
        if any(worker.about is not None for worker in self._workers):
            return None
        if self._is_lost:
            return f"the model does not load: {self._workers[0].failed}"
        return "the model is being loaded"

    @property
    def capacity(self) -> int:
        """Tasks that workers hold at most."""
        return len(self._workers) * self._jobs_per_worker

    @property
    def num_running(self) -> int:
        """Tasks with workers."""
        return sum(len(worker.running) for worker in self._workers)

    async def start(self) -> None:
        """Start all workers; does not wait for them."""
        self._supervisors = [asyncio.create_task(worker.supervise()) for worker in self._workers]

    async def stop(self) -> None:
        """End all workers."""
        for supervisor in self._supervisors:
            supervisor.cancel()
        await asyncio.gather(*self._supervisors, return_exceptions=True)
        await asyncio.gather(*(worker.stop() for worker in self._workers))

    async def draw(self, task: Task) -> Drawn | Failed:
        """The picture, from whichever worker has most room.  Cancelled, the task is dropped wherever it is."""
        entry = _Entry(task, asyncio.get_running_loop().create_future())
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
        """Give what waits to workers that have room."""
        if self._is_lost:
            while self._waiting:
                self._give_up(self._waiting.popleft(), Failed("not_ready", "the model does not load"))
        while self._waiting:
            able = [worker for worker in self._workers if worker.has_room(self._waiting[0])]
            if not able:
                return
            min(able, key=lambda worker: len(worker.running)).give(self._waiting.popleft())

    def take_back(self, entries: Sequence[_Entry]) -> None:
        """What a dead worker was at: to the head of the queue, or given up."""
        for entry in reversed(entries):
            entry.deaths += 1
            if entry.deaths >= self._max_deaths:
                self._give_up(entry, Failed("worker_died", f"{entry.deaths} workers died at this request"))
            elif not entry.answer.done():
                self._waiting.appendleft(entry)
        self.dispatch()

    @property
    def _is_lost(self) -> bool:
        return all(worker.failed is not None for worker in self._workers)

    def _give_up(self, entry: _Entry, why: Failed) -> None:
        if not entry.answer.done():
            entry.answer.set_result(why)


def _placed(config: ServeConfig) -> list[ServeConfig]:
    """The configuration of each worker: the generator on its own device, where it has one."""
    if not config.devices or config.generator.kind == "scripted":
        return [config] * max(1, len(config.devices))
    generators = [config.generator.model_copy(update={"device": device}) for device in config.devices]
    return [config.model_copy(update={"generator": generator}) for generator in generators]
