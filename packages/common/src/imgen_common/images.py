"""Images: tensors to pixels, grids, safe decoding, content hashes."""

import base64
import contextlib
import hashlib
import io
import math
import re
import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from imgen_common.errors import UserError
from imgen_common.files import GIT_LFS, OTHER_BYTES, atomic_file, check_no_address

if TYPE_CHECKING:
    import torch

FORMATS = ("PNG", "JPEG", "WEBP")
OTHER_FORMAT = f"not an image of an allowed format ({', '.join(FORMATS)})"
CUT = "damaged or cut short (its header); save or download it again"
BEGINNING = re.compile(rb"\x89PNG|\xff\xd8\xff|RIFF....WEBP", re.DOTALL)
MAX_PARTS = 2**16
"""Chunks or segments that a file may have."""
MAX_SCANS = 32
"""How often each of the allowed pixels may be written by the scans of a JPEG; progressive ones have 6 to 20."""
MAX_OWN_BYTES = 2**28
"""Size of the largest file of an image that we wrote ourselves."""
MAX_ASPECT_RATIO = 200
"""The processors of Qwen2-VL and its successors refuse an image beyond it."""
MAX_SIDE = 2**16 - 1
"""Longest side, that of JPEG; each row costs time of its own."""
MAX_NAME = 4096
"""Longest path; what is longer is most often the content of an image in the place of its path."""
ORIENTATION = 0x0112


