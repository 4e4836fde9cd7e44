"""Run folders: what was asked, on what it ran, what it measured, and checkpoints that survive a kill at any instant.

    config.yaml        the resolved configuration        environment.json   versions, device, git revision, command
    metrics.jsonl      one JSON object a line            tensorboard/       the same numbers and the images
    samples/           images that were logged           checkpoints/step-000123/{GROUP.safetensors, state.json}

Only the main process writes; on every other process the writing methods do nothing, so that the caller's loop is the
same everywhere.  A lock, released by the system when its process ends, keeps a second writer out.
"""

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from imgen_common.config import Config, load, read_yaml, to_yaml
from imgen_common.errors import UserError
from imgen_common.files import is_disk_full, lock, sync, write_atomic, writing
from imgen_common.run_folder.environment import environment
from imgen_common.run_folder.find import CONFIG, ENVIRONMENT, LOCK, METRICS
from imgen_common.run_folder.trackers import Tracker, start_tracker, tracker_module

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor
    from torch.utils.tensorboard import SummaryWriter

C = TypeVar("C", bound=Config)
Tensors = Mapping[str, Mapping[str, "Tensor"]]
STEP = re.compile(r"step-(\d+)")
SPARE_BYTES = 16 * 2**20


class Checkpoint(NamedTuple):
    """What `RunFolder.save_checkpoint` was given, read back (tensors on the CPU)."""

    step: int
    tensors: dict[str, dict[str, "Tensor"]]
    state: dict[str, Any]


