"""Trainings in processes of their own, as a user launches them."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import forking
import patched
import yaml

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0", "--num_processes")


def launched(
    processes: int,
    *arguments: str,
    launcher: Sequence[str] = TORCHRUN,
) -> None:
    """`torchrun ... -m interleave ARGUMENTS`, or by another launcher, which must succeed."""
    call = [sys.executable, "-m", *launcher, str(processes), "-m", "interleave", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


CONFIGS = Path(__file__).parents[2] / "configs" / "interleave"
SHARDS: Mapping[str, Mapping[str, Any]] = {
    **{f"zero{stage}": {"deepspeed": str(CONFIGS / "deepspeed" / f"zero{stage}.json")} for stage in (2, 3)},
    "fsdp2": yaml.safe_load((CONFIGS / "fsdp" / "fsdp2.yaml").read_text(encoding="utf-8"))["trl"],
}
"""Ways to share out weights, as options of TRL."""


def forked(processes: int, *arguments: str, log: Path, shard: str | None = None, replay: int = 0) -> None:
    """`interleave ARGUMENTS` in processes that know of each other as from a launcher (`forking`); they must succeed.

    shard: one of `SHARDS`.  replay: updates of GRPO on given answers (`patched`).
    """
    forking.forked(processes, _command, arguments, shard == "fsdp2", replay, log=log)


def _command(arguments: Sequence[str], fsdp: bool, replayed: int) -> None:
    if fsdp:
        patched.shard()
    patched.replay(replayed)
    forking.command("interleave", *arguments)


def lines(run: Path) -> list[Mapping[str, Any]]:
    """The numbers of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """The losses of a run, in order."""
    return [line["loss"] for line in lines(run) if "loss" in line]
