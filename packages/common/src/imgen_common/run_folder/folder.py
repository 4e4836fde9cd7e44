"""Run folders: what was asked, on what it ran, what it measured, and checkpoints that survive a kill at any instant.

    config.yaml        the resolved configuration        environment.json   versions, device, git revision, command
    config-at-start.yaml   the same, by which an edit is noticed
    metrics.jsonl      one JSON object a line            tensorboard/       the same numbers and the images
    samples/           images that were logged           checkpoints/step-000123/{GROUP.safetensors, state.json}

Only the main process writes, but for its part of sharded checkpoints; on every other process the writing methods do
nothing, so that the caller's loop is the same everywhere.  A lock, released by the system when its process ends, keeps
a second writer out.
"""

import contextlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Lt
from pydantic import BaseModel, ConfigDict

from imgen_common.config import Config, load, to_yaml
from imgen_common.errors import MENDABLE, DiskFullError, UserError, WriteError, is_disk_full, quoted
from imgen_common.files import (
    append_line,
    finite_or_none,
    lock,
    read_json_lines,
    write_atomic,
    writing,
)
from imgen_common.run_folder import checkpoints
from imgen_common.run_folder.checkpoints import Checkpoint, Tensors
from imgen_common.run_folder.data import FIRST_CONFIG, check_config
from imgen_common.run_folder.environment import environment, read_environment
from imgen_common.run_folder.find import CONFIG, ENVIRONMENT, LOCK, METRICS
from imgen_common.run_folder.trackers import Tracker, finish_tracker, log_to, start_tracker, tracker_module

if TYPE_CHECKING:
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

C = TypeVar("C", bound=Config)
CHECKPOINTS = "checkpoints"


