"""Command line of the miniature's agents."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from imgen_common.errors import UserError, run_cli

app = typer.Typer(no_args_is_help=True, help=__doc__)
Work = Annotated[Path, typer.Option(help="Folder for images and checkpoints; a killed command resumes there.")]
Threads = Annotated[int, typer.Option(min=1, help="Torch threads.")]
EVALUATION_SEED = 7
NUM_REQUESTS = 500
POOL_SEEDS = {"train": 21, "test": 22}


@app.callback()
def main(threads: Threads = 1) -> None:
    """Trains the miniature's agents, in this order: planner, pool, critic, package."""
    torch.set_num_threads(threads)


@app.command()
def planner(work: Work = Path("runs/miniature")) -> None:
    """The planner, in two stages.  Example: python -m scripts.miniature.agents planner"""
    from scripts.miniature.agents import train

    first = work / "planner"
    train.train_agent(first, train.PLANNER, train.planner_batches(train.PLANNER))
    longer = train.PLANNER_LONGER
    train.train_agent(work / "planner-longer", longer, train.planner_batches(longer), start=first / "model")


@app.command()
def pool(work: Work = Path("runs/miniature")) -> None:
    """Images for the critic, from the miniature generator.  Example: python -m scripts.miniature.agents pool"""
    from scripts.miniature.agents import pool as stage

    stage.generate_pool(work / "pool", "train", stage.TRAIN, POOL_SEEDS["train"])
    stage.generate_pool(work / "pool", "test", stage.TEST, POOL_SEEDS["test"])


@app.command()
def critic(work: Work = Path("runs/miniature")) -> None:
    """The critic, after the pool, in stages.  Example: python -m scripts.miniature.agents critic"""
    from scripts.miniature.agents import pool as stage
    from scripts.miniature.agents import train, vision
    from scripts.miniature.agents.cases import CaseSampler

    if not (work / "pool" / "train").is_dir():
        raise UserError(
            f"{work / 'pool'}: no images; run `python -m scripts.miniature.agents pool --work {work}` first"
        )
    generated = stage.load_pool(work / "pool", "train")
    cases = CaseSampler(generated)
    train.train_agent(work / "critic", train.CRITIC, train.critic_batches(train.CRITIC, cases))
    vision.train_vision_tower(work / "vision", train.CRITIC.size, generated, start=work / "critic" / "model")
    before = work / "vision"
    for name, recipe in train.CRITIC_LONGER.items():
        train.train_agent(work / name, recipe, train.critic_batches(recipe, cases), start=before / "model")
        before = work / name


@app.command()
def package(work: Work = Path("runs/miniature")) -> None:
    """Saves both in float16 and measures what was saved.  Example: python -m scripts.miniature.agents package"""
    from scripts.miniature.agents import measure, train, vision
    from scripts.miniature.agents import pool as stage
    from scripts.miniature.agents.package import ship_model

    recipes = [recipe.model_dump(mode="json") for recipe in (train.PLANNER, train.PLANNER_LONGER)]
    ship_model(
        "planner",
        [work / "planner", work / "planner-longer"],
        {"recipes": recipes, "data": {"requests": "stories of the training split, made as needed"}},
        lambda folder: measure.measure_planner(folder, NUM_REQUESTS, EVALUATION_SEED),
    )
    generated = {split: stage.load_pool(work / "pool", split) for split in ("train", "test")}
    stages = {"critic": train.CRITIC, "vision": vision.SCHEDULE} | train.CRITIC_LONGER
    recipes = [recipe.model_dump(mode="json") for recipe in stages.values()]
    data = {"pool_seeds": POOL_SEEDS, "drawn_pictures": {split: len(d.prompts) for split, d in generated.items()}}
    ship_model(
        "critic",
        [work / name for name in stages],
        {"recipes": recipes, "data": data},
        lambda folder: measure.measure_critic(folder, generated["test"]),
    )


run_cli(app, "python -m scripts.miniature.agents")
