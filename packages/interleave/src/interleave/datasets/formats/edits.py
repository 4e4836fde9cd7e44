"""Edits that stories asked for, as rows of prompts with source images: what flowbp trains on as `data.prompts`."""

from collections.abc import Iterator
from pathlib import Path

from imgen_common.errors import UserError
from imgen_common.files import atomic_folder, write_atomic
from interleave.datasets.files import copy_image, to_json
from interleave.records import Attempt
from interleave.storage.images import IMAGES, ImageStore
from interleave.storage.trace import TRACE, read_trace

FILE = "edits.jsonl"


def export_edits(run: Path, out: Path) -> int:
    """Writes OUT/edits.jsonl and the images beside it; returns the number of rows.

    run: the folder of a run or of a built set.  A row, {"prompt", "images": [paths], "trajectory_id", "step"}, is a
    step of a plan whose image is an edit, with the images that its first attempt was given; equal ones are written
    once.  Raises UserError without such steps, or if `out` exists.
    """
    if not (run / TRACE).is_file():
        raise UserError(f"{run}: no {TRACE} in it; give the folder of a run, or of a set that `data build` made")
    images, count = ImageStore(run / IMAGES), 0
    with atomic_folder(out) as fresh:
        lines = []
        for attempt in _edits(run):
            paths = [copy_image(fresh / FILE, f"{IMAGES}/{one}.png", one, images) for one in attempt.source_ids]
            row = {"prompt": attempt.original_prompt, "images": paths}
            lines.append(to_json(row | {"trajectory_id": attempt.trajectory_id, "step": attempt.step}))
        if not (count := len(lines)):
            raise UserError(f"{run}: no step of its plans is an edit, so there is nothing to train on")
        write_atomic(fresh / FILE, "".join(lines))
    return count


def _edits(run: Path) -> Iterator[Attempt]:
    """The first attempt of every edit, without those whose prompt and sources another has."""
    seen = set()
    for entry in read_trace(run).values():
        for _, attempt in sorted(entry.attempts.items()):
            key = (attempt.original_prompt, attempt.source_ids)
            if attempt.attempt == 1 and attempt.source_ids and key not in seen:
                seen.add(key)
                yield attempt
