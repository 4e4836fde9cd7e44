"""Does aligning the generator on edits, to the agents' own critic, make more stories right?  On the miniature.

    generators   base              as shipped
                 text              aligned by `flowbp train` on captions only, to the CLIP reward
                 edits, CLIP       aligned on edits, to the CLIP reward
                 edits, critic     aligned on edits, to the critic that `interleave export-reward` wrote
                 second round      (`--set second_round=true`) the critic is trained on images of the generator that
                                   was aligned to it, and the generator aligned again, to the new critic
    agents       planner, planner + critic

Every cell gets the same stories of the test split with the same seeds.  Edits and captions of the test split say how
good single images are, how often the critic accepts them, and how often a second critic does, which was trained with
another seed on other stories and to which no generator was aligned: a critic that is hacked accepts more wrong images,
and the second one does not.  Finished trainings and cells are kept in `--work`; the same command resumes.

    python -m benchmarks.cross closed_loop
"""

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from annotated_types import Ge, MinLen

from benchmarks.common import (
    choose_device,
    read_json,
    result_file,
    resume_arguments,
    run_command,
    write_json,
)
from benchmarks.cross.closed_loop_report import (
    BASE,
    BY_CLIP,
    BY_CRITIC,
    CRITIC,
    IMAGES,
    PLANNER,
    SECOND,
    TEXT,
    Measured,
    write_report,
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
from benchmarks.quality.interleave_miniature import StoryResult, load_stories, run_stories
from benchmarks.quality.miniature_cells import weight_digests
from imgen_common.config import Config, load
from interleave.loop.config import LoopConfig, ModelCritic, ModelPlanner, NoCritic, RunConfig
from interleave.loop.run import build_components
from interleave.models.chat.local import LocalChatConfig
from interleave.models.generators.pipeline import PipelineConfig, PipelineRunner

VERSION = 1
FOLDER = Path("runs/closed-loop")
PROMPTS = {"captions": "builtin:shapes/test", "edits": "builtin:shapes/edits/test"}
"""Single images that are judged."""
EVAL_LITTLE = ("eval.every=0", "eval.num_prompts=24", "eval.guidance_scale=[2.0]")


class Recipes(Config):
    """The recipes of the trainings; the benchmark adds models, rewards, seeds and folders."""

    text: CommandRecipe = CommandRecipe(sets=("guidance_scale=2", "num_inference_steps=12", *EVAL_LITTLE))
    """Of `flowbp train` on captions."""
    clip: CommandRecipe = CommandRecipe(files=("configs/flowbp/miniature/edits_bridge.yaml",), sets=EVAL_LITTLE)
    """Of `flowbp train` on edits."""
    critic: CommandRecipe = CommandRecipe(files=("configs/flowbp/miniature/edits_critic.yaml",), sets=EVAL_LITTLE)
    """Of `flowbp train` on edits with a critic, `rewards.0`."""
    data: CommandRecipe = CommandRecipe(files=("configs/interleave/data_miniature.yaml",), sets=("prompts.count=160",))
    """Of `interleave data build`, for the second critic and those of the second round."""
    sft: CommandRecipe = CommandRecipe(files=("configs/interleave/sft_critic.yaml",))
    """Of `interleave sft critic`."""


class ClosedLoop(Config):
    """Configuration of the benchmark.  The defaults are the miniature."""

    seed: Annotated[int, Ge(0)] = 0
    """Seed of stories and images."""
    training_seeds: Annotated[tuple[int, ...], MinLen(1)] = (0, 1, 2)
    """Seeds of the trainings."""
    num_stories: Annotated[int, Ge(2)] = 150
    """Number of stories."""
    num_images: Annotated[int, Ge(2)] = 168
    """Number of captions, and of edits."""
    second_round: bool = False
    """Whether the loop is gone through twice."""
    generator: PipelineConfig = PipelineConfig()
    """The generator."""
    planner: ModelPlanner = ModelPlanner()
    """The planner."""
    critic: ModelCritic = ModelCritic()
    """The critic, a local model."""
    recipes: Recipes = Recipes()
    """How generators and critics are trained."""
    loop: LoopConfig = LoopConfig(max_attempts=3)
    """Attempts, budgets, selection."""

    @property
    def refs(self) -> list[str]:
        """The models that the configuration names."""
        chats = (self.planner.model, self.critic.model)
        return [self.generator.ref, *(chat.ref for chat in chats if isinstance(chat, LocalChatConfig))]

    @property
    def arms(self) -> list[str]:
        """The aligned generators."""
        return [TEXT, BY_CLIP, BY_CRITIC, *[SECOND] * self.second_round]


def name_of(*words: object) -> str:
    """Words as the name of a job and of its files."""
    return "-".join(str(word).replace(", ", "-").replace(" + ", "-").replace(" ", "-") for word in words).lower()


def list_jobs(config: ClosedLoop) -> list[BenchmarkJob]:
    """All jobs, each after those that it needs."""
    jobs = [BenchmarkJob("reward", "reward"), BenchmarkJob("second-critic", "critics")]
    for seed in config.training_seeds:
        for arm in config.arms:
            needs = {BY_CRITIC: ("reward",), SECOND: (name_of(BY_CRITIC, seed),)}.get(arm, ())
            jobs.append(BenchmarkJob(name_of(arm, seed), name_of(arm, seed), needs))
    generators = [(BASE, 0), *((arm, seed) for seed in config.training_seeds for arm in config.arms)]
    for arm, seed in generators:
        trained = () if arm == BASE else (name_of(arm, seed),)
        for agents in (PLANNER, CRITIC):
            name = name_of(arm, seed, agents)
            jobs.append(BenchmarkJob(name, name_of(arm, seed), trained, (arm, str(seed), agents)))
        needs = (*trained, "reward", "second-critic")
        jobs.append(BenchmarkJob(name_of(arm, seed, IMAGES), name_of(arm, seed), needs, (arm, str(seed), IMAGES)))
    return jobs


def generator_of(config: ClosedLoop, folder: Path, arm: str, seed: object) -> PipelineConfig:
    """A generator, with the settings of the base."""
    if arm == BASE:
        return config.generator
    settings = config.generator.with_defaults(PipelineRunner(config.generator).settings)
    return config.generator.model_copy(update={"ref": str(folder / name_of(arm, seed)), **settings.model_dump()})


# --- trainings -------------------------------------------------------------------------------------------------------


def export_reward(folder: Path, name: str, critic: str, out: Path) -> None:
    """Runs `interleave export-reward`."""
    run_command(folder, name, "interleave", "export-reward", critic, "--out", str(out), "--runs", str(folder / "runs"))


def train_critic(config: ClosedLoop, folder: Path, name: str, generator: PipelineConfig, seed: int) -> Path:
    """Runs `interleave data build`, `sft critic` and `export-reward`; returns the reward's folder."""
    chat, data, run, out = (
        config.critic.model,
        folder / f"{name}-set",
        folder / "runs" / name,
        folder / f"{name}-reward",
    )
    assert isinstance(chat, LocalChatConfig)
    sets: Settings = {
        "run.generator": generator,
        "prompts.seed": str(1000 + seed),
        "templates.critic": config.critic.template,
    }
    fresh = [*recipe_arguments(config.recipes.data, sets), "--out", str(data)]
    run_command(folder, name, "interleave", "data", "build", *resume_arguments(data, fresh))
    words = recipe_arguments(config.recipes.sft, {"model": chat.ref, "data": str(data), "seed": str(seed)})
    words += ["--runs", str(run.parent), "--name", run.name]
    run_command(folder, name, "interleave", "sft", "critic", *resume_arguments(run, words))
    shutil.rmtree(out, ignore_errors=True)
    export_reward(folder, name, name, out)
    return out


def train(config: ClosedLoop, folder: Path, job: str) -> None:
    """Does a training, which leaves `folder/JOB`."""
    recipes, base, out = config.recipes, config.generator.ref, folder / job
    arms = {name_of(arm, seed): (arm, seed) for arm in config.arms for seed in config.training_seeds}
    if job == "reward":
        assert isinstance(config.critic.model, LocalChatConfig)
        return export_reward(folder, job, config.critic.model.ref, out)
    if job == "second-critic":
        train_critic(config, folder, job, config.generator, max(config.training_seeds) + 1).rename(out)
        return None
    arm, seed = arms[job]
    recipe = {TEXT: recipes.text, BY_CLIP: recipes.clip}.get(arm, recipes.critic)
    sets: Settings = {"model.ref": base, "seed": str(seed)}
    if arm == BY_CRITIC:
        sets["rewards.0.ref"] = str(folder / "reward")
    if arm == SECOND:
        first = generator_of(config, folder, BY_CRITIC, seed)
        reward = train_critic(config, folder, f"{job}-critic", first, seed)
        sets |= {"model.ref": first.ref, "rewards.0.ref": str(reward)}
    return train_generator(folder, job, recipe, sets, out)


# --- cells -----------------------------------------------------------------------------------------------------------


def measure_stories(config: ClosedLoop, folder: Path, job: BenchmarkJob) -> dict[str, Any]:
    """The results of every story of a cell."""
    assert job.cell is not None
    arm, seed, agents = job.cell
    shutil.rmtree(folder / "cells" / job.name, ignore_errors=True)
    critic = config.critic
    if arm == SECOND:
        model = critic.model.model_copy(update={"ref": str(folder / "runs" / f"{name_of(arm, seed)}-critic" / "model")})
        critic = critic.model_copy(update={"model": model})
    run = RunConfig(
        planner=config.planner,
        critic=critic if agents == CRITIC else NoCritic(),
        generator=generator_of(config, folder, arm, seed),
        cache=str(folder / "cache"),
    )
    stories = load_stories(config.num_stories, False, config.seed)
    results, seconds = run_stories(
        stories, build_components(run), config.loop, config.seed, folder / "cells" / job.name
    )
    return {"seconds": seconds, "results": [asdict(result) for result in results]}


def measure_images(config: ClosedLoop, folder: Path, job: BenchmarkJob) -> dict[str, Any]:
    """Per caption and per edit: whether the image is right, and the share of each critic's answers that accept it."""
    from flowbp.evaluation import sampling
    from flowbp.evaluation.sources import evaluation_prompts, model_source

    assert job.cell is not None
    arm, seed, _ = job.cell
    settings = PipelineRunner(config.generator).settings
    sets = [f"rewards=[{{name: critic, score: vlm, ref: '{folder / 'reward'}'}}]"]
    sets += [f"heldout=[{{name: second_critic, score: vlm, ref: '{folder / 'second-critic'}'}}]"]
    sets += [f"eval.num_prompts={config.num_images}", f"eval.num_inference_steps={settings.num_inference_steps}"]
    sets += [f"model.height={settings.height}", f"model.width={settings.width}", f"eval.seed={config.seed}"]
    start, found = time.perf_counter(), {}
    for kind, prompts in PROMPTS.items():
        ref = generator_of(config, folder, arm, seed).ref
        source = model_source(ref, Path("runs"), [*sets, f"eval.prompts={prompts}"])
        texts, scale = evaluation_prompts(source.config), settings.guidance_scale or 1.0
        one = sampling.evaluate_model(source, texts, source.config, (scale,), lambda *done: None)[scale]
        found[kind] = one.scores
    return {"seconds": time.perf_counter() - start, "scores": found}


# --- all of it -------------------------------------------------------------------------------------------------------


def run_job(config: ClosedLoop, folder: Path, job: BenchmarkJob) -> str:
    """Runs a job and writes its file; returns a message with its name and its seconds."""
    start = time.perf_counter()
    if job.cell is None:
        content = run_training(folder, job.name, folder / job.name, lambda: train(config, folder, job.name))
    elif job.cell[2] == IMAGES:
        content = measure_images(config, folder, job)
    else:
        content = measure_stories(config, folder, job)
    write_json(job.done_file(folder), content)
    return f"{job.name}: {time.perf_counter() - start:.0f} s"


def read_measured(config: ClosedLoop, folder: Path) -> Measured:
    """What all jobs found."""
    found = Measured({}, {}, {})
    for job in list_jobs(config):
        content = read_json(job.done_file(folder))
        if job.cell is None:
            found.training_seconds[job.name] = content["seconds"]
            continue
        arm, _, kind = job.cell
        if kind == IMAGES:
            found.images.setdefault(arm, []).append(content["scores"])
        else:
            results = [StoryResult(**result) for result in content["results"]]
            found.stories.setdefault((arm, kind), []).append(results)
    return found


def run_closed_loop(config: ClosedLoop, folder: Path, workers: int, arguments: Sequence[str], output: Path) -> str:
    """Runs the unfinished jobs; prints and writes the report.

    Raises UserError if the folder was made with another configuration or other weights, or is in use.
    """
    owner = WorkFolderConfig(config=config, weights=weight_digests(dict.fromkeys(config.refs)))
    work, read = partial(run_job, config, folder), partial(read_measured, config, folder)
    found, about = run_benchmark(owner, folder, arguments, list_jobs(config), workers, work, read)
    text = write_report(found, {"version": VERSION, **about}, output)
    print(text)
    return text


def main(
    files: Annotated[list[Path] | None, typer.Option("--config", metavar="FILE", help="YAML file.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Changes a key.")] = None,
    folder: Annotated[Path, typer.Option("--work", metavar="DIR", help="Folder of finished jobs.")] = FOLDER,
    workers: Annotated[int, typer.Option(help="Processes of one thread each.", min=1)] = 2,
    output: Annotated[Path | None, typer.Option(help="JSON file; by default named by the hardware.")] = None,
) -> None:
    """The generator as shipped, aligned on captions, and on edits to CLIP and to the critic, with planner and critic.

    Example:

    \b
      python -m benchmarks.cross closed_loop
      python -m benchmarks.cross closed_loop --set training_seeds=[0] --set num_stories=100 --work runs/quick
    """
    config = load(ClosedLoop, files or [], sets or [])
    name = "closed_loop_two_rounds" if config.second_round else "closed_loop"
    run_closed_loop(config, folder, workers, sys.argv[1:], output or result_file(name, choose_device("auto"), "json"))
