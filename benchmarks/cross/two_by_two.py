"""What an aligned generator and trained agents add to each other on the miniature, by the verifier.

    generators   base                 as shipped
                 aligned              by `flowbp train`
    agents       single shot          the request itself is the only prompt
                 planner              one image per step
                 planner + critic SFT, planner + critic GRPO
                                      a rejected image is generated again; the critic is trained by supervised
                                      fine-tuning or by `interleave grpo`

Every cell gets the same requests of the test split with the same ids and seeds: captions (one image each), plain
stories, riddles.  The benchmark trains generator and critic unless the configuration names finished ones; one critic
serves both generators.  Finished trainings and cells are kept in `--work`; the same command resumes.

    python -m benchmarks.cross two_by_two
    python -m benchmarks.cross two_by_two --config mine.yaml --work runs/mine
"""

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self

import typer
from annotated_types import Ge
from pydantic import model_validator

from benchmarks.common import (
    choose_device,
    read_json,
    result_file,
    resume_arguments,
    run_command,
    write_json,
)
from benchmarks.cross.jobs import (
    BenchmarkJob,
    CommandRecipe,
    Settings,
    WorkFolderConfig,
    recipe_arguments,
    run_benchmark,
    run_training,
    train_generator,
)
from benchmarks.cross.report import AGENTS, ALIGNED, BASE, GRPO, SFT, SINGLE, Cells, write_report
from benchmarks.quality.interleave_miniature import StoryResult, load_stories, run_stories
from benchmarks.quality.miniature_cells import weight_digests
from flowbp.data.prompts import load_prompts
from imgen_common.config import Config, load
from imgen_common.shapes.scene import parse_caption
from imgen_common.shapes.steps import Draw, Story
from interleave.loop.config import LoopConfig, ModelCritic, ModelPlanner, NoCritic, NoPlanner, RunConfig
from interleave.loop.run import build_components
from interleave.models.chat.local import LocalChatConfig
from interleave.models.generators.pipeline import PipelineConfig, PipelineRunner
from interleave.protocols import Components

VERSION = 2
FOLDER = Path("runs/two-by-two")
CAPTIONS, STORIES, RIDDLES = "captions", "stories", "riddles"


class Generators(Config):
    """The two generators."""

    base: PipelineConfig = PipelineConfig()
    """The generator before alignment."""
    aligned: PipelineConfig | None = None
    """The aligned generator; its settings override those of `base`.  null: `recipes.align` trains it from `base`."""


class Agents(Config):
    """The planner and the two critics."""

    planner: ModelPlanner = ModelPlanner()
    """The planner of all cells but the single shots."""
    sft: ModelCritic = ModelCritic()
    """The critic after supervised fine-tuning."""
    grpo: ModelCritic | None = None
    """The critic after reinforcement learning; null: `recipes.data` and `recipes.grpo` train it from `sft`."""

    @model_validator(mode="after")
    def _can_be_trained(self) -> Self:
        if self.grpo is None and not isinstance(self.sft.model, LocalChatConfig):
            raise ValueError("grpo: missing, and a critic that is not a local model cannot be trained here; name one")
        return self


class CommandRecipes(Config):
    """The recipes of the trainings."""

    align: CommandRecipe = CommandRecipe(
        sets=("guidance_scale=2", "num_inference_steps=12", "eval.every=0", "eval.num_prompts=24")
    )
    """Of `flowbp train`, with the guidance and the number of steps of `base`, with which the cells sample."""
    data: CommandRecipe = CommandRecipe(files=("configs/interleave/data_miniature.yaml",), sets=("prompts.count=160",))
    """Of `interleave data build`, for `grpo`."""
    grpo: CommandRecipe = CommandRecipe(files=("configs/interleave/grpo_critic.yaml",), sets=("trl.max_steps=20",))
    """Of `interleave grpo`."""


