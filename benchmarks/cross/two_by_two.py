"""What an aligned generator and trained agents add to each other, on the miniature, by the verifier.

    generators   base                 as it came
                 aligned              by `flowbp train`
    agents       single shot          the request itself is the only prompt
                 planner              one picture a step
                 planner + critic SFT, planner + critic GRPO
                                      a rejected picture is drawn again; by supervised training, by `interleave grpo`

Every cell is asked the same requests of the test split with the same ids and seeds: captions (one picture each),
plain stories, riddles.  Generator and critic are trained here unless the configuration names finished ones; one critic
serves both generators.  Trainings and cells that are done are kept in `--work`; a run that was killed goes on.

    python -m benchmarks.cross two_by_two
    python -m benchmarks.cross two_by_two --config mine.yaml --work runs/mine
"""

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, Self

import torch
import typer
from annotated_types import Ge
from pydantic import model_validator

from benchmarks.common import command, device_of, result_file, stamp, write_json
from benchmarks.cross.report import AGENTS, ALIGNED, BASE, GRPO, SFT, SINGLE, Cells, write_report
from benchmarks.quality.interleave_miniature import Told, load_stories, tell
from benchmarks.quality.miniature_cells import digests, read
from flowbp.data.prompts import load_prompts
from imgen_common.config import Config, load
from imgen_common.run_folder.find import CONFIG
from imgen_common.run_folder.folder import RunFolder
from imgen_common.shapes.scene import parse_caption
from imgen_common.shapes.steps import Draw, Story
from interleave.loop.components import Components
from interleave.loop.config import LoopConfig, ModelCritic, ModelPlanner, NoCritic, NoPlanner, RunConfig
from interleave.loop.run import build_components
from interleave.models.chat.local import LocalChatConfig
from interleave.models.generators.pipeline import PipelineConfig, PipelineRunner

VERSION = 1
MODULE = "benchmarks.cross"
FOLDER = Path("runs/two-by-two")
CAPTIONS, STORIES, RIDDLES = "captions", "stories", "riddles"
MAY_DIFFER = ("config.loop.concurrency",)


class Generators(Config):
    """Who draws."""

    base: PipelineConfig = PipelineConfig()
    """The generator as it came."""
    aligned: PipelineConfig | None = None
    """The aligned one, its settings over those of `base`; null: made of `base` by `recipes.align`."""


class Agents(Config):
    """Who plans and judges."""

    planner: ModelPlanner = ModelPlanner()
    """The planner of all cells but the single shots."""
    sft: ModelCritic = ModelCritic()
    """The critic as supervised training left it."""
    grpo: ModelCritic | None = None
    """The critic after reinforcement; null: made of `sft` by `recipes.data` and `recipes.grpo`."""

    @model_validator(mode="after")
    def _can_be_trained(self) -> Self:
        if self.grpo is None and not isinstance(self.sft.model, LocalChatConfig):
            raise ValueError("grpo: missing, and a critic that is no local model cannot be trained here; name one")
        return self


class Recipe(Config):
    """How a command is called; models and folders are given by the benchmark."""

    files: tuple[str, ...] = ()
    """YAML files, from the working directory."""
    sets: tuple[str, ...] = ()
    """`KEY=VALUE` over them."""


class Recipes(Config):
    """What is made here where it is not given."""

    align: Recipe = Recipe(sets=("guidance_scale=2", "num_inference_steps=12", "eval.every=0", "eval.num_prompts=24"))
    """Of `flowbp train`: at the guidance and in the steps that the cells draw with, which are also those of `base`."""
    data: Recipe = Recipe(files=("configs/interleave/data_miniature.yaml",), sets=("prompts.count=160",))
    """Of `interleave data build`, for `grpo`."""
    grpo: Recipe = Recipe(files=("configs/interleave/grpo_critic.yaml",), sets=("trl.max_steps=20",))
    """Of `interleave grpo`."""


class TwoByTwo(Config):
    """The benchmark.  The defaults are the miniature."""

    seed: Annotated[int, Ge(0)] = 0
    """Seed of requests and pictures."""
    num_requests: Annotated[int, Ge(2)] = 300
    """Plain stories, and as many riddles."""
    num_captions: Annotated[int, Ge(2)] = 504
    """Captions for single pictures."""
    generators: Generators = Generators()
    """Who draws."""
    agents: Agents = Agents()
    """Who plans and judges."""
    recipes: Recipes = Recipes()
    """How generator and critic are trained where none is given."""
    loop: LoopConfig = LoopConfig(max_attempts=3)
    """Attempts, budgets, selection."""

    @property
    def refs(self) -> list[str]:
        """The models that it names."""
        chats = [agent.model for agent in (self.agents.planner, self.agents.sft, self.agents.grpo) if agent]
        pipelines = [one for one in (self.generators.base, self.generators.aligned) if one]
        return [*(p.ref for p in pipelines), *(c.ref for c in chats if isinstance(c, LocalChatConfig))]


