"""When a call is repeated, how long it waits, and when a service is left alone: retries, deadline, circuit breaker."""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, ClassVar, TypeVar

from annotated_types import Ge, Gt, Le

from imgen_common.config import Config
from imgen_common.http.failures import ConnectionLost, HttpError

T = TypeVar("T")
log = logging.getLogger(__name__)
MAX_FAILED_TRIES = 6
"""Tries of a call that the service itself answers wrongly, at most: more of them seldom help and may cost money."""

LOST_SECONDS = 5.0
"""Seconds from which on a call whose connection is lost without an answer may have been worked on; one to a port of ssh
or Docker behind which no server is there yet, or one that had been idle, is lost at once."""
GATEWAY_TIMEOUTS = (504, 524)
"""Statuses of a server that did not wait for the one behind it."""


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
    """Seconds for one try; one that takes longer is given up, and the call is sent again unless it is for an image of
    `images_api`, which may have been made and paid for."""
    deadline: Annotated[float, Gt(0), Le(86400)] = 900.0
    """Seconds for one call, all its tries and waits together."""
    max_tries: Annotated[int, Ge(1), Le(100)] = 16
    """How often one call is sent, at most, while the service is not there or busy: with these defaults for 2.5 to 5
    minutes, enough for a restart, and for up to 7.5 where it asks for longer waits.  A call that the service answers
    with an error of its own is sent 6 times at most."""
    initial_backoff: Annotated[float, Gt(0)] = 0.5
    """Longest wait in seconds before the second try; it doubles from try to try, and at least half of it is waited."""
    max_backoff: Annotated[float, Gt(0)] = 30.0
    """Longest wait in seconds before any try, also where the service asks for more."""
    failure_threshold: Annotated[int, Ge(1)] = 8
    """Calls that fail one after another, in all their tries, before the circuit breaker opens."""
    cooldown: Annotated[float, Gt(0)] = 20.0
    """Seconds for which an open circuit breaker refuses every call; then one call tries the service."""

    def backoff(self, number: int) -> float:
        """Longest wait in seconds after try `number`, counted from 1."""
        return min(self.max_backoff, self.initial_backoff * 2.0 ** (number - 1))

    def patience(self, wait: float = 0.0) -> float:
        """Longest time in seconds for which a call waits for a service that is not there, or asks for `wait` seconds
        each time."""
        waits = (max(self.backoff(number), min(wait, self.max_backoff)) for number in range(1, self.max_tries))
        return min(self.deadline, sum(waits))


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
        """Count the outcome of a call.  A server that refuses a call, is busy, or answers what cannot be read is not
        down."""
        if failure is None or failure.kind in ("refused", "rate_limited", "malformed_response"):
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
        self._num_at_once = concurrency
        self._loop: asyncio.AbstractEventLoop | None = None
        self._breaker = CircuitBreaker(policy, clock)
        self._down_since: float | None = None

    async def call(self, send: Callable[[float], Awaitable[T]], *, is_paid: bool = False) -> T:
        """What `send(seconds left for this try)` returns, sent again where its HttpError says that it can be.

        is_paid: whether the service may charge for a call that took too long, or whose connection was lost after a
        while, which is then not sent again.

        Raises HttpError: the one of the last try (`timeout` where it took too long), or `unreachable` at once while the
        circuit breaker is open.
        """
        self._breaker.check()
        self.join_loop()
        async with self._room:
            self._breaker.check()
            self._breaker.begin_trial()
            try:
                answer = await self._try_until_deadline(send, is_paid)
            except HttpError as failure:
                self._breaker.record(failure)
                raise
        self._breaker.record(None)
        return answer

    def join_loop(self) -> bool:
        """Whether another event loop runs than before, as in a second `asyncio.run`; nothing of that one is used."""
        loop = asyncio.get_running_loop()
        if is_other := loop is not self._loop:
            self._loop, self._room = loop, asyncio.Semaphore(self._num_at_once)
        return is_other

    async def _try_until_deadline(self, send: Callable[[float], Awaitable[T]], is_paid: bool) -> T:
        policy, end = self._policy, self._clock() + self._policy.deadline
        num_failed = 0
        for number in range(1, policy.max_tries + 1):
            began = self._clock()
            seconds = min(policy.timeout, end - began)
            try:
                async with asyncio.timeout(seconds):
                    answer = await send(seconds)
                self._note_answer()
                return answer
            except HttpError as failure:
                last = failure
            except TimeoutError:
                last = HttpError("timeout", f"{self._name}: no answer within {seconds:.3g} s")
            if last.kind == "timeout" and last.status is None:  # a service's own says what to raise
                key = "timeout" if seconds == policy.timeout else "deadline"
                remedy = f"{last}; if it needs longer, raise retry.{key}"
                last = HttpError(last.kind, remedy, can_retry=last.can_retry and not is_paid, status=last.status)
            is_lost = isinstance(last, ConnectionLost) and self._clock() - began >= LOST_SECONDS
            if not last.can_retry or (is_paid and (last.has_begun or is_lost or last.status in GATEWAY_TIMEOUTS)):
                raise last
            wait = self._backoff(number, last.retry_after)
            num_failed += is_lost or not last.is_outage
            if number == policy.max_tries or num_failed == MAX_FAILED_TRIES:
                break
            # another call may have opened the breaker meanwhile: then this one gives up as well
            if self._breaker.is_open or self._clock() + wait >= end:
                break
            self._note_outage(last)
            await self._sleep(wait)
        tried = f" (tried {number} times)" if number > 1 else ""
        raise HttpError(last.kind, f"{last}{tried}", can_retry=False, status=last.status) from last

    def _note_outage(self, failure: HttpError) -> None:
        """Say once per outage that calls wait; a service that is busy for a moment has none."""
        asked = failure.retry_after or 0.0
        is_busy = failure.kind == "rate_limited" and asked < self._policy.max_backoff
        if failure.is_outage and not is_busy and self._down_since is None:
            self._down_since = self._clock()
            patience = self._policy.patience(asked)
            shown = f"{round(patience / 60, 1):g} min" if patience >= 60 else f"{patience:.2g} s"
            asks = f"; it asks to wait {asked:.0f} s" if asked else ""
            log.warning("%s%s; waiting up to %s for it to come back", failure, asks, shown)

    def _note_answer(self) -> None:
        if self._down_since is not None:
            log.warning("%s: answers again after %.0f s", self._name, self._clock() - self._down_since)
            self._down_since = None

    def _backoff(self, number: int, retry_after: float | None) -> float:
        """At least half of a doubling wait, or what the service asked for and a little more."""
        policy = self._policy
        if retry_after is not None:
            return min(policy.max_backoff, retry_after + self._rng.uniform(0, policy.initial_backoff))
        longest = policy.backoff(number)
        return self._rng.uniform(longest / 2, longest)
