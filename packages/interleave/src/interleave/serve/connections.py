"""Limits of connections that hold before anything is authorized: bytes and seconds of a head, their number, and what a
client may leave unread or go on sending.
"""

import asyncio
import contextlib
import resource
import socket
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from imgen_common.errors import warn_once

if TYPE_CHECKING:
    from starlette.types import ASGIApp

MAX_HEAD_BYTES = 32 * 2**10
MIN_CHUNK_BYTES = 16
"""A body in chunks may have a chunk for so many of its bytes, beyond `MAX_SMALL_CHUNKS`: each costs time of its own."""
MAX_SMALL_CHUNKS = 4096
FILES_BESIDE = 128
"""Files that may be open beside connections: pipes of workers, libraries, and connections that are just refused."""


def build_limited_server(app: "ASGIApp", max_connections: int, seconds: float, **settings: Any) -> uvicorn.Server:
    """A server of `app`, whose other settings are uvicorn's.

    max_connections: open at once; further ones replace those that wait for a request, or are answered with 503.
    seconds: for the head of a request from its first byte on, for the rest of a body that is already answered, and for
    a client that does not read its answer.
    """
    protocol: Any = partial(LimitedConnection, allowed_connections(max_connections), seconds)
    config = uvicorn.Config(app, http=protocol, h11_max_incomplete_event_size=MAX_HEAD_BYTES, **settings)
    return LimitedServer(config)


def allowed_connections(wanted: int) -> int:
    """`wanted`, or what the limit of open files leaves, which is raised as far as this process may raise it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + FILES_BESIDE
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(OSError, ValueError):  # macOS has a limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    allowed = max(1, soft - FILES_BESIDE)
    warn_once(f"max_connections {wanted}: only {allowed}, as {soft} files may be open; raise the limit (ulimit -n)")
    return allowed


class LimitedServer(uvicorn.Server):
    """uvicorn's server, which a second Ctrl-C ends without waiting for requests, and without tracebacks."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn would leave the application to be cancelled, which it logs as a failure
            await self.lifespan.shutdown()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            try:
                yield
            finally:
                del self._captured_signals[1:]  # the others would interrupt the event loop while it is closed


class LimitedConnection(H11Protocol):
    """uvicorn's HTTP/1.1 with limits."""

    def __init__(self, max_connections: int, seconds: float, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self._max_connections, self._seconds = max_connections, seconds
        self._timer: asyncio.TimerHandle | None = None
        self._is_draining = False
        self._num_bytes = self._num_lines = 0
        self.waits_since = 0.0

    @property
    def is_waiting(self) -> bool:
        """Whether no request is being answered."""
        return self.conn.their_state is h11.IDLE or self._is_draining

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.waits_since = self.loop.time()
        self._start_timer()
        if len(self.connections) > self._max_connections:
            others = [one for one in self.connections if isinstance(one, LimitedConnection) and one is not self]
            waiting = [one for one in others if one.is_waiting]
            if waiting:
                min(waiting, key=lambda one: one.waits_since).transport.abort()
            else:
                self._end("503 Service Unavailable")

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_draining:
            return
        if self.is_waiting and self._timer is None:
            self._start_timer()
        for start in range(0, len(data), MAX_HEAD_BYTES):
            self._receive(data[start : start + MAX_HEAD_BYTES])
            if self._is_draining or self.transport.is_closing():
                return
        if not self.is_waiting and not self.flow.write_paused:
            self._stop_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.waits_since = self.loop.time()
        self._num_bytes = self._num_lines = 0
        if self.transport.is_closing():
            self._start_timer()  # for what the client has not read yet
        elif self.conn.their_state is h11.SEND_BODY:
            self._is_draining = True  # closed at once, a client that still sends would not see its answer
            self._start_timer()
            if self.transport.can_write_eof():
                self.transport.write_eof()
        elif self.is_waiting and self.conn.trailing_data[0]:
            self._start_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self._is_draining and not self.transport.is_closing():
            self._stop_timer()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._start_timer()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._stop_timer()
        super().handle_websocket_upgrade(event)

    def send_400_response(self, msg: str) -> None:
        super().send_400_response(msg)
        if self.cycle is not None:  # which would answer too
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _receive(self, data: bytes) -> None:
        self._num_bytes += len(data)
        self._num_lines += data.count(b"\r\n")
        is_chunked = self.conn.their_state is h11.SEND_BODY and (b"transfer-encoding", b"chunked") in self.headers
        if is_chunked and self._num_lines > 2 * (MAX_SMALL_CHUNKS + self._num_bytes // MIN_CHUNK_BYTES):
            self._end("400 Bad Request")
            return
        try:
            super().data_received(data)
        except h11.LocalProtocolError:  # a mistake in the rest of a request whose answer has begun
            self.transport.abort()

    def _end(self, status: str) -> None:
        self.transport.write(f"HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n".encode())
        self.transport.close()

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(self._seconds, self._expire)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        if self.transport.is_closing() or self._is_draining or self.flow.write_paused:
            self.transport.abort()
        else:
            self._end("408 Request Timeout")
            self._start_timer()
