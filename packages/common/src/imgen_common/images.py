"""Images: tensors to pixels, grids, safe decoding, content hashes."""

import base64
import hashlib
import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from imgen_common.errors import UserError

if TYPE_CHECKING:
    import torch

FORMATS = ("PNG", "JPEG", "WEBP")


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


def decode(source: bytes | Path, max_bytes: int = 32 * 2**20, max_pixels: int = 64 * 10**6) -> Image.Image:
    """An untrusted PNG, JPEG or WEBP image as upright RGB (transparency on white; the first frame of several).

    Bytes are bounded before they are read and pixels before they are decoded.
    Raises UserError for an image that is too large, of another format, damaged or cut short.
    """
    name = "the image" if isinstance(source, bytes) else str(source)
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    if len(data) > max_bytes:
        raise UserError(f"{name}: more than the allowed {max_bytes} bytes; give a smaller file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise UserError(f"{name}: more than the allowed {max_pixels} pixels; give a smaller image") from None
    except (OSError, ValueError, SyntaxError):
        raise UserError(f"{name}: not an image of an allowed format ({', '.join(FORMATS)})") from None
    if image.width * image.height > max_pixels:
        size = f"{image.width}x{image.height}"
        raise UserError(f"{name}: {size} is more than the allowed {max_pixels} pixels; give a smaller image")
    try:
        image.load()
        return _upright_rgb(image)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{name}: damaged or cut short ({error}); save or download it again") from None


def _upright_rgb(image: Image.Image) -> Image.Image:
    return to_rgb(ImageOps.exif_transpose(image))


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