class TwoByTwo(Config):
    """Configuration of the benchmark.  The defaults are the miniature."""

    seed: Annotated[int, Ge(0)] = 0
    """Seed of requests and images."""
    num_requests: Annotated[int, Ge(2)] = 300
    """Number of plain stories, and of riddles."""
    num_captions: Annotated[int, Ge(2)] = 504
    """Number of captions for single images."""
    generators: Generators = Generators()
    """The generators of the cells."""
    agents: Agents = Agents()
    """The planner and the critics of the cells."""
    recipes: CommandRecipes = CommandRecipes()
    """How generator and critic are trained where none is given."""
    loop: LoopConfig = LoopConfig(max_attempts=3)
    """Attempts, budgets, selection."""

    @property
    def refs(self) -> list[str]:
        """The models that the configuration names."""
        chats = [agent.model for agent in (self.agents.planner, self.agents.sft, self.agents.grpo) if agent]
        pipelines = [one for one in (self.generators.base, self.generators.aligned) if one]
        return [*(p.ref for p in pipelines), *(c.ref for c in chats if isinstance(c, LocalChatConfig))]


def list_jobs(config: TwoByTwo) -> list[BenchmarkJob]:
    """All jobs, each after those that it needs; the trainings, which take longest, come first."""
    jobs = [BenchmarkJob("align", "align")] if config.generators.aligned is None else []
    if config.agents.grpo is None:
        jobs += [BenchmarkJob("data", "grpo"), BenchmarkJob("grpo", "grpo", ("data",))]
    trainings = [job.name for job in jobs]
    cells = [(SINGLE, CAPTIONS), *((agents, kind) for agents in AGENTS for kind in (STORIES, RIDDLES))]
    for agents, kind in cells:
        for generator in (BASE, ALIGNED):
            needs = ["align"] * (generator == ALIGNED) + ["grpo"] * (agents == GRPO)
            name = f"{generator}-{agents}-{kind}".replace(" + ", "-").replace(" ", "-").lower()
            after = tuple(need for need in needs if need in trainings)
            jobs.append(BenchmarkJob(name, f"{generator} {kind}", after, (generator, agents, kind)))
    return jobs


# --- trainings -------------------------------------------------------------------------------------------------------


def align_generator(config: TwoByTwo, folder: Path) -> None:
    """Runs `flowbp train` and `flowbp export`, which leave `folder/aligned`."""
    base: Settings = {"model.ref": config.generators.base.ref}
    train_generator(folder, "align", config.recipes.align, base, folder / ALIGNED)


def build_data_set(config: TwoByTwo, folder: Path) -> None:
    """Runs `interleave data build`, which leaves `folder/set`."""
    out = folder / "set"
    sets: Settings = {"run.generator": config.generators.base, "run.cache": str(folder / "cache")}
    fresh = recipe_arguments(config.recipes.data, sets | {"templates.critic": config.agents.sft.template})
    run_command(folder, "data", "interleave", "data", "build", *resume_arguments(out, [*fresh, "--out", str(out)]))


def train_critic(config: TwoByTwo, folder: Path) -> None:
    """Runs `interleave grpo`, which leaves `folder/runs/grpo/model`."""
    run, critic = folder / "runs" / "grpo", config.agents.sft
    assert isinstance(critic.model, LocalChatConfig)
    sets: Settings = {"model": critic.model.ref, "data": str(folder / "set")}
    sets |= {"template": critic.template, "generator": config.generators.base, "cache": str(folder / "grpo-cache")}
    fresh = [*recipe_arguments(config.recipes.grpo, sets), "--runs", str(run.parent), "--name", run.name]
    run_command(folder, "grpo", "interleave", "grpo", *resume_arguments(run, fresh))


TRAININGS = {
    "align": (align_generator, Path(ALIGNED)),
    "data": (build_data_set, Path("set/set.json")),
    "grpo": (train_critic, Path("runs/grpo/model")),
}
"""Each training with the path that exists when it is finished."""


# --- cells -----------------------------------------------------------------------------------------------------------


def load_requests(config: TwoByTwo, kind: str) -> list[Story]:
    """The requests of a kind."""
    if kind == CAPTIONS:
        captions = load_prompts("builtin:shapes/test", limit=config.num_captions)
        return [Story(caption, (Draw(parse_caption(caption)),)) for caption in captions]
    return load_stories(config.num_requests, kind == RIDDLES, config.seed)


def generator_config(config: TwoByTwo, folder: Path, name: str) -> PipelineConfig:
    """The generator `name`; both have the same settings unless the configuration says otherwise."""
    if name == BASE:
        return config.generators.base
    aligned = config.generators.aligned or PipelineConfig(ref=str(folder / ALIGNED))
    defaults = PipelineRunner(config.generators.base).settings
    return aligned.model_copy(update=aligned.with_defaults(defaults).model_dump())


