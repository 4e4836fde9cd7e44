"""Several things at once: a bounded map, and one computation for equal questions."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")


async def map_concurrently(
    work: Callable[[Item], Awaitable[Value]], items: Iterable[Item], concurrency: int
) -> list[Value]:
    """`work` on every item, `concurrency` at once; results in their order.

    The first error ends the rest and is raised.
    """
    room = asyncio.Semaphore(concurrency)

    async def one(item: Item) -> Value:
        async with room:
            return await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(item)) for item in items]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


@dataclass
class _Flight(Generic[Value]):
    """A computation under way, and how many callers wait for it."""

    task: asyncio.Task[Value]
    num_waiting: int = 0


class SingleFlight(Generic[Value]):
    """Computes the value of a key once for all who ask for it at the same time.

    A cancelled caller leaves the others their value; once all are cancelled, the computation is.
    """

    def __init__(self) -> None:
        self._flights: dict[Hashable, _Flight[Value]] = {}

    def __contains__(self, key: Hashable) -> bool:
        """Whether the value of `key` is being computed."""
        return key in self._flights

    async def __call__(self, key: Hashable, compute: Callable[[], Awaitable[Value]]) -> Value:
        """The value of `key`, by `compute` unless it is being computed already.  Raises what `compute` raises."""
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Flight(asyncio.ensure_future(_awaited(compute)))
        flight.num_waiting += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.num_waiting -= 1
            if not flight.num_waiting:
                flight.task.cancel()  # does nothing to a finished one
                if self._flights.get(key) is flight:
                    del self._flights[key]


async def _awaited(compute: Callable[[], Awaitable[Value]]) -> Value:
    return await compute()