class MetricsLine(BaseModel):
    """A line of metrics.jsonl: the step, and numbers by name; null for one that was not finite."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    __pydantic_extra__: dict[str, float | None]
    step: Annotated[int, Ge(0), Lt(2**53)]


class RunFolder:
    """One run on disk.  Made by `create` or `open`; close it, or use it in a `with` statement."""

    def __init__(self, path: Path, is_main: bool, lock: int | None = None) -> None:
        self.path, self.is_main, self._lock = path, is_main, lock
        self._purge_step: int | None = None
        self._checked: int | None = None
        self._replayed: set[tuple[int, frozenset[str]]] = set()
        self._writer: SummaryWriter | None = None
        self._trackers: list[Any] = []

    @classmethod
    def create(
        cls, path: Path, config: Config, command: Sequence[str] | None = None, *, trackers: Sequence[Tracker] = ()
    ) -> "RunFolder":
        """Start a run in a new or empty folder.

        command: the command line, recorded as given, with the environment, whose devices torch names; None: `open` will
        record it.  trackers: where else numbers go ("wandb", "trackio").
        Raises UserError if the folder holds anything, is in use, or a tracker is not installed.
        """
        _refuse_used(path)
        modules, is_new = [tracker_module(name) for name in trackers], not path.exists()
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
        run = cls(path, is_main=True, lock=_acquire(path))
        with contextlib.ExitStack() as undo:
            undo.callback(run.close)
            _refuse_used(path)  # another process may have made its run meanwhile
            if is_new:
                undo.callback(shutil.rmtree, path, ignore_errors=True)
            for name in () if is_new else (CONFIG, FIRST_CONFIG, ENVIRONMENT):
                undo.callback((path / name).unlink, missing_ok=True)
            if command is not None:
                run._record_environment(command)
            write_atomic(path / CONFIG, to_yaml(config))
            write_atomic(path / FIRST_CONFIG, to_yaml(config))
            run._start_trackers(modules, config)
            undo.pop_all()
        return run

    @classmethod
    def open(
        cls,
        path: Path,
        config: Config | None = None,
        command: Sequence[str] | None = None,
        *,
        is_main: bool = True,
        may_differ: Collection[str] = (),
        trackers: Sequence[Tracker] = (),
    ) -> "RunFolder":
        """Go on in an existing run folder; with `is_main=False` only read it, without taking the lock.

        config: what this process is asked to do; it must equal the recorded one, which must not have been edited,
        except under the dotted keys in `may_differ`.  command: recorded with the environment of this process; the
        earlier ones are kept beside it.
        Raises UserError if there is no run, it is in use, or its configuration is another.
        """
        if not (path / CONFIG).is_file():
            raise UserError(f"{path}: not a run folder (no {CONFIG} in it); give the folder of an earlier run")
        if config is not None:
            check_config(path, config, may_differ)
        if not is_main:
            return cls(path, is_main=False)
        modules = [tracker_module(name) for name in trackers]
        run = cls(path, is_main=True, lock=_acquire(path))
        try:
            checkpoints.mend_checkpoints(run._checkpoints)
            run._check_newest_checkpoint()
            if command is not None:
                run._record_environment(command)
            run._start_trackers(modules, config)
        except BaseException:
            run.close()
            raise
        return run

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Closes the run; a disk that is full or gone becomes a UserError that says what is kept and how to go on."""
        try:
            self.close()
        except Exception as failure:  # what waited to be written
            error = error or failure
        explained = None if error is None else self._explain(error)
        if explained is not None:
            raise explained from None
        if kind is None and error is not None:
            raise error

    def _explain(self, error: BaseException) -> UserError | None:
        is_full = isinstance(error, DiskFullError) or is_disk_full(error)
        if not (self.path / CONFIG).is_file():
            if is_full or not isinstance(error, OSError | WriteError):
                return None
            return UserError(
                f"{self.path}: was removed, or its disk is gone, while the run wrote to it; start it again"
            )
        if is_full:
            if self.is_main:
                checkpoints.mend_checkpoints(self._checkpoints)
            latest = self.latest_checkpoint()
            kept = "what was recorded before" if latest is None else f"the checkpoint of step {latest}"
            what = error.what if isinstance(error, DiskFullError) else f"{self.path}: the disk is full"
            return UserError(f"{what}; {kept} is kept; make room and go on with --resume {quoted(self.path)}")
        if isinstance(error, OSError) and Path(str(error.filename or "")).is_relative_to(self.path):
            remedy = MENDABLE.get(error.errno or 0, "mend it")
            return UserError(
                f"{error.filename}: {error.strerror}; {remedy}; then go on with --resume {quoted(self.path)}"
            )
        return None

    def close(self) -> None:
        """Flush everything and give the lock back."""
        try:
            if self._writer is not None:
                self._writer.close()
            for tracker in self._trackers:
                finish_tracker(tracker)
        finally:
            self._writer, self._trackers = None, []
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def config(self, cls: type[C]) -> C:
        """The recorded configuration as a value of class `cls`.  Raises UserError if it is of another version."""
        return load(cls, [self.path / CONFIG])

    def _record_environment(self, command: Sequence[str]) -> None:
        before = read_environment(self.path) if (self.path / CONFIG).exists() else {}
        earlier = [*before.pop("earlier", []), before] if before else []
        content = json.dumps(environment(command) | {"earlier": earlier}, indent=2) + "\n"
        write_atomic(self.path / ENVIRONMENT, content)

    # --- metrics -----------------------------------------------------------------------------------------------------

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line {"step": step, ...} and pass it on; what is not finite is recorded as null."""
        if not self.is_main:
            return
        values = {name: float(value) for name, value in metrics.items()}
        line = {"step": step} | {name: finite_or_none(value) for name, value in values.items()}
        append_line(self.path / METRICS, json.dumps(line))
        writer = self._tensorboard()
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        # a tracker cannot forget what a killed process sent it after the checkpoint
        if (step, frozenset(values)) not in self._replayed:
            for tracker in self._trackers:
                log_to(tracker, values, step)

    def log_image(self, step: int, name: str, image: "Image.Image") -> None:
        """Keep an image as samples/NAME-000123.png and show it in TensorBoard."""
        if not self.is_main:
            return
        import numpy as np

        from imgen_common.images import save_png

        folder = self.path / "samples"
        folder.mkdir(exist_ok=True)
        save_png(image, folder / f"{name}-{step:06d}.png")
        self._tensorboard().add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl in order; a line torn by a kill, or damaged, is left out."""
        return [line.model_dump() for line, _ in read_json_lines(self.path / METRICS, MetricsLine)]

    def rewind(self, step: int) -> None:
        """Forget, all or nothing, the metrics after `step`: call it with the step a run resumes from, -1 for none."""
        if not self.is_main:
            return
        lines = list(read_json_lines(self.path / METRICS, MetricsLine))
        write_atomic(self.path / METRICS, b"".join(text for line, text in lines if line.step <= step))
        self._purge_step = step + 1
        self._replayed = {(line.step, frozenset(line.model_extra or ())) for line, _ in lines if line.step > step}

    def _tensorboard(self) -> "SummaryWriter":
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = _print_unless_disk_full  # of its thread, which raises its error here again
            self._writer = SummaryWriter(str(self.path / "tensorboard"), purge_step=self._purge_step, flush_secs=10)
        return self._writer

    def _start_trackers(self, modules: Sequence[Any], config: Config | None) -> None:
        values = config.model_dump(mode="json") if config is not None else None
        for module in modules:
            start_tracker(module, self.path, values)
            self._trackers.append(module)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def save_checkpoint(self, step: int, tensors: Tensors, state: Mapping[str, Any]) -> None:
        """Write checkpoints/step-000123, whole or not at all.

        tensors: group name to tensors by name, one safetensors file a group; sharded ones (DTensor), of which every
        process has a part to write, one a process.  state: anything JSON can hold.
        Raises UserError, with the checkpoints before it untouched, if the disk has not room enough.
        """
        checkpoints.save_checkpoint(self._checkpoints, step, tensors, state, is_main=self.is_main)

    def checkpoints(self) -> list[int]:
        """The steps that have a whole checkpoint, ascending."""
        return list(checkpoints.find_checkpoints(self._checkpoints))

    def latest_checkpoint(self) -> int | None:
        """The last step that has a whole checkpoint."""
        return max(self.checkpoints(), default=None)

    def check_step(self, step: int) -> None:
        """Raises UserError unless there is a whole checkpoint of `step`."""
        if step not in (found := self.checkpoints()):
            known = ", ".join(map(str, found)) or "none"
            raise UserError(f"{self.path}: no checkpoint of step {step}; there are: {known}")

    def load_checkpoint(self, step: int) -> Checkpoint:
        """What was saved at `step`.  Raises UserError if there is none, or it is damaged."""
        self.check_step(step)
        found = checkpoints.find_checkpoints(self._checkpoints)
        if step != self._checked:
            checkpoints.check_checkpoint(found, step)
        return checkpoints.load_checkpoint(found, step)

    def prune(self, last: int, keep: Collection[int] = ()) -> None:
        """Remove all checkpoints but the `last` newest (at least 1) and those of the steps in `keep`."""
        if last < 1:
            raise ValueError(f"last must be >= 1, got {last}")
        found = checkpoints.find_checkpoints(self._checkpoints)
        for step in set(list(found)[:-last]) - set(keep) if self.is_main else ():
            checkpoints.remove_checkpoint(found[step])

    @property
    def _checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def _check_newest_checkpoint(self) -> None:
        """Raises UserError if it is damaged."""
        if found := checkpoints.find_checkpoints(self._checkpoints):
            checkpoints.check_checkpoint(found, max(found))
            self._checked = max(found)