def build_cell_components(config: TwoByTwo, folder: Path, generator: str, agents: str) -> Components:
    """The planner, critic and generator of a cell with loaded models."""
    configs = config.agents
    trained = configs.sft.model.model_copy(update={"ref": str(folder / TRAININGS["grpo"][1])})
    critics = {SFT: configs.sft, GRPO: configs.grpo or configs.sft.model_copy(update={"model": trained})}
    run = RunConfig(
        planner=NoPlanner() if agents == SINGLE else configs.planner,
        critic=critics.get(agents, NoCritic()),
        generator=generator_config(config, folder, generator),
        cache=str(folder / "cache"),
    )
    return build_components(run)


def measure_cell(config: TwoByTwo, folder: Path, job: BenchmarkJob) -> dict[str, Any]:
    """The results of every request of a cell.  An interrupted cell starts again, with its images from the cache."""
    assert job.cell is not None
    generator, agents, kind = job.cell
    cell_folder = folder / "cells" / job.name
    shutil.rmtree(cell_folder, ignore_errors=True)
    parts = build_cell_components(config, folder, generator, agents)
    results, seconds = run_stories(load_requests(config, kind), parts, config.loop, config.seed, cell_folder)
    return {"seconds": seconds, "results": [asdict(result) for result in results]}


# --- all of it -------------------------------------------------------------------------------------------------------


def run_job(config: TwoByTwo, folder: Path, job: BenchmarkJob) -> str:
    """Runs a job and writes its file; returns a message with its name and its seconds.

    The file of a training has `seconds: null` where an interrupted run did a part of it.
    """
    start = time.perf_counter()
    if job.cell is None:
        train, made = TRAININGS[job.name]
        content = run_training(folder, job.name, folder / made, lambda: train(config, folder))
    else:
        content = measure_cell(config, folder, job)
    write_json(job.done_file(folder), content)
    return f"{job.name}: {time.perf_counter() - start:.0f} s"


def read_cells(config: TwoByTwo, folder: Path) -> tuple[Cells, dict[str, float | None]]:
    """The results of every cell, and the seconds of every training."""
    cells, seconds = {}, {}
    for job in list_jobs(config):
        content = read_json(job.done_file(folder))
        if job.cell is None:
            seconds[job.name] = content["seconds"]
        else:
            cells[job.cell] = ([StoryResult(**result) for result in content["results"]], content["seconds"])
    return cells, seconds


def run_two_by_two(config: TwoByTwo, folder: Path, workers: int, arguments: Sequence[str], output: Path) -> str:
    """Runs the unfinished jobs; prints and writes the report.

    Raises UserError if the folder was made with another configuration or other weights, or is in use.
    """
    owner = WorkFolderConfig(config=config, weights=weight_digests(dict.fromkeys(config.refs)))
    work, read = partial(run_job, config, folder), partial(read_cells, config, folder)
    (cells, seconds), about = run_benchmark(owner, folder, arguments, list_jobs(config), workers, work, read)
    about |= {"version": VERSION, "training_seconds": seconds}
    text = write_report(cells, about, output)
    print(text)
    return text


def main(
    files: Annotated[list[Path] | None, typer.Option("--config", metavar="FILE", help="YAML file.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Changes a key.")] = None,
    folder: Annotated[Path, typer.Option("--work", metavar="DIR", help="Folder of finished jobs.")] = FOLDER,
    workers: Annotated[int, typer.Option(help="Processes of one thread each.", min=1)] = 2,
    output: Annotated[Path | None, typer.Option(help="JSON file; by default named by the hardware.")] = None,
) -> None:
    """Base or aligned generator with no agents, a planner, and a critic by SFT or by GRPO: one table, one plot.

    Example:

    \b
      python -m benchmarks.cross two_by_two
      python -m benchmarks.cross two_by_two --set generators.aligned.ref=aligned --set agents.grpo.model.ref=critic
    """
    device = choose_device("auto")
    config = load(TwoByTwo, files or [], sets or [])
    run_two_by_two(config, folder, workers, sys.argv[1:], output or result_file("two_by_two", device, "json"))
