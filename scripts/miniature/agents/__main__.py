"""Command line of the miniature's agents."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from imgen_common.errors import UserError, run_cli

app = typer.Typer(no_args_is_help=True, help=__doc__)
Work = Annotated[Path, typer.Option(help="Folder for pictures and checkpoints; a killed command resumes there.")]
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
    train.train(first, train.PLANNER, train.planner_rows(train.PLANNER))
    longer = train.PLANNER_LONGER
    train.train(work / "planner-longer", longer, train.planner_rows(longer), start=first / "model")


@app.command()
def pool(work: Work = Path("runs/miniature")) -> None:
    """Pictures for the critic, from the miniature generator.  Example: python -m scripts.miniature.agents pool"""
    from scripts.miniature.agents import pool as stage

    stage.generate(work / "pool", "train", stage.TRAIN, POOL_SEEDS["train"])
    stage.generate(work / "pool", "test", stage.TEST, POOL_SEEDS["test"])


@app.command()
def critic(work: Work = Path("runs/miniature")) -> None:
    """The critic, after the pool, in stages.  Example: python -m scripts.miniature.agents critic"""
    from scripts.miniature.agents import pool as stage
    from scripts.miniature.agents import train, vision
    from scripts.miniature.agents.cases import Cases

    if not (work / "pool" / "train").is_dir():
        raise UserError(
            f"{work / 'pool'}: no pictures; run `python -m scripts.miniature.agents pool --work {work}` first"
        )
    drawn = stage.load(work / "pool", "train")
    cases = Cases(drawn)
    train.train(work / "critic", train.CRITIC, train.critic_rows(train.CRITIC, cases))
    vision.train(work / "vision", train.CRITIC.size, drawn, start=work / "critic" / "model")
    before = work / "vision"
    for name, recipe in train.CRITIC_LONGER.items():
        train.train(work / name, recipe, train.critic_rows(recipe, cases), start=before / "model")
        before = work / name


@app.command()
def package(work: Work = Path("runs/miniature")) -> None:
    """Ships both in float16, measured as saved.  Example: python -m scripts.miniature.agents package"""
    from scripts.miniature.agents import measure, train, vision
    from scripts.miniature.agents import pool as pictures
    from scripts.miniature.agents.package import ship

    recipes = [recipe.model_dump(mode="json") for recipe in (train.PLANNER, train.PLANNER_LONGER)]
    ship(
        "planner",
        [work / "planner", work / "planner-longer"],
        {"recipes": recipes, "data": {"requests": "stories of the training split, made as needed"}},
        lambda folder: measure.measure_planner(folder, NUM_REQUESTS, EVALUATION_SEED),
    )
    drawn = {split: pictures.load(work / "pool", split) for split in ("train", "test")}
    stages = {"critic": train.CRITIC, "vision": vision.SCHEDULE} | train.CRITIC_LONGER
    recipes = [stage.model_dump(mode="json") for stage in stages.values()]
    data = {"pool_seeds": POOL_SEEDS, "drawn_pictures": {split: len(d.prompts) for split, d in drawn.items()}}
    ship(
        "critic",
        [work / name for name in stages],
        {"recipes": recipes, "data": data},
        lambda folder: measure.measure_critic(folder, drawn["test"]),
    )


run_cli(app, "python -m scripts.miniature.agents")
