"""Where models run: devices, their memory and speed, and the processes that a launcher started."""

import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from imgen_common.errors import UserError, nearest, warn_once

if TYPE_CHECKING:
    import torch


PEAK_TFLOPS = {
    **{"RTX 3090": 71, "RTX 3090 Ti": 80, "RTX 4080": 97.5, "RTX 4090": 165, "RTX 5080": 113, "RTX 5090": 210},
    **{"RTX A6000": 155, "RTX 6000 Ada": 364, "A10": 125, "A30": 165, "A40": 150, "A100": 312},
    **{"L4": 121, "L20": 119.5, "L40": 181, "L40S": 362, "H20": 148, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989},
    **{
        "H800 PCIe": 756,
        "H800": 989,
        "H200": 989,
        "GH200": 989,
        "B200": 2250,
        "MI250X": 191.5,
        "MI300X": 1307,
        "MI325X": 1307,
    },
}
"""Dense bfloat16 matrix products with float32 sums, without sparsity, in TFLOP/s, of one device of torch: an MI250X is
two of them.  The figures are those of the makers' data sheets and architecture whitepapers; those of RTX 3090 Ti,
RTX 6000 Ada, L4 and H800 PCIe were found in tables of other projects only."""
VARIANTS = {"laptop", "mobile", "super", "max", "q", "d", "ti", "nvl", "mig"}
"""Words that make a name another card."""


def find_card(name: str) -> str | None:
    """The card of `PEAK_TFLOPS` that a name such as `NVIDIA H100 80GB HBM3` or `rtx4090` means; None for another one,
    and for variants of a known one, such as a laptop's."""
    words = set(re.findall("[a-z0-9]+", re.sub(r"rtx(?=[0-9])", "rtx ", name.lower())))
    parts = {card: set(card.lower().split()) for card in PEAK_TFLOPS}
    fitting = [card for card, known in parts.items() if known - {"rtx"} <= words and not words & VARIANTS - known]
    return max(fitting, key=lambda card: len(parts[card]), default=None)


def known_card(name: str) -> str:
    """As `find_card`.  Raises UserError where it is None."""
    if (card := find_card(name)) is None:
        known = ", ".join(PEAK_TFLOPS)
        raise UserError(f"--gpu {name}: not known{nearest(name, PEAK_TFLOPS)}; give --tflops, or one of {known}")
    return card


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


@contextmanager
def float32_matmul_precision(name: str) -> Iterator[None]:
    """Within it torch multiplies float32 matrices with this precision: `highest`, `high`, `medium`."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def autocast_weights_once() -> Iterator[None]:
    """Within it autocast casts a trained weight at its first use and keeps the copy for later contexts of autocast too,
    which would each make their own.  Weights must not change in it."""
    import torch

    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or a CPU."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""By which MPI says how many processes there are: accelerate and DeepSpeed read them in the place of WORLD_SIZE."""


class LaunchedProcess(NamedTuple):
    """This process among those that a launcher started."""

    rank: int
    size: int


def launched_process(environment: Mapping[str, str]) -> LaunchedProcess:
    """Which process this is, as torchrun, accelerate launch and MPI say it; the only one where none of them is used.

    Raises UserError for variables that no launcher sets like this, such as those left over from another launch: the
    process would wait for others, or print nothing since it took itself for one of them.
    """
    given = {name: environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if environment.get(name)}
    values = {name: int(text) if text.isdecimal() else -1 for name, text in given.items()}
    rank, size = values.get("RANK", 0), values.get("WORLD_SIZE", 1)
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", *(("LOCAL_RANK",) if size > 1 else ()))
    missing = [name for name in needed if not environment.get(name)]
    sizes = {name: environment[name] for name in MPI_SIZES if environment.get(name, "1") not in ("", "0", "1")}
    # accelerate takes any LOCAL_RANK for a launcher, and on GPUs each process without it for the only one
    if (missing and (sizes or "LOCAL_RANK" in given or (rank, size) != (0, 1))) or not 0 <= rank < size:
        given |= sizes
        said = ", ".join(f"{name}={text}" for name, text in given.items())
        lacking = f", but not {', '.join(missing)}" if missing else ""
        raise UserError(
            f"the environment has {said}{lacking}, as {'mpirun' if sizes else 'no launcher'} sets them; for one "
            f"process: unset {' '.join(given)}; for several: start them with torchrun or accelerate launch"
        )
    return LaunchedProcess(rank, size)


def _is_of_this_machine(host: str) -> bool:
    for family, kind, protocol, _, address in _addresses(host):
        with socket.socket(family, kind, protocol) as own, suppress(OSError):
            own.bind((address[0], 0))
            return True
    return False


def _addresses(host: str) -> list[Any]:
    try:
        return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []


def announce_process() -> LaunchedProcess:
    """Which process this is.  Where no torchrun shows that there are others, one that prints nothing says so.

    Raises UserError as `launched_process`, and where the only process would wait at another machine's address for
    itself, which torch does for many minutes and no signal ends; it does so where LOCAL_RANK is set.
    """
    process, host = launched_process(os.environ), os.environ.get("MASTER_ADDR")
    names = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name in os.environ]
    is_joined = process.size == 1 and "LOCAL_RANK" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    if is_joined and host and not _is_of_this_machine(host):
        raise UserError(f"MASTER_ADDR={host} is not this machine, and WORLD_SIZE is 1: unset {' '.join(names)}")
    if process.rank > 0 and "TORCHELASTIC_RUN_ID" not in os.environ:
        print(
            f"process {process.rank} of {process.size}, as RANK and WORLD_SIZE in the environment say: process 0 "
            "prints what all do; unset them to run alone",
            file=sys.stderr,
        )
    return process


def check_launcher(environment: Mapping[str, str], command: str, ours: Mapping[str, str]) -> None:
    """Raises UserError if accelerate launch started one process where several were asked for, or would shard weights or
    compute in 8 bits.

    command: what was launched, such as "flowbp train".  ours: our settings that shard weights, under FSDP and
    DEEPSPEED.
    """
    launched_process(environment)
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "")
    is_first = environment.get("SLURM_PROCID", "0") == "0"
    if tasks.isdecimal() and int(tasks) > 1 and is_first and "RANK" not in environment:
        warn_once(
            f"srun started {tasks} processes that do not know of each other, so that each trains alone; for one "
            f"training on all of them let srun start torchrun -m {command} ... (docs/scale.md)"
        )
    # where accelerate sees no GPU it starts a single process without a word, and these variables give that away
    is_alone = "ACCELERATE_MIXED_PRECISION" in environment and "RANK" not in environment
    if is_alone and environment.get("MASTER_ADDR") == "127.0.0.1":  # another one is of whoever called accelerate
        raise UserError(
            "accelerate launch: several processes were asked for and one was started, as it does on a CPU; add "
            f"--multi_gpu, which works without a GPU too, or use torchrun --nproc_per_node N -m {command} ..."
        )
    program = command.partition(" ")[0]
    if environment.get("ACCELERATE_MIXED_PRECISION") == "fp8":
        raise UserError(
            f"accelerate's own configuration asks for mixed_precision fp8; {program} sets its precision itself: launch "
            "with --mixed_precision no"
        )
    for name in (*ours, "MEGATRON_LM"):
        if environment.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true"):
            setting = f" and --set {ours[name]}" if name in ours else ""
            raise UserError(
                f"accelerate's own configuration asks for {name}; {program} shards weights itself: launch with plain "
                f"multi-GPU{setting}"
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
