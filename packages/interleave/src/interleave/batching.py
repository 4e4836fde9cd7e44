"""Many callers, one model: what is waiting is computed together, on one thread."""

import asyncio
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Awaiting `batcher(item)` gives `run([... item ...])`'s result for it.

    Items of equal `key` that wait at the same time share a call of `run`, at most `max_batch` of them, the longest
    waiting first; a batch starts `linger` seconds after the first of its items came to an idle model, so that callers
    who come together are served together.  `run` works on a thread of its own and answers one result, or one
    exception, per item; an exception it raises goes to every item of the batch.  A cancelled caller's item is dropped
    if it still waits.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Sequence[Result | BaseException]],
        max_batch: int,
        key: Callable[[Item], Hashable] = lambda item: None,
        linger: float = 0.005,
    ) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch must be >= 1, got {max_batch}")
        self._run, self._max_batch, self._key, self._linger = run, max_batch, key, linger
        self._waiting: list[tuple[Item, asyncio.Future[Result]]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batcher")
        self._server: asyncio.Task[None] | None = None

    async def __call__(self, item: Item) -> Result:
        """The result for `item`.  Raises what `run` answered or raised for it."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
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
                results: Sequence[Result | BaseException] = await asyncio.get_running_loop().run_in_executor(
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

    def _next(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        self._waiting = [entry for entry in self._waiting if not entry[1].done()]
        if not self._waiting:
            return []
        key = self._key(self._waiting[0][0])
        batch = [entry for entry in self._waiting if self._key(entry[0]) == key][: self._max_batch]
        chosen = {id(entry[1]) for entry in batch}
        self._waiting = [entry for entry in self._waiting if id(entry[1]) not in chosen]
        return batch
