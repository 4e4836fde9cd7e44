"""The client of `interleave serve`: a pool of replicas, each call to the one with the least to do that is up."""

import asyncio
import base64
import itertools
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from annotated_types import Ge, Gt, MinLen

from imgen_common.config import Config
from imgen_common.errors import UserError
from interleave.generators import http
from interleave.generators.pipeline import Settings
from interleave.parts import FailureKind, Job, PartFailed, Picture
from interleave.resilience import Caller, CallerConfig, Transient

if TYPE_CHECKING:
    import httpx

EARLIER = 0.95
"""Share of the time left that a replica is given, so that its refusal still arrives in time."""


class ServiceConfig(Config):
    """`interleave serve` on one or several machines, all with the same model."""

    kind: Literal["service"] = "service"
    urls: Annotated[tuple[str, ...], MinLen(1)] = ("http://127.0.0.1:8011",)
    """Addresses of the replicas."""
    token_env: str = "INTERLEAVE_SERVE_TOKEN"
    """Variable of the environment that holds the bearer token; nothing is sent where it is not set."""
    params: Settings = Settings()
    """Settings over those of the service."""
    startup: Annotated[float, Ge(0)] = 60.0
    """Seconds to wait at the start until one replica has loaded its model."""
    eject_after: Annotated[int, Ge(1)] = 2
    """Failures one after another after which a replica gets no calls; one that is not there or not ready: one."""
    probe_every: Annotated[float, Gt(0)] = 2.0
    """Seconds between looks at whether an ejected replica is ready again."""
    calls: CallerConfig = CallerConfig(concurrency=64)
    """How patiently the pool is called; a try asks every replica that is up before it fails."""
    max_answer_bytes: Annotated[int, Ge(1024)] = 128 * 2**20
    """Largest answer that is read."""
    max_pixels: Annotated[int, Ge(1)] = 64 * 10**6
    """Largest picture that is decoded."""


@dataclass(frozen=True)
class About:
    """What a replica says of itself."""

    model: str
    params: Mapping[str, Any]
    max_sources: int


@dataclass(eq=False)
class _Replica:
    """An address, what it has to do, and whether it is up.  turn: when it was last chosen."""

    url: str
    outstanding: int = 0
    failures: int = 0
    up: bool = True
    turn: int = 0


