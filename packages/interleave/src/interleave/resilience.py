"""Calls of a service that may fail: asked again with patience, within a deadline, a bounded number at once, and not at
all for a while once nothing answers."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Gt, Le

from imgen_common.config import Config
from interleave.parts import FailureKind, PartFailed

T = TypeVar("T")
Item = TypeVar("Item")


async def each(work: Callable[[Item], Awaitable[T]], items: Iterable[Item], concurrency: int) -> list[T]:
    """`work` on every item, so many at once; results in their order.  The first error ends the rest and is raised."""
    room = asyncio.Semaphore(concurrency)

    async def one(item: Item) -> T:
        async with room:
            return await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(item)) for item in items]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


class CallerConfig(Config):
    """How patiently a service is called."""

    timeout: Annotated[float, Gt(0), Le(86400)] = 300.0
    """Seconds for one try; one that takes longer is given up, and the call is sent again."""
    deadline: Annotated[float, Gt(0), Le(86400)] = 900.0
    """Seconds for one call, all its tries and waits together."""
    tries: Annotated[int, Ge(1), Le(100)] = 6
    """How often one call is sent, at most."""
    first_wait: Annotated[float, Gt(0)] = 0.5
    """Longest wait in seconds before the second try; it doubles from try to try, and a random part of it is waited."""
    longest_wait: Annotated[float, Gt(0)] = 30.0
    """Longest wait in seconds before any try, also where the service asks for more."""
    concurrency: Annotated[int, Ge(1), Le(10000)] = 16
    """Calls under way at once."""
    failures: Annotated[int, Ge(1)] = 8
    """Calls that fail one after another, in all their tries, before the service counts as down."""
    rest: Annotated[float, Gt(0)] = 20.0
    """Seconds for which a service that is down is left alone; then one call tries it."""


class Transient(Exception):
    """A try failed in a way that may pass.  retry_after: seconds that the service asks us to wait."""

    def __init__(self, kind: FailureKind, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.kind, self.retry_after = kind, retry_after


class Caller:
    """Sends calls of one service.  `clock`, `sleep` and `rng` can be replaced in tests."""

    def __init__(
        self,
        config: CallerConfig,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
        rng: random.Random | None = None,
        name: str = "the service",
    ) -> None:
        """name: what messages call it."""
        self._config, self._clock, self._sleep, self._name = config, clock, sleep, name
        self._rng = rng or random.Random()
        self._room = asyncio.Semaphore(config.concurrency)
        self._failed_in_a_row = 0
        self._down_until: float | None = None
        self._why = ""

    async def call(self, send: Callable[[float], Awaitable[T]]) -> T:
        """What `send(seconds left for this try)` answers.

        send raises Transient where it may be tried again, PartFailed where not.  Raises PartFailed: what the last
        Transient was (`deadline` where a try took too long), or `unreachable` at once while the service is down.
        """
        self._refuse_while_down()
        async with self._room:
            self._refuse_while_down()
            if self._down_until is not None:  # its rest is over: this call tries it once, the others wait for the news
                self._down_until = self._clock() + self._config.rest
            try:
                answer = await self._tries(send)
            except PartFailed as failure:
                self._count(failure)
                raise
        self._failed_in_a_row, self._down_until = 0, None
        return answer

    async def _tries(self, send: Callable[[float], Awaitable[T]]) -> T:
        end = self._clock() + self._config.deadline
        for number in range(1, self._config.tries + 1):
            seconds = min(self._config.timeout, end - self._clock())
            try:
                async with asyncio.timeout(seconds):
                    return await send(seconds)
            except Transient as failure:
                last = failure
            except TimeoutError:
                last = Transient("deadline", f"{self._name}: no answer within {seconds:.3g} s")
            wait = self._wait(number, last.retry_after)
            if number == self._config.tries or self._down_until is not None or self._clock() + wait >= end:
                break
            await self._sleep(wait)
        tried = f" (tried {number} times)" if number > 1 else ""
        raise PartFailed(last.kind, f"{last}{tried}") from last

    def _wait(self, number: int, asked: float | None) -> float:
        """Full jitter over a doubling wait, or what the service asked for and a little more."""
        longest = min(self._config.longest_wait, self._config.first_wait * 2 ** (number - 1))
        if asked is not None:
            return min(self._config.longest_wait, asked + self._rng.uniform(0, self._config.first_wait))
        return self._rng.uniform(0, longest)

    def _refuse_while_down(self) -> None:
        if self._down_until is not None and (rest := self._down_until - self._clock()) > 0:
            raise PartFailed("unreachable", f"left alone for another {rest:.0f} s, since {self._why}")

    def _count(self, failure: PartFailed) -> None:
        """A service that refuses, or is busy, is there; one that fails in other ways so often in a row is down."""
        if failure.kind in ("refused", "overloaded"):
            self._failed_in_a_row, self._down_until = 0, None
            return
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= self._config.failures:
            self._down_until, self._why = self._clock() + self._config.rest, str(failure)
