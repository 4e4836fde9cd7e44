"""Any OpenAI-compatible images endpoint: pictures from words, and edits of pictures."""

import asyncio
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

from annotated_types import Ge, Le

from imgen_common.config import Config
from interleave.generators import http
from interleave.parts import Job, PartFailed, Picture
from interleave.resilience import Caller, CallerConfig, Transient

if TYPE_CHECKING:
    import httpx

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)


class ImagesApiConfig(Config):
    """An OpenAI-compatible images endpoint, hosted or on a server of one's own."""

    kind: Literal["images_api"] = "images_api"
    url: str = "http://127.0.0.1:8000/v1"
    """Address up to the version."""
    model: str = "default"
    """Name by which the server knows the model."""
    key_env: str = "INTERLEAVE_API_KEY"
    """Variable of the environment that holds the key; nothing is sent where it is not set."""
    size: str | None = None
    """Size as the server names it, such as `1024x1024`; null: the server's own."""
    quality: str | None = None
    """Quality as the server names it; null: the server's own."""
    response_format: Literal["b64_json"] | None = "b64_json"
    """Asks for the picture itself instead of an address; null where the server knows no such key (gpt-image)."""
    send_seed: bool = False
    """Whether seeds are sent, as `seed`; hosted models refuse them, and draw differently each time."""
    max_references: Annotated[int, Ge(0), Le(16)] = 1
    """How many pictures an edit may be given; 0: no edits."""
    image_field: Literal["image[]", "image"] = "image[]"
    """Name of the form's field that each picture of an edit is sent in."""
    extra: Mapping[str, Any] = {}
    """Further keys of every request, as the server names them."""
    allow_addresses: bool = False
    """Whether a picture is fetched from the address that the server answers; https only, without the key."""
    calls: CallerConfig = CallerConfig()
    """How patiently it is called."""
    max_answer_bytes: Annotated[int, Ge(1024)] = 128 * 2**20
    """Largest answer that is read."""
    max_pixels: Annotated[int, Ge(1)] = 64 * 10**6
    """Largest picture that is decoded."""


class ImagesApiGenerator:
    """`/images/generations` for words alone, `/images/edits` with pictures."""

    def __init__(self, config: ImagesApiConfig, transport: "httpx.AsyncBaseTransport | None" = None) -> None:
        """transport: for tests.  Raises UserError for an address that is none."""
        self._config, self._transport, self._url = config, transport, http.checked(config.url)
        self._caller = Caller(config.calls)
        self._client: httpx.AsyncClient | None = None

    @property
    def id(self) -> str:
        """The model's name."""
        return self._config.model

    @property
    def params(self) -> Mapping[str, Any]:
        """Address, size, quality and the further keys."""
        return self._config.model_dump(mode="json", include={"url", "size", "quality", "send_seed", "extra"})

    @property
    def max_sources(self) -> int:
        """`max_references`."""
        return self._config.max_references

    async def generate(self, job: Job) -> Picture:
        """The picture.  Raises PartFailed."""
        if len(job.sources) > self.max_sources:
            raise PartFailed("refused", f"{self.id} was given {len(job.sources)} pictures, takes {self.max_sources}")
        request = await asyncio.to_thread(self._request, job)
        return await self._caller.call(lambda left: self._send(request, left))

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    def _request(self, job: Job) -> dict[str, Any]:
        """Address and content, as httpx takes them."""
        c = self._config
        keys = {"model": c.model, "prompt": job.prompt, "n": 1, "size": c.size, "quality": c.quality}
        keys |= {"response_format": c.response_format, "seed": job.seed if c.send_seed else None}
        fields = {name: value for name, value in keys.items() if value is not None} | dict(c.extra)
        if not job.sources:
            return {"url": f"{self._url}/images/generations", "json": fields}
        files = [(c.image_field, (f"{i}.png", http.png(one), "image/png")) for i, one in enumerate(job.sources)]
        form = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
        return {"url": f"{self._url}/images/edits", "data": form, "files": files}

    def _open(self) -> "httpx.AsyncClient":
        if self._client is None:
            import httpx

            limits = httpx.Limits(max_connections=self._config.calls.concurrency)
            self._client = httpx.AsyncClient(limits=limits, transport=self._transport)
        return self._client

    async def _send(self, request: dict[str, Any], left: float) -> Picture:
        headers = http.bearer(self._config.key_env)
        entry = _entry(await self._fetch("POST", left, headers, **request), headers)
        if entry.get("b64_json") is not None:
            return await asyncio.to_thread(http.picture_of_base64, entry["b64_json"], self._config.max_pixels)
        address = entry.get("url")
        if not isinstance(address, str):
            raise Transient("garbage", f"{self._url}: no picture in the answer")
        if not self._config.allow_addresses:
            raise PartFailed(
                "refused",
                f"{self._url} answers an address; set response_format: b64_json or allow_addresses: true",
            )
        if urlsplit(address).scheme != "https":
            raise PartFailed("refused", f"{self._url} answers an address that is not https")
        return await asyncio.to_thread(
            http.picture, await self._fetch("GET", left, {}, url=address), self._config.max_pixels
        )

    async def _fetch(self, method: str, left: float, headers: Mapping[str, str], **request: Any) -> bytes:
        """The body of a good answer.  Raises Transient or PartFailed."""
        import httpx

        try:
            async with self._open().stream(method, headers=headers, timeout=http.within(left), **request) as answer:
                data = await http.read(answer, self._config.max_answer_bytes)
        except (httpx.ReadTimeout, httpx.WriteTimeout):
            raise Transient("deadline", f"{self.id}: no answer in time") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Transient("unreachable", f"{self._url}: {http.line(str(error) or type(error).__name__)}") from None
        status, said = answer.status_code, http.line(data[:1000].decode("utf-8", "replace"), headers)
        if status in RETRIED:
            raise Transient("overloaded", f"status {status}: {said}", http.retry_after(answer.headers))
        if status >= 300:
            hint = f"; set {self._config.key_env} to a valid key" if status in (401, 403) else ""
            raise PartFailed("refused", f"status {status}: {said}{hint}")
        return data


def _entry(data: bytes, headers: Mapping[str, str]) -> dict[str, Any]:
    """The first picture of an answer.  Raises Transient, with the server's own words where they are an error."""
    try:
        answer = json.loads(data)
        entry = answer["data"][0]
        if not isinstance(entry, dict):
            raise TypeError
    except (ValueError, KeyError, IndexError, TypeError):
        said = http.line(data[:1000].decode("utf-8", "replace"), headers)
        raise Transient("garbage", f"no picture in the answer: {said}") from None
    return entry
