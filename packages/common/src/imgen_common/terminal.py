"""Standard output and error that can end no program: any encoding, closed pipes, closed terminals."""

import codecs
import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

LOOK_ALIKES = str.maketrans(
    {
        **{"\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "\N{MULTIPLICATION SIGN}": "x", "…": "...", "✓": "+"},
        **{"→": "->", "±": "+-", "●": "o", "◉": "O", "○": ".", "▲": "^"},
        **dict(zip("▁▂▃▄▅▆▇█", "_.,-~=*#", strict=True)),
    }
)
"""What our own tables are made of, for encodings that lack it; other characters become escapes, as in JSON."""
GONE = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.ECONNRESET)
"""What writing answers when nobody reads any more: `| head` has ended, the terminal is closed."""


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(LOOK_ALIKES)
    units = text.encode("utf-16-be", "surrogatepass")
    codes = [int.from_bytes(units[at : at + 2]) for at in range(0, len(units), 2)]
    return "".join(chr(code) if code < 128 else f"\\u{code:04x}" for code in codes), error.end


codecs.register_error("look-alikes", _replace)


class _Descriptor(io.FileIO):
    """A standard stream that is written to as long as that succeeds, and then leads nowhere.

    A training run goes on without its reader; `failure` remembers any other reason, such as a full disk.
    """

    failure: OSError | None = None

    def write(self, data: object, /) -> int:
        try:
            while (written := super().write(data)) is None:  # type: ignore[arg-type]
                select.select((), (self,), ())  # a pipe that does not wait for its reader itself
            return written
        except OSError as error:
            if error.errno not in GONE:
                self.failure = error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return memoryview(data).nbytes  # type: ignore[arg-type]


@contextlib.contextmanager
def safe_streams() -> Iterator[Callable[[], OSError | None]]:
    """Within it the program's standard output and error replace what their encoding lacks, and outlive their readers.

    Yields failure(): why standard output could not be written, such as a full disk, if it was not for lack of a reader.
    """
    _open_closed()
    descriptors = _Descriptor(1, "w", closefd=False), _Descriptor(2, "w", closefd=False)
    before = sys.stdout, sys.stderr

    def failure() -> OSError | None:
        sys.stdout.flush()
        return descriptors[0].failure

    # a stream that somebody else has replaced, such as a test, is left alone
    if sys.stdout is sys.__stdout__:
        sys.stdout = _wrap(sys.stdout, descriptors[0])
    if sys.stderr is sys.__stderr__:
        sys.stderr = _wrap(sys.stderr, descriptors[1])
    try:
        yield failure
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _wrap(stream: TextIO | None, descriptor: _Descriptor) -> TextIO:
    """A writer like `stream`, which is None where the caller has closed it."""
    wanted: dict[str, Any] = {"encoding": "utf-8", "errors": "strict"}
    if stream is not None:
        stream.flush()
        wanted = {name: getattr(stream, name) for name in ("encoding", "errors", "line_buffering", "write_through")}
        # with PYTHONUNBUFFERED, what is written through stays in the buffer that is put around the descriptor
        wanted["line_buffering"] |= wanted["write_through"]
    if wanted["errors"] in ("strict", "surrogateescape", "backslashreplace"):
        wanted["errors"] = "look-alikes"
    return io.TextIOWrapper(io.BufferedWriter(descriptor), **wanted)


def _open_closed() -> None:
    """Opens the standard descriptors that the caller has closed: the next files opened would get their numbers."""
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(opened)
