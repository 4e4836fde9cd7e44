"""What of a run folder can be removed without losing what the run found or where it can go on."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from imgen_common.errors import UserError
from imgen_common.run_folder.checkpoints import TRAINER_STATE, remove_checkpoint
from imgen_common.run_folder.folder import RunFolder
from imgen_common.run_folder.listing import (
    is_in_use,
    last_healthy_update,
    read_alerts,
    summarize_run,
    whole_checkpoints,
)


@dataclass(frozen=True)
class Removable:
    """Something that can be removed: a checkpoint (a folder) or files, its bytes, and what it is in words."""

    path: Path
    files: tuple[Path, ...]
    size: int
    what: str
    is_checkpoint: bool


def find_removable(path: Path, images: bool) -> list[Removable]:
    """The checkpoints of a run before its last one and, with `images`, the images of a finished run.

    Never the last checkpoint, the last one before the first alert of a watchdog, that which a training of TRL will load
    at its end as its best, scores, records, metrics or exported models; never images that a training set names.
    Raises UserError if the run is in use or, with `images`, not finished.
    """
    if is_in_use(path):
        raise UserError(f"{path}: in use by another process; wait for it to end, or leave it out")
    checkpoints, is_ended = whole_checkpoints(path), (path / "model").is_dir()
    best = "" if is_ended else next(map(_best_of, reversed(checkpoints.values())), "")
    healthy = last_healthy_update(path) if any(read_alerts(path).values()) else None
    older = list(checkpoints.items())[:-1]
    older = [(step, folder) for step, folder in older if step != healthy and folder.name != best]
    found = [_removable(folder, f"checkpoint of update {step}", True) for step, folder in older]
    if images:
        run = summarize_run(path)
        if run.state != "finished":
            raise UserError(f"{path}: {run.progress}, and --images is for finished runs; leave it out")
        if run.kind == "data build":
            raise UserError(f"{path}: its sets name its images; leave --images out")
        found += [one for one in _images(path, run.kind) if one.files]
    return found


def remove(path: Path, images: bool) -> int:
    """Removes what `find_removable` finds, holding the lock of the run; the bytes that were freed.

    Raises UserError as `find_removable` does, and if the last checkpoint is damaged, so that an earlier one is needed.
    """
    found = find_removable(path, images)
    with RunFolder.open(path):
        for one in found:
            if one.is_checkpoint:
                remove_checkpoint(one.path)
                continue
            for file in one.files:
                file.unlink(missing_ok=True)
    return sum(one.size for one in found)


def _best_of(checkpoint: Path) -> str:
    """The name of the best checkpoint so far, as one of TRL knows it; "" of others."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE).read_bytes())
        return Path(state["best_model_checkpoint"]).name
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _images(path: Path, kind: str) -> Iterator[Removable]:
    if kind == "train":
        yield _removable(path / "samples", "logged images")
        yield _removable(path / "evaluations", "images of evaluations")
    elif kind in ("run", "batch"):
        yield _removable(path / "images", "images of the stories")


def _removable(path: Path, what: str, is_checkpoint: bool = False) -> Removable:
    files = tuple(file for file in sorted(path.rglob("*" if is_checkpoint else "*.png")) if file.is_file())
    return Removable(path, files, sum(file.stat().st_size for file in files), what, is_checkpoint)
