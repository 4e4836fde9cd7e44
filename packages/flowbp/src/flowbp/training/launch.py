"""A training run from Python: what `flowbp train` does, without its terminal."""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from flowbp.config import TrainConfig
from flowbp.training import loop
from flowbp.training.progress import NullReporter
from flowbp.training.runs import check_training, open_run
from imgen_common.run_folder.folder import RunFolder


def train(
    config: TrainConfig | None = None,
    runs: str | Path = "runs",
    resume: str | Path | None = None,
    reporter: NullReporter | None = None,
    command: Sequence[str] = ("flowbp.train",),
) -> Path:
    """Trains, evaluates before and after, and returns the run folder.

    config: by default the miniature, or that of the run to resume.  resume: the folder of a run of the same
    configuration, which continues from its last checkpoint.  reporter: receives stages, updates and evaluations; by
    default it is silent.  Under torchrun every process calls it.  Raises UserError for everything that can be found
    wrong before models are loaded.
    """
    path = Path(resume) if resume else None
    if config is None:
        config = TrainConfig() if path is None else RunFolder.open(path, is_main=False).config(TrainConfig)
    job, _ = check_training(config, Path(runs), path)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    with open_run(job, Path(runs), command, accelerator, resume=path) as run:
        loop.train(job.config, run, accelerator, reporter or NullReporter())
    return run.path
