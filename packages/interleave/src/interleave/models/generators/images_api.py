"""Any OpenAI-compatible images endpoint: images from words, and edits of images."""

import asyncio
import base64
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Le

from imgen_common.config import NO_SECRETS, ONE_ANSWER, Config, KeyVariable, ServedModel
from imgen_common.errors import UserError, one_line
from imgen_common.http import (
    HttpClient,
    HttpError,
    Refusal,
    RetryPolicy,
    ServiceUrl,
    check_url,
    error_in_answer,
    redacted,
    version_hint,
)
from imgen_common.http.chat import COMMENTS, FILTERED, STREAMED
from imgen_common.http.failures import ERROR_KEYS
from interleave.models.remote import backend_errors, decode_base64_image, decode_image, encode_png
from interleave.protocols import GenerationRequest, HashedImage, check_sources

if TYPE_CHECKING:
    import httpx


BLACKED_OUT = ("has_nsfw_concepts", "nsfw_content_detected")
"""How servers of diffusers say that the image is a black one in the place of what was drawn."""
STREAM = (b"data:", b"event:")
"""How an answer begins that a server streams."""
IMAGE_FILES = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"RIFF")
"""How files of images begin."""
EDITS = "/images/edits"
REFUSED_KEYS = {key: f"{key}: null" for key in ("response_format", "quality", "size")} | {"seed": "send_seed: false"}
"""What to set where a server's refusal names a key that it does not take."""
LONG_BASE64 = re.compile(r"[\w+/=]{100,}")


class ImagesApiConfig(Config):
    """An OpenAI-compatible images endpoint, hosted or on a server of one's own."""

    renamed: ClassVar = {"calls": "retry, with concurrency beside it"}
    kind: Literal["images_api"] = "images_api"
    url: ServiceUrl = "http://127.0.0.1:8000/v1"
    """Address up to the version."""
    model: ServedModel = "default"
    """Name by which the server knows the model."""
    key_env: KeyVariable = "INTERLEAVE_API_KEY"
    """Variable of the environment that holds the key; nothing is sent where it is not set."""
    size: str | None = None
    """Size as the server names it, such as `1024x1024`; null: the server's own."""
    quality: str | None = None
    """Quality as the server names it; null: the server's own."""
    response_format: Literal["b64_json"] | None = "b64_json"
    """Asks for the image itself instead of an address; null where the server knows no such key (gpt-image)."""
    send_seed: bool = False
    """Whether seeds are sent, as `seed`; hosted models refuse them, and answer differently each time."""
    max_references: Annotated[int, Ge(0), Le(16)] = 1
    """How many images an edit may be given; 0: no edits."""
    image_field: Literal["image[]", "image"] = "image[]"
    """Name of the form's field that each image of an edit is sent in."""
    extra: Annotated[Mapping[str, Any], NO_SECRETS, ONE_ANSWER] = {}
    """Further keys of every request, as the server names them; null leaves one out.  No keys or passwords: they
    belong into the environment."""
    allow_addresses: bool = False
    """Whether an image is fetched from the address that the server answers, or to which that points; https only,
    without the key."""
    concurrency: Annotated[int, Ge(1), Le(10000)] = 16
    """Requests in flight at once."""
    retry: RetryPolicy = RetryPolicy()
    """Timeouts, retries and the circuit breaker."""
    max_answer_bytes: Annotated[int, Ge(1024)] = 128 * 2**20
    """Largest answer that is read."""
    max_pixels: Annotated[int, Ge(1)] = 64 * 10**6
    """Largest image that is decoded."""

    def build(self) -> "ImagesApiGenerator":
        """The generator.  Raises UserError for an address or a key that is none."""
        return ImagesApiGenerator(self)


