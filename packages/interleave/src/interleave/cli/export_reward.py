"""The command `interleave export-reward`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from imgen_common.console import spinner
from imgen_common.errors import UserError, quoted
from interleave.cli.options import Configs, Json, Runs, Sets

MAKERS = ("interleave sft", "interleave grpo")
"""Commands that train critics."""


def export_reward(
    critic: Annotated[
        str,
        typer.Argument(
            metavar="CRITIC", help="A run of sft or grpo, its name under --runs, a model folder, or builtin:..."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to create.")],
    configs: Configs = None,
    sets: Sets = None,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Write a critic as a reward that flowbp can train a generator on: its model as safetensors, and reward.json with
    its template, the rule by which its answers accept an image, and how answers are sampled. These are those of the
    critic in CONFIG, a configuration of `interleave run`. Without CONFIG the template is the one that the run was
    trained with, and the rest as for the miniature. The reward of a critic that answers without reasoning
    (critic.parse_mode=direct, or a run of sft with reasoning=false) is the log-odds of its verdict.

    Example:

    \b
      interleave export-reward builtin:shapes/critic --out rewards/critic
      interleave export-reward grpo_critic --out rewards/grpo --set critic.num_samples=16
      interleave export-reward Qwen/Qwen3-VL-8B-Instruct configs/interleave/klein_qwen3vl.yaml --out rewards/qwen3vl
      flowbp train --set rewards.0.score=vlm --set rewards.0.ref=rewards/critic
    """
    with spinner("exporting"):
        from imgen_common.config import load
        from imgen_common.files import check_is_new
        from interleave.loop.config import RunConfig

        check_is_new(out)
        # from here on torch is needed
        from interleave.loop.reward_folder import export_reward as write

        model, template = _find_critic(critic, runs, configs)
        config = load(RunConfig, configs or [], [*template, *(sets or [])])
        folder = write(model, config, out)
    print(json.dumps({"type": "Reward", "path": str(folder)}) if as_json else f"reward: {folder}")


def _find_critic(text: str, runs: Path, configs: list[Path] | None) -> tuple[str, list[str]]:
    """The model that `text` names, and as for `--set` its template and whether it answers without reasoning, where they
    are known and not configured.

    Raises UserError for a run that is not finished, and where no template is known.
    """
    from imgen_common.config import read_yaml
    from imgen_common.run_folder.data import recorded_data
    from imgen_common.run_folder.find import CONFIG, check_is_model, find_run, is_run
    from interleave.datasets.check import read_set_info

    if not is_run(text, runs):
        check_is_model(text, runs, *MAKERS)
        if not configs and not text.startswith("builtin:"):
            raise UserError(
                f"{text}: a model alone does not say with which template it judges; give the CONFIG of "
                "`interleave run` in which it is the critic"
            )
        return text, []
    run = find_run(text, runs, *MAKERS)
    if not (run / "model").is_dir():
        raise UserError(f"{run}: has no model yet; finish it with --resume {quoted(run)}, or name a folder of weights")
    if configs:
        return str(run / "model"), []
    if "planner_sft" in recorded_data(run):
        raise UserError(f"{run}: trained a planner; name a run of a critic, or give the CONFIG in which it judges")
    trained = read_yaml(run / CONFIG)
    info = read_set_info(Path(str(trained.get("data"))))
    template = trained.get("template") or (info.templates.get("critic") if info else None)
    if template is None:
        raise UserError(
            f"{run}: the template of its rows is not known (no set.json in {trained.get('data')}); give the CONFIG of "
            "`interleave run` in which it is the critic"
        )
    shown = template if isinstance(template, str | dict) else template.model_dump()
    is_direct = trained.get("reasoning") is False or (trained.get("scorer") or {}).get("parse_mode") == "direct"
    mode = ["critic.parse_mode=direct"] if is_direct else []
    return str(run / "model"), [f"critic.template={json.dumps(shown)}", *mode]
