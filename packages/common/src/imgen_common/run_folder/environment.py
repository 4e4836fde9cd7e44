"""What a run ran on."""

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from imgen_common.errors import UserError
from imgen_common.files import read_json
from imgen_common.run_folder.find import ENVIRONMENT

PACKAGES = (
    *("imgen-common", "flowbp", "interleave"),
    *("torch", "torchvision", "diffusers", "transformers", "accelerate", "peft", "trl", "deepspeed"),
    *("datasets", "huggingface-hub", "numpy", "pillow", "pydantic", "safetensors", "tokenizers"),
)


def environment(command: Sequence[str]) -> dict[str, Any]:
    """On what a run runs: package versions, python, platform, device, git revision, command line.

    Nothing of the process environment is recorded, since it may hold secrets.
    """
    return {
        "command": list(command),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": _device(),
        "git": _git(Path(__file__).parent),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
    }


class Environment(BaseModel):
    """What a reader of `environment.json` relies on; what else it holds is kept."""

    model_config = ConfigDict(extra="allow")
    command: list[str] = []
    git: dict[str, Any] | None = None
    device: dict[str, Any] = {}
    packages: dict[str, str] = {}
    earlier: list["Environment"] = []


def read_environment(run: Path) -> dict[str, Any]:
    """On what a run ran: what `environment` returned, with `earlier` ones; {} if the file is missing or damaged."""
    try:
        return read_json(run / ENVIRONMENT, Environment).model_dump(exclude_unset=True)
    except UserError:
        return {}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _device() -> dict[str, Any]:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return {"kind": "cuda", "names": names, "cuda": torch.version.cuda}
    return {"kind": "cpu", "names": [platform.machine()], "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def _git(folder: Path) -> dict[str, Any] | None:
    """Revision of the code in `folder`, and whether it was changed since; None without git or outside a repository."""
    revision = _git_output(folder, "rev-parse", "HEAD")
    # uv rewrites the committed, portable uv.lock at every sync: that is not a change of the code.
    status = _git_output(folder, "status", "--porcelain", "--", ":/", ":(exclude,top)uv.lock")
    return None if revision is None else {"revision": revision, "dirty": bool(status)}


def _git_output(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
