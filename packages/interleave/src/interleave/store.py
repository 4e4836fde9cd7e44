"""What a run leaves on disk: pictures under the hash of their pixels, and one file of records that only grows.

Pictures are written before the records that name them, and each record is one whole line, on disk before `append`
returns.  A kill at any instant therefore loses at most the record in flight.
"""

import contextlib
import errno
import fcntl
import io
import json
import os
import re
import secrets
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from PIL import Image

from imgen_common.errors import UserError
from imgen_common.images import content_hash, decode
from interleave.parts import Picture
from interleave.records import Attempt, PlanRecord, Record, Trajectory

TRACE = "trace.jsonl"
PICTURES = "pictures"
TYPES: Mapping[str, type[PlanRecord] | type[Attempt] | type[Trajectory]] = {
    "plan": PlanRecord,
    "attempt": Attempt,
    "trajectory": Trajectory,
}
PICTURE_ID = re.compile(r"[0-9a-f]{64}")
MAX_FILE_BYTES = 2**28


class PictureStore:
    """A folder of PNG files, `ab/cd/abcd....png`.  Any number of threads and processes may share it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, image_id: str) -> Path:
        """Where a picture lies, or would lie.  Raises UserError if `image_id` is not a picture's id."""
        if not PICTURE_ID.fullmatch(image_id):
            raise UserError(f"{image_id[:80]!r} is not the id of a picture; an id is 64 hexadecimal digits")
        return self._folder / image_id[:2] / image_id[2:4] / f"{image_id}.png"

    def __contains__(self, image_id: str) -> bool:
        return self.path(image_id).is_file()

    def put(self, picture: Picture) -> str:
        """Keep `picture`, whole or not at all, unless it is there already; its id.

        Raises ValueError if its id is not that of its pixels, UserError if it cannot be written.
        """
        path = self.path(picture.id)
        if path.is_file():
            return picture.id
        # The pixels alone: what else a picture carries (a transparent colour, an orientation) would be written too.
        plain = Image.frombytes("RGB", picture.image.size, picture.image.tobytes())
        if content_hash(plain) != picture.id:
            raise ValueError(f"picture {picture.id} has other pixels than its id says; make it by Picture.of")
        buffer = io.BytesIO()
        plain.save(buffer, "PNG")
        with writing(self._folder):
            _put_file(path, buffer.getvalue())
        return picture.id

    def get(self, image_id: str) -> Picture:
        """The picture.  Raises UserError if it is missing or its pixels are not those of its id."""
        path = self.path(image_id)
        if not path.is_file():
            raise _missing(path)
        picture = Picture.of(decode(path, max_bytes=MAX_FILE_BYTES))
        if picture.id != image_id:
            raise UserError(f"{path}: its pixels are not those it was stored with; remove it and make it again")
        return picture

    def copy(self, image_id: str, target: Path) -> None:
        """Write the picture's file to `target`, whole or not at all.  Raises UserError if it is missing."""
        source = self.path(image_id)
        if not source.is_file():
            raise _missing(source)
        with writing(target.parent):
            _put_file(target, source.read_bytes())


def _missing(path: Path) -> UserError:
    return UserError(f"{path}: no such picture; it was removed, or belongs to another run")


@dataclass
class Recorded:
    """What a trace holds of one trajectory: the latest record of each kind, attempts by (step, attempt)."""

    plan: PlanRecord | None = None
    attempts: dict[tuple[int, int], Attempt] = field(default_factory=dict)
    trajectory: Trajectory | None = None


class Trace:
    """The records of a run, for its one writer: opening cuts off a line that a kill left unfinished.

    A second writer, of this process or another, is refused until the first closes or ends.  Threads may share one.
    Readers use `read_trace`, at any time.
    """

    def __init__(self, folder: Path) -> None:
        """Raises UserError if the file has another writer or cannot be written."""
        self.path = folder / TRACE
        self._lock = threading.Lock()
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise UserError(f"{self.path}: in use by another run; wait for it to end or choose another") from None
        with writing(folder):
            self._file.truncate(len(_whole_lines(self.path)))
            _sync_folder(folder)

    def append(self, record: Record) -> None:
        """Write one line and wait until it is on disk.

        Raises UserError if it cannot be written, as on a full disk; nothing of the line is left then.
        """
        line = _line(record)
        with self._lock, writing(self.path):
            length = self.path.stat().st_size
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[self._file.write(rest) :]
                os.fsync(self._file.fileno())
            except OSError:
                self._file.truncate(length)
                raise

    def read(self) -> dict[str, Recorded]:
        """All records by trajectory id, in the order of their first lines.  Raises UserError if a line is damaged."""
        return read_trace(self.path.parent)

    def close(self) -> None:
        """Let another writer in."""
        self._file.close()

    def __enter__(self) -> "Trace":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_trace(folder: Path) -> dict[str, Recorded]:
    """The records in a run folder by trajectory id; of two for the same thing the later one counts.

    A last line that is still being written is left out; without a file there are none.
    Raises UserError naming the line if one is damaged.
    """
    path = folder / TRACE
    found: dict[str, Recorded] = {}
    if not path.is_file():
        return found
    for number, line in enumerate(_whole_lines(path).splitlines(), 1):
        try:
            fields = json.loads(line)
            record = TYPES[fields.pop("type")].model_validate(fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path}:{number}: damaged record ({reason}); remove the line and resume") from None
        match record:
            case PlanRecord():
                found.setdefault(record.trajectory_id, Recorded()).plan = record
            case Attempt():
                of = found.setdefault(record.trajectory_id, Recorded())
                of.attempts[record.step, record.attempt] = record
            case Trajectory():
                found.setdefault(record.id, Recorded()).trajectory = record
    return found


def _line(record: Record) -> bytes:
    name = next(name for name, kind in TYPES.items() if isinstance(record, kind))
    text = json.dumps({"type": name, **record.model_dump(mode="json")}, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"  # half a surrogate pair: as its escape in JSON


def _whole_lines(path: Path) -> bytes:
    """The file up to the end of its last whole line."""
    data = path.read_bytes()
    return data[: data.rfind(b"\n") + 1]


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says what to do where writing below `path` fails.  Raises UserError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{path}: the disk is full; make room and go on with --resume; everything recorded before is kept"
            ) from None
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); choose another folder") from None


def _put_file(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, whoever else writes it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with fresh.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
