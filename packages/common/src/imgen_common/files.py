"""Files and folders: read as UTF-8, whole or as lines, written whole or not at all, locked against a second writer.

A kill at any instant leaves the old content or the new: what is written goes to a file of another name first, reaches
the disk, and is then renamed.
"""

import codecs
import contextlib
import errno
import fcntl
import math
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Annotated, TypeVar

from pydantic import BaseModel, BeforeValidator, ValidationError

from imgen_common.errors import (
    MENDABLE,
    DiskFullError,
    UserError,
    WriteError,
    is_disk_full,
    nearest,
    system_error,
    warn_once,
)

Model = TypeVar("Model", bound=BaseModel)
Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A number in a JSON file, where null stands for one that was not finite."""
MAX_LINE_BYTES = 64 * 2**20
"""Length from which a line is taken for something else than text."""
MAX_JSON_BYTES = 2**28
"""Size of the largest JSON file that is read."""
ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
"""How an address begins, also one that was taken for a path, which has no two slashes together."""
GIT_LFS = b"version https://git-lfs"
OTHER_BYTES = {
    b"PK\x03\x04": "a .zip or a spreadsheet (.xlsx, .ods); unpack it, or save the table as .csv",
    b"\x1f\x8b": "compressed; unpack it",
    b"\x28\xb5\x2f\xfd": "compressed; unpack it",
    b"PAR1\x15": "a table of parquet; name it .parquet where that is read, or save it as .jsonl",
    b"%PDF-": "a PDF; save its text as .txt",
    GIT_LFS: "a pointer of Git LFS; run `git lfs pull` there",
}
"""What a file is instead of text that begins so."""
CANNOT_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EACCES, errno.EISDIR}
CANNOT_SYNC |= {errno.EBADF, errno.ENOTTY}
"""What file systems answer that do not offer fsync, or not for folders."""


def finite_or_none(value: float) -> float | None:
    """The value, or None where it is NaN or infinite: JSON has neither."""
    return value if math.isfinite(value) else None


def read_text(path: Path, max_bytes: int | None = None) -> str:
    """The text of a UTF-8 file, without the byte order mark that some editors write.

    Raises UserError if it is missing (with the nearest name beside it), unreadable, not UTF-8, or larger than allowed.
    """
    with opened(path) as file:
        data = file.read() if max_bytes is None else file.read(max_bytes + 1)
    if max_bytes is not None and len(data) > max_bytes:
        raise UserError(f"{path}: more than the allowed {max_bytes} bytes; give another file")
    _check_kind(data, path)
    return _decode(data, path).replace("\r\n", "\n").replace("\r", "\n")


def byte_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers; only a line feed ends a line.

    Line ends and byte order marks, which stay inside where files were joined, are taken off.
    Raises UserError as `read_text` does, and for a line of more than `MAX_LINE_BYTES`; decoding is left to the caller.
    """
    with opened(path) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if number == 1:
                _check_kind(line, path)
            if len(line) > MAX_LINE_BYTES:
                raise UserError(
                    f"{path}:{number}: the line is longer than {MAX_LINE_BYTES // 2**20} MiB; is it a file of lines?"
                )
            if line.strip():
                yield number, line.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n")


def local_path(text: str) -> Path:
    """The path that a user wrote, with its `~` expanded.  Raises UserError where that is nobody's home."""
    try:
        return Path(text).expanduser()
    except (RuntimeError, ValueError):  # a zero byte
        raise UserError(f"{text}: there is no such home folder; write the path in full") from None


def files_below(folder: Path, pattern: str = "*") -> list[Path]:
    """All files of a folder and its folders whose names match, in order, also of folders that are links."""
    return [file for file in _walk(folder, frozenset()) if fnmatch(file.name, pattern)]


