"""A run killed at any moment, three times over, ends with the very weights of one that was left alone."""

import random
import shutil
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import forking
import pytest
import torch
from tiers import tiers

from flowbp.config import TrainConfig
from flowbp.training import runs
from flowbp.training.preflight import hash_settings
from imgen_common import hub
from imgen_common.config import load, to_yaml
from imgen_common.errors import UserError
from imgen_common.run_folder.data import FIRST_CONFIG, record_data
from imgen_common.run_folder.find import CONFIG
from imgen_common.run_folder.folder import RunFolder

NUM_UPDATES = 14
SETS = [
    *(
        "num_inference_steps=6",
        "total_batch_size=4",
        f"max_train_steps={NUM_UPDATES}",
        "checkpoint.every=3",
        "method=flowbp_bridge",
    ),
    *(
        "eval.num_prompts=4",
        "eval.num_inference_steps=2",
        "eval.guidance_scale=[1.0]",
        "eval.every=5",
        "eval.quick_num_prompts=4",
    ),
]
ADAPTERS = {"full": [], "lora": ["lora.rank=4"], "edits": ["lora.rank=4", "data.prompts=builtin:shapes/edits"]}


def start(folder: Path, *arguments: str) -> BaseProcess:
    words = ("flowbp", "train", "--runs", str(folder), *arguments)
    return forking.start(forking.command, *words, log=folder / "log")


def wait_for(process: BaseProcess, run: Path, update: int) -> None:
    """Until the run has logged an update."""
    while not any(line["step"] >= update for line in metrics(run)):
        assert process.is_alive(), (run.parent / "log").read_text()
        time.sleep(0.01)


def metrics(run: Path) -> list[dict]:
    return RunFolder.open(run, is_main=False).metrics() if (run / "config.yaml").exists() else []


def final_state(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = RunFolder.open(run, is_main=False).load_checkpoint(NUM_UPDATES)
    return {f"{group}/{k}": v for group, tensors in checkpoint.tensors.items() for k, v in tensors.items()}


@pytest.mark.parametrize("adapters", tiers(ADAPTERS))
def test_kill_nine_three_times(tmp_path: Path, adapters: str) -> None:
    sets = [part for text in [*SETS, *ADAPTERS[adapters]] for part in ("--set", text)]
    log = tmp_path / "log"
    forking.finish(start(tmp_path, *sets, "--set", "name=whole"), log)

    rng = random.Random(adapters)
    run, arguments = tmp_path / "killed", [*sets, "--set", "name=killed"]
    for moment in sorted(rng.sample(range(1, NUM_UPDATES), 3)):
        process = start(tmp_path, *arguments)
        wait_for(process, run, moment)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        arguments = ["--resume", str(run)]
    forking.finish(start(tmp_path, *arguments), log)

    ours, theirs = final_state(run), final_state(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    updates = [line["step"] for line in metrics(run) if "train/loss" in line]
    assert updates == list(range(1, NUM_UPDATES + 1))


@pytest.mark.parametrize(
    ("edit", "refused"),
    [
        (("  seed: 1\n", "  seed: 99\n"), "the run has eval.seed = 1, now 99 was given"),
        (("combine: weighted", "combine: normalized"), "the run has combine"),
        (("eval:\n  model: null", "eval:\n  model: builtin:shapes/generator"), "the run has eval.model = null"),
        (("max_train_steps: 105", "max_train_steps: 200"), None),
    ],
)
def test_a_run_whose_configuration_was_edited_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit: tuple[str, str], refused: str | None
) -> None:
    def check_run(*_: object, **__: object) -> None:
        raise UserError("what else is checked")

    monkeypatch.setattr(runs, "check_run", check_run)
    config = load(TrainConfig, [], ["lora.rank=4"])
    run, text = tmp_path / "run", to_yaml(config)
    RunFolder.create(run, config).close()
    assert text.count(edit[0]) == 1
    (run / "config.yaml").write_text(text.replace(*edit))
    edited = load(TrainConfig, [run / "config.yaml"])
    said = (
        None
        if refused is None
        else rf"run/config.yaml: edited since the run was started, by config-at-start.yaml: .*{refused}"
    )
    with pytest.raises(UserError, match=said or "what else is checked"):
        runs.check_training(edited, tmp_path, run)
    (run / FIRST_CONFIG).unlink()  # as in a run of an earlier version
    with pytest.raises(UserError, match="what else is checked"):
        runs.check_training(edited, tmp_path, run)


def test_a_run_is_resumed_with_its_models_at_other_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check_run(*_: object, **__: object) -> None:
        raise UserError("what else is checked")

    monkeypatch.setattr(runs, "check_run", check_run)
    run, config = tmp_path / "run", TrainConfig()
    RunFolder.create(run, config).close()
    places = {"model.ref": "generator", "rewards.0.ref": "reward", "heldout.0.ref": "heldout"}
    for name in places.values():
        shutil.copytree(hub.resolve(f"builtin:shapes/{name}"), tmp_path / name)
    moved = load(TrainConfig, [run / CONFIG], [f"{key}={tmp_path / name}" for key, name in places.items()])
    with pytest.raises(UserError, match=r'the run has model\.ref = "builtin:shapes/generator", now ".*" was given'):
        runs.check_training(moved, tmp_path, run)  # without hashes, as in a run of an earlier version
    record_data(run, hash_settings(config))
    with pytest.raises(UserError, match="what else is checked"):
        runs.check_training(moved, tmp_path, run)
    (run / CONFIG).write_text(to_yaml(moved))
    with pytest.raises(UserError, match="what else is checked"):
        runs.check_training(load(TrainConfig, [run / CONFIG]), tmp_path, run)
    other = load(TrainConfig, [run / CONFIG], [f"rewards.0.ref={tmp_path / 'heldout'}"])
    with pytest.raises(UserError, match=rf"the reward {config.rewards[0].name} has changed since the run was started"):
        runs.check_training(other, tmp_path, run)
