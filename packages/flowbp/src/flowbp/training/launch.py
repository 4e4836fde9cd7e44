"""A training run from Python: what `flowbp train` does, without its terminal."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from flowbp.config import TrainConfig
from flowbp.training import loop
from flowbp.training.preflight import check_disk, check_launcher, check_run
from flowbp.training.progress import NullReporter
from flowbp.training.runs import check_resume, new_run_path, open_run
from imgen_common.console import quiet_libraries


def train(
    config: TrainConfig | None = None,
    runs: str | Path = "runs",
    resume: str | Path | None = None,
    reporter: NullReporter | None = None,
    command: Sequence[str] = ("flowbp.train",),
) -> Path:
    """Trains, evaluates before and after, and returns the run folder.

    config: the miniature by default.  resume: the folder of a run of the same configuration, which goes on from its
    last checkpoint.  reporter: told of stages, updates and evaluations; silent by default.  Under torchrun every
    process calls it.  Raises UserError for everything that can be found wrong before models are loaded.
    """
    config, path = config or TrainConfig(), Path(resume) if resume else None
    if path is not None:
        check_resume(path, config)
    quiet_libraries()
    check_launcher(config.distributed.kind, os.environ)
    checked = check_run(config, int(os.environ.get("WORLD_SIZE", "1")))
    check_disk(checked, path or new_run_path(config, Path(runs)), resume=path is not None)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    with open_run(checked, Path(runs), command, accelerator, resume=path) as run:
        loop.train(config, run, accelerator, reporter or NullReporter())
    return run.path
