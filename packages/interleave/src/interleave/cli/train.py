"""The commands `interleave sft` and `interleave grpo`.  Nothing heavy is imported before one runs."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imgen_common.errors import UserError

if TYPE_CHECKING:
    from interleave.training.batch_plan import GrpoSums, SftSums
    from interleave.training.memory import Memory

Files = Annotated[
    list[Path] | None, typer.Argument(metavar="CONFIG...", help="YAML files, later ones over earlier ones.")
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the configuration; may be given again."),
]
Resume = Annotated[str | None, typer.Option(metavar="RUN", help="Go on with a run that was stopped or killed.")]
Name = Annotated[str | None, typer.Option(metavar="NAME", help="Name of the run folder.")]
Runs = Annotated[Path, typer.Option("--runs", metavar="DIR", help="Folder that holds the run folders.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print batches, calls, cost and memory; start nothing.")]
Processes = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="With --dry-run: processes to plan for; else those launched.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines, and nothing else.")]


class Agent(StrEnum):
    """Who is trained."""

    planner = "planner"
    critic = "critic"


def sft(
    agent: Annotated[Agent, typer.Argument(help="Which agent to train.")],
    configs: Files = None,
    sets: Sets = None,
    resume: Resume = None,
    name: Name = None,
    runs: Runs = Path("runs"),
    dry_run: DryRun = False,
    processes: Processes = None,
    as_json: Json = False,
) -> None:
    """Train planner or critic on examples, with TRL's SFTTrainer; only the answers are learnt. The run folder holds
    checkpoints, numbers and, at the end, `model/`, which `interleave run` loads.

    Example:

    \b
      interleave sft critic configs/interleave/sft_critic.yaml --dry-run --processes 8
      interleave sft critic configs/interleave/sft_critic.yaml --set data=sets/mine
      torchrun --nproc_per_node 8 -m interleave sft planner configs/interleave/sft_planner_qwen3vl.yaml
      interleave sft critic --resume sft_critic
    """
    from interleave.training import run as launch

    launch.quiet_environment()
    from imgen_common.config import load
    from imgen_common.run_folder.find import CONFIG
    from interleave.training import sft
    from interleave.training.config import SftConfig

    run = _resumed(resume, configs, runs)
    files = [run / CONFIG] if run else []
    config = load(SftConfig, [*files, *(configs or [])], sets or [])
    if dry_run:
        _tell(*sft.plan(agent.value, config, processes or launch.num_processes("interleave sft")), as_json)
        return
    _done(sft.train(agent.value, config, sys.argv, runs=runs, name=name, resume=run), as_json)


def grpo(
    configs: Files = None,
    sets: Sets = None,
    resume: Resume = None,
    name: Name = None,
    runs: Runs = Path("runs"),
    dry_run: DryRun = False,
    processes: Processes = None,
    as_json: Json = False,
) -> None:
    """Train the critic by reinforcement, with TRL's GRPOTrainer: an answer is worth what the picture drawn with its
    prompt is worth to the judge. It does not start where generator or judge is down, and stops, with a checkpoint,
    where they fail too often.

    Example:

    \b
      interleave grpo configs/interleave/grpo_critic.yaml --dry-run
      interleave grpo configs/interleave/grpo_critic.yaml --set model=runs/sft_critic/model
      torchrun --nproc_per_node 8 -m interleave grpo configs/interleave/grpo_critic_qwen3vl.yaml
      interleave grpo --resume grpo_critic
    """
    from interleave.training import run as launch

    launch.quiet_environment()
    from imgen_common.config import load
    from imgen_common.run_folder.find import CONFIG
    from interleave.training import grpo
    from interleave.training.config import GrpoConfig

    run = _resumed(resume, configs, runs)
    files = [run / CONFIG] if run else []
    config = load(GrpoConfig, [*files, *(configs or [])], sets or [])
    if dry_run:
        _tell(*grpo.plan(config, processes or launch.num_processes("interleave grpo")), as_json)
        return
    _done(grpo.train(config, sys.argv, runs=runs, name=name, resume=run), as_json)


def _resumed(resume: str | None, configs: list[Path] | None, runs: Path) -> Path | None:
    from imgen_common.run_folder.find import find_run

    if (resume is None) == (not configs):
        raise UserError("give a CONFIG to begin, or --resume RUN to go on (one of the two)")
    return None if resume is None else find_run(resume, runs)


def _tell(sums: "SftSums | GrpoSums", held: "Memory", as_json: bool) -> None:
    from interleave.training import batch_plan

    if as_json:
        print(json.dumps(batch_plan.as_json(sums, held)))
    else:
        print("\n".join([*sums.told(), *held.told()]))


def _done(model: Path, as_json: bool) -> None:
    from interleave.training import run as launch

    if launch.is_main():
        print(
            json.dumps({"type": "Run", "path": str(model.parent), "model": str(model)})
            if as_json
            else f"model: {model}"
        )
