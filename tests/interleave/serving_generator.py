"""A generator that logs what it computes; apart from the rest, so that workers load little."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from imgen_common.errors import UserError
from interleave.models.generators.pipeline import GenerationSettings
from interleave.models.generators.scripted import ScriptedGenerator, color_bands
from interleave.protocols import BackendError, GenerationRequest, Generator, HashedImage
from interleave.serve import ServeConfig


class LoggingGenerator:
    """Draws bands after `latency` seconds, of which a prompt may ask for more ("slow 2"), and writes down what it does.

    A prompt of "crash" ends its process, "fail" and "bug" fail.
    """

    id, params, max_sources = "logging", {"height": 10, "width": 10}, 2

    def __init__(self, log: Path, latency: float, on_batch: Callable[[int], None]) -> None:
        self._log, self._latency, self._on_batch = log, latency, on_batch
        self._write("load", str(os.getpid()))

    def with_params(self, settings: GenerationSettings) -> Generator:
        if settings.guidance_scale == 99:
            raise UserError("guidance_scale 99: never heard of")
        return ScriptedGenerator(self._draw, max_sources=2).with_params(settings) if settings.height else self

    async def generate(self, request: GenerationRequest) -> HashedImage:
        self._write("begin", request.prompt)
        if request.prompt.startswith("crash"):
            os._exit(3)
        if request.prompt.startswith("fail"):
            raise BackendError("out_of_memory", "secret detail")
        if request.prompt.startswith("bug"):
            raise RuntimeError("secret detail")
        slow = float(request.prompt.split()[1]) if request.prompt.startswith("slow ") else 0.0
        await asyncio.sleep(self._latency + slow)
        self._on_batch(1)
        return HashedImage.from_pil(self._draw(request))

    async def close(self) -> None:
        pass

    def _draw(self, request: GenerationRequest) -> Image.Image:
        self._write("draw", request.prompt)
        return picture_of(request)

    def _write(self, what: str, text: str) -> None:
        with self._log.open("a") as file:
            file.write(f"{what} {text}\n")


def picture_of(request: GenerationRequest) -> Image.Image:
    """What the service is to answer."""
    return color_bands(request, 10, 10)


def make_logging(log: Path, latency: float, config: ServeConfig, on_batch: Callable[[int], None]) -> LoggingGenerator:
    """A worker's generator."""
    return LoggingGenerator(log, latency, on_batch)


def make_nothing(config: ServeConfig, on_batch: Callable[[int], None]) -> LoggingGenerator:
    """A model that does not load."""
    raise UserError("no such model: nothing")


def make_late(log: Path, dies: bool, config: ServeConfig, on_batch: Callable[[int], None]) -> LoggingGenerator:
    """A model that loads at the fifth try; before that it takes its process down, or is said to be missing."""
    generator = LoggingGenerator(log, 0.0, on_batch)
    if len(log.read_text().splitlines()) < 5:
        if dies:
            os._exit(9)
        raise UserError("no such model yet")
    return generator
