"""Functions that the benchmarks share: result files, a description of the machine, clocks, commands."""

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from imgen_common.errors import UserError
from imgen_common.files import write_atomic
from imgen_common.run_folder.environment import environment
from imgen_common.run_folder.find import CONFIG

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Claim:
    """A statement, the number that decides it, and whether it holds."""

    text: str
    value: float
    holds: bool

    def __str__(self) -> str:
        return f"{'holds' if self.holds else 'FAILS'}: {self.text}: {self.value:.6g}"


def choose_device(name: str) -> torch.device:
    """The device `name`; `auto` is the GPU where there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else torch.device(name)


def hardware_name(device: torch.device) -> str:
    """Name of the processor or of the GPU as the operating system reports it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def result_file(name: str, device: torch.device, suffix: str) -> Path:
    """`benchmarks/results/NAME-HARDWARE.SUFFIX`; `runs/benchmark-results/` has it where that is the result of a command
    with other options, which stays."""
    slug = re.sub(r"[^a-z0-9]+", "-", f"{device.type} {hardware_name(device)}".lower()).strip("-")
    kept = RESULTS / f"{name}-{slug}.json"
    is_other = kept.exists() and json.loads(kept.read_text())["environment"]["command"][3:] != sys.argv[1:]
    return (Path("runs/benchmark-results") if is_other else RESULTS) / f"{name}-{slug}.{suffix}"


def describe_run(module: str, arguments: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Versions, hardware, git revision and command of a run, to be written with its result."""
    return environment(["python", "-m", module, *arguments]) | {"hardware": hardware_name(device)}


def format_versions(environment: dict[str, Any]) -> str:
    """Versions of the packages that decide a number, in one line."""
    packages = environment["packages"]
    named = [f"{name} {packages[name]}" for name in ("torch", "diffusers", "transformers") if name in packages]
    return ", ".join([f"python {environment['python']}", *named])


def clock(device: torch.device) -> float:
    """Seconds that this process has computed: its CPU time, or on a GPU the wall-clock time once the GPU is idle.

    CPU seconds (all threads together) depend less on other processes than wall-clock time does.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def time_call(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of computing of one call."""
    start = clock(device)
    call()
    return clock(device) - start


def run_command(folder: Path, name: str, module: str, *arguments: str) -> None:
    """Runs a command of flowbp or interleave on one thread and appends its output to NAME.log.

    Raises UserError if the command fails.
    """
    log = folder / f"{name}.log"
    with log.open("ab") as out:
        call = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(call, stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
        raise UserError(
            f"{name} failed ({last}); its output is in {log}; correct the cause and start again, with another recipe "
            "in another --work"
        )


def resume_arguments(folder: Path, fresh: Sequence[str]) -> list[str]:
    """`--resume FOLDER` where a command has begun in the folder, otherwise the arguments of a fresh one."""
    return ["--resume", str(folder)] if (folder / CONFIG).is_file() else list(fresh)


def write_json(file: Path, content: object) -> None:
    """Writes a JSON file atomically and makes its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(content, indent=1) + "\n")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    return json.loads(file.read_text(encoding="utf-8"))
