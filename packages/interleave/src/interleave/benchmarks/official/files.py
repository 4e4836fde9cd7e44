"""Image files of a benchmark: found, checked, shown to a judge, copied into the layout of the authors' scorer."""

import contextlib
import io
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from PIL import Image

from imgen_common.errors import UserError
from imgen_common.files import check_no_address, write_atomic, writing
from imgen_common.images import MAX_OWN_BYTES, decode

SUFFIXES = ("png", "jpg", "jpeg")
"""Those that authors' scorers look for, in that order."""
TINY = 32
"""Longest side of the miniature's images, in pixels."""


def image_path(folder: Path, name: object, where: str) -> Path:
    """The file of that name below a folder.  Raises UserError naming `where` for no name, and for a path out of it.

    Links are followed, since download caches consist of them.
    """
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{where}: {name!r} is not the name of an image; write its path below {folder}")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{where}: {name!r} leads out of the folder; images must lie in {folder}")
    return folder / path


def find_image(name: str, folders: Sequence[Path], where: str) -> Path:
    """The image of that name in the first folder that has it.  Raises UserError naming `where` if none has."""
    for folder in folders:
        with contextlib.suppress(OSError, ValueError):  # no name of a file
            if (file := folder / name).is_file():
                return file
    check_no_address(name)
    places = " nor ".join(str(folder.absolute()) for folder in folders)
    raise UserError(f"{where}: no image {name[:200]!r} in {places}; put it there, or correct the path")


def read_image(file: Path, *, drop_alpha: bool = False) -> Image.Image:
    """An image file as `decode` reads it, also one as large as the loop keeps.  Raises UserError."""
    return decode(file, max_bytes=MAX_OWN_BYTES, drop_alpha=drop_alpha)


def check_images(files: Iterable[tuple[str, Path]], hint: str) -> None:
    """Raises UserError for the first file that is missing or is no image, naming its place, with what to do."""
    with ThreadPoolExecutor() as threads:
        for problem in threads.map(_problem_of, files):
            if problem:
                raise UserError(f"{problem}; {hint}")


def _problem_of(file: tuple[str, Path]) -> str:
    where, path = file
    if not path.is_file():
        return f"{where}: {path}: no such image"
    try:
        read_image(path)
    except UserError as error:
        return f"{where}: {error}"
    return ""


def through_jpeg(image: Image.Image) -> Image.Image:
    """An RGB image as it is after a JPEG of quality 75, Pillow's default, which the authors' scorers leave as it is.

    Those of the miniature, which are smaller than any official one and would lose their colors, are left alone.
    """
    if max(image.size) <= TINY:
        return image
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return Image.open(buffer).convert("RGB")


def write_png(source: Path, target: Path) -> None:
    """Writes an image file of any allowed format as PNG; one is copied, since compressing it again takes as long as all
    else.  Raises UserError if it cannot be read or written."""
    data = _as_png(source, _read(source))
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_bytes() != data:
            write_atomic(target, data)


def copy_image(source: Path, folder: Path, stem: str) -> str:
    """Copies a PNG or JPEG file, and another image as PNG, to `stem` with its suffix; returns the new name.

    An image of the same stem with another suffix is removed, so that a scorer does not prefer it.
    Raises UserError for what is no image, and where nothing can be written.
    """
    data = _read(source)
    suffix = "jpg" if data.startswith(b"\xff\xd8\xff") else "png"
    data = data if suffix == "jpg" else _as_png(source, data)
    target = folder / f"{stem}.{suffix}"
    with writing(target):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(target, data)
        for other in (folder / f"{stem}.{suffix}" for suffix in SUFFIXES):
            if other not in (source, target):
                other.unlink(missing_ok=True)
    return target.name


def copy_file(source: Path, target: Path) -> None:
    """Copies a file, atomically.  Raises UserError where it cannot be read or written."""
    data = _read(source)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, data)


def _as_png(file: Path, data: bytes) -> bytes:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    buffer = io.BytesIO()
    read_image(file).save(buffer, "PNG")
    return buffer.getvalue()


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); restore it") from None
