"""Images on disk by the request that they answer: an identical request is never generated twice."""

import asyncio
import contextlib
import hashlib
import json
from dataclasses import replace
from pathlib import Path

from imgen_common.errors import UserError, warn_once
from imgen_common.files import write_atomic, writing
from interleave.models.concurrency import SingleFlight
from interleave.protocols import GenerationRequest, Generator, HashedImage
from interleave.storage.images import IMAGES, ImageStore


class CachedGenerator:
    """`inner`, whose images are kept in `folder`, where any number of runs may share them.

    A key (generator, parameters, prompt, sources, seed) names the image's id in `keys/`, with the revised prompt in
    a second line, if any; the image is in `images/`.  What is damaged is generated again.  Equal requests at the same
    time share one image.  Failures are not kept.
    """

    def __init__(self, inner: Generator, folder: Path) -> None:
        self._inner, self._folder = inner, folder
        self.id, self.params, self.max_sources = inner.id, inner.params, inner.max_sources
        self._images = ImageStore(folder / IMAGES)
        self._in_flight = SingleFlight[HashedImage]()
        self.hits, self.misses = 0, 0

    async def generate(self, request: GenerationRequest) -> HashedImage:
        """The kept image, or the inner generator's, with one warning where it cannot be kept.  Raises BackendError."""
        key = self.key(request)
        self.hits += key in self._in_flight
        return await self._in_flight(key, lambda: self._find(key, request))

    async def close(self) -> None:
        """Close the inner generator."""
        await self._inner.close()

    def key(self, request: GenerationRequest) -> str:
        """sha256 (hex) of everything that an image depends on."""
        parts = {
            "generator": self.id,
            "params": dict(self.params),
            "prompt": request.prompt,
            "sources": [source.id for source in request.sources],
            "seed": request.seed,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    async def _find(self, key: str, request: GenerationRequest) -> HashedImage:
        known = await asyncio.to_thread(self._read, key)
        if known is not None:
            self.hits += 1
            return known
        self.misses += 1
        image = await self._inner.generate(request)
        try:
            await asyncio.to_thread(self._write, key, image)
        except UserError as error:  # the image is there, and perhaps paid for
            warn_once(f"the cache of images keeps nothing: {error}, or set cache: null")
        return image

    def _path(self, key: str) -> Path:
        return self._folder / "keys" / key[:2] / key

    def _read(self, key: str) -> HashedImage | None:
        try:
            image_id, _, revised = self._path(key).read_text(encoding="ascii").partition("\n")
            prompt = json.loads(revised) if revised else None
        except (OSError, ValueError):
            return None
        try:
            return replace(self._images.get(image_id), revised_prompt=prompt)
        except UserError:
            self._path(key).unlink(missing_ok=True)
        with contextlib.suppress(UserError):  # where the key's own file was damaged, it names no image
            self._images.path(image_id).unlink(missing_ok=True)
        return None

    def _write(self, key: str, image: HashedImage) -> None:
        self._images.put(image)
        path = self._path(key)
        with writing(self._folder):
            path.parent.mkdir(parents=True, exist_ok=True)
            revised = f"\n{json.dumps(image.revised_prompt)}" if image.revised_prompt else ""
            write_atomic(path, image.id + revised)
