"""What the benchmarks share: where results go, on what they ran, and what time is."""

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from imgen_common.errors import UserError
from imgen_common.files import write_atomic
from imgen_common.run_folder.environment import environment

RESULTS = Path(__file__).parent / "results"


def device_of(name: str) -> torch.device:
    """`cpu`, `cuda`, or for `auto` whichever is there."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else torch.device(name)


def hardware(device: torch.device) -> str:
    """Name of the processor or of the GPU, as its maker gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def result_file(name: str, device: torch.device, suffix: str) -> Path:
    """`benchmarks/results/NAME-HARDWARE.SUFFIX`."""
    slug = re.sub(r"[^a-z0-9]+", "-", f"{device.type} {hardware(device)}".lower()).strip("-")
    return RESULTS / f"{name}-{slug}.{suffix}"


def stamp(module: str, arguments: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Versions, device, git revision and command of a result."""
    return environment(["python", "-m", module, *arguments]) | {"hardware": hardware(device)}


def versions(environment: dict[str, Any]) -> str:
    """The packages that decide a number, in one line."""
    packages = environment["packages"]
    named = [f"{name} {packages[name]}" for name in ("torch", "diffusers", "transformers") if name in packages]
    return ", ".join([f"python {environment['python']}", *named])


def clock(device: torch.device) -> float:
    """Seconds that this process has computed: its CPU time, or on a GPU the time by the wall once the GPU is idle.

    CPU seconds (all threads together) bear a busy machine better than the time by the wall.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def command(folder: Path, name: str, module: str, *arguments: str) -> None:
    """Run a product's command on one thread, its output into NAME.log.  Raises UserError if it fails."""
    log = folder / f"{name}.log"
    with log.open("ab") as out:
        call = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(call, stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
        raise UserError(
            f"{name} failed ({last}); all it said is in {log}; mend it and go on, with another recipe in another --work"
        )


def write_json(file: Path, content: object) -> None:
    """Whole or not at all; folders are made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(content, indent=1) + "\n")
