"""How a program stops: Ctrl-C, SIGTERM (a scheduler), SIGHUP (a closed terminal), and SIGUSR1, SIGUSR2 and SIGXCPU,
by which schedulers say that the time is nearly used up, take the same path."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

OTHER_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
SIGNALS = (signal.SIGINT, *OTHER_SIGNALS)
REPEAT_SECONDS = 1.0
"""Signals so soon after the first are the same request: a launcher passes on what its terminal has sent already."""
_received: int = signal.SIGINT


def exit_code() -> int:
    """The exit code of a program that was stopped: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP, and so on."""
    return 128 + _received


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals) -> Iterator[None]:
    """Calls `handler` on signals.  What is ignored stays ignored (nohup), and only the main thread can handle them."""
    owner, before = os.getpid(), dict[signal.Signals, Any]()

    def on_signal(number: int, frame: FrameType | None) -> None:
        global _received
        if os.getpid() == owner:
            _received = number
            handler(number, frame)
        elif number != signal.SIGINT:  # a forked worker: Ctrl-C is its parent's, the others end it
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)


def interrupted_by_signals() -> contextlib.AbstractContextManager[None]:
    """Within it `OTHER_SIGNALS` do what Ctrl-C does at that moment: KeyboardInterrupt, or as asyncio wants it."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        on_interrupt = signal.getsignal(signal.SIGINT)
        if not callable(on_interrupt):
            raise KeyboardInterrupt
        on_interrupt(signal.SIGINT, frame)

    return _handled(interrupt, *OTHER_SIGNALS)


def ended_at_once(notice: str) -> contextlib.AbstractContextManager[None]:
    """Within it a signal ends the program at once, with `notice` on standard error: for downloads, whose threads cannot
    be interrupted, and which the next call continues."""

    def end(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(OSError):
            os.write(2, f"\n{notice}\n".encode())
        os._exit(128 + number)

    return _handled(end, *SIGNALS)


class GracefulShutdown:
    """Within it the first of `SIGNALS` sets `requested`, so that the work in flight ends and is saved; the next one
    raises KeyboardInterrupt.

    notice: printed on standard error when the first one comes.
    """

    def __init__(self, notice: str = "") -> None:
        self.requested = False
        self._notice, self._first = notice, 0.0
        self._handlers = _handled(self._on_signal, *SIGNALS)

    def __enter__(self) -> "GracefulShutdown":
        self._handlers.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._handlers.__exit__(None, None, None)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self._first = True, time.monotonic()
            if self._notice:
                with contextlib.suppress(OSError):  # not `print`, which the signal may have interrupted
                    os.write(2, f"\n{self._notice}\n".encode())
        elif time.monotonic() - self._first >= REPEAT_SECONDS:
            raise KeyboardInterrupt


@contextlib.contextmanager
def message_when_stopped(message: Callable[[], str]) -> Iterator[None]:
    """Says on standard error what is saved and how to continue, where the block ends by KeyboardInterrupt."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\n{message()}", file=sys.stderr, flush=True)
        raise
