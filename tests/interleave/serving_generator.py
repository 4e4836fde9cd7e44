"""A generator that logs what it computes; apart from the rest, so that workers load little."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from imgen_common.errors import UserError
from interleave.generators.pipeline import Settings
from interleave.generators.scripted import ScriptedGenerator, bands
from interleave.parts import Generator, Job, PartFailed, Picture
from interleave.serve import ServeConfig


class LoggingGenerator:
    """Draws bands after `latency` seconds, of which a prompt may ask for more ("slow 2"), and writes down what it does.

    A prompt of "crash" ends its process, "fail" and "bug" fail.
    """

    id, params, max_sources = "logging", {"height": 10, "width": 10}, 2

    def __init__(self, log: Path, latency: float, on_batch: Callable[[int], None]) -> None:
        self._log, self._latency, self._on_batch = log, latency, on_batch
        self._write("load", str(os.getpid()))

    def with_params(self, settings: Settings) -> Generator:
        if settings.guidance_scale == 99:
            raise UserError("guidance_scale 99: never heard of")
        return ScriptedGenerator(self._draw, max_sources=2).with_params(settings) if settings.height else self

    async def generate(self, job: Job) -> Picture:
        self._write("begin", job.prompt)
        if job.prompt.startswith("crash"):
            os._exit(3)
        if job.prompt.startswith("fail"):
            raise PartFailed("out_of_memory", "secret detail")
        if job.prompt.startswith("bug"):
            raise RuntimeError("secret detail")
        slow = float(job.prompt.split()[1]) if job.prompt.startswith("slow ") else 0.0
        await asyncio.sleep(self._latency + slow)
        self._on_batch(1)
        return Picture.of(self._draw(job))

    async def close(self) -> None:
        pass

    def _draw(self, job: Job) -> Image.Image:
        self._write("draw", job.prompt)
        return picture_of(job)

    def _write(self, what: str, text: str) -> None:
        with self._log.open("a") as file:
            file.write(f"{what} {text}\n")


def picture_of(job: Job) -> Image.Image:
    """What the service is to answer."""
    return bands(job, 10, 10)


def make_logging(log: Path, latency: float, config: ServeConfig, on_batch: Callable[[int], None]) -> LoggingGenerator:
    """A worker's generator."""
    return LoggingGenerator(log, latency, on_batch)


def make_nothing(config: ServeConfig, on_batch: Callable[[int], None]) -> LoggingGenerator:
    """A model that does not load."""
    raise UserError("no such model: nothing")


def make_dying(config: ServeConfig, on_batch: Callable[[int], None]) -> LoggingGenerator:
    """A model that takes its process down."""
    os._exit(9)