class ServiceGenerator:
    """Pictures over HTTP; made by `connect`.  A call that is cancelled closes its request, so that nobody draws it."""

    def __init__(
        self, config: ServiceConfig, about: About, transport: "httpx.AsyncBaseTransport | None" = None
    ) -> None:
        self._config, self._about, self._transport = config, about, transport
        self._replicas = [_Replica(http.checked(url)) for url in config.urls]
        self._turns = itertools.count(1)
        self._caller = Caller(config.calls)
        self._client: httpx.AsyncClient | None = None
        self._watchers: dict[str, asyncio.Task[None]] = {}

    @classmethod
    def connect(cls, config: ServiceConfig) -> "ServiceGenerator":
        """A generator whose model the replicas have told.

        Raises UserError if none is ready in time, the token is refused, or their models differ.
        """
        end = time.monotonic() + config.startup
        while True:
            answers = {url: _about(http.checked(url), config.token_env) for url in config.urls}
            found = {url: answer for url, answer in answers.items() if isinstance(answer, About)}
            if found:
                break
            if time.monotonic() >= end:
                reasons = "; ".join(f"{url}: {reason}" for url, reason in answers.items())
                raise UserError(f"no service is ready ({reasons}); start `interleave serve` or mend generator.urls")
            time.sleep(min(1.0, config.startup))
        first = next(iter(found.values()))
        for url, about in found.items():
            if about != first:
                raise UserError(
                    f"{url} draws with {about.model} {about.params}, {next(iter(found))} with {first.model} "
                    f"{first.params}; give replicas of one model"
                )
        return cls(config, first)

    @property
    def id(self) -> str:
        """The service's model."""
        return self._about.model

    @property
    def params(self) -> Mapping[str, Any]:
        """The service's, and the configured settings over them."""
        return {**self._about.params, **self._config.params.model_dump(mode="json", exclude_none=True)}

    @property
    def max_sources(self) -> int:
        """As the service says."""
        return self._about.max_sources

    async def generate(self, job: Job) -> Picture:
        """The picture.  Raises PartFailed."""
        body = await asyncio.to_thread(self._body, job)
        return await self._caller.call(lambda left: self._send(body, left))

    async def close(self) -> None:
        """Close the connections."""
        watchers, self._watchers = list(self._watchers.values()), {}
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    def _body(self, job: Job) -> bytes:
        body = {
            "prompt": job.prompt,
            "images": [base64.b64encode(http.png(source)).decode() for source in job.sources],
            "seed": job.seed,
            "params": self._config.params.model_dump(mode="json", exclude_none=True),
        }
        return json.dumps(body).encode()

    def _open(self) -> "httpx.AsyncClient":
        if self._client is None:
            import httpx

            self._client = httpx.AsyncClient(
                headers=http.bearer(self._config.token_env),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=self._config.calls.concurrency),
                transport=self._transport,
            )
        return self._client

    # --- choosing ---

    async def _send(self, body: bytes, left: float) -> Picture:
        """The answer of the first replica that gives one.  Raises what the last one raised."""
        end = time.monotonic() + left
        last = Transient("unreachable", "no replica is up")
        tried: list[_Replica] = []
        while able := [replica for replica in self._replicas if replica.up and replica not in tried]:
            replica = min(able, key=lambda one: (one.outstanding, one.turn))
            replica.turn = next(self._turns)
            replica.outstanding += 1
            try:
                answer = await self._ask(replica, body, end - time.monotonic())
            except Transient as failure:
                last = failure
                tried.append(replica)
                if failure.kind != "overloaded":
                    self._note_failure(replica, out=failure.kind == "unreachable")
            except PartFailed as failure:
                if failure.kind == "deadline":
                    self._note_failure(replica, out=False)
                raise
            else:
                replica.failures = 0
                return answer
            finally:
                replica.outstanding -= 1
        raise last

    def _note_failure(self, replica: _Replica, out: bool) -> None:
        replica.failures += 1
        if replica.up and (out or replica.failures >= self._config.eject_after):
            replica.up = False
            self._watchers[replica.url] = asyncio.create_task(self._watch(replica))

    async def _watch(self, replica: _Replica) -> None:
        """Until the replica says that it is ready."""
        import httpx

        while not replica.up:
            await asyncio.sleep(self._config.probe_every)
            try:
                answer = await self._open().get(f"{replica.url}/readyz", timeout=http.CONNECT_SECONDS)
            except httpx.HTTPError:
                continue
            if answer.status_code == 200:
                replica.failures, replica.up = 0, True

    # --- asking ---

    async def _ask(self, replica: _Replica, body: bytes, left: float) -> Picture:
        import httpx

        left *= EARLIER
        headers = {"Content-Type": "application/json", "X-Deadline-Seconds": f"{max(left, 0.001):.3f}"}
        url, limit = f"{replica.url}/v1/generate", self._config.max_answer_bytes
        try:
            async with self._open().stream(
                "POST", url, content=body, headers=headers, timeout=http.within(left)
            ) as answer:
                data = await http.read(answer, limit)
        except (httpx.ReadTimeout, httpx.WriteTimeout):
            raise PartFailed("deadline", f"{replica.url}: no answer in time") from None
        except httpx.HTTPError as error:
            raise Transient("unreachable", f"{replica.url}: {http.line(str(error) or type(error).__name__)}") from None
        if answer.status_code != 200:
            self._raise_for(replica, answer, data)
        return await asyncio.to_thread(self._picture, replica, data)

    def _raise_for(self, replica: _Replica, answer: "httpx.Response", data: bytes) -> None:
        status = answer.status_code
        kind, said = _problem(data)
        what = f"{replica.url}: status {status}: {said}"
        if status == 429:
            raise Transient("overloaded", what, http.retry_after(answer.headers))
        if status in (502, 503):
            raise Transient("unreachable", what, http.retry_after(answer.headers))
        if status in (401, 403):
            raise PartFailed("refused", f"{what}; set {self._config.token_env} to the service's token")
        if status == 504:
            raise PartFailed("deadline", what)
        if status < 500:
            raise PartFailed("refused", what)
        if kind in get_args(FailureKind):
            raise PartFailed(kind, what)  # type: ignore[arg-type]  # checked above
        raise Transient("broken", what)

    def _picture(self, replica: _Replica, data: bytes) -> Picture:
        try:
            answer = json.loads(data)
            model, image = answer["model"], answer["image"]
        except (ValueError, KeyError, TypeError):
            raise Transient("garbage", f"{replica.url}: not an answer of `interleave serve`") from None
        if model != self.id:
            raise Transient("garbage", f"{replica.url}: draws with {http.line(str(model))}, not with {self.id}")
        return http.picture_of_base64(image, self._config.max_pixels)


def _problem(data: bytes) -> tuple[str, str]:
    """Kind and message of an error, as far as it can be read."""
    try:
        error = json.loads(data)["error"]
        return str(error["kind"]), http.line(str(error["message"]))
    except (ValueError, KeyError, TypeError):
        return "", http.line(data[:1000].decode("utf-8", "replace"))


def _about(url: str, token_env: str) -> About | str:
    """What a replica says of itself, or why it says nothing.  Raises UserError where the token is refused."""
    import httpx

    try:
        answer = httpx.get(f"{url}/v1/info", headers=http.bearer(token_env), timeout=http.CONNECT_SECONDS)
    except httpx.HTTPError as error:
        return http.line(str(error) or type(error).__name__)
    if answer.status_code in (401, 403):
        raise UserError(f"{url}: the token is refused; set {token_env} to the service's token")
    if answer.status_code != 200:
        return f"status {answer.status_code}: {_problem(answer.content)[1]}"
    try:
        said = answer.json()
        return About(str(said["model"]), dict(said["params"]), int(said["max_sources"]))
    except (ValueError, KeyError, TypeError):
        return "it is no `interleave serve`"