class RunFolder:
    """One run on disk.  Made by `create` or `open`; close it, or use it in a `with` statement."""

    def __init__(self, path: Path, is_main: bool, lock: int | None = None) -> None:
        self.path, self.is_main, self._lock = path, is_main, lock
        self._purge_step: int | None = None
        self._writer: SummaryWriter | None = None
        self._trackers: list[Any] = []

    @classmethod
    def create(
        cls, path: Path, config: Config, command: Sequence[str], *, trackers: Sequence[Tracker] = ()
    ) -> "RunFolder":
        """Start a run in a new or empty folder.

        command: the command line, recorded as given.  trackers: where else numbers go ("wandb", "trackio").
        Raises UserError if the folder holds anything, is in use, or a tracker is not installed.
        """
        _refuse_used(path)
        modules = [tracker_module(name) for name in trackers]
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
        run = cls(path, is_main=True, lock=_acquire(path))
        try:
            _refuse_used(path)
            run._record_environment(command)
            write_atomic(path / CONFIG, to_yaml(config))
            run._start_trackers(modules, config)
        except BaseException:
            run.close()
            raise
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

        config: what this process is asked to do; it must equal the recorded one, except under the dotted keys in
        `may_differ`.  command: recorded with the environment of this process; the earlier ones are kept beside it.
        Raises UserError if there is no run, it is in use, or its configuration is another.
        """
        if not (path / CONFIG).is_file():
            raise UserError(f"{path}: not a run folder (no {CONFIG} in it); give the folder of an earlier run")
        if config is not None:
            _refuse_other_config(path, config, may_differ)
        if not is_main:
            return cls(path, is_main=False)
        modules = [tracker_module(name) for name in trackers]
        run = cls(path, is_main=True, lock=_acquire(path))
        try:
            run._mend_checkpoints()
            if command is not None:
                run._record_environment(command)
            run._start_trackers(modules, config)
        except BaseException:
            run.close()
            raise
        return run

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Flush everything and give the lock back."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        for tracker in self._trackers:
            tracker.finish()
        self._trackers = []
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def config(self, cls: type[C]) -> C:
        """The recorded configuration as a value of class `cls`.  Raises UserError if it is of another version."""
        return load(cls, [self.path / CONFIG])

    def _record_environment(self, command: Sequence[str]) -> None:
        file = self.path / ENVIRONMENT
        earlier: list[Any] = []
        if (self.path / CONFIG).exists() and file.exists():
            before = json.loads(file.read_text(encoding="utf-8"))
            earlier = [*before.pop("earlier", []), before]
        write_atomic(file, json.dumps(environment(command) | {"earlier": earlier}, indent=2) + "\n")

    # --- metrics -----------------------------------------------------------------------------------------------------

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line {"step": step, ...} and pass it on; what is not finite is recorded as null."""
        if not self.is_main:
            return
        values = {name: float(value) for name, value in metrics.items()}
        line = {"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()}
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        writer = self._tensorboard()
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        for tracker in self._trackers:
            tracker.log(values, step=step)

    def log_image(self, step: int, name: str, image: "Image.Image") -> None:
        """Keep an image as samples/NAME-000123.png and show it in TensorBoard."""
        if not self.is_main:
            return
        import numpy as np

        folder = self.path / "samples"
        folder.mkdir(exist_ok=True)
        image.save(folder / f"{name}-{step:06d}.png")
        self._tensorboard().add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl in order; a line torn by a kill is left out."""
        return [line for line, _ in self._metric_lines()]

    def rewind(self, step: int) -> None:
        """Forget, all or nothing, the metrics after `step`: call it with the step a run resumes from."""
        if not self.is_main:
            return
        kept = [text for line, text in self._metric_lines() if line["step"] <= step]
        write_atomic(self.path / METRICS, "".join(kept))
        self._purge_step = step + 1

    def _metric_lines(self) -> Iterator[tuple[dict[str, Any], str]]:
        file = self.path / METRICS
        if not file.exists():
            return
        for text in file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict) and "step" in line and text.endswith("\n"):
                    yield line, text

    def _tensorboard(self) -> "SummaryWriter":
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

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

        tensors: group name to tensors by name, one safetensors file a group.  state: anything JSON can hold.
        Raises UserError, with the checkpoints before it untouched, if the disk has not room enough.
        """
        if not self.is_main:
            return
        folder = self.path / "checkpoints"
        folder.mkdir(exist_ok=True)
        text = json.dumps({"step": step, "groups": sorted(tensors), "state": state})
        needed = len(text) + sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
        _refuse_full_disk(folder, needed)
        fresh = folder / f".new-step-{step:06d}"
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            fresh.mkdir()
            for name, group in tensors.items():
                _save_group(fresh / f"{name}.safetensors", group)
            write_atomic(fresh / "state.json", text)
        except Exception as error:
            shutil.rmtree(fresh, ignore_errors=True)
            if is_disk_full(error):
                _refuse_full_disk(folder, needed, surely=True)
            raise
        # what is there is set aside first; `_mend_checkpoints` finishes this after a kill
        final, aside = folder / f"step-{step:06d}", folder / f".old-step-{step:06d}"
        if final.exists():
            final.rename(aside)
        fresh.rename(final)
        sync(folder)
        shutil.rmtree(aside, ignore_errors=True)

    def checkpoints(self) -> list[int]:
        """The steps that have a whole checkpoint, ascending."""
        folder = self.path / "checkpoints"
        names = [STEP.fullmatch(entry.name) for entry in folder.iterdir()] if folder.is_dir() else []
        return sorted(int(match[1]) for match in names if match)

    def latest_checkpoint(self) -> int | None:
        """The last step that has a whole checkpoint."""
        return max(self.checkpoints(), default=None)

    def load_checkpoint(self, step: int) -> Checkpoint:
        """What was saved at `step`.  Raises UserError if there is none, or it is damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if step not in self.checkpoints():
            known = ", ".join(map(str, self.checkpoints())) or "none"
            raise UserError(f"{self.path}: no checkpoint of step {step}; there are: {known}")
        folder = self.path / "checkpoints" / f"step-{step:06d}"
        try:
            saved = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            tensors = {name: load_file(folder / f"{name}.safetensors") for name in saved["groups"]}
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise UserError(f"{folder}: damaged checkpoint ({error}); remove it and resume from an older one") from None
        return Checkpoint(saved["step"], tensors, saved["state"])

    def prune(self, last: int, keep: Collection[int] = ()) -> None:
        """Remove all checkpoints but the `last` newest (at least 1) and those of the steps in `keep`."""
        if last < 1:
            raise ValueError(f"last must be >= 1, got {last}")
        if not self.is_main:
            return
        for step in set(self.checkpoints()[:-last]) - set(keep):
            # renamed before it is removed, so that a kill leaves no torn checkpoint
            folder = self.path / "checkpoints" / f"step-{step:06d}"
            gone = folder.rename(folder.with_name(f".gone-{folder.name}"))
            shutil.rmtree(gone)

    def _mend_checkpoints(self) -> None:
        """Finish or undo what a killed process left."""
        folder = self.path / "checkpoints"
        for entry in sorted(folder.glob(".*-step-*")):
            final = folder / entry.name.partition("-")[2]
            if entry.name.startswith(".old-") and not final.exists():
                entry.rename(final)
            else:
                shutil.rmtree(entry)


# --- refusals --------------------------------------------------------------------------------------------------------


def _refuse_full_disk(folder: Path, needed: int, surely: bool = False) -> None:
    free = shutil.disk_usage(folder).free
    if surely or free < needed + SPARE_BYTES:
        raise UserError(
            f"{folder}: no room for a checkpoint: {needed} bytes (and {SPARE_BYTES} to spare) needed, {free} free; "
            "make room and go on with --resume; earlier checkpoints are untouched"
        )


def _save_group(path: Path, group: Mapping[str, "Tensor"]) -> None:
    """One safetensors file; tensors that share memory (tied weights, views) are stored each in full."""
    from safetensors.torch import save_file

    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in group.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        plain[name] = value.clone() if storage in seen else value
        seen.add(storage)
    save_file(plain, path)
    sync(path)


def _refuse_used(path: Path) -> None:
    """A folder left by a process killed before it wrote its configuration counts as empty."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: a file, not a folder; choose another name")
    entries = {entry.name for entry in path.iterdir()} if path.exists() else set()
    if CONFIG in entries:
        raise UserError(f"{path}: holds a run already; go on with it by --resume or choose another name")
    if {name for name in entries if not name.endswith(".tmp")} - {LOCK, ENVIRONMENT}:
        raise UserError(f"{path}: not empty and not a run; choose another name")


