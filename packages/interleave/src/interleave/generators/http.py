"""What the models behind HTTP share: addresses, tokens, bounded answers, pictures in them."""

import base64
import binascii
import email.utils
import io
import os
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from imgen_common.errors import UserError
from imgen_common.images import decode
from interleave.parts import PartFailed, Picture
from interleave.resilience import Transient

if TYPE_CHECKING:
    import httpx

SHOWN = 300
"""Characters of a server's words that are shown."""
CONNECT_SECONDS = 5.0


def checked(url: str) -> str:
    """`url` without a slash at its end.  Raises UserError unless it is a plain http(s) address."""
    try:
        parts = urlsplit(url)
        plain = parts.port != 0 and not (parts.username or parts.query)  # `port` raises for what is no number
    except ValueError:
        plain = False
    if not plain or parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"url {url!r}: must be like http://HOST:PORT, without name, key or query in it")
    return url.rstrip("/")


def bearer(variable: str) -> dict[str, str]:
    """The header with the token that a variable of the environment holds; none where it is not set.

    Raises UserError, without showing it, for a token that no header can carry.
    """
    token = os.environ.get(variable, "").strip()
    if not (token.isascii() and token.isprintable()):
        raise UserError(
            f"{variable}: holds characters that no token has, such as ends of lines or accents; set it again"
        )
    return {"Authorization": f"Bearer {token}"} if token else {}


def within(seconds: float) -> "httpx.Timeout":
    """Time limits of a request with so many seconds left; a silent address does not use them all up."""
    import httpx

    return httpx.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS))


async def read(answer: "httpx.Response", limit: int) -> bytes:
    """The body of a streamed answer.  Raises PartFailed (garbage) for more than `limit` bytes."""
    data = bytearray()
    async for piece in answer.aiter_bytes():
        data += piece
        if len(data) > limit:
            raise PartFailed("garbage", f"{answer.url.host}: an answer of more than {limit} bytes")
    return bytes(data)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks us to wait, as a number or a date, if it does."""
    asked = headers.get("retry-after", "").strip()
    if asked.isdecimal():
        return float(asked) if len(asked) < 10 else None
    try:
        return max(0.0, email.utils.parsedate_to_datetime(asked).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def line(words: str, headers: Mapping[str, str] = MappingProxyType({})) -> str:
    """A server's words, on one line and not too long, without the token that `bearer` put into the headers."""
    for value in headers.values():
        words = words.replace(value.removeprefix("Bearer "), "...")
    plain = " ".join("".join(c if c.isprintable() else " " for c in words).split())
    return plain if len(plain) <= SHOWN else plain[: SHOWN - 1] + "…"


def png(picture: Picture) -> bytes:
    """A picture as a file, packed fast: a megapixel packed well takes seconds."""
    buffer = io.BytesIO()
    picture.image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def picture(data: bytes, max_pixels: int) -> Picture:
    """An untrusted picture file.  Raises Transient (garbage) for what is none, or is too large once decoded."""
    try:
        return Picture.of(decode(data, max_bytes=len(data), max_pixels=max_pixels))
    except UserError as error:
        raise Transient("garbage", f"the server's answer: {error}") from None


def picture_of_base64(text: object, max_pixels: int) -> Picture:
    """The same in base64."""
    try:
        if not isinstance(text, str):
            raise TypeError
        return picture(base64.b64decode(text, validate=True), max_pixels)
    except (TypeError, binascii.Error, ValueError):
        raise Transient("garbage", "the server's answer: no picture in base64") from None
