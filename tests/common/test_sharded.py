"""Checkpoints of tensors that two processes hold parts of: each writes its own, any number of processes read them."""

import errno
import os
from pathlib import Path

import pytest
import torch
from forking import forked
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from imgen_common.errors import UserError
from imgen_common.run_folder.checkpoints import find_checkpoints, find_damage, load_checkpoint, save_checkpoint
from imgen_common.run_folder.sharded import ShardedTensors


def whole_tensors() -> dict[str, Tensor]:
    """Tensors of shapes that two processes cannot all share evenly, one that both hold, two precisions."""
    made = torch.Generator().manual_seed(0)
    tensors = {str(rows): torch.randn(rows, 3, generator=made) for rows in (1, 2, 5)}
    return tensors | {"half": torch.randn(4, generator=made).bfloat16(), "name/step": torch.tensor(7.0)}


def worker(folder: Path) -> None:
    distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    whole = whole_tensors()
    tensors = {name: distribute_tensor(t, mesh, [Shard(0)]) if t.dim() else t for name, t in whole.items()}
    is_main = distributed.get_rank() == 0
    save_checkpoint(folder, 1, {"weights": tensors}, {"note": "kept"}, is_main=is_main)
    distributed.barrier()

    read = {name: torch.zeros_like(t) for name, t in tensors.items()}
    saved = load_checkpoint(find_checkpoints(folder), 1).tensors["weights"]
    assert isinstance(saved, ShardedTensors)
    saved.read_into(read)
    for name, t in read.items():
        assert torch.equal(t.full_tensor() if hasattr(t, "full_tensor") else t, whole[name])

    # the disk of one process is full: no process goes on, and nothing torn is left
    if not is_main:
        os.fsync = refuse
    with pytest.raises((OSError, UserError), match=r"No space left|no room for a checkpoint"):
        save_checkpoint(folder, 2, {"weights": tensors}, {}, is_main=is_main)
    distributed.barrier()
    assert [path.name for path in folder.iterdir()] == ["step-000001"]
    distributed.destroy_process_group()


def refuse(file: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.slow
def test_each_process_writes_its_parts_and_one_process_reads_them_all(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    forked(2, worker, folder, log=tmp_path / "log")
    found = find_checkpoints(folder)
    assert find_damage(found[1]) is None
    checkpoint = load_checkpoint(found, 1)
    whole = whole_tensors()
    assert checkpoint.state == {"note": "kept"}
    assert dict(checkpoint.tensors["weights"]).keys() == whole.keys()
    assert all(torch.equal(t, whole[name]) for name, t in checkpoint.tensors["weights"].items())

    # each process wrote its part alone
    parts = sorted((found[1] / "weights").iterdir())
    assert len(parts) == 2
    assert sum(part.stat().st_size for part in parts) < 2 * sum(t.nbytes for t in whole.values()) + 4000

    # a part that is gone, or shorter, is damage
    content = parts[1].read_bytes()
    parts[1].write_bytes(content[:-1])
    assert find_damage(found[1]) == f"weights/{parts[1].name} has {len(content) - 1} bytes instead of {len(content)}"
    parts[1].unlink()
    assert find_damage(found[1]) == f"weights/{parts[1].name} is missing"
