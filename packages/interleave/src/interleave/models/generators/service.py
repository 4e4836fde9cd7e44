"""The client of `interleave serve`: a pool of replicas, each call to the one with the least to do that is up."""

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from annotated_types import Ge, Gt, Le, MinLen

from imgen_common.config import Config, KeyVariable
from imgen_common.errors import UserError, warn_once
from imgen_common.http import (
    CONNECT_SECONDS,
    HttpClient,
    HttpError,
    RetryPolicy,
    ServiceUrl,
    check_url,
    error_in_answer,
    run_in_thread,
)
from interleave.models.generators.pipeline import GenerationSettings
from interleave.models.remote import RemoteFailure, backend_errors, decode_base64_image, encode_base64_png
from interleave.protocols import GenerationRequest, HashedImage
from interleave.records import FailureKind

if TYPE_CHECKING:
    import httpx

EARLIER = 0.95
"""Share of the time left that a replica is given, so that its refusal still arrives in time."""


class ServiceConfig(Config):
    """`interleave serve` on one or several machines, all with the same model."""

    renamed: ClassVar = {"calls": "retry, with concurrency beside it"}
    kind: Literal["service"] = "service"
    urls: Annotated[tuple[ServiceUrl, ...], MinLen(1)] = ("http://127.0.0.1:8011",)
    """Addresses of the replicas."""
    token_env: KeyVariable = "INTERLEAVE_SERVE_TOKEN"
    """Variable of the environment that holds the bearer token; nothing is sent where it is not set."""
    params: GenerationSettings = GenerationSettings()
    """Settings over those of the service."""
    startup: Annotated[float, Ge(0)] = 60.0
    """Seconds to wait at the start until one replica has loaded its model."""
    eject_after: Annotated[int, Ge(1)] = 2
    """Failures one after another after which a replica gets no calls; one that is not there or not ready: one."""
    probe_every: Annotated[float, Gt(0)] = 2.0
    """Seconds between requests that ask whether an ejected replica is ready again."""
    concurrency: Annotated[int, Ge(1), Le(10000)] = 64
    """Requests in flight at once, over all replicas."""
    retry: RetryPolicy = RetryPolicy()
    """Timeouts, retries and the circuit breaker of the pool; a try asks every replica that is up before it fails."""
    max_answer_bytes: Annotated[int, Ge(1024)] = 128 * 2**20
    """Largest answer that is read."""
    max_pixels: Annotated[int, Ge(1)] = 64 * 10**6
    """Largest image that is decoded."""

    def build(self) -> "ServiceGenerator":
        """The generator, connected.  Raises UserError where no service answers."""
        return ServiceGenerator.connect(self)


@dataclass(frozen=True)
class ServiceInfo:
    """What a replica answers to `/v1/info`.  settings: those that a request may give; None: it does not say."""

    model: str
    params: Mapping[str, Any]
    max_sources: int
    settings: Sequence[str] | None = field(default=None, compare=False)


@dataclass(eq=False)
class _Replica:
    """An address, its requests in flight, and whether it is up.  turn: when it was last chosen."""

    url: str
    in_flight: int = 0
    failures: int = 0
    up: bool = True
    turn: int = 0


