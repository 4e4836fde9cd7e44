"""What the models behind HTTP share: their failures as BackendError, and images in requests and answers."""

import base64
import contextlib
import io
from collections.abc import Iterator

from PIL import Image

from imgen_common.errors import UserError
from imgen_common.http import HttpError
from imgen_common.images import decode
from interleave.protocols import BackendError, HashedImage
from interleave.records import FailureKind

HOW_REACHED = (
    *("url", "urls", "key_env", "token_env", "concurrency", "retry", "startup", "eject_after", "probe_every"),
    *("response_format", "allow_addresses", "device"),
)
"""Keys of a model, wherever it is, on which no answer depends, but for the rounding of a device."""


URL_SAFE = str.maketrans("-_", "+/")
"""The alphabet of base64 in addresses, as Go and Google's encoders write it, to the usual one."""


class RemoteFailure(HttpError):
    """`interleave serve` answered that its generator failed; `failure` is the kind that it named."""

    def __init__(self, failure: FailureKind, message: str) -> None:
        super().__init__("server_error", message, can_retry=False)
        self.failure = failure


@contextlib.contextmanager
def backend_errors() -> Iterator[None]:
    """Raises BackendError for every HttpError."""
    try:
        yield
    except HttpError as error:
        kind = error.failure if isinstance(error, RemoteFailure) else error.kind
        raise BackendError("denied" if error.is_denied else kind, str(error)) from error


def encode_png(image: HashedImage) -> bytes:
    """An image as a file, compressed fast: the best compression takes seconds for a megapixel."""
    buffer = io.BytesIO()
    image.image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def encode_base64_png(image: HashedImage) -> str:
    """The same in base64."""
    return base64.b64encode(encode_png(image)).decode()


def data_address(image: HashedImage, max_pixels: int, max_bytes: int) -> str:
    """An image in an address, scaled down to `max_pixels`: as PNG, or as JPEG where that would be larger than
    `max_bytes`, and with half the pixels, or a quarter, ... where that would be too."""
    shown = image.image
    if (num_pixels := shown.width * shown.height) > max_pixels:
        scale = (max_pixels / num_pixels) ** 0.5
        size = max(1, int(shown.width * scale)), max(1, int(shown.height * scale))
        shown = shown.resize(size, Image.Resampling.LANCZOS)
    for kind, options in (("png", {"compress_level": 1}), ("jpeg", {"quality": 95, "subsampling": 0})):
        buffer = io.BytesIO()
        shown.save(buffer, kind, **options)
        if buffer.tell() <= max_bytes or shown.width * shown.height == 1:
            return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return data_address(image, shown.width * shown.height // 2, max_bytes)


def decode_image(data: bytes, max_pixels: int) -> HashedImage:
    """An untrusted image file.  Raises HttpError, `malformed_response`, if it is none, or too large once decoded; it is
    not asked for again, since its server would generate, and charge for, another one each time."""
    try:
        return HashedImage.from_pil(decode(data, max_bytes=len(data), max_pixels=max_pixels))
    except UserError as error:
        raise HttpError("malformed_response", f"the server's answer: {error}", can_retry=False) from None


def read_base64(text: str) -> bytes:
    """What base64 holds, in either alphabet, also as a data address, with line breaks or without padding.

    Raises ValueError.
    """
    if text.startswith("data:"):
        text = text.partition(",")[2]
    packed = "".join(text.split()).rstrip("=").translate(URL_SAFE)
    return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)


def decode_base64_image(text: object, max_pixels: int) -> HashedImage:
    """The same in base64, as `read_base64` reads it."""
    try:
        if not isinstance(text, str):
            raise TypeError
        data = read_base64(text)
    except (TypeError, ValueError):  # binascii.Error is a ValueError
        raise HttpError("malformed_response", "the server's answer: no image in base64", can_retry=False) from None
    return decode_image(data, max_pixels)