class ImagesApiGenerator:
    """`/images/generations` for words alone, `/images/edits` with images."""

    def __init__(self, config: ImagesApiConfig, transport: "httpx.AsyncBaseTransport | None" = None) -> None:
        """transport: for tests.  Raises UserError for an address that is none, or a key that no header can carry."""
        self._config, self._url = config, check_url(config.url)
        self.id, self.max_sources = config.model, config.max_references
        self.params = config.model_dump(mode="json", include={"url", "size", "quality", "send_seed", "extra"})
        more = (config.key_env, config.retry, config.concurrency, config.max_answer_bytes, transport)
        self._client, self._files = HttpClient(self._url, *more), HttpClient(f"the files of {self._url}", *more)

    async def generate(self, request: GenerationRequest) -> HashedImage:
        """The image.  Raises BackendError, and UserError for an answer that the configuration does not let be read."""
        check_sources(self, request)
        content = await asyncio.to_thread(self._content, request)
        with backend_errors():
            encoded, address, revised = await self._client.call(lambda left: self._send(content, left), is_paid=True)
            # what follows has calls of its own: another answer would be another image, which has its price
            if encoded is not None:
                image = await asyncio.to_thread(decode_base64_image, encoded, self._config.max_pixels)
            else:
                image = await self._fetch(address)
        return replace(image, revised_prompt=revised)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()
        await self._files.close()

    def _content(self, request: GenerationRequest) -> dict[str, Any]:
        """Path and content of the HTTP request, as `HttpClient.request` takes them."""
        c = self._config
        keys = {"model": c.model, "prompt": request.prompt, "n": 1, "size": c.size, "quality": c.quality}
        keys |= {"response_format": c.response_format, "seed": request.seed if c.send_seed else None, **c.extra}
        fields = {name: value for name, value in keys.items() if value is not None}
        if not request.sources:
            return {"path": "/images/generations", "json": fields}
        sources = enumerate(request.sources)
        files = [(c.image_field, (f"{i}.png", encode_png(source), "image/png")) for i, source in sources]
        form = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
        return {"path": EDITS, "data": form, "files": files}

    async def _send(self, content: dict[str, Any], seconds: float) -> tuple[str | None, str, str | None]:
        try:
            data = await self._client.request("POST", self._url, seconds=seconds, **content)
        except HttpError as error:
            if (remedy := _remedy(error, content)) is None:
                raise
            raise HttpError(error.kind, f"{error}{remedy}", can_retry=False, status=error.status) from None
        try:
            return _read_entry(data)
        except HttpError as error:
            hint = version_hint(self._url) if error.kind == "malformed_response" else ""
            raise self._client.named(self._url, error, hint) from None

    async def _fetch(self, address: str) -> HashedImage:
        """The image at an address that the endpoint answered.

        Raises UserError where none may be fetched: so would all others be bought in vain.
        """
        if not self._config.allow_addresses:
            remedy = "set response_format: b64_json or allow_addresses: true"
            raise UserError(f"{self._url} answers an address; {remedy}")
        if not address.lower().startswith("https://"):
            what = f"{self._url} answers an address that is not https ({redacted(address)})"
            raise UserError(f"{what}; set response_format: b64_json")

        try:
            data = await self._files.call(lambda left: self._files.download(address, left))
            return await asyncio.to_thread(decode_image, data, self._config.max_pixels)
        except HttpError as error:
            remedy = "where the server knows response_format: b64_json, set it to get the image itself"
            raise HttpError(
                error.kind, f"{error}; {remedy}", can_retry=False
            ) from None  # the status is of the file alone


def _remedy(error: HttpError, content: Mapping[str, Any]) -> str | None:
    """What to do about a request that the server refuses, if that is known."""
    if error.status in (404, 405) and content["path"] == EDITS:
        return f" (asked for {EDITS}); if it makes no edits, name another generator, since steps edit images"
    sent = content.get("json") or content.get("data", {})
    named = [key for key in REFUSED_KEYS if key in sent and key in str(error)] if error.status in (400, 422) else []
    return f"; if it does not take {named[0]}, set {REFUSED_KEYS[named[0]]}" if named else None


def _read_entry(data: bytes) -> tuple[str | None, str, str | None]:
    """The image in base64, or its address, and the prompt as the endpoint revised it.  Raises HttpError.

    An answer that is the file of an image itself is taken, too.
    """
    if data.startswith(IMAGE_FILES):
        return base64.b64encode(data).decode(), "", None
    data = COMMENTS.sub(b"", data, count=1)
    try:
        answer = json.loads(data)
        if (error := error_in_answer(answer, "data")) is not None:
            raise error
        entry = answer["data"][0]
        if (error := error_in_answer(entry)) is not None:
            raise error
        if str(reason := entry.get("finish_reason", "")).lower().startswith(FILTERED):
            raise Refusal(f"stopped by a content filter (finish_reason {one_line(str(reason), 40)})")
        found = [place.get(key) for place in (answer, entry) for key in BLACKED_OUT]
        if any(value is True or value == [True] for value in found) or entry.get("is_image_safe") is False:
            raise Refusal("blacked out or held back by a content filter, as the answer says")
        encoded, address, revised = entry.get("b64_json") or None, entry.get("url"), entry.get("revised_prompt")
        if encoded is None and isinstance(address, str) and address.startswith("data:"):
            encoded = address
        if not isinstance(encoded or address or None, str):
            raise TypeError("neither b64_json nor url")
        return encoded, address, revised if isinstance(revised, str) and revised.strip() else None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        shown = LONG_BASE64.sub("...", data.decode("utf-8", "replace"))[:1000]
        streamed = f"; {STREAMED}" if data.startswith(STREAM) else ""
        what = f"no image in the answer: {shown}{streamed}"
        raise HttpError("malformed_response", what, can_retry=not _may_have_drawn(data)) from None


def _may_have_drawn(data: bytes) -> bool:
    """Whether the server may charge for an answer: an image in another place or form, a job, or a stream."""
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        return data.startswith(STREAM) or b"\0" in data
    return not isinstance(answer, dict) or not answer.keys() <= set(ERROR_KEYS)