def _refuse_other_config(path: Path, config: Config, may_differ: Collection[str]) -> None:
    old, new = _leaves(read_yaml(path / CONFIG)), _leaves(config.model_dump(mode="json"))
    for key in [*new, *(key for key in old if key not in new)]:
        allowed = any(key == free or key.startswith(f"{free}.") for free in may_differ)
        if not allowed and old.get(key) != new.get(key):
            was, now = (json.dumps(side.get(key)) for side in (old, new))
            raise UserError(
                f"{path}: the run has {key} = {was}, now {now} was given; "
                f"resume with the configuration of the run or choose another name"
            )


def _leaves(node: object, prefix: str = "") -> dict[str, Any]:
    """Nested data as dotted keys."""
    items: Sequence[tuple[object, object]] = ()
    if isinstance(node, dict):
        items = list(node.items())
    elif isinstance(node, list | tuple):
        items = list(enumerate(node))
    if not items:
        return {prefix: node}
    return {
        key: value
        for name, child in items
        for key, value in _leaves(child, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _acquire(path: Path) -> int:
    """An open file that holds the folder's lock; the system gives the lock back when the process ends, even killed."""
    with writing(path):
        file = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    if not lock(file):
        owner = os.read(file, 32).decode(errors="replace").strip() or "unknown"
        os.close(file)
        raise UserError(f"{path}: in use by another process (pid {owner}); wait for it to end or choose another name")
    os.truncate(file, 0)
    os.write(file, f"{os.getpid()}\n".encode())
    return file
