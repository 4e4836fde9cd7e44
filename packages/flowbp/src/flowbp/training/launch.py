"""A training run from Python: what `flowbp train` does, without its terminal."""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from flowbp.config import TrainConfig
from flowbp.training import loop
from flowbp.training.progress import NullReporter
from flowbp.training.runs import check_training, open_run


def train(
    config: TrainConfig | None = None,
    runs: str | Path = "runs",
    resume: str | Path | None = None,
    reporter: NullReporter | None = None,
    command: Sequence[str] = ("flowbp.train",),
) -> Path:
    """Trains, evaluates before and after, and returns the run folder.

    config: the miniature by default.  resume: the folder of a run of the same configuration, which continues from its
    last checkpoint.  reporter: receives stages, updates and evaluations; by default it is silent.  Under torchrun every
    process calls it.  Raises UserError for everything that can be found wrong before models are loaded.
    """
    config, path = config or TrainConfig(), Path(resume) if resume else None
    job, _ = check_training(config, Path(runs), path)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    with open_run(job, Path(runs), command, accelerator, resume=path) as run:
        loop.train(job.config, run, accelerator, reporter or NullReporter())
    return run.path
