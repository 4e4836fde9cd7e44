"""Pictures: tensors to pixels, grids, safe decoding, content hashes."""

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
    """A batch (b, 3, h, w) in [0, 1] as b RGB pictures."""
    return [Image.fromarray(pixels) for pixels in to_uint8(images)]


def from_pil(pictures: "Sequence[Image.Image]") -> "torch.Tensor":
    """Pictures of one size as (n, 3, h, w) in [0, 1]."""
    import torch

    arrays = np.stack([np.asarray(picture.convert("RGB"), np.float32) for picture in pictures])
    return torch.from_numpy(arrays / 255).permute(0, 3, 1, 2)


def enlarge(picture: Image.Image, factor: int) -> Image.Image:
    """`picture` with every pixel as a square of `factor` x `factor` pixels.  Raises ValueError if factor < 1."""
    if factor < 1:
        raise ValueError(f"factor must be >= 1, got {factor}")
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def grid(images: "torch.Tensor | Sequence[Image.Image]", columns: int, scale: int = 1, gap: int = 2) -> Image.Image:
    """Pictures in rows of `columns`, row by row, each enlarged `scale` times, `gap` white pixels between them.

    images: (b, 3, h, w) in [0, 1], or pictures; a cell is as large as the largest.  Fewer than `columns` pictures give
    one shorter row.  Raises ValueError without a picture or a column.
    """
    pictures = list(images) if isinstance(images, Sequence) else to_pil(images)
    if not pictures or columns < 1:
        raise ValueError(f"a grid needs pictures and columns, got {len(pictures)} pictures in {columns} columns")
    pictures = [enlarge(picture.convert("RGB"), scale) for picture in pictures]
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    width = max(picture.width for picture in pictures) + gap
    height = max(picture.height for picture in pictures) + gap
    sheet = Image.new("RGB", (columns * width - gap, rows * height - gap), "white")
    for index, picture in enumerate(pictures):
        sheet.paste(picture, ((index % columns) * width, (index // columns) * height))
    return sheet


def decode(source: bytes | Path, max_bytes: int = 32 * 2**20, max_pixels: int = 64 * 10**6) -> Image.Image:
    """An untrusted PNG, JPEG or WEBP picture as upright RGB (transparency on white; the first frame of several).

    Bytes are bounded before they are read and pixels before they are decoded.
    Raises UserError for a picture that is too large, of another format, damaged or cut short.
    """
    name = "the picture" if isinstance(source, bytes) else str(source)
    data = source if isinstance(source, bytes) else _read(source, max_bytes)
    if len(data) > max_bytes:
        raise UserError(f"{name}: more than the allowed {max_bytes} bytes; give a smaller file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise UserError(f"{name}: more than the allowed {max_pixels} pixels; give a smaller picture") from None
    except (OSError, ValueError, SyntaxError):
        raise UserError(f"{name}: not a picture of an allowed format ({', '.join(FORMATS)})") from None
    if picture.width * picture.height > max_pixels:
        size = f"{picture.width}x{picture.height}"
        raise UserError(f"{name}: {size} is more than the allowed {max_pixels} pixels; give a smaller picture")
    try:
        picture.load()
        return _upright_rgb(picture)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{name}: damaged or cut short ({error}); save or download it again") from None


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(max_bytes + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _upright_rgb(picture: Image.Image) -> Image.Image:
    upright = ImageOps.exif_transpose(picture)
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        paper = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(paper, upright)
    return upright.convert("RGB")


def content_hash(picture: Image.Image) -> str:
    """sha256 (hex) over mode, size, palette and pixels: equal for equal pictures, whatever file they came from."""
    digest = hashlib.sha256(f"{picture.mode} {picture.width}x{picture.height}\n".encode())
    digest.update(bytes(picture.getpalette() or []))
    digest.update(picture.tobytes())
    return digest.hexdigest()


def data_uri(picture: Image.Image, webp_quality: int | None = None) -> str:
    """`picture` inside a `data:` address, for pages that need no other file: as PNG, or as WebP of a quality in
    [0, 100], which makes a large picture small and is not exact.
    """
    buffer = io.BytesIO()
    if webp_quality is None:
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "WEBP", quality=webp_quality)
    kind = "png" if webp_quality is None else "webp"
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()
