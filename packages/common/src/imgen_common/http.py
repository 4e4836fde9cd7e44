"""One HTTP client for every service: retries with backoff, a deadline, a circuit breaker and bounded answers."""

import asyncio
import email.utils
import json
import os
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar
from urllib.parse import urlsplit

from annotated_types import Ge, Gt, Le

from imgen_common.config import Config
from imgen_common.errors import UserError, one_line

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
HttpFailure = Literal["unreachable", "refused", "rate_limited", "server_error", "timeout", "malformed_response"]
"""unreachable: no connection.  refused: the server said no for good.  rate_limited: it said not now.  server_error: it
failed.  timeout: it was too slow.  malformed_response: its answer cannot be read."""
CONNECT_SECONDS = 5.0
"""Longest time for a connection, so that an address where nobody answers does not use up the whole time limit."""
MAX_ERROR_BYTES = 1000
"""Bytes that are shown of an answer which is not JSON."""


class HttpError(Exception):
    """A request that failed.  The message fits on one line and shows no token.

    can_retry: whether the same request may succeed later.  retry_after: seconds that the server asks to wait.
    status, body: of the server's answer, where it gave one.
    """

    def __init__(
        self,
        kind: HttpFailure,
        message: str,
        *,
        can_retry: bool = True,
        retry_after: float | None = None,
        status: int | None = None,
        body: bytes = b"",
    ) -> None:
        super().__init__(message)
        self.kind, self.can_retry, self.retry_after, self.status, self.body = kind, can_retry, retry_after, status, body


def failure_of_status(status: int) -> tuple[HttpFailure, bool]:
    """What an error status means, and whether the request may be sent again."""
    if status in (408, 409, 425, 429):
        return "rate_limited", True
    return ("server_error", True) if status >= 500 else ("refused", False)


class RetryPolicy(Config):
    """Timeouts, retries and the circuit breaker of the calls of one service."""

    renamed: ClassVar = {
        "tries": "max_tries",
        "first_wait": "initial_backoff",
        "longest_wait": "max_backoff",
        "failures": "failure_threshold",
        "rest": "cooldown",
        "concurrency": "concurrency, beside retry",
    }

    timeout: Annotated[float, Gt(0), Le(86400)] = 300.0
    """Seconds for one try; one that takes longer is given up, and the call is sent again."""
    deadline: Annotated[float, Gt(0), Le(86400)] = 900.0
    """Seconds for one call, all its tries and waits together."""
    max_tries: Annotated[int, Ge(1), Le(100)] = 6
    """How often one call is sent, at most."""
    initial_backoff: Annotated[float, Gt(0)] = 0.5
    """Longest wait in seconds before the second try; it doubles from try to try, and a random part of it is waited."""
    max_backoff: Annotated[float, Gt(0)] = 30.0
    """Longest wait in seconds before any try, also where the service asks for more."""
    failure_threshold: Annotated[int, Ge(1)] = 8
    """Calls that fail one after another, in all their tries, before the circuit breaker opens."""
    cooldown: Annotated[float, Gt(0)] = 20.0
    """Seconds for which an open circuit breaker refuses every call; then one call tries the service."""