class Sitting(Config):
    """What a work folder belongs to."""

    config: TwoByTwo
    """What is measured."""
    weights: dict[str, str]
    """Digest of every model's weights by reference."""


@dataclass(frozen=True)
class Job:
    """A training, or a cell.

    needs: jobs that come before it.  lane: two jobs of one lane are not done at once, since the later one finds
    pictures that the earlier one drew.  cell: generator, agents, kind of request.
    """

    name: str
    lane: str
    needs: tuple[str, ...] = ()
    cell: tuple[str, str, str] | None = None

    def file(self, folder: Path) -> Path:
        """What it leaves when it is done."""
        return folder / "done" / f"{self.name}.json"


def jobs_of(config: TwoByTwo) -> list[Job]:
    """Everything that is to be done, each after what it needs, the long trainings first."""
    found = [Job("align", "align")] if config.generators.aligned is None else []
    if config.agents.grpo is None:
        found += [Job("data", "grpo"), Job("grpo", "grpo", ("data",))]
    made = [job.name for job in found]
    asked = [(SINGLE, CAPTIONS), *((agents, kind) for agents in AGENTS for kind in (STORIES, RIDDLES))]
    for agents, kind in asked:
        for generator in (BASE, ALIGNED):
            needs = ["align"] * (generator == ALIGNED) + ["grpo"] * (agents == GRPO)
            name = f"{generator}-{agents}-{kind}".replace(" + ", "-").replace(" ", "-").lower()
            after = tuple(need for need in needs if need in made)
            found.append(Job(name, f"{generator} {kind}", after, (generator, agents, kind)))
    return found


# --- trainings -------------------------------------------------------------------------------------------------------


def begin(recipe: Recipe, sets: Mapping[str, str]) -> list[str]:
    """The arguments of a recipe."""
    given = [f"{key}={value}" for key, value in sets.items()]
    return [*recipe.files, *(part for one in (*recipe.sets, *given) for part in ("--set", one))]


def align(config: TwoByTwo, folder: Path) -> None:
    """`flowbp train` and `flowbp export`, to `folder/aligned`."""
    run = folder / "runs" / "align"
    fresh = begin(config.recipes.align, {"name": run.name, "model.ref": config.generators.base.ref})
    how = ["--resume", str(run)] if (run / CONFIG).is_file() else [*fresh, "--runs", str(run.parent)]
    command(folder, "align", "flowbp", "train", *how)
    command(folder, "align", "flowbp", "export", str(run), "--to", "merged", "--out", str(folder / ALIGNED))


def data(config: TwoByTwo, folder: Path) -> None:
    """`interleave data build`, to `folder/set`."""
    out = folder / "set"
    sets = {"run.generator": config.generators.base.model_dump_json(), "run.cache": str(folder / "cache")}
    fresh = begin(config.recipes.data, sets | {"templates.critic": config.agents.sft.template})
    how = ["--resume", str(out)] if (out / CONFIG).is_file() else [*fresh, "--out", str(out)]
    command(folder, "data", "interleave", "data", "build", *how)


def grpo(config: TwoByTwo, folder: Path) -> None:
    """`interleave grpo`, to `folder/runs/grpo/model`."""
    run, critic = folder / "runs" / "grpo", config.agents.sft
    assert isinstance(critic.model, LocalChatConfig)
    sets = {"model": critic.model.ref, "data": str(folder / "set"), "template": critic.template}
    sets |= {"generator": config.generators.base.model_dump_json(), "cache": str(folder / "grpo-cache")}
    fresh = [*begin(config.recipes.grpo, sets), "--runs", str(run.parent), "--name", run.name]
    how = ["--resume", str(run)] if (run / CONFIG).is_file() else fresh
    command(folder, "grpo", "interleave", "grpo", *how)


TRAININGS = {
    "align": (align, Path(ALIGNED)),
    "data": (data, Path("set/set.json")),
    "grpo": (grpo, Path("runs/grpo/model")),
}
"""Each with what it has made when it is done."""


# --- cells -----------------------------------------------------------------------------------------------------------


def stories_of(config: TwoByTwo, kind: str) -> list[Story]:
    """The requests of a kind."""
    if kind == CAPTIONS:
        captions = load_prompts("builtin:shapes/test", limit=config.num_captions)
        return [Story(caption, (Draw(parse_caption(caption)),)) for caption in captions]
    return load_stories(config.num_requests, kind == RIDDLES, config.seed)


def generator_of(config: TwoByTwo, folder: Path, name: str) -> PipelineConfig:
    """A generator, both with the same settings unless the configuration says otherwise."""
    if name == BASE:
        return config.generators.base
    found = config.generators.aligned or PipelineConfig(ref=str(folder / ALIGNED))
    return found.model_copy(update=found.with_defaults(PipelineRunner(config.generators.base).settings).model_dump())


