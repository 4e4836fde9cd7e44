"""Several things at once: a bounded map, one computation for equal questions, and batches on a model's thread."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from imgen_common.devices import out_of_memory
from imgen_common.errors import one_line
from interleave.protocols import BackendError

Item = TypeVar("Item")
Value = TypeVar("Value")


async def map_concurrently(
    work: Callable[[Item], Awaitable[Value]], items: Iterable[Item], concurrency: int
) -> list[Value]:
    """Results of `work` on every item in their order, `concurrency` at once; the first error ends the rest."""
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
            flight = self._flights[key] = _Flight(asyncio.ensure_future(compute()))
            # once all callers are cancelled nobody waits for its error
            flight.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        flight.num_waiting += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.num_waiting -= 1
            if not flight.num_waiting:
                flight.task.cancel()  # does nothing to a finished one
                if self._flights.get(key) is flight:
                    del self._flights[key]


class Batcher(Generic[Item, Value]):
    """Awaiting `batcher(item)` gives `run([... item ...])`'s result for it.

    Items of equal `key` that wait at the same time share a call of `run`, at most `max_batch` of them, the longest
    waiting first; a batch starts `linger` seconds after the first of its items came to an idle model, so that callers
    who come together are served together.  `run` works on a thread of its own and answers one result, or one
    exception, per item; an exception it raises goes to every item of the batch.  A cancelled caller's item is dropped
    if it still waits.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Sequence[Value | BaseException]],
        max_batch: int,
        key: Callable[[Item], Hashable] = lambda item: None,
        linger: float = 0.005,
    ) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch must be >= 1, got {max_batch}")
        self._run, self._max_batch, self._key, self._linger = run, max_batch, key, linger
        self._waiting: list[tuple[Item, asyncio.Future[Value]]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batcher")
        self._server: asyncio.Task[None] | None = None

    async def __call__(self, item: Item) -> Value:
        """The result for `item`.  Raises what `run` answered or raised for it."""
        future: asyncio.Future[Value] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._server is None or self._server.done():
            self._server = asyncio.create_task(self._serve())
        return await future

    @property
    def num_waiting(self) -> int:
        """Items not yet begun."""
        return sum(not future.done() for _, future in self._waiting)

    async def close(self) -> None:
        """Cancel what waits and end the thread once it is idle."""
        for _, future in self._waiting:
            future.cancel()
        if self._server is not None:
            await asyncio.gather(self._server, return_exceptions=True)
        await asyncio.to_thread(self._thread.shutdown)

    async def _serve(self) -> None:
        await asyncio.sleep(self._linger)
        while batch := self._next():
            items = [item for item, _ in batch]
            try:
                results: Sequence[Value | BaseException] = await asyncio.get_running_loop().run_in_executor(
                    self._thread, self._run, items
                )
                if len(results) != len(items):
                    raise RuntimeError(f"{len(items)} items were answered by {len(results)} results")
            except Exception as error:
                results = [error] * len(items)
            for (_, future), result in zip(batch, results, strict=True):
                if future.done():
                    continue
                if isinstance(result, BaseException):
                    future.set_exception(result)
                else:
                    future.set_result(result)

    def _next(self) -> list[tuple[Item, asyncio.Future[Value]]]:
        self._waiting = [entry for entry in self._waiting if not entry[1].done()]
        if not self._waiting:
            return []
        key = self._key(self._waiting[0][0])
        batch = [entry for entry in self._waiting if self._key(entry[0]) == key][: self._max_batch]
        chosen = {id(entry[1]) for entry in batch}
        self._waiting = [entry for entry in self._waiting if id(entry[1]) not in chosen]
        return batch


class FittingBatches(Generic[Item, Value]):
    """Runs items in batches that fit into memory; where one of them fails, the others still have their result.

    Where memory runs out, a batch is repeated in halves, and later batches have at most that size.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Sequence[Value]],
        max_batch: int,
        name: str,
        free_memory: Callable[[], None] = lambda: None,
    ) -> None:
        """name: what messages call the model.  free_memory: called after memory has run out."""
        self._run, self.max_batch, self._name, self._free_memory = run, max_batch, name, free_memory

    def __call__(self, items: Sequence[Item]) -> list[Value | BackendError]:
        """A result, or why there is none, for each item."""
        if len(items) > self.max_batch:
            size = self.max_batch
            return [one for start in range(0, len(items), size) for one in self(items[start : start + size])]
        try:
            return list(self._run(items))
        except BackendError as error:
            failure = error
        except Exception as error:
            memory = out_of_memory(error)
            message = f"{self._name}: {type(error).__name__}: {one_line(str(error))}"
            failure = BackendError("out_of_memory" if memory else "model_error", message)
            failure.__cause__ = error.with_traceback(None) if memory else error  # frames hold tensors
        half = (len(items) + 1) // 2
        if failure.kind == "out_of_memory":
            self.max_batch = half
            self._free_memory()
        return [failure] if len(items) == 1 else self(items[:half]) + self(items[half:])