class CircuitBreaker:
    """Refuses calls of a service that failed `failure_threshold` times in a row, until one call succeeds again."""

    def __init__(self, policy: RetryPolicy, clock: Callable[[], float]) -> None:
        self._policy, self._clock = policy, clock
        self._failures, self._reason = 0, ""
        self._open_until: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether the service counts as down."""
        return self._open_until is not None

    def check(self) -> None:
        """Raises HttpError, `unreachable`, while the breaker cools down."""
        if self._open_until is not None and (seconds := self._open_until - self._clock()) > 0:
            raise HttpError(
                "unreachable", f"not called for another {seconds:.0f} s, since {self._reason}", can_retry=False
            )

    def begin_trial(self) -> None:
        """After the cooldown one call tries the service; the others are refused until its outcome is known."""
        if self._open_until is not None:
            self._open_until = self._clock() + self._policy.cooldown

    def record(self, failure: HttpError | None) -> None:
        """Count the outcome of a call.  A server that refuses a call, or is busy, is not down."""
        if failure is None or failure.kind in ("refused", "rate_limited"):
            self._failures, self._open_until = 0, None
            return
        self._failures += 1
        if self._failures >= self._policy.failure_threshold:
            self._open_until, self._reason = self._clock() + self._policy.cooldown, str(failure)


class RetryingCaller:
    """Sends the calls of one service under a RetryPolicy, `concurrency` at once.

    name: what messages call the service.  `clock`, `sleep` and `rng` can be replaced in tests.
    """

    def __init__(
        self,
        policy: RetryPolicy,
        concurrency: int = 16,
        name: str = "the service",
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
        rng: random.Random | None = None,
    ) -> None:
        self._policy, self._name, self._clock, self._sleep = policy, name, clock, sleep
        self._rng = rng or random.Random()
        self._room = asyncio.Semaphore(concurrency)
        self._breaker = CircuitBreaker(policy, clock)

    async def call(self, send: Callable[[float], Awaitable[T]]) -> T:
        """What `send(seconds left for this try)` returns, sent again where its HttpError says that it can be.

        Raises HttpError: the one of the last try (`timeout` where it took too long), or `unreachable` at once while the
        circuit breaker is open.
        """
        self._breaker.check()
        async with self._room:
            self._breaker.check()
            self._breaker.begin_trial()
            try:
                answer = await self._try_until_deadline(send)
            except HttpError as failure:
                self._breaker.record(failure)
                raise
        self._breaker.record(None)
        return answer

    async def _try_until_deadline(self, send: Callable[[float], Awaitable[T]]) -> T:
        policy, end = self._policy, self._clock() + self._policy.deadline
        for number in range(1, policy.max_tries + 1):
            seconds = min(policy.timeout, end - self._clock())
            try:
                async with asyncio.timeout(seconds):
                    return await send(seconds)
            except HttpError as failure:
                last = failure
            except TimeoutError:
                last = HttpError("timeout", f"{self._name}: no answer within {seconds:.3g} s")
            if not last.can_retry:
                raise last
            wait = self._backoff(number, last.retry_after)
            # another call may have opened the breaker meanwhile: then this one gives up as well
            if number == policy.max_tries or self._breaker.is_open or self._clock() + wait >= end:
                break
            await self._sleep(wait)
        tried = f" (tried {number} times)" if number > 1 else ""
        raise HttpError(last.kind, f"{last}{tried}", can_retry=False, status=last.status) from last

    def _backoff(self, number: int, retry_after: float | None) -> float:
        """Full jitter over a doubling wait, or what the service asked for and a little more."""
        policy = self._policy
        if retry_after is not None:
            return min(policy.max_backoff, retry_after + self._rng.uniform(0, policy.initial_backoff))
        return self._rng.uniform(0, min(policy.max_backoff, policy.initial_backoff * 2 ** (number - 1)))


class HttpClient(RetryingCaller):
    """Requests to one service, under a RetryPolicy: `call` sends one, made by `request`, until it is answered.

    The bearer token is read once from the environment.  It follows no redirect, and no message shows it, not even where
    the server repeats it.
    """

    def __init__(
        self,
        name: str,
        token_env: str,
        policy: RetryPolicy,
        concurrency: int = 16,
        max_bytes: int = 8 * 2**20,
        transport: "httpx.AsyncBaseTransport | None" = None,
    ) -> None:
        """token_env: variable of the environment with the token; no token is sent where it is not set.  max_bytes: of
        one answer.  transport: for tests.  Raises UserError, without the token, for one that no header can carry.
        """
        super().__init__(policy, concurrency, name)
        self._token_env, self._token = token_env, os.environ.get(token_env, "").strip()
        if not (self._token.isascii() and self._token.isprintable()):
            raise UserError(
                f"{token_env}: holds characters that no token has, such as ends of lines or accents; set it again"
            )
        self._concurrency, self._max_bytes, self._transport = concurrency, max_bytes, transport
        self._client: httpx.AsyncClient | None = None

    async def request(
        self, method: str, base: str, path: str = "", *, seconds: float, with_token: bool = True, **content: Any
    ) -> bytes:
        """The body of a good answer to one request, without retries.  content: as httpx takes it.

        Raises HttpError; messages begin with `base`.
        """
        import httpx

        headers = dict(content.pop("headers", {}))
        if with_token and self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        # a silent address must not use up all the time that is left
        limits = httpx.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS))
        try:
            async with self._opened().stream(method, base + path, headers=headers, timeout=limits, **content) as answer:
                data = await self._read(answer, base)
        except (httpx.ReadTimeout, httpx.WriteTimeout):
            raise HttpError("timeout", f"{base}: no answer within {seconds:.3g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = self.clean(str(error)) or type(error).__name__
            raise HttpError("unreachable", f"{base}: cannot be reached ({reason})") from None
        if answer.status_code >= 300:
            raise self._status_error(base, answer, data)
        return data

    def malformed(self, base: str, reason: str) -> HttpError:
        """The error of an answer that cannot be read; the request may be sent again."""
        return HttpError("malformed_response", f"{base}: {self.clean(reason)}")

    def clean(self, text: str) -> str:
        """Words of the server on one line, cut short, without the token."""
        return one_line(text.replace(self._token, "...") if self._token else text)

    async def close(self) -> None:
        """Close the connections; the client can be used again."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    def _opened(self) -> "httpx.AsyncClient":
        if self._client is None:
            import httpx

            limits = httpx.Limits(max_connections=None, max_keepalive_connections=self._concurrency)
            self._client = httpx.AsyncClient(limits=limits, transport=self._transport, follow_redirects=False)
        return self._client

    async def _read(self, answer: "httpx.Response", base: str) -> bytes:
        data = bytearray()
        async for piece in answer.aiter_bytes():
            data += piece
            if len(data) > self._max_bytes:
                what = f"{base}: an answer of more than {self._max_bytes} bytes"
                raise HttpError("malformed_response", what, can_retry=False)
        return bytes(data)

    def _status_error(self, base: str, answer: "httpx.Response", data: bytes) -> HttpError:
        status = answer.status_code
        kind, can_retry = failure_of_status(status)
        message = f"{base}: status {status}: {self.clean(error_message(data))}"
        if status < 400:
            target = self.clean(answer.headers.get("location", "nowhere"))
            message += f"; it points to {target}: give that address as url"
        if status in (401, 403):
            message += f"; set {self._token_env} to a valid key"
        wait = retry_after(answer.headers)
        return HttpError(kind, message, can_retry=can_retry, retry_after=wait, status=status, body=data)


def check_url(url: str) -> str:
    """`url` without a slash at its end.  Raises UserError unless it is a plain http(s) address."""
    try:
        parts = urlsplit(url)
        plain = parts.port != 0 and not (parts.username or parts.query)  # `port` raises for what is no number
    except ValueError:
        plain = False
    if not plain or parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"url {url!r}: must be like http://HOST:PORT, without name, key or query in it")
    return url.rstrip("/")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait, as a number or a date, if it does."""
    asked = headers.get("retry-after", "").strip()
    if asked.isdecimal():
        return float(asked) if len(asked) < 10 else None
    try:
        return max(0.0, email.utils.parsedate_to_datetime(asked).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def error_message(data: bytes) -> str:
    """What the body of an error says, as servers write it: {"error": {"message": ...}}, {"detail": ...}, or text."""
    text = data.decode("utf-8", "replace")
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return text[:MAX_ERROR_BYTES]
    for name in ("error", "message", "detail"):
        said = said[name] if isinstance(said, dict) and name in said else said
    return said if isinstance(said, str) else text[:MAX_ERROR_BYTES]


def run_in_thread(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, for code that is not asynchronous but may be called where an event loop runs."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
