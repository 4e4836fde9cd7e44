"""Command line of the miniature's training."""

from pathlib import Path
from typing import Annotated

import torch
import typer

app = typer.Typer(no_args_is_help=True, help=__doc__)
Work = Annotated[Path, typer.Option(help="Folder for states, logs and results; a killed command resumes there.")]
Threads = Annotated[int, typer.Option(min=1, help="Torch threads.")]
Device = Annotated[str, typer.Option(help="Where to train: cpu or cuda.")]


@app.callback()
def main(threads: Threads = 1) -> None:
    """Trains the miniature, in this order: vae, generator, refine, heldout, reward, tune-reward, package."""
    torch.set_num_threads(threads)


@app.command()
def vae(work: Work = Path("runs/shapes"), device: Device = "cpu") -> None:
    """The autoencoder.  Example: python -m scripts.miniature.world --threads 2 vae"""
    from scripts.miniature.world import vae as stage

    stage.train_vae(work / "vae", device)


@app.command()
def generator(work: Work = Path("runs/shapes"), device: Device = "cpu") -> None:
    """The pipeline, after the autoencoder.  Example: python -m scripts.miniature.world --threads 2 generator"""
    from scripts.miniature.world import generator as stage

    stage.train_generator(work, stage.BASE, device)


@app.command()
def refine(work: Work = Path("runs/shapes"), device: Device = "cpu") -> None:
    """The pipeline further, mostly on edits.  Example: python -m scripts.miniature.world refine --device cuda"""
    from scripts.miniature.world import generator as stage

    stage.train_generator(work, stage.REFINE, device)


@app.command()
def heldout(work: Work = Path("runs/shapes"), device: Device = "cpu") -> None:
    """The held-out reward.  Example: python -m scripts.miniature.world heldout"""
    from scripts.miniature.world import rewards as stage

    stage.train_reward(work / "heldout", stage.HELDOUT, device)


@app.command()
def reward(work: Work = Path("runs/shapes"), device: Device = "cpu") -> None:
    """The training reward, before tuning.  Example: python -m scripts.miniature.world reward"""
    from scripts.miniature.world import rewards as stage

    stage.train_reward(work / "reward", stage.REWARD, device)


@app.command()
def tune_reward(work: Work = Path("runs/shapes"), device: Device = "cpu") -> None:
    """The training reward on labeled generated images.  Example: python -m scripts.miniature.world tune-reward"""
    from scripts.miniature.world import rewards as stage

    stage.tune_reward(work, device)


@app.command()
def package(work: Work = Path("runs/shapes")) -> None:
    """Ships the trained folders in float16, re-evaluated.  Example: python -m scripts.miniature.world package"""
    from scripts.miniature.world import package as stage

    stage.package_models(work)


app()
