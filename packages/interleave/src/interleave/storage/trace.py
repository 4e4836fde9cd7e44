"""`trace.jsonl`: every record of a run, in the order in which they were made."""

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from imgen_common.errors import UserError, one_line
from imgen_common.files import append, lock, sync, whole_lines, writing
from interleave.records import Attempt, PlanRecord, Record, Trajectory

TRACE = "trace.jsonl"
TYPES: Mapping[str, type[PlanRecord] | type[Attempt] | type[Trajectory]] = {
    "plan": PlanRecord,
    "attempt": Attempt,
    "trajectory": Trajectory,
}


@dataclass
class TraceEntry:
    """What a trace holds of one trajectory: the latest record of each kind, attempts by (step, attempt).

    replaced: attempts that were made again later, and those that had followed them.
    """

    plan: PlanRecord | None = None
    attempts: dict[tuple[int, int], Attempt] = field(default_factory=dict)
    trajectory: Trajectory | None = None
    replaced: list[Attempt] = field(default_factory=list)


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
        if not lock(self._file):
            self._file.close()
            raise UserError(f"{self.path}: in use by another run; wait for it to end or choose another") from None
        with writing(folder):
            self._file.truncate(sum(map(len, whole_lines(self.path))))
            sync(folder)

    def append(self, record: Record) -> None:
        """Write one line to the disk.  Raises UserError if it cannot be written; nothing of the line is left then."""
        name = next(name for name, kind in TYPES.items() if isinstance(record, kind))
        text = json.dumps({"type": name, **record.model_dump(mode="json")}, ensure_ascii=False)
        line = text.encode("utf-8", "backslashreplace") + b"\n"  # half a surrogate pair: as its escape in JSON
        with self._lock:
            append(self._file, line, durable=True)

    def read(self, *, forget_whole: bool = False) -> dict[str, TraceEntry]:
        """All records by trajectory id, in the order of their first lines.  Raises UserError if a line is damaged.

        forget_whole: as for `read_trace`.
        """
        return read_trace(self.path.parent, forget_whole=forget_whole)

    def close(self) -> None:
        """Let another writer in."""
        self._file.close()

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_trace(folder: Path, *, forget_whole: bool = False) -> dict[str, TraceEntry]:
    """The records in a run folder by trajectory id; of two for the same thing the later one counts.

    forget_whole: whether of stories that are whole, with all scores, the trajectory alone is kept, to save memory.
    A last line that is still being written is left out; without a file there are none.
    Raises UserError naming the line if one is damaged, and for a run of an earlier version.
    """
    path = folder / TRACE
    found: dict[str, TraceEntry] = {}
    if not path.is_file():
        return found
    if (folder / "pictures").is_dir():  # where earlier versions kept a run's images
        raise UserError(
            f"{folder}: made by an earlier version of interleave, whose records cannot be read; run it again"
        )
    for number, line in enumerate(whole_lines(path), 1):
        try:
            fields = json.loads(line)
            record = TYPES[fields.pop("type")].model_validate(fields)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            reason = one_line(error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error))
            raise UserError(f"{path}:{number}: damaged record ({reason}); remove the line and resume") from None
        add_record(found, record, forget_whole=forget_whole)
    return found


def add_record(
    found: dict[str, TraceEntry], record: PlanRecord | Attempt | Trajectory, *, forget_whole: bool = False
) -> None:
    """One record more, as `read_trace` has it."""
    match record:
        case PlanRecord():
            found.setdefault(record.trajectory_id, TraceEntry()).plan = record
        case Attempt():
            entry, key = found.setdefault(record.trajectory_id, TraceEntry()), (record.step, record.attempt)
            if not _is_only_scored(entry.attempts.get(key), record):
                # what followed an attempt that is made again is of another course of the story
                after = [other for other in entry.attempts if other >= key] if key in entry.attempts else []
                entry.replaced += map(entry.attempts.pop, after)
            entry.attempts[key] = record
        case Trajectory():
            attempts = found.get(record.id, TraceEntry()).attempts.values()
            if forget_whole and record.is_whole and not any(attempt.has_lost_scores for attempt in attempts):
                found[record.id] = TraceEntry()
            found.setdefault(record.id, TraceEntry()).trajectory = record


def _is_only_scored(old: Attempt | None, new: Attempt) -> bool:
    """Whether the attempt is not made again, but its judge asked again for the scores that it could not give."""
    if old is None or new.scores is None or not old.has_lost_scores:
        return False
    return new == old.with_scores(new.scores, new.timings["judge"])
