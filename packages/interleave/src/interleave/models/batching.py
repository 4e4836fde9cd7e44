"""Many callers, one model: what is waiting is computed together, on one thread, in batches that fit into memory."""

import asyncio
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from imgen_common.devices import out_of_memory
from imgen_common.errors import one_line
from interleave.protocols import BackendError

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


class FittingBatches(Generic[Item, Result]):
    """Runs items in batches that fit into memory; where one of them fails, the others still have their result.

    Where memory runs out, a batch is repeated in halves, and later batches have at most that size.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Sequence[Result]],
        max_batch: int,
        name: str,
        free_memory: Callable[[], None] = lambda: None,
    ) -> None:
        """name: what messages call the model.  free_memory: called after memory has run out."""
        self._run, self.max_batch, self._name, self._free_memory = run, max_batch, name, free_memory

    def __call__(self, items: Sequence[Item]) -> list[Result | BackendError]:
        """A result, or why there is none, for each item."""
        if len(items) > self.max_batch:
            size = self.max_batch
            return [one for start in range(0, len(items), size) for one in self(items[start : start + size])]
        try:
            return list(self._run(items))
        except BackendError as error:
            failure = error
        except Exception as error:
            failure = self._as_backend_error(error)
        half = (len(items) + 1) // 2
        if failure.kind == "out_of_memory":
            self.max_batch = half
            self._free_memory()
        return [failure] if len(items) == 1 else self(items[:half]) + self(items[half:])

    def _as_backend_error(self, error: Exception) -> BackendError:
        memory = out_of_memory(error)
        message = f"{self._name}: {type(error).__name__}: {one_line(str(error))}"
        failure = BackendError("out_of_memory" if memory else "model_error", message)
        failure.__cause__ = error.with_traceback(None) if memory else error  # frames hold tensors
        return failure
