"""Decoders: processes that are killed when an image takes too long, or when nobody waits for it any more."""

import asyncio
import io
import multiprocessing
import os
import signal
from collections.abc import Awaitable

import pytest
from PIL import Image
from serving import eventually

from imgen_common.errors import UserError
from interleave.serve.decoding import Decoders, NoDecoderError, _Decoder

RED = Image.new("RGB", (5, 3), "red")


def png() -> bytes:
    buffer = io.BytesIO()
    RED.save(buffer, "PNG")
    return buffer.getvalue()


def decoder_pids() -> list[int]:
    return sorted(child.pid or 0 for child in multiprocessing.active_children() if "Spawn" in type(child).__name__)


async def refused(work: Awaitable[object]) -> str:
    with pytest.raises(UserError) as caught:
        await work
    return str(caught.value)


def test_a_decoder_that_cannot_be_started_says_nothing_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: object) -> None:
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(_Decoder, "start", start)
    decoders = Decoders(1, seconds=5.0, max_pixels=100)
    for _ in range(2):
        with pytest.raises(NoDecoderError):
            asyncio.run(decoders.decode(png()))


@pytest.mark.slow
def test_a_decoder_that_died_with_nothing_to_do_is_not_blamed_on_the_next_image() -> None:
    async def decode() -> None:
        decoders = Decoders(1, seconds=300.0, max_pixels=100)
        try:
            assert (await decoders.decode(png())).width == 5
            [before] = decoder_pids()
            os.kill(before, signal.SIGKILL)
            eventually(lambda: decoder_pids() == [])
            assert (await decoders.decode(png())).width == 5
        finally:
            decoders.stop()

    asyncio.run(decode())


@pytest.mark.slow
def test_a_decoder_is_replaced_whatever_ends_it() -> None:
    async def decode() -> None:
        hasty = Decoders(1, seconds=0.0, max_pixels=100)
        decoders = Decoders(1, seconds=300.0, max_pixels=100)
        try:
            assert "not decoded within 0 s" in await refused(hasty.decode(png()))
            assert "not an image" in await refused(decoders.decode(b"no image"))
            image = await decoders.decode(png())
            assert (image.width, image.height, image.pixels) == (5, 3, RED.tobytes())
            [before] = decoder_pids()
            assert (await decoders.decode(png())).width == 5
            assert decoder_pids() == [before]
            os.kill(before, signal.SIGSTOP)  # as one that is at an image for hours
            waiting = [asyncio.create_task(decoders.decode(png())) for _ in range(2)]
            await asyncio.sleep(0.05)
            waiting[0].cancel()
            assert (await waiting[1]).width == 5, "the place of the canceled one is free"
            assert waiting[0].cancelled()
            [after] = decoder_pids()
            os.kill(after, signal.SIGSTOP)
            waiting = [asyncio.create_task(decoders.decode(png()))]
            await asyncio.sleep(0.05)
            os.kill(after, signal.SIGKILL)
            assert "its decoder died" in await refused(waiting[0])
            assert (await decoders.decode(png())).width == 5
        finally:
            hasty.stop()
            decoders.stop()

    asyncio.run(decode())
    eventually(lambda: not decoder_pids())
