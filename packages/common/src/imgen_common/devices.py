"""Where models run: devices and their memory, and the processes that a launcher started."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from imgen_common.errors import UserError

if TYPE_CHECKING:
    import torch


def device_of(name: str) -> "torch.device":
    """`cpu`, `cuda`, `cuda:1`; `auto` is the first GPU, else the CPU.  Raises UserError for one that is not there."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r}: {str(error).splitlines()[0]}; give auto, cpu, cuda or cuda:N") from None
    return device


def dtype_of(name: str, device: "torch.device") -> "torch.dtype":
    """`float32`, `bfloat16`, `float16`; `auto` is bfloat16 on a GPU, float32 on a CPU."""
    import torch

    if name == "auto":
        name = "float32" if device.type == "cpu" else "bfloat16"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or a CPU."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def check_launcher(environment: Mapping[str, str], command: str, ours: Mapping[str, str]) -> None:
    """Raises UserError if accelerate launch started one process where several were asked for, or would shard weights.

    command: what was launched, such as "flowbp train".  ours: our settings that shard weights, under FSDP and
    DEEPSPEED.
    """
    # where accelerate sees no GPU it starts a single process without a word, and these variables give that away
    if "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment and "RANK" not in environment:
        raise UserError(
            "accelerate launch: several processes were asked for and one was started, as it does on a CPU; add "
            f"--multi_gpu, which works without a GPU too, or use torchrun --nproc_per_node N -m {command} ..."
        )
    for name, setting in ours.items():
        if environment.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true"):
            raise UserError(
                f"accelerate's own configuration asks for {name}; {command.partition(' ')[0]} shards weights itself: "
                f"launch with plain multi-GPU and --set {setting}"
            )


def any_process(flag: bool, device: "torch.device") -> bool:
    """Whether the flag is up on any process; all ask.  A signal may reach one before an update, another after it."""
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return flag
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags)
    return bool(flags.item() > 0)