def set_aside_damaged_checkpoints(path: Path) -> dict[Path, str]:
    """Renames the damaged checkpoints of a run that are newer than its last whole one, from which it then resumes.

    Returns what is wrong with each, by its new path.  Raises UserError if the run is in use.
    """
    file = _acquire(path)
    try:
        checkpoints.mend_checkpoints(path / CHECKPOINTS)
        return checkpoints.set_aside_damaged(checkpoints.find_checkpoints(path / CHECKPOINTS))
    finally:
        os.close(file)


def choose_checkpoint(path: Path | None, resume_from: Literal["last", "last-good"]) -> None:
    """What `--resume-from` asks for, before a run is resumed: `last-good` sets damaged checkpoints aside, and says so.

    It also says where a run has no checkpoint and so begins again.
    """
    if resume_from == "last-good" and path is None:
        raise UserError("--resume-from last-good: says where a run is resumed; give the run by --resume")
    if path is None:
        return
    for damaged, reason in set_aside_damaged_checkpoints(path).items() if resume_from == "last-good" else ():
        print(f"set aside a damaged checkpoint ({reason}); {damaged} can be removed", file=sys.stderr)
    if not checkpoints.find_checkpoints(path / CHECKPOINTS):
        print(f"{path}: holds no checkpoint, so its training begins at the first update", file=sys.stderr)


def _print_unless_disk_full(thrown: threading.ExceptHookArgs) -> None:
    if thrown.exc_value is None or not is_disk_full(thrown.exc_value):
        threading.__excepthook__(thrown)


# --- refusals --------------------------------------------------------------------------------------------------------


def _refuse_used(path: Path) -> None:
    """A folder left by a process killed before it wrote its configuration counts as empty."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: a file, not a folder; choose another name")
    entries = {entry.name for entry in path.iterdir()} if path.exists() else set()
    if CONFIG in entries:
        raise UserError(f"{path}: holds a run already; go on with it by --resume or choose another name")
    if {name for name in entries if not name.endswith(".tmp")} - {LOCK, ENVIRONMENT}:
        raise UserError(f"{path}: not empty and not a run; choose another name")


def _acquire(path: Path) -> int:
    """An open file that holds the folder's lock; the system gives the lock back when the process ends, even killed."""
    with writing(path):
        file = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)  # the umask cuts it, as for every other file
    if not lock(file):
        owner = os.read(file, 32).decode(errors="replace").strip() or "unknown"
        os.close(file)
        raise UserError(f"{path}: in use by another process (pid {owner}); wait for it to end or choose another name")
    with contextlib.suppress(OSError):  # who holds it is for messages only
        os.truncate(file, 0)
        os.write(file, f"{os.getpid()}\n".encode())
    return file
