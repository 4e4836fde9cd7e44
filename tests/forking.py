"""Commands in processes of their own, forked from one that has imported everything.

They are ready at once: a kill at some moment falls into the work, and not into ten seconds of imports.
"""

import importlib
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOAD = ["trl", "trl.trainer.sft_trainer", "trl.trainer.grpo_trainer", "interleave.cli"]
_PRELOAD += ["flowbp.cli", "flowbp.training.loop", "flowbp.backbones.pipelines", "matplotlib.pyplot", "tensorboard"]
SECONDS = 400
"""After which what has not ended is killed."""


def command(*words: str) -> None:
    """`flowbp ...` or `interleave ...` in this process."""
    sys.argv = list(words)
    importlib.import_module(f"{words[0]}.cli").main()


def start(work: Callable[..., None], *given: Any, log: Path, **environment: str) -> BaseProcess:
    """Begin `work(*given)`, a function with a name, in a process of its own; what it says goes to `log`."""
    _CONTEXT.set_forkserver_preload(_PRELOAD)
    process = _CONTEXT.Process(target=_run, args=(work, given, log, environment))
    process.start()
    return process


def _run(work: Callable[..., None], given: Sequence[Any], log: Path, environment: Mapping[str, str]) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2)
    os.environ.update(environment)
    work(*given)


def finish(process: BaseProcess, log: Path) -> None:
    """Wait for a process, which must succeed."""
    assert _exit_codes([process]) == [0], log.read_text()[-4000:]


def exit_codes(processes: int, work: Callable[..., None], *given: Any, log: Path) -> list[int | None]:
    """Of `work(*given)` in processes that know of each other as from a launcher; None: one that did not end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = str(processes)
    common = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return _exit_codes(
        [start(work, *given, log=log, RANK=rank, LOCAL_RANK=rank, **common) for rank in map(str, range(processes))]
    )


def forked(processes: int, work: Callable[..., None], *given: Any, log: Path) -> None:
    """`work(*given)` in processes that know of each other as from a launcher; all must succeed."""
    assert exit_codes(processes, work, *given, log=log) == [0] * processes, log.read_text()[-4000:]


def _exit_codes(started: Sequence[BaseProcess]) -> list[int | None]:
    deadline = time.monotonic() + SECONDS
    for process in started:
        process.join(max(0, deadline - time.monotonic()))
    found = [process.exitcode for process in started]
    for process in started:
        process.kill()
    return found