def _walk(folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    about = folder.stat()
    if (own := (about.st_dev, about.st_ino)) in above:
        return  # a link to a folder that it is in
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _walk(path, above | {own})
        else:
            yield path


def check_no_address(text: str) -> None:
    """Raises UserError, which shows neither secrets nor contents, for an address or an image in the place of a file."""
    if text.startswith("data:"):
        raise UserError("data:...: is the content of a file, not its path; write it into a file, and give the path")
    if found := ADDRESS.match(text):
        raise UserError(f"{found[1]}://...: is an address, not a file; download it, and give the path of that file")


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a UTF-8 file that are not blank, stripped, with their numbers; only a line feed ends a line.

    Raises UserError as `text_lines`.
    """
    return [(number, line) for number, line in ((number, line.strip()) for number, line in text_lines(path)) if line]


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """`byte_lines` as text.  Raises UserError as they do, and naming a line that is not UTF-8 or holds several."""
    for number, line in byte_lines(path):
        text = _decode(line, path, number)
        if "\r" in text.strip():
            raise UserError(f"{path}:{number}: has carriage returns inside; end its lines with line feeds")
        yield number, text


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A file to read.  Raises UserError if it is missing (with the nearest name beside it) or cannot be read."""
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError:
        check_no_address(str(path))
        siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such file{nearest(path.name, siblings)}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _check_kind(data: bytes, path: Path) -> None:
    if what := next((what for start, what in OTHER_BYTES.items() if data.startswith(start)), None):
        raise UserError(f"{path}: is {what}")


def _decode(data: bytes, path: Path, first_line: int = 1) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = error.object[: error.start]  # without the byte order mark
        line, byte = first_line + before.count(b"\n"), error.start - before.rfind(b"\n") - 1
        raise UserError(f"{path}:{line}: not UTF-8 at byte {byte}; save it as UTF-8") from None
    if "\0" in text:
        line = first_line + text[: text.index("\0")].count("\n")
        raise UserError(f"{path}:{line}: holds a zero byte, as UTF-16 does; save it as UTF-8")
    return text


def read_json(path: Path, kind: type[Model]) -> Model:
    """What a JSON file that this project wrote holds, as a value of class `kind`.

    Raises UserError if it is missing, too large, cut off, nested too deeply, or holds something else.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: not a file; restore or remove it")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path}: larger than {MAX_JSON_BYTES >> 20} MiB, so it is not what was written here")
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = "".join(f"{key}: " for key in first["loc"])
        raise UserError(f"{path}: damaged ({where}{first['msg']}); restore or remove it") from None


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file that grows line by line, with their line feeds; one that is not finished is left out."""
    return [line + b"\n" for line in path.read_bytes().split(b"\n")[:-1]]


def read_json_lines(path: Path, kind: type[Model]) -> Iterator[tuple[Model, bytes]]:
    """Each line of a file that grows line by line, as a value and as it stands; others than `kind` are left out."""
    for line in whole_lines(path) if path.is_file() else ():
        with contextlib.suppress(ValidationError):
            yield kind.model_validate_json(line), line


def append(file: IO[bytes], line: bytes, *, durable: bool = False) -> None:
    """Adds a line to an unbuffered file, whole or not at all.

    durable: it has reached the disk on return.  Raises UserError if it cannot be written.
    """
    with writing(Path(file.name)):
        length = os.fstat(file.fileno()).st_size
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[file.write(rest) :]
            if durable:
                sync(file.fileno())
        except OSError:
            file.truncate(length)
            raise


def append_line(path: Path, line: str) -> None:
    """Adds a line to a file, whole or not at all.  Raises UserError if it cannot be written."""
    with writing(path), path.open("ab", buffering=0) as file:
        append(file, line.encode() + b"\n")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, whoever else writes it at the same time; text as UTF-8.

    Raises UserError if it cannot be written.
    """
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to fill that becomes `path` when all went well, and is removed otherwise.

    Raises UserError if it cannot be written.
    """
    if path.is_dir():
        raise WriteError(f"{path}: is a folder; give the path of a file, such as {path / 'NAME'}")
    fresh = path.with_name(f".{path.name[:32]}-{secrets.token_hex(8)}.tmp")
    with writing(path):
        try:
            with fresh.open("xb") as file:
                yield file
                file.flush()
                sync(file.fileno())
            fresh.replace(path)
        finally:
            with contextlib.suppress(OSError):
                fresh.unlink()
        sync(path.parent)


def check_is_new(out: Path) -> None:
    """Raises UserError where a folder that would be made is there."""
    if out.exists():
        raise UserError(f"{out}: exists already; give another folder, or remove it")


@contextlib.contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A folder to fill that becomes `out` when all went well, and is removed otherwise.

    Raises UserError if `out` exists.
    """
    check_is_new(out)
    fresh = out.with_name(f".{out.name[:32]}-{secrets.token_hex(8)}.tmp")
    with writing(out):
        try:
            fresh.mkdir(parents=True)
            yield fresh
            fresh.rename(out)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def sync(what: Path | int) -> None:
    """Wait until the content of a file (a path, or an open handle), or the names in a folder, have reached the disk.

    A file system that does not offer it gets one warning.
    """
    try:
        handle = what if isinstance(what, int) else os.open(what, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            if not isinstance(what, int):
                os.close(handle)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise
        warn_once(
            f"the file system does not say when a file has reached the disk (fsync: {error.strerror}); what is "
            "written last may be lost if the machine loses power"
        )


def nearest_existing(path: Path) -> Path:
    """`path`, or the nearest part of it that is there."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return place


def free_bytes(folder: Path) -> float:
    """Bytes that the disk of a folder has room for; infinite where the file system does not say."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return math.inf
    return usage.free if usage.total else math.inf


def lock(file: IO[bytes] | int) -> bool:
    """Take the lock of an open file for this process; False if another one holds it.

    The system releases it when the file is closed or the process ends, even killed.  A file system without locks gets
    one warning.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        warn_once(
            f"the file system has no locks (flock: {error.strerror}), so that a second process would not be kept out; "
            "start only one in each folder"
        )
    return True


def make_folder(path: Path) -> None:
    """Makes a folder, with its parents, unless it is there.  Raises UserError if files cannot be written into it."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failure to write below `path` into a UserError that says what to do."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            raise DiskFullError(f"{path}: the disk is full") from None
        if (failure := system_error(error)) is not None:
            reason = failure.strerror or failure
            if isinstance(failure, FileExistsError | NotADirectoryError):
                reason = "a part of this path is a file, or a link to nothing"
            remedy = MENDABLE[errno.EFBIG] if failure.errno == errno.EFBIG else "choose another folder"
            raise WriteError(f"{path}: cannot be written ({reason}); {remedy}") from None
        raise
