"""A generator behind plain data: what a worker process and a Ray replica both hold."""

import asyncio
import io
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from imgen_common.errors import UserError
from imgen_common.images import decode
from interleave.models.generators.pipeline import GenerationSettings, PipelineConfig, PipelineGenerator
from interleave.models.generators.scripted import ScriptedConfig
from interleave.protocols import BackendError, GenerationRequest, Generator, HashedImage
from interleave.records import FailureKind
from interleave.serve.config import ServeConfig

log = logging.getLogger("interleave.serve")


@dataclass(frozen=True)
class Task:
    """A request for a picture.  images: encoded pictures, checked; settings: those it gives, by name."""

    prompt: str
    images: tuple[bytes, ...] = field(repr=False)
    seed: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class Drawn:
    """A picture.  seconds: from when the worker took the request; batches: sizes of the batches drawn since the last
    answer."""

    png: bytes = field(repr=False)
    seconds: float
    batches: tuple[int, ...] = ()


@dataclass(frozen=True)
class Failed:
    """Why there is no picture, in words that may be shown to anyone who may ask for one."""

    kind: FailureKind | Literal["not_ready", "worker_died"]
    message: str


@dataclass(frozen=True)
class About:
    """The model that draws."""

    model: str
    params: dict[str, Any]
    max_sources: int


class Backend(Protocol):
    """Where requests are drawn: worker processes of this machine, or Ray Serve replicas."""

    @property
    def about(self) -> About | None:
        """The model; None until a worker has loaded it."""
        ...

    @property
    def trouble(self) -> str | None:
        """Why it is not ready; None when it is."""
        ...

    @property
    def capacity(self) -> int:
        """Requests that can be with workers at once."""
        ...

    @property
    def num_running(self) -> int:
        """Requests with workers now."""
        ...

    async def start(self) -> None:
        """Begin to load; does not wait for it."""
        ...

    async def draw(self, task: Task) -> Drawn | Failed:
        """The picture.  Cancelled, the task is dropped if it waits, and cancelled in its worker if it runs."""
        ...

    async def stop(self) -> None:
        """Let go of all workers."""
        ...


class Adjustable(Generator, Protocol):
    """A generator that can draw with other settings without loading anything anew."""

    def with_params(self, settings: GenerationSettings) -> Generator:
        """The same generator with `settings` over its own.  Raises UserError for settings that it does not take."""
        ...


Make = Callable[[ServeConfig, Callable[[int], None]], Adjustable]
"""Loads the generator of a worker; the second argument is told the size of each batch that is drawn."""


def make_generator(config: ServeConfig, on_batch: Callable[[int], None]) -> Adjustable:
    """The generator that `config` names.  Raises UserError where it cannot be had."""
    match config.generator:
        case PipelineConfig():
            return PipelineGenerator(config.generator, on_batch)
        case ScriptedConfig():
            return config.generator.build()


class Studio:
    """A loaded generator that answers tasks and never raises."""

    def __init__(self, config: ServeConfig, make: Make = make_generator) -> None:
        """Raises UserError where the generator cannot be had."""
        self._max_pixels = config.max_pixels
        self._batches: deque[int] = deque()
        self._generator = make(config, self._batches.append)
        self.about = About(self._generator.id, dict(self._generator.params), self._generator.max_sources)

    async def draw(self, task: Task) -> Drawn | Failed:
        """The picture as PNG, or why there is none; what is not for others' eyes is logged."""
        started = time.monotonic()
        try:
            generator = self._generator.with_params(GenerationSettings(**task.settings))
            sources = await asyncio.to_thread(self._read, task.images) if task.images else ()
            picture = await generator.generate(GenerationRequest(task.prompt, sources, task.seed))
            png = await asyncio.to_thread(_png, picture)
        except UserError as error:
            return Failed("refused", str(error))
        except BackendError as error:
            log.warning("a picture failed (%s): %s", error.kind, error)
            return Failed(error.kind, f"the generator failed ({error.kind})")
        except Exception:
            log.exception("a picture failed")
            return Failed("model_error", "the generator failed (model_error)")
        batches = tuple(self._batches.popleft() for _ in range(len(self._batches)))
        return Drawn(png, time.monotonic() - started, batches)

    async def close(self) -> None:
        """Let go of the model."""
        await self._generator.close()

    def _read(self, images: tuple[bytes, ...]) -> tuple[HashedImage, ...]:
        return tuple(HashedImage.from_pil(decode(image, len(image), self._max_pixels)) for image in images)


def _png(picture: HashedImage) -> bytes:
    buffer = io.BytesIO()
    picture.image.save(buffer, "PNG")
    return buffer.getvalue()
