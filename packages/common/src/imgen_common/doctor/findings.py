"""What a machine offers to this project, with a remedy for what it lacks."""

import fcntl
import math
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from imgen_common.errors import SET_TMPDIR, one_line
from imgen_common.files import free_bytes, nearest_existing
from imgen_common.hub import offline

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.  remedy: what to do, where it is not `ok`."""

    area: str
    state: Literal["ok", "warning", "problem"]
    text: str
    remedy: str = ""


def examine(runs: Path) -> Iterator[Finding]:
    """Findings about Python, devices, disks, the folder of run folders, cached models and tokens; writes nothing."""
    yield Finding("python", "ok", f"Python {platform.python_version()} on {platform.platform()}")
    yield from _devices()
    yield from _disks(runs)
    yield from _file_system(runs)
    yield from _models()
    yield from _tokens()


def _devices() -> Iterator[Finding]:
    import torch

    yield Finding("torch", "ok", f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        built = torch.version.cuda
        text = f"no GPU is visible (torch is built for CUDA {built})" if built else "this build of torch has no CUDA"
        yield Finding("gpu", "warning", text, "the miniature needs none; for large models check `nvidia-smi`")
        return
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        text = f"{card.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        yield _finding("gpu", free > 0.9 * total, text, "another process holds memory: see `nvidia-smi`")
        has_bfloat16 = card.major >= 8
        yield _finding(
            "gpu",
            has_bfloat16,
            f"{card.name}: compute capability {card.major}.{card.minor}",
            "set model.dtype=float32: it has no fast bfloat16",
        )
    kernels = {
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
        "flash-attn": find_spec("flash_attn") is not None,
        "xformers": find_spec("xformers") is not None,
    }
    yield Finding("attention", "ok", f"kernels: {', '.join(name for name, found in kernels.items() if found)}")


def _disks(runs: Path) -> Iterator[Finding]:
    try:
        temporary = [Path(tempfile.gettempdir())]
    except FileNotFoundError as error:
        temporary = []
        yield Finding("disk, temporary files", "problem", str(error.strerror), SET_TMPDIR)
    for name, folder, least, remedy in (
        (
            "runs",
            nearest_existing(runs),
            10,
            "make room, or give another --runs; flowbp estimate says what a run needs",
        ),
        *(("temporary files", folder, 1, "make room, or set TMPDIR") for folder in temporary),
        ("shared memory", Path("/dev/shm"), 1, "give the container more (docker run --shm-size=8g)"),
    ):
        if folder.is_dir():
            free = free_bytes(folder) / GIB
            said = f"{free:.1f} GiB free" if math.isfinite(free) else "the file system does not say what is free"
            yield _finding(f"disk, {name}", free >= least, said, remedy)


def _finding(area: str, good: bool, text: str, remedy: str) -> Finding:
    """`ok`, or a warning with its remedy."""
    return Finding(area, "ok" if good else "warning", text, "" if good else remedy)


def _file_system(runs: Path) -> Iterator[Finding]:
    area = "file system of the runs"
    try:
        with tempfile.TemporaryDirectory(dir=nearest_existing(runs), prefix=".doctor-") as folder:
            yield from _try_files(area, Path(folder))
    except OSError as error:
        yield Finding(area, "problem", f"files cannot be written ({error.strerror})", "give another folder as --runs")


def _try_files(area: str, folder: Path) -> Iterator[Finding]:
    def tries(what: str, call: Callable[[], object], remedy: str) -> Finding:
        try:
            call()
        except OSError as error:
            return Finding(area, "warning", f"no {what} ({error.strerror})", remedy)
        return Finding(area, "ok", what)

    first, second = folder / "first", folder / "second"
    first.write_text("1")
    with first.open("r+b") as file:  # NFS locks only what is open for writing
        locks = lambda: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # noqa: E731
        yield tries("locks (flock)", locks, "start only one process in each run folder")
    handle = os.open(folder, os.O_RDONLY)
    yield tries("sync of folders (fsync)", lambda: os.fsync(handle), "what is written last may be lost with the power")
    os.close(handle)
    yield tries("replacement of a file in one step", lambda: os.replace(first, second), "choose another disk")
    skew = max(path.stat().st_mtime for path in folder.iterdir()) - time.time()
    yield _finding(
        "clock", abs(skew) < 5, f"{abs(skew):.0f} s between the disk and this machine", "set the clocks (NTP)"
    )


def _models() -> Iterator[Finding]:
    import warnings

    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cache = scan_cache_dir()
    except CacheNotFound:
        yield Finding("models", "ok", "no model is in the Hugging Face cache")
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(str(error))
        remedy = "set HF_HOME to a folder that can be read, or change the permissions of its files"
        yield Finding("models", "problem", f"the Hugging Face cache cannot be read ({reason})", remedy)
        return
    for repo in sorted(cache.repos, key=lambda repo: repo.repo_id):
        license_name = _license([revision.snapshot_path for revision in repo.revisions])
        size = repo.size_on_disk / GIB
        yield Finding("models", "ok", f"{repo.repo_id}, {size:.2f} GiB, license: {license_name}")
    if not cache.repos:
        yield Finding("models", "ok", "no model is in the Hugging Face cache")


def _license(snapshots: Sequence[Path]) -> str:
    """The license that a cached model card names."""
    for snapshot in snapshots:
        card = snapshot / "README.md"
        text = card.read_text("utf-8", "replace")[:20_000] if card.is_file() else ""
        if found := re.search(r"(?m)^license(?:_name)?:\s*(\S+)", text):
            return found[1]
    return "not known"


def _tokens() -> Iterator[Finding]:
    from huggingface_hub import get_token

    there = get_token() is not None
    remedy = "" if there else "for gated models: `hf auth login`, or HF_TOKEN"
    yield Finding("tokens", "ok", f"Hugging Face: {'there' if there else 'none'}", remedy)
    named = sorted(name for name in os.environ if re.search(r"_(API_)?(KEY|TOKEN)$", name))
    yield Finding("tokens", "ok", f"in the environment: {', '.join(named) or 'none'} (values are never shown)")
    if name := offline():
        yield Finding("network", "warning", f"{name} is set: nothing is downloaded", "unset it, or prefetch")


def extras(packages: Mapping[str, str]) -> Iterator[Finding]:
    """Whether optional packages are installed.  packages: {name: what it is for}."""
    for package, purpose in packages.items():
        there = find_spec(package) is not None
        yield Finding("extras", "ok", f"{package} ({purpose}): {'installed' if there else 'not installed'}")
