"""Tensors that several processes hold parts of, as a folder of safetensors files: each process writes its own parts.

Written and read by torch.distributed.checkpoint, whose headers of safetensors files say where each part belongs.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from imgen_common.errors import UserError, one_line

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader


def is_sharded(tensors: Mapping[str, "Tensor"]) -> bool:
    """Whether other processes hold parts of these tensors, so that all must take part in saving them."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


def on_main(work: Callable[[], None], is_main: bool, *, alone: bool = False) -> None:
    """Lets the main process do something while the others wait.  Where it fails, all raise; every process calls it.

    alone: whether the others do not wait, and do not call it.
    """
    from torch import distributed

    failure = None
    if is_main:
        try:
            work()
        except Exception as error:
            failure = error
    text = [None if failure is None else str(failure)]
    if not alone:
        distributed.broadcast_object_list(text)
    if failure is not None:
        raise failure
    if text[0] is not None:
        raise UserError(text[0])


def save_sharded(folder: Path, tensors: Mapping[str, "Tensor"]) -> None:
    """Writes this process's parts into a folder.  Where one process fails, all raise; every process calls it."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


class ShardedTensors(Mapping[str, "Tensor"]):
    """What `save_sharded` wrote, for any number of processes: whole tensors by name, all read when the first is asked
    for, or, by `read_into`, no more than the parts that a process holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def like(self) -> dict[str, "Tensor"]:
        """The tensors without their values, on the meta device.  Raises UserError if the files cannot be read."""
        import torch
        from safetensors import SafetensorError
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        try:
            found = self._reader().read_metadata().state_dict_metadata
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise UserError(f"{self.folder}: cannot be read: {one_line(str(error))}") from None
        kept = {name: part for name, part in found.items() if isinstance(part, TensorStorageMetadata)}
        return {name: torch.empty(m.size, dtype=m.properties.dtype, device="meta") for name, m in kept.items()}

    def read_into(self, tensors: Mapping[str, "Tensor"]) -> None:
        """Overwrites tensors, sharded or whole, of the names, shapes and types in `like`; of sharded ones, every
        process calls it."""
        from torch.distributed.checkpoint.state_dict_loader import load

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            load(dict(tensors), storage_reader=self._reader(), no_dist=not is_sharded(tensors))

    def _reader(self) -> "HuggingFaceStorageReader":
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

        return HuggingFaceStorageReader(str(self.folder))

    @cached_property
    def _whole(self) -> dict[str, "Tensor"]:
        import torch

        tensors = {name: torch.empty_like(tensor, device="cpu") for name, tensor in self.like.items()}
        self.read_into(tensors)
        return tensors

    def __getitem__(self, name: str) -> "Tensor":
        return self._whole[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.like)

    def __len__(self) -> int:
        return len(self.like)
