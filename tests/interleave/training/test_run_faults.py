"""Trainings whose checkpoint is damaged, whose rows have changed, or whose disk fills: refused, or resumed exactly."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import losses

from imgen_common import hub
from imgen_common.errors import UserError
from imgen_common.run_folder.checkpoints import MANIFEST
from imgen_common.run_folder.folder import choose_checkpoint
from interleave.training import sft
from interleave.training.config import SftConfig

pytestmark = pytest.mark.exhaustive
QUICK = {"per_device_train_batch_size": 2, "max_steps": 4, "save_steps": 1, "logging_steps": 1}
QUICK |= {"learning_rate": 1e-3, "gradient_checkpointing": False, "disable_tqdm": True}


def stop_at(step: int) -> Any:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                raise KeyboardInterrupt

    return Stop()


def config_of(root: Path) -> SftConfig:
    return SftConfig(model=str(root / "model"), data=str(root / "set"), max_length=512, trl=QUICK)


def digest(model: Path) -> str:
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def straight(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of a run that nothing happened to."""
    return sft.train_sft("critic", config_of(root), ["t"], runs=tmp_path_factory.mktemp("straight"))


@pytest.fixture(scope="module")
def stopped(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of updates 1, 2 and 3."""
    runs = tmp_path_factory.mktemp("stopped")
    with pytest.raises(KeyboardInterrupt):
        sft.train_sft("critic", config_of(root), ["t"], runs=runs, name="run", callbacks=[stop_at(4)])
    return runs / "run"


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit of the weights": lambda folder: flip(folder / "model.safetensors"),
    "a flipped bit of the optimizer": lambda folder: flip(folder / "optimizer.pt"),
    "an empty optimizer": lambda folder: (folder / "optimizer.pt").write_bytes(b""),
    "a cut trainer state": lambda folder: (folder / "trainer_state.json").write_text('{"global_step": 3,'),
    "another step": lambda folder: shutil.copy(folder.parent / "checkpoint-2" / "trainer_state.json", folder),
    "no random state": lambda folder: (folder / "rng_state.pth").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named_and_the_checkpoint_before_leads_to_the_same_weights(
    damage: Callable[[Path], object], root: Path, straight: Path, stopped: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    damage(run / "checkpoints" / "checkpoint-3")
    with pytest.raises(UserError, match=r"checkpoint-3: damaged checkpoint \(.*that of step 2 is whole.*last-good"):
        sft.train_sft("critic", config_of(root), ["t"], resume=run)
    choose_checkpoint(run, "last-good")
    again = sft.train_sft("critic", config_of(root), ["t"], resume=run)
    assert digest(again) == digest(straight)
    assert losses(run) == losses(straight.parent)


def test_one_of_an_earlier_version_and_one_that_was_not_finished(
    root: Path, straight: Path, stopped: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    folder = run / "checkpoints"
    (folder / "checkpoint-3" / MANIFEST).unlink()
    (folder / "checkpoint-2" / MANIFEST).rename(folder / "checkpoint-2" / "whole")
    assert digest(sft.train_sft("critic", config_of(root), ["t"], resume=run)) == digest(straight)


def test_other_rows_are_refused(root: Path, stopped: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(root, tmp_path / "changed")
    file = changed / "set" / "critic_sft.jsonl"
    kept = file.read_text(encoding="utf-8")
    lines = kept.splitlines(keepends=True)
    run = shutil.copytree(stopped, tmp_path / "run")
    config = config_of(changed)
    # the set was moved, which makes no difference
    written = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(written.replace(str(root / "model"), str(changed / "model")))
    first = json.loads(lines[0])
    first["completion"] += " "
    for rows in (lines[:-1], [*lines[1:], lines[0]], [json.dumps(first) + "\n", *lines[1:]]):
        file.write_text("".join(rows), encoding="utf-8")
        with pytest.raises(UserError, match="critic_sft has changed since the run was started"):
            sft.train_sft("critic", config, ["t"], resume=run)
    file.write_text(kept, encoding="utf-8")
    weights = changed / "model" / "model.safetensors"
    trained_on = weights.read_bytes()
    weights.write_bytes(trained_on[:-4] + bytes(4))
    with pytest.raises(UserError, match="model has changed since the run was started"):
        sft.train_sft("critic", config, ["t"], resume=run)
    weights.write_bytes(trained_on)
    sft.train_sft("critic", config, ["t"], resume=run)


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_disk_that_fills_while_a_checkpoint_is_written_ends_the_run_in_one_line(
    file: str, root: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.save

    def full(content: Any, path: Any, **options: Any) -> None:
        if Path(str(path)).parts[-2:] == ("checkpoint-3", file):
            Path(path).write_bytes(b"half")
            raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534")
        real(content, path, **options)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(UserError, match="the disk is full; the checkpoint of step 2 is kept; make room and go on"):
            sft.train_sft("critic", config_of(root), ["t"], runs=tmp_path, name="run")
    assert sorted(path.name for path in (run / "checkpoints").glob("*-*")) == ["checkpoint-1", "checkpoint-2"]
    assert digest(sft.train_sft("critic", config_of(root), ["t"], resume=run)) == digest(straight)


def test_a_disk_that_fills_while_the_model_is_written_leaves_no_half_model(
    root: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = hub.check_folder

    def full(folder: Path, **options: Any) -> None:
        if folder.name == "model.new":
            raise OSError(28, "No space left on device", str(folder / "model.safetensors"))
        real(folder, **options)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(hub, "check_folder", full)
        with pytest.raises(UserError, match="the disk is full; the checkpoint of step 4 is kept; make room and go on"):
            sft.train_sft("critic", config_of(root), ["t"], runs=tmp_path, name="run")
    assert not list(run.glob("model*"))
    assert digest(sft.train_sft("critic", config_of(root), ["t"], resume=run)) == digest(straight)
