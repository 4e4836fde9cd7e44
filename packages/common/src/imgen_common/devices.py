"""Where models run, and how memory runs out there."""

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