def to_uint8(images: "torch.Tensor") -> np.ndarray:
    """Pixels of a batch: (b, 3, h, w) in [0, 1] to (b, h, w, 3) uint8, rounded to nearest.

    Values outside [0, 1] are clamped; NaN becomes 0 (black).  Raises ValueError for another shape.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must have shape (b, 3, h, w), got {tuple(images.shape)}")
    pixels = images.detach().float().nan_to_num(0.0).clamp(0, 1).mul(255).round().byte()
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def to_pil(images: "torch.Tensor") -> list[Image.Image]:
    """A batch (b, 3, h, w) in [0, 1] as b RGB images."""
    return [Image.fromarray(pixels) for pixels in to_uint8(images)]


def from_pil(images: "Sequence[Image.Image]") -> "torch.Tensor":
    """Images of one size as (n, 3, h, w) in [0, 1]."""
    import torch

    arrays = np.stack([np.asarray(to_rgb(image), np.float32) for image in images])
    return torch.from_numpy(arrays / 255).permute(0, 3, 1, 2)


def enlarge(image: Image.Image, factor: int) -> Image.Image:
    """`image` with every pixel as a square of `factor` x `factor` pixels.  Raises ValueError if factor < 1."""
    if factor < 1:
        raise ValueError(f"factor must be >= 1, got {factor}")
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def thumbnail(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image within (width, height) `size`: smaller, or with whole pixels as squares, its ratio of sides kept."""
    factor = min(size[0] // image.width, size[1] // image.height)
    if factor >= 1:
        return enlarge(image, factor)
    found = to_rgb(image)
    found.thumbnail(size)
    return found


def grid(images: "torch.Tensor | Sequence[Image.Image]", columns: int, scale: int = 1, gap: int = 2) -> Image.Image:
    """Images in rows of `columns`, row by row, each enlarged `scale` times, `gap` white pixels between them.

    images: a batch (b, 3, h, w) in [0, 1], or RGB images; a cell is as large as the largest.  Fewer than `columns`
    images give one shorter row.  Raises ValueError without an image or a column.
    """
    cells = list(images) if isinstance(images, Sequence) else to_pil(images)
    if not cells or columns < 1:
        raise ValueError(f"a grid needs images and columns, got {len(cells)} images in {columns} columns")
    cells = [enlarge(to_rgb(cell), scale) for cell in cells]
    columns = min(columns, len(cells))
    rows = math.ceil(len(cells) / columns)
    width = max(cell.width for cell in cells) + gap
    height = max(cell.height for cell in cells) + gap
    sheet = Image.new("RGB", (columns * width - gap, rows * height - gap), "white")
    for index, cell in enumerate(cells):
        sheet.paste(cell, ((index % columns) * width, (index // columns) * height))
    return sheet


def decode(
    source: bytes | Path, max_bytes: int = 32 * 2**20, max_pixels: int = 64 * 10**6, *, drop_alpha: bool = False
) -> Image.Image:
    """An untrusted PNG, JPEG or WEBP image as upright RGB (transparency on white; the first frame of several).

    drop_alpha: what is transparent shows the color that is stored there, as Pillow's `convert("RGB")` has it.
    Work is bounded before any is done: bytes, pixels, chunks, and the scans of a JPEG, each of which visits all pixels.
    Only what pixels are made of reaches the decoder: no profile, text, thumbnail or animation.
    Raises UserError for an image that is too large, of another format, damaged or cut short.
    """
    name = "the image" if isinstance(source, bytes) else str(source)
    name = name if len(name) <= MAX_NAME else f"{name[:300]}..."
    data = _read(source, name, max_bytes)
    try:
        bare, orientation = _without_metadata(data, max_pixels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(bare), formats=FORMATS)
    except _Refused as error:
        raise UserError(f"{name}: {error}") from None
    except Image.DecompressionBombError:
        raise UserError(f"{name}: more than the allowed {max_pixels} pixels; give a smaller image") from None
    except (OSError, ValueError, SyntaxError):
        other = f"is {OTHER_BYTES[GIT_LFS]}" if data.startswith(GIT_LFS) else OTHER_FORMAT
        raise UserError(f"{name}: {CUT if BEGINNING.match(data) else other}") from None
    size = f"{image.width}x{image.height}"
    if image.width * image.height > max_pixels:
        raise UserError(f"{name}: {size} is more than the allowed {max_pixels} pixels; give a smaller image")
    if max(image.size) > MAX_SIDE:
        raise UserError(f"{name}: {size}; a side may have {MAX_SIDE} pixels; give a smaller image")
    try:
        image.load()
        return _upright_rgb(image, orientation, drop_alpha)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{name}: damaged or cut short ({error}); save or download it again") from None


def _read(source: bytes | Path, name: str, max_bytes: int) -> bytes:
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            data = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: no name of a file
        check_no_address(name)
        raise UserError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(data) > max_bytes:
        raise UserError(f"{name}: more than the allowed {max_bytes} bytes; give a smaller file")
    return data


class _Refused(Exception):
    """A file that is not given to a decoder; the message says why."""


def _without_metadata(data: bytes, max_pixels: int) -> tuple[bytes, int]:
    """A file reduced to what its pixels are made of, and its orientation; 0 for WEBP, whose metadata costs nothing.

    Raises _Refused.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _bare_png(data, max_pixels)
    if data.startswith(b"\xff\xd8\xff"):
        return _bare_jpeg(data, max_pixels)
    return data, 0


def _bare_png(data: bytes, max_pixels: int) -> tuple[bytes, int]:
    kept: dict[bytes, bytearray] = {kind: bytearray() for kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT")}
    exif = xmp = b""
    position = 8
    for _ in range(MAX_PARTS):
        head = data[position : position + 8]
        if len(head) < 8 or head.endswith(b"IEND"):
            break
        length, kind = struct.unpack(">I4s", head)
        content = data[position + 8 : position + 8 + length]
        position += length + 12
        if kind in kept:
            if zlib.crc32(content, zlib.crc32(kind)) != int.from_bytes(data[position - 4 : position], "big"):
                raise _Refused("damaged or cut short (wrong checksum); save or download it again")
            kept[kind] += content
        elif kind == b"eXIf":
            exif = content
        elif kind == b"iTXt" and content.startswith(b"XML:com.adobe.xmp\0"):
            xmp = content
    else:
        raise _Refused(f"more than the allowed {MAX_PARTS} chunks; save it again")
    _check_png(kept[b"IHDR"], kept[b"PLTE"], kept[b"IDAT"], max_pixels)
    kept[b"tRNS"] = _transparent_of_8_bits(kept[b"IHDR"], kept[b"tRNS"])
    chunks = [(kind, bytes(content)) for kind, content in kept.items() if content] + [(b"IEND", b"")]
    parts = [
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(content, zlib.crc32(kind)))
        for kind, content in chunks
    ]
    return data[:8] + b"".join(parts), _orientation(exif, xmp)


def _transparent_of_8_bits(head: bytearray, transparent: bytearray) -> bytearray:
    """The transparent shade or color of a PNG as Pillow decodes its pixels: it makes 8 bits of them, but not of it."""
    depth, color = head[8:10] if len(head) == 13 else (8, 0)
    if (color, len(transparent)) == (0, 2) and depth in (2, 4):
        return bytearray([0, (transparent[1] & (2**depth - 1)) * 255 // (2**depth - 1)])
    if (color, depth, len(transparent)) == (2, 16, 6):
        return bytearray(byte for high in transparent[::2] for byte in (0, high))
    return transparent


PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Numbers of a pixel by a PNG's color type, of which 3 is that of a palette."""
PIECE = 2**14
"""Compressed bytes that are inflated at once, to 17 MB at most."""


def _check_png(head: bytearray, palette: bytearray, compressed: bytearray, max_pixels: int) -> None:
    """Raises _Refused for pixels or a palette that are missing, which Pillow would make up."""
    if len(head) != 13:
        return  # the decoder says so
    width, height, depth, color, *_, interlaced = struct.unpack(">IIBBBBB", head)
    if color == 3 and not palette:
        raise _Refused("damaged: its colors are those of a palette that it lacks; save it again")
    if interlaced or color not in PNG_CHANNELS or width * height > max_pixels:
        return
    expected, found, inflate = height * (1 + -(-width * PNG_CHANNELS[color] * depth // 8)), 0, zlib.decompressobj()
    with contextlib.suppress(zlib.error):  # the decoder says so
        for start in range(0, len(compressed), PIECE):
            found += len(inflate.decompress(compressed[start : start + PIECE]))
            if found >= expected:
                return
        raise _Refused(f"damaged or cut short ({found} of {expected} bytes of pixels); save or download it again")


JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
"""Neither a byte 255 of the data, nor a fill byte, nor a restart inside a scan."""
STANDALONE, END, SCAN, APP1 = (0x01, 0xD8), 0xD9, 0xDA, 0xE1
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
KEPT_SEGMENTS = frozenset(range(0xC0, 0xD0)) | {SCAN, 0xDB, 0xDC, 0xDD, 0xE0, 0xEE}


def _bare_jpeg(data: bytes, max_pixels: int) -> tuple[bytes, int]:
    kept = [data[:2]]
    exif = xmp = b""
    position, num_pixels, num_scans = 2, 0, 0
    for _ in range(MAX_PARTS):
        found = JPEG_MARKER.search(data, position)
        if found is None:
            break
        start, position = found.span()
        code = data[position - 1]
        if code == END:
            kept.append(found[0])
            break
        if code in STANDALONE:
            continue
        content, position = position + 2, position + max(2, int.from_bytes(data[position : position + 2], "big"))
        if code == SCAN:
            num_scans += 1
            following = JPEG_MARKER.search(data, position)
            position = len(data) if following is None else following.start()
        elif code in FRAMES:
            height, width = (int.from_bytes(data[content + i : content + i + 2], "big") for i in (1, 3))
            num_pixels = max(num_pixels, height * width)
        elif code == APP1 and data.startswith(b"Exif\0\0", content):
            exif = exif or data[content:position]
        elif code == APP1:
            xmp = xmp or data[content:position]
        if code in KEPT_SEGMENTS:
            kept.append(data[start:position])
    else:
        raise _Refused(f"more than the allowed {MAX_PARTS} segments; save it again")
    if num_pixels <= max_pixels and num_scans * num_pixels > MAX_SCANS * max_pixels:
        most = MAX_SCANS * max_pixels // num_pixels
        raise _Refused(f"{num_scans} scans of {num_pixels} pixels, at most {most} are allowed; save it again")
    return b"".join(kept), _orientation(exif, xmp)


def _orientation(exif: bytes, xmp: bytes) -> int:
    """How an image is turned, 1 to 8 as in EXIF.

    Pillow's own reader copies what each entry of an EXIF block points to: gigabytes for a file of one.
    """
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2], "<")
    with contextlib.suppress(struct.error):
        start = struct.unpack_from(f"{order}L", exif, 4)[0]
        for entry in range(struct.unpack_from(f"{order}H", exif, start)[0]):
            tag, kind = struct.unpack_from(f"{order}HH", exif, start + 2 + 12 * entry)
            if tag == ORIENTATION:
                value = struct.unpack_from(order + {1: "B", 4: "L"}.get(kind, "H"), exif, start + 10 + 12 * entry)[0]
                return value if value <= 8 else 1
    found = re.search(rb'tiff:Orientation(?:="|>)([1-8])', xmp)
    return int(found[1]) if found else 1


def _upright_rgb(image: Image.Image, orientation: int, drop_alpha: bool) -> Image.Image:
    """orientation: 0: the image itself says it."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation or _orientation(image.info.get("exif", b""), image.info.pop("xmp", b""))
    image.info["exif"] = exif.tobytes()
    image = ImageOps.exif_transpose(image)
    if drop_alpha and image.has_transparency_data:
        image.info.pop("transparency", None)
        image = image.convert("RGB") if image.mode in ("RGBA", "LA", "PA", "P") else image
    return to_rgb(image)


def shape_problem(width: int, height: int) -> str | None:
    """What keeps the processor of a vision-language model from reading an image of that size; None: nothing."""
    if max(width, height) <= MAX_ASPECT_RATIO * min(width, height):
        return None
    return f"is {width}x{height}; models take at most {MAX_ASPECT_RATIO} times as wide as high or as high as wide"


def to_rgb(image: Image.Image) -> Image.Image:
    """A new image of 8-bit RGB, of whatever mode, with transparency on white.

    16-bit gray v becomes round(v / 257), where Pillow would cut off at 255.  Modes without a range of their own: I is
    16-bit gray unless every value fits into 8 bits; F is gray in [0, 1] unless a value exceeds 1, else in [0, 255].
    NaN is black; what lies outside of the range is clamped.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _gray_to_8_bits(image)
    if image.mode == "La":
        image = image.convert("LA")  # the only mode that it converts to
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _gray_to_8_bits(image: Image.Image) -> Image.Image:
    """Mode L; LA if a value stands for transparent."""
    values = np.asarray(image).astype(np.float32)
    if image.mode == "F":
        values = np.nan_to_num(values)
        scale = 255.0 if values.max(initial=0) <= 1 else 1.0
    else:
        scale = 1 / 257 if image.mode != "I" or values.max(initial=0) > 255 else 1.0
    gray = Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray.putalpha(Image.fromarray((values != transparent).astype(np.uint8) * 255))
    return gray


def save_png(image: Image.Image, path: Path) -> None:
    """Writes a PNG file whole or not at all.  Raises UserError if it cannot be written."""
    with atomic_file(path) as file:
        image.save(file, "PNG")


def content_hash(image: Image.Image) -> str:
    """sha256 (hex) over mode, size, palette and pixels: equal for equal images, whatever file they came from."""
    digest = hashlib.sha256(f"{image.mode} {image.width}x{image.height}\n".encode())
    digest.update(bytes(image.getpalette() or []))
    digest.update(image.tobytes())
    return digest.hexdigest()


def data_uri(image: Image.Image, webp_quality: int | None = None) -> str:
    """`image` inside a `data:` address, for pages that need no other file: as PNG, or as WebP of a quality in
    [0, 100], which makes a large image small and is not exact.
    """
    kind, options = ("png", {"optimize": True}) if webp_quality is None else ("webp", {"quality": webp_quality})
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()
