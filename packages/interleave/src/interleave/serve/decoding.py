"""Decoding of untrusted images in processes of their own, apart from the service and from generation.

A decoder that is at one image for too long, or that nobody waits for any more, is killed: unlike a thread's, its work
ends, and its place is free.
"""

import asyncio
import logging
import multiprocessing
import signal
import struct
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from imgen_common.errors import UserError
from imgen_common.images import decode
from interleave.serve.worker import RawImage

log = logging.getLogger(__name__)
READY, IMAGE, REFUSED = b"r", b"i", b"e"
"""First byte of an answer; an image's width and height follow, then its pixels, or why there is none."""


def run_decoder(connection: Connection, max_pixels: int) -> None:
    """A decoder's process: decodes one image after the other until the service closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the service decides
    connection.send_bytes(READY)
    while True:
        try:
            data = connection.recv_bytes()
        except EOFError:
            return
        try:
            image = decode(data, len(data), max_pixels)
            connection.send_bytes(IMAGE + struct.pack(">II", *image.size) + image.tobytes())
        except UserError as error:
            connection.send_bytes(REFUSED + str(error).encode())


class NoDecoderError(Exception):
    """No further process can be started; nothing is known of the image."""


class Decoders:
    """A number of decoders, each started when it is first needed."""

    def __init__(self, count: int, seconds: float, max_pixels: int) -> None:
        """seconds: that one image may take.  max_pixels: of one image."""
        self._seconds, self._max_pixels = seconds, max_pixels
        self._all = [_Decoder(max_pixels) for _ in range(count)]
        self._threads = ThreadPoolExecutor(count, "decoder")
        self._free: asyncio.LifoQueue[_Decoder] = asyncio.LifoQueue()
        for decoder in self._all:
            self._free.put_nowait(decoder)

    async def decode(self, data: bytes) -> RawImage:
        """The image in `data`, once a decoder is free.

        Raises UserError if it is none that may be decoded, or takes too long, and NoDecoderError.  Canceled, it stops
        the decoder.
        """
        loop = asyncio.get_running_loop()
        decoder = await self._free.get()
        try:
            try:
                await loop.run_in_executor(self._threads, decoder.start)
            except (OSError, EOFError) as error:
                log.warning("no decoder can be started (%s)", error)
                raise NoDecoderError from None
            async with asyncio.timeout(self._seconds):
                answer = await loop.run_in_executor(self._threads, decoder.ask, data)
        except BaseException as error:
            decoder.stop()
            self._all.remove(decoder)
            decoder = _Decoder(self._max_pixels)
            self._all.append(decoder)
            if isinstance(error, TimeoutError):
                raise UserError(f"not decoded within {self._seconds:g} s; give a smaller image") from None
            if isinstance(error, EOFError | OSError):
                raise UserError("its decoder died; give another image") from None
            raise
        finally:
            self._free.put_nowait(decoder)
        if answer[:1] == REFUSED:
            raise UserError(answer[1:].decode())
        width, height = struct.unpack_from(">II", answer, 1)
        return RawImage(width, height, answer[9:])

    def stop(self) -> None:
        """Kills all decoders."""
        for decoder in self._all:
            decoder.stop()


class _Decoder:
    """The process of one decoder.  `start` and `ask` wait, in threads; `stop` ends them from outside."""

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._process: SpawnProcess | None = None
        self._is_stopped = False

    def start(self) -> None:
        """Returns when the process is ready; one that died while it had nothing to do is replaced."""
        if self._process is not None and self._process.is_alive():
            return
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        process = context.Process(target=run_decoder, args=(theirs, self._max_pixels), daemon=True)
        with theirs:
            process.start()
        self._process = process
        if self._is_stopped:  # in the meantime
            self.stop()
        self._connection.recv_bytes()

    def ask(self, data: bytes) -> bytes:
        """The answer of the process.  Raises EOFError or OSError if it dies."""
        self._connection.send_bytes(data)
        return self._connection.recv_bytes()

    def stop(self) -> None:
        self._is_stopped = True
        if self._process is not None:
            self._process.kill()
