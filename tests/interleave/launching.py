"""Trainings in processes of their own, as a user launches them."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def launched(processes: int, *arguments: str) -> None:
    """`torchrun ... -m interleave ARGUMENTS`, which must succeed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "-m", "interleave", *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def lines(run: Path) -> list[Mapping[str, Any]]:
    """The numbers of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """The losses of a run, in order."""
    return [line["loss"] for line in lines(run) if "loss" in line]
