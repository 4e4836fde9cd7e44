"""A worker: a loaded generator that takes and returns plain data, in a process of its own or a Ray replica."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from PIL import Image

from imgen_common.errors import UserError
from interleave.models.generators.pipeline import GenerationSettings, PipelineConfig, PipelineGenerator
from interleave.models.generators.scripted import ScriptedConfig
from interleave.models.remote import encode_png
from interleave.protocols import BackendError, GenerationRequest, Generator, HashedImage
from interleave.records import FailureKind
from interleave.serve.config import ServeConfig

log = logging.getLogger("interleave.serve")


@dataclass(frozen=True)
class RawImage:
    """An image as its RGB pixels, row by row."""

    width: int
    height: int
    pixels: bytes = field(repr=False)


@dataclass(frozen=True)
class GenerationTask:
    """A request for an image.  images: source images, decoded.  settings: those of the request, by name."""

    prompt: str
    images: tuple[RawImage, ...] = field(repr=False)
    seed: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class GenerationResult:
    """A generated image.  seconds: since the worker got the task.  batches: their sizes since the last result."""

    png: bytes = field(repr=False)
    seconds: float
    batches: tuple[int, ...] = ()


@dataclass(frozen=True)
class GenerationFailure:
    """Why there is no image, in words that every client may read."""

    kind: FailureKind | Literal["not_ready", "worker_died"]
    message: str


@dataclass(frozen=True)
class ModelInfo:
    """The model that generates."""

    model: str
    params: dict[str, Any]
    max_sources: int


class Backend(Protocol):
    """Where tasks are run: worker processes of this machine, or Ray Serve replicas."""

    @property
    def model_info(self) -> ModelInfo | None:
        """The model; None until a worker has loaded it."""

    @property
    def not_ready_reason(self) -> str | None:
        """Why no worker is ready; None when one is."""

    @property
    def capacity(self) -> int:
        """Tasks that the workers hold at most."""

    @property
    def num_running(self) -> int:
        """Tasks that the workers hold now."""

    async def start(self) -> None:
        """Starts to load the workers; does not wait for them."""

    async def generate(self, task: GenerationTask) -> GenerationResult | GenerationFailure:
        """The image.  Canceled, the task is dropped if it waits, and canceled in its worker if it runs."""

    async def stop(self) -> None:
        """Stops all workers."""


class AdjustableGenerator(Generator, Protocol):
    """A generator that takes other settings without loading anything again."""

    def with_params(self, settings: GenerationSettings) -> Generator:
        """The same generator with `settings` over its own.  Raises UserError for settings that it does not take."""


GeneratorFactory = Callable[[ServeConfig, Callable[[int], None]], AdjustableGenerator]
"""Loads the generator of a worker; the second argument is called with the size of each batch."""


def build_worker_generator(config: ServeConfig, on_batch: Callable[[int], None]) -> AdjustableGenerator:
    """The generator that `config` names.  Raises UserError where it cannot be loaded."""
    match config.generator:
        case PipelineConfig():
            return PipelineGenerator(config.generator, on_batch)
        case ScriptedConfig():
            return config.generator.build()


class Worker:
    """A loaded generator that runs tasks and never raises."""

    def __init__(self, config: ServeConfig, build_generator: GeneratorFactory = build_worker_generator) -> None:
        """Raises UserError where the generator cannot be loaded."""
        self._batches: deque[int] = deque()
        self._generator = build_generator(config, self._batches.append)
        self.model_info = ModelInfo(self._generator.id, dict(self._generator.params), self._generator.max_sources)

    async def generate(self, task: GenerationTask) -> GenerationResult | GenerationFailure:
        """The image as PNG, or why there is none; details that clients may not read are logged."""
        started = time.monotonic()
        try:
            generator = self._generator.with_params(GenerationSettings(**task.settings))
            sources = await asyncio.to_thread(_hashed, task.images) if task.images else ()
            image = await generator.generate(GenerationRequest(task.prompt, sources, task.seed))
            png = await asyncio.to_thread(encode_png, image)
        except UserError as error:
            return GenerationFailure("refused", str(error))
        except BackendError as error:
            if error.kind == "refused":
                return GenerationFailure("refused", str(error))
            log.warning("an image failed (%s): %s", error.kind, error)
            return GenerationFailure(error.kind, f"the generator failed ({error.kind})")
        except Exception:
            log.exception("an image failed")
            return GenerationFailure("model_error", "the generator failed (model_error)")
        batches = tuple(self._batches.popleft() for _ in range(len(self._batches)))
        return GenerationResult(png, time.monotonic() - started, batches)

    async def close(self) -> None:
        """Releases the model."""
        await self._generator.close()


def _hashed(images: tuple[RawImage, ...]) -> tuple[HashedImage, ...]:
    return tuple(
        HashedImage.from_pil(Image.frombytes("RGB", (image.width, image.height), image.pixels)) for image in images
    )
