"""The commands `interleave sft` and `interleave grpo`.  Nothing heavy is imported before one runs."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer

from imgen_common.devices import announce_process
from imgen_common.errors import UserError
from interleave.cli import data
from interleave.cli.options import Json, MiniatureConfigs, Name, Runs, Sets

if TYPE_CHECKING:
    from interleave.training.batch_plan import GrpoBatchPlan, SftBatchPlan
    from interleave.training.config import TrainingConfig
    from interleave.training.memory import MemoryEstimate
    from interleave.training.rows import FirstRow

C = TypeVar("C", bound="TrainingConfig")
Resume = Annotated[str | None, typer.Option(metavar="RUN", help="Resume a run that was stopped or killed.")]
ResumeFrom = Annotated[
    Literal["last", "last-good"],
    typer.Option(help="With --resume: the last checkpoint, or, if that is damaged, the last that is whole."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print batches, calls, cost and memory; do not train.")]
Processes = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="With --dry-run: number of processes; default: as launched.")
]


def sft(
    agent: Annotated[Literal["planner", "critic"], typer.Argument(metavar="AGENT", help="planner or critic.")],
    configs: MiniatureConfigs = None,
    sets: Sets = None,
    resume: Resume = None,
    resume_from: ResumeFrom = "last",
    name: Name = None,
    runs: Runs = Path("runs"),
    dry_run: DryRun = False,
    processes: Processes = None,
    as_json: Json = False,
) -> None:
    """Train the planner or the critic on examples with TRL's SFTTrainer; the loss is on the answers only. The run
    folder holds checkpoints, metrics and, at the end, `model/`, which `interleave run` can load. Without CONFIG it
    trains the miniature's agent on the CPU, and first builds its training set where sets/miniature is not there.

    Example:

    \b
      interleave sft critic
      interleave sft critic configs/interleave/sft_critic.yaml --dry-run --processes 8
      interleave sft critic configs/interleave/sft_critic.yaml --set data=sets/mine
      torchrun --nproc_per_node 8 -m interleave sft planner configs/interleave/sft_planner_qwen3vl.yaml
      interleave sft critic --resume sft_critic
      interleave sft critic --resume sft_critic --resume-from last-good
    """
    announce_process()
    # what needs no torch is imported and checked first, so that a typo costs no time
    from interleave.training.config import SftConfig
    from interleave.training.rows import rows_file

    run, config = _load_config(SftConfig, f"sft_{agent}", resume, configs, sets, runs)
    _check_start(config, dry_run)
    _check_place(runs, name, f"sft_{agent}", run, resume_from, dry_run)
    _ensure_set(run, configs, config, as_json, dry_run)
    rows_file(Path(config.data), f"{agent}_sft")
    from interleave.training import run as launch

    launch.prepare_environment()
    from interleave.training import sft

    if dry_run:
        count = processes or launch.num_processes("interleave sft")
        _print_estimate(*sft.plan_sft(agent, config, count), as_json)
    else:
        _choose_checkpoint(run, resume_from)
        _print_model(sft.train_sft(agent, config, sys.argv, runs=runs, name=name, resume=run), as_json)


def grpo(
    configs: MiniatureConfigs = None,
    sets: Sets = None,
    resume: Resume = None,
    resume_from: ResumeFrom = "last",
    name: Name = None,
    runs: Runs = Path("runs"),
    dry_run: DryRun = False,
    processes: Processes = None,
    as_json: Json = False,
) -> None:
    """Train the critic by reinforcement learning with TRL's GRPOTrainer. An answer is rewarded by the judge's scores of
    the image that is generated from its new prompt. Training does not start if the generator or the judge is down, and
    stops with a checkpoint if they fail too often. Without CONFIG it trains the miniature's critic on the CPU, and
    first builds its training set where sets/miniature is not there.

    Example:

    \b
      interleave grpo
      interleave grpo configs/interleave/grpo_critic.yaml --dry-run
      interleave grpo configs/interleave/grpo_critic.yaml --set model=runs/sft_critic/model
      torchrun --nproc_per_node 8 -m interleave grpo configs/interleave/grpo_critic_qwen3vl.yaml
      interleave grpo --resume grpo_critic
      interleave grpo --resume grpo_critic --resume-from last-good
    """
    announce_process()
    # what needs no torch is imported and checked first, so that a typo costs no time
    from interleave.models.hashes import check_models
    from interleave.training.config import GrpoConfig
    from interleave.training.reward import reward_weights
    from interleave.training.rows import rows_file

    run, config = _load_config(GrpoConfig, "grpo_critic", resume, configs, sets, runs)
    reward_weights(config)
    _check_start(config, dry_run)
    _check_place(runs, name, "grpo_critic", run, resume_from, dry_run)
    check_models({} if dry_run else config.models)
    _ensure_set(run, configs, config, as_json, dry_run)
    rows_file(Path(config.data), "critic_rl")
    from interleave.training import run as launch

    launch.prepare_environment()
    from interleave.training import grpo

    if dry_run:
        _print_estimate(*grpo.plan_grpo(config, processes or launch.num_processes("interleave grpo")), as_json)
    else:
        _choose_checkpoint(run, resume_from)
        _print_model(grpo.train_grpo(config, sys.argv, runs=runs, name=name, resume=run), as_json)


def _check_place(
    runs: Path,
    name: str | None,
    default_name: str,
    run: Path | None,
    resume_from: Literal["last", "last-good"],
    dry_run: bool,
) -> None:
    """Raises UserError, before anything is built, for a name that is taken, a run that has ended, and options that do
    not go together."""
    from imgen_common.devices import launched_process
    from imgen_common.run_folder.folder import choose_checkpoint
    from interleave.training.config import find_place

    if run is not None and name is not None:
        raise UserError(f"--name {name}: is for a new run; leave it out, or leave --resume out")
    if run is None:
        choose_checkpoint(None, resume_from)  # refused, but for the default
    if not dry_run and launched_process(os.environ).rank == 0:  # the others find a new folder made by the first
        find_place(runs, name, default_name, run)


def _choose_checkpoint(run: Path | None, resume_from: Literal["last", "last-good"]) -> None:
    from imgen_common.run_folder.folder import choose_checkpoint
    from interleave.training import run as launch

    if launch.is_main_process():
        choose_checkpoint(run, resume_from)


def _load_config(
    cls: type[C], recipe: str, resume: str | None, configs: list[Path] | None, sets: list[str] | None, runs: Path
) -> tuple[Path | None, C]:
    """The run to resume, if any, and its configuration; without either that of the miniature's recipe."""
    from imgen_common.config import load
    from imgen_common.run_folder.find import CONFIG, find_run
    from interleave.training.trl_options import check_spelling

    run, command = None, recipe.partition("_")[0]
    if resume is not None:
        if configs:
            raise UserError("give a CONFIG to start a run, or --resume RUN to continue one (one of the two)")
        run = find_run(resume, runs, f"interleave {command}")
    config = load(cls, [run / CONFIG] if run else configs or [data.RECIPES / f"{recipe}.yaml"], sets or [])
    check_spelling(config.trl, f"{command.upper()}Config")
    return run, config


