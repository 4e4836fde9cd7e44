"""Checkpoints: written whole or not at all, each with a manifest by which damage is found before a run resumes.

step-000123/   GROUP.safetensors  state.json  manifest.json (size and SHA-256 of every other file)
               GROUP/shard-*.safetensors  in place of GROUP.safetensors, of tensors that are sharded over processes
checkpoint-123/                   those of TRL, in place; their manifest, written last, says that they are complete
"""

import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from annotated_types import Ge
from pydantic import BaseModel, StringConstraints

from imgen_common.errors import DiskFullError, UserError, is_disk_full, quoted, system_error, warn_once
from imgen_common.files import free_bytes, read_json, sync, write_atomic
from imgen_common.run_folder.find import free_path
from imgen_common.run_folder.sharded import ShardedTensors, is_sharded, on_main, save_sharded

if TYPE_CHECKING:
    from torch import Tensor

Tensors = Mapping[str, Mapping[str, "Tensor"]]
MANIFEST, STATE, TRAINER_STATE = "manifest.json", "state.json", "trainer_state.json"
NAME = re.compile(r"(?:step|checkpoint)-([0-9]+)")
LEFT = re.compile(rf"\.(new|old|gone)-({NAME.pattern})(?:-[0-9]+)?")
"""What a killed process left, or what could not be removed."""
SPARE_BYTES = 16 * 2**20
LARGE = 2**33
"""Bytes that take longer to read than a user waits without a word."""


class Checkpoint(NamedTuple):
    """What `save_checkpoint` was given, read back (tensors on the CPU)."""

    step: int
    tensors: dict[str, Mapping[str, "Tensor"]]
    state: dict[str, Any]


class SavedFile(BaseModel):
    """What a manifest says of a file."""

    bytes: int
    sha256: str


class Manifest(BaseModel):
    """The files of a folder by their path in it."""

    files: dict[str, SavedFile]


class SavedState(BaseModel):
    """The content of `state.json`."""

    step: Annotated[int, Ge(0)]
    groups: list[Annotated[str, StringConstraints(pattern=r"^[\w-]+$")]]
    state: dict[str, Any]


# --- manifests -------------------------------------------------------------------------------------------------------