def parts_of(config: TwoByTwo, folder: Path, generator: str, agents: str) -> Components:
    """The parts of a cell, models loaded."""
    known = config.agents
    trained = known.sft.model.model_copy(update={"ref": str(folder / TRAININGS["grpo"][1])})
    critics = {SFT: known.sft, GRPO: known.grpo or known.sft.model_copy(update={"model": trained})}
    run = RunConfig(
        planner=NoPlanner() if agents == SINGLE else known.planner,
        critic=critics.get(agents, NoCritic()),
        generator=generator_of(config, folder, generator),
        cache=str(folder / "cache"),
    )
    return build_components(run)


def measure(config: TwoByTwo, folder: Path, job: Job) -> dict[str, Any]:
    """What became of every request of a cell.  One that was begun before is begun anew, its pictures from the cache."""
    assert job.cell is not None
    generator, agents, kind = job.cell
    place = folder / "cells" / job.name
    shutil.rmtree(place, ignore_errors=True)
    parts = parts_of(config, folder, generator, agents)
    told, seconds = tell(stories_of(config, kind), parts, config.loop, config.seed, place)
    return {"seconds": seconds, "told": [asdict(one) for one in told]}


# --- all of it -------------------------------------------------------------------------------------------------------


def work(config: TwoByTwo, folder: Path, job: Job) -> str:
    """Do a job and leave its file; in words, how long it took.

    seconds of a training: null where an earlier sitting did a part of it.
    """
    began = time.perf_counter()
    if job.cell is None:
        train, made = TRAININGS[job.name]
        is_begun = (folder / f"{job.name}.log").exists()
        if not (folder / made).exists():
            train(config, folder)
        found: dict[str, Any] = {"seconds": None if is_begun else time.perf_counter() - began}
    else:
        found = measure(config, folder, job)
    write_json(job.file(folder), found)
    return f"{job.name}: {time.perf_counter() - began:.0f} s"


def execute(config: TwoByTwo, folder: Path, workers: int) -> None:
    """The jobs that are not done, here or in worker processes of one thread each."""
    waiting = [job for job in jobs_of(config) if not job.file(folder).exists()]
    if workers < 2:
        for job in waiting:
            print(work(config, folder, job), flush=True)
        return
    running: dict[Future[str], Job] = {}

    def is_ready(job: Job) -> bool:
        unfinished = {other.name for other in (*waiting, *running.values())}
        return job.lane not in {other.lane for other in running.values()} and not unfinished & set(job.needs)

    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        while waiting or running:
            while len(running) < workers and (ready := next(filter(is_ready, waiting), None)):
                waiting.remove(ready)
                running[pool.submit(work, config, folder, ready)] = ready
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                del running[done]
                print(done.result(), flush=True)


def collected(config: TwoByTwo, folder: Path) -> tuple[Cells, dict[str, float | None]]:
    """What was told in every cell, and the seconds of every training."""
    cells, seconds = {}, {}
    for job in jobs_of(config):
        found = read(job.file(folder))
        if job.cell is None:
            seconds[job.name] = found["seconds"]
        else:
            cells[job.cell] = ([Told(**told) for told in found["told"]], found["seconds"])
    return cells, seconds


def run(config: TwoByTwo, folder: Path, workers: int, arguments: Sequence[str], output: Path) -> str:
    """Measure what is not measured yet; print and write the report.

    Raises UserError if the folder was made with another configuration or other weights, or is in use.
    """
    began = time.perf_counter()
    sitting = Sitting(config=config, weights=digests(dict.fromkeys(config.refs)))
    called = ["python", "-m", MODULE, *arguments]
    is_begun = (folder / CONFIG).is_file()
    opened = (
        RunFolder.open(folder, sitting, called, may_differ=MAY_DIFFER)
        if is_begun
        else RunFolder.create(folder, sitting, called)
    )
    with opened:
        execute(config, folder, workers)
        cells, seconds = collected(config, folder)
    about = {
        "version": VERSION,
        "environment": stamp(MODULE, arguments, device_of("auto")),
        **sitting.model_dump(mode="json"),
        "training_seconds": seconds,
        "wall_seconds": None if is_begun else time.perf_counter() - began,
    }
    text = write_report(cells, about, output)
    print(text)
    return text


def main(
    files: Annotated[list[Path] | None, typer.Option("--config", metavar="FILE", help="YAML: other models.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A key of it.")] = None,
    folder: Annotated[Path, typer.Option("--work", metavar="DIR", help="What is done already is there.")] = FOLDER,
    workers: Annotated[int, typer.Option(help="Processes of one thread each.", min=1)] = 2,
    output: Annotated[Path | None, typer.Option(help="JSON file; by default named by the hardware.")] = None,
) -> None:
    """Generator as it came or aligned, times agents: none, planner, with critic by SFT, by GRPO. One table, one plot.

    Example:

    \b
      python -m benchmarks.cross two_by_two
      python -m benchmarks.cross two_by_two --set generators.aligned.ref=aligned --set agents.grpo.model.ref=critic
    """
    device = device_of("auto")
    config = load(TwoByTwo, files or [], sets or [])
    run(config, folder, workers, sys.argv[1:], output or result_file("two_by_two", device, "json"))
