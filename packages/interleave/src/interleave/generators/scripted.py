"""A generator that does as it is told: for tests, and to try a service or the loop without a model."""

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from PIL import Image

from imgen_common.config import Config
from interleave.generators.pipeline import Settings
from interleave.parts import Job, PartFailed, Picture


class ScriptedConfig(Config):
    """Pictures that only tell their jobs apart: bands of colours by the hash of prompt, sources and seed."""

    kind: Literal["scripted"] = "scripted"
    height: Annotated[int, Ge(1), Le(4096)] = 64
    """Height in pixels."""
    width: Annotated[int, Ge(1), Le(4096)] = 64
    """Width in pixels."""
    latency: Annotated[float, Ge(0)] = 0.0
    """Seconds that each picture takes."""
    max_sources: Annotated[int, Ge(0), Le(16)] = 1
    """How many pictures an edit may be given."""


def bands(job: Job, width: int = 64, height: int = 64) -> Image.Image:
    """A picture by the hash of the job: ten coloured bands."""
    named = repr((job.prompt, [source.id for source in job.sources], job.seed)).encode()
    small = Image.frombytes("RGB", (1, 10), hashlib.sha256(named).digest()[:30])
    return small.resize((width, height), Image.Resampling.NEAREST)


class ScriptedGenerator:
    """Answers with `draw(job)` after `latency` seconds, or with the failure that `fails(job)` gives."""

    def __init__(
        self,
        draw: Callable[[Job], Image.Image] = bands,
        latency: float = 0.0,
        fails: Callable[[Job], PartFailed | None] = lambda job: None,
        max_sources: int = 1,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        self._draw, self._latency, self._fails = draw, latency, fails
        self._max_sources, self._params = max_sources, params or {}

    @classmethod
    def of(cls, config: ScriptedConfig) -> "ScriptedGenerator":
        """The generator that `config` describes."""
        return cls(
            lambda job: bands(job, config.width, config.height),
            config.latency,
            max_sources=config.max_sources,
            params={"width": config.width, "height": config.height},
        )

    @property
    def id(self) -> str:
        """`scripted`."""
        return "scripted"

    @property
    def params(self) -> Mapping[str, Any]:
        """As given."""
        return self._params

    @property
    def max_sources(self) -> int:
        """As given."""
        return self._max_sources

    async def generate(self, job: Job) -> Picture:
        """The picture of `job`, or its failure."""
        await asyncio.sleep(self._latency)
        failure = self._fails(job)
        if failure is not None:
            raise failure
        return Picture.of(self._draw(job))

    def with_params(self, settings: Settings) -> "ScriptedGenerator":
        """The same generator; pictures are resized where `settings` gives a height or width."""
        given = settings.model_dump(exclude_none=True)

        def draw(job: Job) -> Image.Image:
            image = self._draw(job)
            size = given.get("width", image.width), given.get("height", image.height)
            return image.resize(size, Image.Resampling.NEAREST)

        return ScriptedGenerator(draw, self._latency, self._fails, self._max_sources, {**self._params, **given})

    async def close(self) -> None:
        """Nothing to let go of."""
