"""Command line of the miniature's training."""

from pathlib import Path
from typing import Annotated

import torch
import typer

app = typer.Typer(no_args_is_help=True, help=__doc__)
Work = Annotated[Path, typer.Option(help="Folder for states, logs and results; a killed command resumes there.")]
Threads = Annotated[int, typer.Option(min=1, help="Torch threads.")]


@app.callback()
def main(threads: Threads = 1) -> None:
    """Trains the miniature from nothing, in this order: vae, generator, heldout, reward, tune-reward, package."""
    torch.set_num_threads(threads)


@app.command()
def vae(work: Work = Path("runs/shapes")) -> None:
    """The autoencoder.  Example: python -m imgen_common.shapes.train --threads 2 vae"""
    from imgen_common.shapes.train import vae as stage

    stage.train(work / "vae")


@app.command()
def generator(work: Work = Path("runs/shapes")) -> None:
    """The pipeline, after the autoencoder.  Example: python -m imgen_common.shapes.train --threads 2 generator"""
    from imgen_common.shapes.train import generator as stage

    stage.train(work)


@app.command()
def heldout(work: Work = Path("runs/shapes")) -> None:
    """The held-out reward.  Example: python -m imgen_common.shapes.train heldout"""
    from imgen_common.shapes.train import rewards as stage

    stage.train(work / "heldout", stage.HELDOUT)


@app.command()
def reward(work: Work = Path("runs/shapes")) -> None:
    """The training reward, before tuning.  Example: python -m imgen_common.shapes.train reward"""
    from imgen_common.shapes.train import rewards as stage

    stage.train(work / "reward", stage.REWARD)


app()