class ServiceGenerator:
    """Images over HTTP; made by `connect`.  A cancelled call closes its request, so that the service drops it."""

    def __init__(
        self,
        config: ServiceConfig,
        info: ServiceInfo,
        transport: "httpx.AsyncBaseTransport | None" = None,
        *,
        down: Collection[str] = (),
    ) -> None:
        """transport: for tests.  down: addresses of replicas that are not ready yet.

        Raises UserError for an address that is none, or a token that no header can carry.
        """
        self._config, self._info = config, info
        self.id, self.max_sources = info.model, info.max_sources
        self._params = config.params.model_dump(mode="json", exclude_none=True)
        self.params = {**info.params, **self._params}
        self._replicas = [_Replica(url, up=url not in down) for url in map(check_url, config.urls)]
        self._turns = itertools.count(1)
        self._client = _client(config, transport)
        self._probes: dict[str, asyncio.Task[None]] = {}

    @classmethod
    def connect(cls, config: ServiceConfig) -> "ServiceGenerator":
        """A generator of the model that the replicas name, once one of them is ready.

        Raises UserError if none is ready in time, the token is refused, their models differ, or one does not take the
        settings.
        """
        urls = [check_url(url) for url in config.urls]
        end, said = time.monotonic() + config.startup, False
        while True:
            answers = run_in_thread(_describe_all(config, urls))
            found = {url: answer for url, answer in answers.items() if isinstance(answer, ServiceInfo)}
            if found:
                break
            if not said and time.monotonic() < end:
                warn_once(f"{'; '.join(map(str, answers.values()))}; waiting up to {config.startup:g} s")
                said = True
            if time.monotonic() >= end:
                reasons = "; ".join(map(str, answers.values()))
                is_there = any(isinstance(one, HttpError) and one.status == 503 for one in answers.values())
                remedy = "raise generator.startup if it needs longer" if is_there else "correct generator.urls"
                raise UserError(f"no service is ready ({reasons}); start `interleave serve` or {remedy}")
            time.sleep(min(1.0, config.startup))
        first_url, first = next(iter(found.items()))
        for url, info in found.items():
            if info != first:
                raise UserError(
                    f"{url} generates with {info.model} {info.params}, {first_url} with {first.model} {first.params}; "
                    "give replicas of one model"
                )
            given = config.params.model_dump(exclude_none=True)
            if info.settings is not None and (other := sorted(given.keys() - set(info.settings))):
                allowed = ", ".join(info.settings)
                raise UserError(f"generator.params.{other[0]}: is set by the service {url}; allowed: {allowed}")
        return cls(config, first, down={*urls} - {*found})

    async def generate(self, request: GenerationRequest) -> HashedImage:
        """The image.  Raises BackendError."""
        body = await asyncio.to_thread(self._body, request)
        with backend_errors():
            return await self._client.call(lambda seconds: self._send_to_pool(body, seconds))

    async def close(self) -> None:
        """Close the connections."""
        probes, self._probes = list(self._probes.values()), {}
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)
        await self._client.close()

    def _body(self, request: GenerationRequest) -> bytes:
        body = {
            "prompt": request.prompt,
            "images": [encode_base64_png(source) for source in request.sources],
            "seed": request.seed,
            "params": self._params,
        }
        return json.dumps(body).encode()

    # --- the pool ---

    async def _send_to_pool(self, body: bytes, seconds: float) -> HashedImage:
        """The answer of the first replica that gives one.  Raises what the last one raised."""
        end = time.monotonic() + seconds
        last = HttpError("unreachable", "no replica is up")
        tried: list[_Replica] = []
        for replica in self._replicas:
            self._probe_where_down(replica)
        while able := [replica for replica in self._replicas if replica.up and replica not in tried]:
            replica = min(able, key=lambda one: (one.in_flight, one.turn))
            replica.turn = next(self._turns)
            replica.in_flight += 1
            try:
                image = await self._send(replica, body, end - time.monotonic())
            except HttpError as failure:
                if failure.kind == "timeout" or (failure.can_retry and failure.kind != "rate_limited"):
                    # a replica that is not there, or behind its gateway not ready, is ejected at once
                    self._note_failure(replica, at_once=failure.kind == "unreachable" or failure.status in (502, 503))
                if not failure.can_retry:
                    raise
                last = failure
                tried.append(replica)
            else:
                replica.failures = 0
                return image
            finally:
                replica.in_flight -= 1
        raise last

    def _note_failure(self, replica: _Replica, at_once: bool) -> None:
        replica.failures += 1
        if replica.up and (at_once or replica.failures >= self._config.eject_after):
            replica.up = False
            self._probe_where_down(replica)

    def _probe_where_down(self, replica: _Replica) -> None:
        if not replica.up and (replica.url not in self._probes or self._probes[replica.url].done()):
            self._probes[replica.url] = asyncio.create_task(self._probe_until_ready(replica))

    async def _probe_until_ready(self, replica: _Replica) -> None:
        """Until it is ready, with the model and the settings of the first one: it may have been started with others."""
        while not replica.up:
            await asyncio.sleep(self._config.probe_every)
            with contextlib.suppress(HttpError):
                await self._client.request("GET", replica.url, "/readyz", seconds=CONNECT_SECONDS)
                info = await _describe(self._client, replica.url)
                if info == self._info:
                    replica.failures, replica.up = 0, True
                elif isinstance(info, ServiceInfo):
                    what = f"generates with {info.model} {info.params}, not with {self._info.model} {self._info.params}"
                    warn_once(f"{replica.url}: {what}; it gets no calls until it does")

    # --- one replica ---

    async def _send(self, replica: _Replica, body: bytes, seconds: float) -> HashedImage:
        seconds *= EARLIER
        headers = {"Content-Type": "application/json", "X-Deadline-Seconds": f"{max(seconds, 0.001):.3f}"}
        try:
            data = await self._client.request(
                "POST", replica.url, "/v1/generate", seconds=seconds, content=body, headers=headers
            )
        except HttpError as error:
            raise _as_service_error(error) from None
        return await asyncio.to_thread(self._read_image, replica, data)

    def _read_image(self, replica: _Replica, data: bytes) -> HashedImage:
        try:
            answer = json.loads(data)
            if (error := error_in_answer(answer)) is not None:
                raise self._client.named(replica.url, error)
            model, image = answer["model"], answer["image"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self._client.malformed(replica.url, "not an answer of `interleave serve`") from None
        if model != self.id:
            raise self._client.malformed(replica.url, f"generates with {model}, not with {self.id}")
        return decode_base64_image(image, self._config.max_pixels)


def _client(config: ServiceConfig, transport: "httpx.AsyncBaseTransport | None" = None) -> HttpClient:
    return HttpClient(
        ", ".join(config.urls), config.token_env, config.retry, config.concurrency, config.max_answer_bytes, transport
    )


def _as_service_error(error: HttpError) -> HttpError:
    """What an error of a replica means: a request that was too slow is too slow for the others too, and a failure of
    the generator itself has the kind that the service names."""
    if error.kind == "timeout" or error.status == 504:
        return HttpError("timeout", str(error), can_retry=False, status=error.status)
    try:
        kind = json.loads(error.body)["error"]["kind"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return error
    if kind == "worker_died":  # at this request, in every try: other replicas would lose their workers too
        return RemoteFailure("model_error", str(error))
    if error.kind == "server_error" and error.status not in (502, 503) and kind in get_args(FailureKind):
        return RemoteFailure(kind, str(error))
    return error


async def _describe_all(config: ServiceConfig, urls: Sequence[str]) -> dict[str, ServiceInfo | HttpError]:
    """What each replica says of itself, or why it says nothing.  Raises UserError where token or host are refused."""
    client = _client(config)
    try:
        answers = await asyncio.gather(*(_describe(client, url) for url in urls))
    finally:
        await client.close()
    for url, answer in zip(urls, answers, strict=True):
        if isinstance(answer, HttpError) and answer.status in (401, 403):
            raise UserError(f"{url}: the token is refused; set {config.token_env} to the service's token")
        if isinstance(answer, HttpError) and answer.status == 400:
            raise UserError(
                f"{answer}; a service without a token takes its own names only: add this to its allowed_hosts"
            )
    return dict(zip(urls, answers, strict=True))


async def _describe(client: HttpClient, url: str) -> ServiceInfo | HttpError:
    try:
        info = json.loads(await client.request("GET", url, "/v1/info", seconds=CONNECT_SECONDS))
        return ServiceInfo(str(info["model"]), dict(info["params"]), int(info["max_sources"]), info.get("settings"))
    except HttpError as error:
        return error
    except (ValueError, KeyError, TypeError, RecursionError):
        return client.malformed(url, "it is no `interleave serve`")
