"""Pictures on disk by what they were asked with: an identical job is never drawn twice."""

import asyncio
import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imgen_common.errors import UserError
from interleave.parts import Generator, Job, Picture
from interleave.store import PictureStore, writing


@dataclass
class _Flight:
    """A picture that is being found, and how many wait for it."""

    task: asyncio.Task[Picture]
    passengers: int = 0


class CachedGenerator:
    """`inner`, whose pictures are kept in `folder`, where any number of runs may share them.

    A key (generator, parameters, prompt, sources, seed) names the picture's id in `keys/`, the picture lies in
    `pictures/`; what is damaged is drawn again.  Equal jobs at the same time share one picture.  Failures are not kept.
    """

    def __init__(self, inner: Generator, folder: Path) -> None:
        self._inner, self._folder = inner, folder
        self._pictures = PictureStore(folder / "pictures")
        self._flights: dict[str, _Flight] = {}
        self.hits = 0
        self.misses = 0

    @property
    def id(self) -> str:
        """That of the inner generator."""
        return self._inner.id

    @property
    def params(self) -> Mapping[str, Any]:
        """Those of the inner generator."""
        return self._inner.params

    @property
    def max_sources(self) -> int:
        """That of the inner generator."""
        return self._inner.max_sources

    async def generate(self, job: Job) -> Picture:
        """The picture of an equal job before, at the same time, or else of the inner generator.

        Raises UserError if the folder cannot be written, besides what the inner generator raises.
        """
        key = self.key(job)
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Flight(asyncio.create_task(self._find(key, job)))
        else:
            self.hits += 1
        flight.passengers += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.passengers -= 1
            if not flight.passengers:
                flight.task.cancel()  # where every passenger was cancelled; else it is done
                if self._flights.get(key) is flight:
                    del self._flights[key]

    async def close(self) -> None:
        """Close the inner generator."""
        await self._inner.close()

    def key(self, job: Job) -> str:
        """sha256 (hex) of everything that a picture depends on."""
        parts = {
            "generator": self._inner.id,
            "params": dict(self._inner.params),
            "prompt": job.prompt,
            "sources": [source.id for source in job.sources],
            "seed": job.seed,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    async def _find(self, key: str, job: Job) -> Picture:
        known = await asyncio.to_thread(self._read, key)
        if known is not None:
            self.hits += 1
            return known
        self.misses += 1
        picture = await self._inner.generate(job)
        await asyncio.to_thread(self._write, key, picture)
        return picture

    def _path(self, key: str) -> Path:
        return self._folder / "keys" / key[:2] / key

    def _read(self, key: str) -> Picture | None:
        try:
            image_id = self._path(key).read_text(encoding="ascii")
        except (OSError, ValueError):
            return None
        try:
            return self._pictures.get(image_id)
        except UserError:
            self._path(key).unlink(missing_ok=True)
        with contextlib.suppress(UserError):  # where the key's own file was damaged, it names no picture
            self._pictures.path(image_id).unlink(missing_ok=True)
        return None

    def _write(self, key: str, picture: Picture) -> None:
        self._pictures.put(picture)
        path = self._path(key)
        with writing(self._folder):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", delete=False) as fresh:
                fresh.write(picture.id)
            os.replace(fresh.name, path)