def write_manifest(folder: Path) -> None:
    """Records size and SHA-256 of all files of a folder, once they have reached the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    for path in files:
        sync(path)
    names = (path.relative_to(folder).as_posix() for path in files)
    content = Manifest(files=dict(zip(names, _measure(files), strict=True)))
    write_atomic(folder / MANIFEST, content.model_dump_json(indent=1) + "\n")


def find_damage(folder: Path) -> str | None:
    """Which file of a checkpoint is not as it was written, in words; None where all are.

    A checkpoint without a manifest, made by an earlier version, passes with a warning if it can be read.
    """
    if not (folder / MANIFEST).exists():
        return _find_unreadable(folder)
    try:
        files = read_json(folder / MANIFEST, Manifest).files
        if not files:
            return f"{MANIFEST} names no file"
        for name, saved in files.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (size := (folder / name).stat().st_size) != saved.bytes:
                return f"{name} has {size} bytes instead of {saved.bytes}"
        if (total := sum(saved.bytes for saved in files.values())) > LARGE:
            print(f"checking {folder} for damage: {total / 2**30:.0f} GiB", file=sys.stderr)
        found = _measure([folder / name for name in files])
    except UserError:
        return f"{MANIFEST} cannot be read"
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    changed = (name for name, now in zip(files, found, strict=True) if now != files[name])
    reason = next((f"the content of {name} has changed" for name in changed), None)
    return reason or _find_mismatch(folder, files)


def _find_mismatch(folder: Path, names: Collection[str]) -> str | None:
    """What the state of a checkpoint says that its folder, of whole files, is not: one that was copied or renamed."""
    if TRAINER_STATE in names:
        step = json.loads((folder / TRAINER_STATE).read_bytes())["global_step"]
        return None if folder.name.endswith(f"-{step}") else f"{TRAINER_STATE} is of step {step}"
    if not folder.name.startswith("step-"):
        return None
    try:
        saved = _read_state(folder)
    except UserError as error:
        return str(error).removeprefix(f"{folder}/")
    found = {name.partition("/")[0].removesuffix(".safetensors") for name in names}
    return next((f"{name} is not in {MANIFEST}" for name in (STATE, *saved.groups) if name not in found), None)


def _find_unreadable(folder: Path) -> str | None:
    if not any(folder.iterdir()):
        return "the folder is empty"
    if folder.name.startswith("step-"):
        try:
            _read(folder)
        except UserError as error:
            return str(error).removeprefix(f"{folder}/")
    warn_once(f"{folder}: has no {MANIFEST} (made by an earlier version, or copied in part), so not checked for damage")
    return None


def _measure(files: Iterable[Path]) -> list[SavedFile]:
    """Sizes and hashes; files are read several at once."""

    def measure(path: Path) -> SavedFile:
        with path.open("rb") as file:
            return SavedFile(
                bytes=os.fstat(file.fileno()).st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest()
            )

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(measure, files))


# --- which there are -------------------------------------------------------------------------------------------------


def find_checkpoints(folder: Path) -> dict[int, Path]:
    """The whole checkpoints of a folder by their step, ascending; `step-000002` goes before `step-2`."""
    entries = [entry for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []
    entries.sort(key=lambda entry: len(entry.name))
    found = {int(match[1]): entry for entry in entries if (match := NAME.fullmatch(entry.name))}
    return dict(sorted(found.items()))


def check_checkpoint(found: Mapping[int, Path], step: int) -> None:
    """Raises UserError if the checkpoint of a step is damaged; it names the newest whole one before it."""
    if (reason := find_damage(found[step])) is not None:
        raise damaged_error(found, step, reason)


def damaged_error(found: Mapping[int, Path], step: int, reason: str) -> UserError:
    """The error of a damaged checkpoint, with the way to go on."""
    whole = (other for other in sorted(found, reverse=True) if other < step and find_damage(found[other]) is None)
    before = next(whole, None)
    offer = "no earlier one is whole: it starts again" if before is None else f"that of step {before} is whole: go on"
    how = f"--resume {quoted(found[step].parents[1])} --resume-from last-good"
    how += f", or export it with --step {before}" if before is not None else ""
    return UserError(f"{found[step]}: damaged checkpoint ({reason}); {offer} with {how}")


def set_aside_damaged(found: Mapping[int, Path]) -> dict[Path, str]:
    """Renames damaged checkpoints, from the newest down to the first whole one, to `damaged-step-000123`.

    Returns what is wrong with each, by its new path.
    """
    damaged: dict[Path, str] = {}
    for _, path in sorted(found.items(), reverse=True):
        if (reason := find_damage(path)) is None:
            break
        damaged[path.rename(free_path(path.parent, None, f"damaged-{path.name}"))] = reason
    return damaged


def remove_checkpoint(folder: Path) -> None:
    """Renamed before it is removed, so that a kill leaves no torn checkpoint."""
    _remove(folder.rename(free_path(folder.parent, None, f".gone-{folder.name}")))


def _remove(hidden: Path) -> None:
    """NFS keeps the files that another process has open: what is left is removed by a later `mend_checkpoints`."""
    hidden.unlink() if hidden.is_symlink() else shutil.rmtree(hidden, ignore_errors=True)
    if hidden.exists():
        warn_once(f"{hidden}: cannot be removed now, as if another process had a file of it open; a resume tries again")


def mend_checkpoints(folder: Path) -> None:
    """Finishes or undoes what a killed process left; what has another name is left alone."""
    for entry in sorted(folder.glob(".*-*")):
        match = LEFT.fullmatch(entry.name)
        if match and match[1] == "old" and not (folder / match[2]).exists():
            entry.rename(folder / match[2])
        elif match:
            _remove(entry)
    for entry in find_checkpoints(folder).values():
        # earlier versions marked complete checkpoints of TRL by an empty file `whole`
        is_whole = (entry / MANIFEST).exists() or (entry / "whole").exists()
        if entry.name.startswith("checkpoint-") and not is_whole:
            remove_checkpoint(entry)


# --- those of tensors ------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path, step: int, tensors: Tensors, state: Mapping[str, Any], *, is_main: bool = True
) -> None:
    """Writes folder/step-000123, whole or not at all.

    is_main: whether this process writes; of tensors that are sharded every process calls it, and writes its parts.
    Raises DiskFullError, with the checkpoints before it untouched, if the disk has not room enough.
    """
    sharded = any(map(is_sharded, tensors.values()))
    if not is_main and not sharded:
        return
    content = json.dumps({"step": step, "groups": sorted(tensors), "state": state})
    needed = len(content) + sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
    fresh = folder / f".new-step-{step:06d}"

    def begin() -> None:
        folder.mkdir(exist_ok=True)
        _refuse_full_disk(folder, needed)
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()

    def finish() -> None:
        write_atomic(fresh / STATE, content)
        write_manifest(fresh)
        _move_into_place(fresh, folder, step)

    try:
        on_main(begin, is_main, alone=not sharded)
        for name, group in tensors.items():
            if sharded:
                save_sharded(fresh / name, group)
            else:
                _save_group(fresh / f"{name}.safetensors", group)
        on_main(finish, is_main, alone=not sharded)
    except Exception as error:
        if is_main:
            shutil.rmtree(fresh, ignore_errors=True)
        if isinstance(error, DiskFullError) or is_disk_full(error):
            _refuse_full_disk(folder, needed, surely=True)
        raise


def _move_into_place(fresh: Path, folder: Path, step: int) -> None:
    """What is there is set aside first; `mend_checkpoints` finishes this after a kill."""
    final, aside = folder / f"step-{step:06d}", folder / f".old-step-{step:06d}"
    if final.exists():
        final.rename(aside)
    fresh.rename(final)
    sync(folder)
    shutil.rmtree(aside, ignore_errors=True)


def load_checkpoint(found: Mapping[int, Path], step: int) -> Checkpoint:
    """What was saved at `step`, of which `check_checkpoint` found no damage.  Raises UserError if it cannot be read."""
    try:
        return _read(found[step])
    except UserError as error:
        raise damaged_error(found, step, str(error).removeprefix(f"{found[step]}/")) from None


def _read_state(folder: Path) -> SavedState:
    saved = read_json(folder / STATE, SavedState)
    if folder.name != f"step-{saved.step:06d}":
        raise UserError(f"{STATE} is of step {saved.step}")
    return saved


def _read(folder: Path) -> Checkpoint:
    from safetensors import SafetensorError

    saved = _read_state(folder)
    try:
        tensors = {name: _read_group(folder / name) for name in saved.groups}
    except (OSError, SafetensorError) as error:
        raise UserError(str(error)) from None
    return Checkpoint(saved.step, tensors, saved.state)


def _read_group(path: Path) -> Mapping[str, "Tensor"]:
    from safetensors.torch import load_file

    if path.is_dir():
        return ShardedTensors(path)
    return load_file(path.with_name(f"{path.name}.safetensors"))


def check_tensors(what: str, found: Mapping[str, "Tensor"], expected: Mapping[str, "Tensor"]) -> None:
    """Raises UserError unless the names, shapes and data types are those that are expected."""
    for name in (*expected, *found):
        if name not in found or name not in expected:
            state = "missing" if name not in found else "not of this model"
            raise UserError(f"{what}: {name} is {state}; use a checkpoint that this configuration made")
        ours, theirs = (f"{tuple(side[name].shape)} {side[name].dtype}" for side in (found, expected))
        if ours != theirs:
            raise UserError(
                f"{what}: {name} is {ours} instead of {theirs}; use a checkpoint that this configuration made"
            )


def _refuse_full_disk(folder: Path, needed: int, surely: bool = False) -> None:
    free, reason = free_bytes(folder), ""
    if free < needed + SPARE_BYTES:
        reason = f", {free} free"
    elif surely and math.isfinite(free):
        reason = f", {free} free, so it is your share of the disk that is full (quota, or inodes: df -i)"
    if surely or reason:
        raise DiskFullError(
            f"{folder}: no room for a checkpoint: {needed} bytes (and {SPARE_BYTES} to spare) needed{reason}; "
            "earlier ones are untouched"
        )


def _save_group(path: Path, group: Mapping[str, "Tensor"]) -> None:
    """One safetensors file; tensors that share memory (tied weights, views) are stored each in full."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in group.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        plain[name] = value.clone() if storage in seen else value
        seen.add(storage)
    try:
        save_file(plain, path)
    except SafetensorError as error:
        raise (system_error(error, path) or error) from None
