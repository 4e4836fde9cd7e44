"""A generator without a model: for tests, and to try a service or the loop."""

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from PIL import Image

from imgen_common.config import Config
from interleave.models.generators.pipeline import GenerationSettings
from interleave.protocols import BackendError, GenerationRequest, HashedImage, check_sources


class ScriptedConfig(Config):
    """Images that only tell their requests apart: bands of color by the hash of prompt, sources and seed."""

    kind: Literal["scripted"] = "scripted"
    height: Annotated[int, Ge(1), Le(4096)] = 64
    """Height in pixels."""
    width: Annotated[int, Ge(1), Le(4096)] = 64
    """Width in pixels."""
    latency: Annotated[float, Ge(0)] = 0.0
    """Seconds that each image takes."""
    max_sources: Annotated[int, Ge(0), Le(16)] = 1
    """How many images an edit may be given."""

    def build(self) -> "ScriptedGenerator":
        """The generator."""
        return ScriptedGenerator(
            lambda request: color_bands(request, self.width, self.height),
            self.latency,
            max_sources=self.max_sources,
            params={"width": self.width, "height": self.height},
        )


def color_bands(request: GenerationRequest, width: int = 64, height: int = 64) -> Image.Image:
    """An image by the hash of the request: ten bands of color."""
    named = repr((request.prompt, [source.id for source in request.sources], request.seed)).encode()
    small = Image.frombytes("RGB", (1, 10), hashlib.sha256(named).digest()[:30])
    return small.resize((width, height), Image.Resampling.NEAREST)


class ScriptedGenerator:
    """Answers with `generate(request)` after `latency` seconds, or with the failure that `fails(request)` gives."""

    def __init__(
        self,
        generate: Callable[[GenerationRequest], Image.Image] = color_bands,
        latency: float = 0.0,
        fails: Callable[[GenerationRequest], BackendError | None] = lambda request: None,
        max_sources: int = 1,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        self._generate, self._latency, self._fails = generate, latency, fails
        self.id, self.max_sources, self.params = "scripted", max_sources, params or {}

    async def generate(self, request: GenerationRequest) -> HashedImage:
        """The image of `request`, or its failure."""
        check_sources(self, request)
        await asyncio.sleep(self._latency)
        failure = self._fails(request)
        if failure is not None:
            raise failure
        return HashedImage.from_pil(self._generate(request))

    def with_params(self, settings: GenerationSettings) -> "ScriptedGenerator":
        """The same generator; images are resized where `settings` gives a height or width."""
        given = settings.model_dump(exclude_none=True)

        def resized(request: GenerationRequest) -> Image.Image:
            image = self._generate(request)
            size = given.get("width", image.width), given.get("height", image.height)
            return image.resize(size, Image.Resampling.NEAREST)

        return ScriptedGenerator(resized, self._latency, self._fails, self.max_sources, {**self.params, **given})

    async def close(self) -> None:
        """Nothing to release."""