def _check_start(config: "TrainingConfig", dry_run: bool) -> None:
    """Raises UserError for a model that is not there, and, for more than a plan, for vLLM that is not installed, or
    DeepSpeed where no launcher started the process (it would look for MPI)."""
    from imgen_common import hub
    from interleave.training.trl_options import check_vllm_installed

    hub.resolve(config.model, weights=not dry_run)
    if not dry_run:
        check_vllm_installed(config.trl)
    if not dry_run and config.trl.get("deepspeed") is not None and "RANK" not in os.environ:
        how = "torchrun --nproc_per_node N -m interleave, also for N = 1"
        raise UserError(f"trl.deepspeed: needs processes that a launcher started; begin the command with {how}")


def _ensure_set(
    run: Path | None, configs: list[Path] | None, config: "TrainingConfig", as_json: bool, dry_run: bool
) -> None:
    """Builds the miniature's set where its recipe is run and the set is not there, if what the training is to do is
    possible.  Raises UserError if it is not, or the set may not be built."""
    if run is None and not configs and data.lacks_miniature_set(Path(config.data)):
        if may_build := not dry_run:
            from interleave.training import run as launch

            launch.prepare_environment()
            from interleave.training import grpo, sft
            from interleave.training.config import SftConfig

            (sft if isinstance(config, SftConfig) else grpo).check_settings(config)
            may_build = launch.num_processes("interleave") == 1
        data.build_miniature_set(Path(config.data), as_json, may_build)


def _print_estimate(
    plan: "SftBatchPlan | GrpoBatchPlan", memory: "MemoryEstimate", first: "FirstRow", as_json: bool
) -> None:
    if as_json:
        held = asdict(memory) | {"static": memory.static, "peak": memory.peak}
        print(json.dumps(asdict(plan) | {"memory": held, "first_row": asdict(first)}))
    else:
        print("\n".join([*first.lines(), *plan.lines(), *memory.lines()]))


def _print_model(model: Path, as_json: bool) -> None:
    from interleave.training import run as launch

    run = {"type": "Run", "path": str(model.parent), "model": str(model)}
    if launch.is_main_process():
        print(json.dumps(run) if as_json else f"model: {model}")
