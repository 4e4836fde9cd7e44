"""Files and folders: read as UTF-8, written whole or not at all, locked against a second writer.

A kill at any instant leaves the old content or the new: what is written goes to a file of another name first, reaches
the disk, and is then renamed.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from imgen_common.errors import UserError, nearest


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without the byte order mark that some editors write.

    Raises UserError if it is missing (with the nearest name beside it), unreadable or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except FileNotFoundError:
        siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such file{nearest(path.name, siblings)}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def local_path(text: str) -> Path:
    """The path that a user wrote, with its `~` expanded.  Raises UserError where that is nobody's home."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{text}: there is no such home folder; write the path in full") from None


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a UTF-8 file that are not blank, stripped, with their numbers; only a line feed ends a line.

    Raises UserError as `read_text` does.
    """
    return [(number, line.strip()) for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, whoever else writes it at the same time; text as UTF-8."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to fill that becomes `path` when all went well, and is removed otherwise."""
    fresh = path.with_name(f".{path.name[:64]}-{secrets.token_hex(8)}.tmp")
    try:
        with fresh.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
    sync(path.parent)


@contextlib.contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A folder to fill that becomes `out` when all went well, and is removed otherwise.

    Raises UserError if `out` exists.
    """
    if out.exists():
        raise UserError(f"{out}: exists already; give another folder, or remove it")
    fresh = out.with_name(out.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
        fresh.rename(out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, have reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock(file: IO[bytes] | int) -> bool:
    """Take the lock of an open file for this process; False if another one holds it.

    The system releases it when the file is closed or the process ends, even killed.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def is_disk_full(error: BaseException) -> bool:
    """Whether the disk, or the user's share of it, is full; safetensors says so in words only."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return (isinstance(error, OSError) and error.errno in full) or "No space left" in str(error)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failure to write below `path` into a UserError that says what to do."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise UserError(
                f"{path}: the disk is full; make room and go on with --resume; everything recorded before is kept"
            ) from None
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); choose another folder") from None
