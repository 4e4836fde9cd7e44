"""An event loop whose clock advances only while every task waits, so that a duration is exact on any machine."""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Selector(selectors.DefaultSelector):
    loop: "VirtualTimeLoop"

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if not timeout:
            return super().select(timeout)
        if self.loop.num_in_threads:
            return super().select(None)  # a thread's work takes no virtual time
        self.loop.now += timeout
        return super().select(0)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.now = 0.0
        self.num_in_threads = 0
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        def is_done(future: asyncio.Future[T]) -> None:
            self.num_in_threads -= 1

        self.num_in_threads += 1
        future = super().run_in_executor(executor, func, *args)
        future.add_done_callback(is_done)
        return future


def run(work: Coroutine[Any, Any, T]) -> tuple[T, float]:
    """The result of `work`, and the seconds that its sleeps took."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        result = runner.run(work)
        return result, runner.get_loop().time()
