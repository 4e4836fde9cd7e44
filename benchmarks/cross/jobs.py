"""Jobs of a benchmark of both products: trainings by commands, and cells; finished ones are kept in a work folder."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import SerializeAsAny

from benchmarks.common import choose_device, describe_run, resume_arguments, run_command
from imgen_common.config import Config
from imgen_common.run_folder.find import CONFIG
from imgen_common.run_folder.folder import RunFolder

MODULE = "benchmarks.cross"
MAY_DIFFER = ("config.loop.concurrency",)
"""What a begun benchmark may go on with."""
Result = TypeVar("Result")
Settings = dict[str, str | Config]
"""{key: value} of a command's configuration."""


class CommandRecipe(Config):
    """The configuration of a command; the benchmark adds models and folders."""

    files: tuple[str, ...] = ()
    """YAML files, relative to the working directory."""
    sets: tuple[str, ...] = ()
    """`KEY=VALUE` that override the files."""


def recipe_arguments(recipe: CommandRecipe, sets: Settings) -> list[str]:
    """The arguments of a command: the recipe's files and settings, and `sets` over them."""
    texts = {key: value if isinstance(value, str) else value.model_dump_json() for key, value in sets.items()}
    added = [f"{key}={text}" for key, text in texts.items()]
    return [*recipe.files, *(part for one in (*recipe.sets, *added) for part in ("--set", one))]


@dataclass(frozen=True)
class BenchmarkJob:
    """A training or a cell.

    needs: jobs that must be finished before.  lane: jobs of one lane do not run at the same time, since the later one
    finds images of the earlier one in the cache.  cell: generator, agents, kind of request; None for a training.
    """

    name: str
    lane: str
    needs: tuple[str, ...] = ()
    cell: tuple[str, str, str] | None = None

    def done_file(self, folder: Path) -> Path:
        """The file that a finished job writes."""
        return folder / "done" / f"{self.name}.json"


class WorkFolderConfig(Config):
    """What the results in a work folder depend on."""

    config: SerializeAsAny[Config]
    """Configuration of the benchmark."""
    weights: dict[str, str]
    """Digest of every model's weights by reference."""

    def open(self, folder: Path, command: Sequence[str]) -> tuple[RunFolder, bool]:
        """The work folder, and whether it was begun before.

        Raises UserError if it was made with another configuration or other weights, or is in use.
        """
        if (folder / CONFIG).is_file():
            return RunFolder.open(folder, self, command, may_differ=MAY_DIFFER), True
        return RunFolder.create(folder, self, command), False


def run_benchmark(
    owner: WorkFolderConfig,
    folder: Path,
    arguments: Sequence[str],
    jobs: Sequence[BenchmarkJob],
    workers: int,
    run: Callable[[BenchmarkJob], str],
    read: Callable[[], Result],
) -> tuple[Result, dict[str, Any]]:
    """Runs the unfinished jobs in a work folder; returns what `read` finds there, and what a report says of the run.

    `wall_seconds` is None where an earlier command did a part.  Raises UserError as `WorkFolderConfig.open`.
    """
    start = time.perf_counter()
    run_folder, is_begun = owner.open(folder, ["python", "-m", MODULE, *arguments])
    with run_folder:
        run_jobs(jobs, folder, workers, run)
        found = read()
    return found, {
        "environment": describe_run(MODULE, arguments, choose_device("auto")),
        **owner.model_dump(mode="json"),
        "wall_seconds": None if is_begun else time.perf_counter() - start,
    }


def run_training(folder: Path, name: str, made: Path, train: Callable[[], None]) -> dict[str, Any]:
    """Trains unless `made` exists; returns {"seconds"}, null where an interrupted run did a part of it."""
    is_begun, start = (folder / f"{name}.log").exists(), time.perf_counter()
    if not made.exists():
        train()
    return {"seconds": None if is_begun else time.perf_counter() - start}


def train_generator(folder: Path, name: str, recipe: CommandRecipe, sets: Settings, out: Path) -> None:
    """Runs `flowbp train` and `flowbp export`, which leave a pipeline in `out`."""
    run = folder / "runs" / name
    fresh = [*recipe_arguments(recipe, {"name": name, **sets}), "--runs", str(run.parent)]
    run_command(folder, name, "flowbp", "train", *resume_arguments(run, fresh))
    run_command(folder, name, "flowbp", "export", str(run), "--to", "merged", "--out", str(out))


def run_jobs(jobs: Sequence[BenchmarkJob], folder: Path, workers: int, run: Callable[[BenchmarkJob], str]) -> None:
    """Runs the unfinished jobs, in this process or in worker processes of one thread each, and prints their messages.

    run: does a job and writes its file; a function of a module, or a partial of one, so that it can be pickled.
    """
    waiting = [job for job in jobs if not job.done_file(folder).exists()]
    if workers < 2:
        for job in waiting:
            print(run(job), flush=True)
        return
    running: dict[Future[str], BenchmarkJob] = {}

    def is_ready(job: BenchmarkJob) -> bool:
        unfinished = {other.name for other in (*waiting, *running.values())}
        return job.lane not in {other.lane for other in running.values()} and not unfinished & set(job.needs)

    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        while waiting or running:
            while len(running) < workers and (ready := next(filter(is_ready, waiting), None)):
                waiting.remove(ready)
                running[pool.submit(run, ready)] = ready
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                del running[done]
                print(done.result(), flush=True)
