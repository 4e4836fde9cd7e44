"""Checkpoints on disk."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from imgen_common.errors import UserError
from imgen_common.files import sync

if TYPE_CHECKING:
    from torch import Tensor


Tensors = Mapping[str, Mapping[str, "Tensor"]]
STEP = re.compile(r"step-(\d+)")
SPARE_BYTES = 16 * 2**20


class Checkpoint(NamedTuple):
    """What `RunFolder.save_checkpoint` was given, read back (tensors on the CPU)."""

    step: int
    tensors: dict[str, dict[str, "Tensor"]]
    state: dict[str, Any]


def refuse_full_disk(folder: Path, needed: int, surely: bool = False) -> None:
    free = shutil.disk_usage(folder).free
    if surely or free < needed + SPARE_BYTES:
        raise UserError(
            f"{folder}: no room for a checkpoint: {needed} bytes (and {SPARE_BYTES} to spare) needed, {free} free; "
            "make room and go on with --resume; earlier checkpoints are untouched"
        )


def save_group(path: Path, group: Mapping[str, "Tensor"]) -> None:
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


def step_name(step: int) -> str:
    return f"step-{step:06d}"
