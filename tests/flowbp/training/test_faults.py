"""A run whose checkpoint, prompts or records are not what they were, and one that was killed before its first one."""

import shutil
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import flowbp
from flowbp.config import OptimConfig, TrainConfig
from flowbp.evaluation.results import load_evaluations
from flowbp.reports.run_data import read_run
from flowbp.training.progress import NullReporter
from flowbp.training.state import TorchTrainState
from imgen_common.config import load
from imgen_common.errors import UserError
from imgen_common.run_folder.folder import RunFolder, set_aside_damaged_checkpoints
from imgen_common.run_folder.listing import read_alerts

State = dict[str, dict[str, Tensor]]


def after_updates(count: int) -> tuple[TorchTrainState, State]:
    """A state after some updates, and what a checkpoint of it holds."""
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    state = TorchTrainState(net, OptimConfig(), Accelerator(cpu=True), sync_each_backward=False)
    for _ in range(count):
        net(torch.ones(1, 3)).sum().backward()
        state.step(0.1, 1.0, 0.5)
    return state, {group: {n: t.clone() for n, t in part.items()} for group, part in state.state_dict().items()}


SPOILED: dict[str, tuple[Callable[[State], object], str]] = {
    "a missing weight": (lambda s: s["weights"].pop("bias"), "weights: bias is missing"),
    "a missing average": (lambda s: s["ema"].pop("weight"), "ema: weight is missing"),
    "a missing moment": (lambda s: s["optimizer"].pop("bias/exp_avg"), "optimizer: bias/exp_avg is missing"),
    "a missing count": (lambda s: s["optimizer"].pop("bias/step"), "optimizer: bias/step is missing"),
    "an empty optimizer": (lambda s: s["optimizer"].clear(), "optimizer: .* is missing"),
    "weights of another model": (lambda s: s["weights"].update(extra=torch.ones(1)), "extra is not of this model"),
    "a row that broadcasts": (lambda s: s["weights"].update(weight=torch.ones(1, 3)), r"weight is \(1, 3\)"),
    "a number that broadcasts": (lambda s: s["ema"].update(bias=torch.tensor(1.0)), r"ema: bias is \(\)"),
    "half precision": (lambda s: s["weights"].update(bias=torch.ones(2).half()), "bias is .* torch.float16"),
    "moments in bfloat16": (
        lambda s: s["optimizer"].update({"bias/exp_avg": torch.ones(2).bfloat16()}),
        "bias/exp_avg is .* torch.bfloat16",
    ),
    "other updates": (
        lambda s: [value.fill_(7) for name, value in s["optimizer"].items() if name.endswith("/step")],
        "its optimizer has made 7 updates",
    ),
    "one other count": (lambda s: s["optimizer"]["bias/step"].fill_(9), "its optimizer has made 9 updates"),
}


@pytest.mark.parametrize(("spoil", "said"), SPOILED.values(), ids=SPOILED)
def test_a_state_that_is_not_of_these_weights_is_refused_unchanged(spoil: Callable[[State], object], said: str) -> None:
    state, saved = after_updates(2)
    spoil(saved)
    before = state.state_dict()
    with pytest.raises(UserError, match=f"the checkpoint of update 2: .*{said}"):
        state.load_state_dict(saved, 2)
    assert all(
        torch.equal(t, before[group][name]) for group, part in state.state_dict().items() for name, t in part.items()
    )


def test_a_whole_state_is_restored() -> None:
    for count in (0, 2):
        state, saved = after_updates(count)
        other, _ = after_updates(3)
        if count:
            other.load_state_dict(saved, count)
            found = other.state_dict()
            assert all(torch.equal(t, found[group][name]) for group, part in saved.items() for name, t in part.items())
        else:
            state.load_state_dict(saved, 0)


@pytest.mark.parametrize(
    "content",
    [
        *(
            "",
            "[]",
            "{",
            '{"name": "base"}',
            "[" * 50_000,
            '{"name": "base", "guidance": 1, "prompts": 3, "scores": {}}',
        ),
        '{"name": "base", "guidance": 1, "prompts": ["a", "b"], "scores": {"reward": [1]}, "groups": null}',
        '{"name": "base", "guidance": 1, "prompts": ["\\ud800"], "scores": {"reward": [1]}, "groups": null}',
    ],
)
def test_a_damaged_evaluation_is_named(content: str, tmp_path: Path) -> None:
    file = tmp_path / "evaluations" / "base-g1" / "scores.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with pytest.raises(UserError, match=r"base-g1/scores\.json: damaged \(.*\); restore or remove it"):
        load_evaluations(tmp_path)


@pytest.mark.parametrize(
    "content", ["[]", '{"sigmas": 3}', '{"sigmas": [1e999]}', '{"sigmas": ["a"]}', '{"sigmas": [1']
)
def test_a_damaged_grid_is_named(content: str, tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", TrainConfig(), ["flowbp"]).close()
    (tmp_path / "run" / "grid.json").write_text(content)
    with pytest.raises(UserError, match=r"grid\.json: damaged"):
        read_run(tmp_path / "run")


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"update": "x", "alerts": []}', '{"update": 2}', '{"update": 2, "alerts": 3}']
)
def test_damaged_lines_of_the_watchdog_are_left_out(line: str, tmp_path: Path) -> None:
    (tmp_path / "watchdog").mkdir()
    (tmp_path / "watchdog" / "log.jsonl").write_text(
        f'{{"update": 1, "alerts": []}}\n{line}\n{{"update": 3, "alerts": ["a"]}}\n'
    )
    assert read_alerts(tmp_path) == {1: [], 3: ["a"]}


# --- whole runs ------------------------------------------------------------------------------------------------------


class StopAt(NullReporter):
    """Stands for a kill right after an update, before anything is saved for it."""

    def __init__(self, update: int) -> None:
        self.last = update

    def update(self, update: int, metrics: Mapping[str, float]) -> None:
        if update == self.last:
            raise KeyboardInterrupt


def config_of(prompts: Path, *sets: str) -> TrainConfig:
    common = ["num_inference_steps=6", "total_batch_size=2", "max_train_steps=4", "checkpoint.every=2", "name=run"]
    common += ["method=flowbp_bridge", "method.active.num_active_steps=3", "trackers=[trackio]", "checkpoint.keep=3"]
    common += ["eval.num_prompts=2", "eval.num_inference_steps=2", "eval.guidance_scale=[1.0]"]
    common += ["eval.every=2", "eval.quick_num_prompts=2", f"data.prompts={prompts}"]
    return load(TrainConfig, [], [*common, *sets])


def state_of(run: Path) -> dict[str, Tensor]:
    tensors = RunFolder.open(run, is_main=False).load_checkpoint(4).tensors
    return {f"{group}/{name}": tensor.clone() for group, part in tensors.items() for name, tensor in part.items()}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("a red circle\na blue square\na green triangle\n")
    return file


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, frozenset[str]]]:
    """What a tracker receives."""
    found: list[tuple[int, frozenset[str]]] = []
    tracker: Any = types.ModuleType("trackio")
    tracker.init, tracker.finish = (lambda **options: None), (lambda: None)
    tracker.log = lambda values, step: found.append((step, frozenset(values)))
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    return found


@pytest.mark.exhaustive
def test_a_kill_before_the_first_checkpoint_leaves_no_evaluation_twice(
    prompts: Path, tmp_path: Path, sent: list[tuple[int, frozenset[str]]]
) -> None:
    config = config_of(prompts)
    whole = flowbp.train(config, tmp_path / "whole")
    straight = list(sent)
    sent.clear()
    with pytest.raises(KeyboardInterrupt):
        flowbp.train(config, tmp_path, reporter=StopAt(1))
    killed = flowbp.train(config, tmp_path, resume=tmp_path / "run")
    lines = [
        [(line["step"], frozenset(line) - {"step"}) for line in RunFolder(run, False).metrics()]
        for run in (whole, killed)
    ]
    assert lines[0] == lines[1] == straight == sent
    ours, theirs = state_of(killed), state_of(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert read_alerts(killed).keys() == read_alerts(whole).keys()


@pytest.mark.exhaustive
def test_a_run_goes_on_from_its_last_whole_checkpoint_to_the_same_weights_but_not_with_other_prompts(
    prompts: Path, tmp_path: Path, sent: list[tuple[int, frozenset[str]]]
) -> None:
    config = config_of(prompts)
    run = flowbp.train(config, tmp_path)
    before = state_of(run)
    for damage, number in (("optimizer", ""), ("weights", "-2")):
        file = run / "checkpoints" / "step-000004" / f"{damage}.safetensors"
        content = bytearray(file.read_bytes())
        content[-3] ^= 16
        file.write_bytes(content)
        with pytest.raises(
            UserError, match=rf"the content of {damage}.safetensors has changed\); that of step 2 is whole"
        ):
            flowbp.train(config, tmp_path, resume=run)
        assert [path.name for path in set_aside_damaged_checkpoints(run)] == [f"damaged-step-000004{number}"]
        flowbp.train(config, tmp_path, resume=run)
        assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(run).items())
    kept = prompts.read_text()
    for changed in (
        "a red circle\na blue square\n",
        kept.replace("green", "red"),
        "\n".join(reversed(kept.split("\n"))),
    ):
        prompts.write_text(changed)
        try:
            with pytest.raises(UserError, match=r"data\.prompts has changed since the run was started"):
                flowbp.train(config, tmp_path, resume=run)
        finally:
            prompts.write_text(kept)


@pytest.mark.exhaustive
def test_a_disk_that_fills_in_mid_run_ends_it_in_one_line(
    prompts: Path, tmp_path: Path, sent: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the images of an evaluation, at a line of metrics, at a checkpoint: what is there is whole, and goes on."""
    config = config_of(prompts)
    before = state_of(flowbp.train(config, tmp_path / "whole"))
    places = {
        "image": ("PIL.Image.Image.save", 9),
        "metrics": ("imgen_common.run_folder.folder.append_line", 5),
        "checkpoint": ("imgen_common.run_folder.checkpoints._save_group", 4),
    }
    for name, (target, calls) in places.items():
        with monkeypatch.context() as patch:
            fail_after(calls, target, patch)
            with pytest.raises(UserError, match=r"the disk is full|no room for a checkpoint") as caught:
                flowbp.train(config.model_copy(update={"name": name}), tmp_path)
        assert "--resume" in str(caught.value)
        assert "\n" not in str(caught.value)
        run = tmp_path / name
        assert not [path for path in run.rglob("*") if path.name.startswith(".") and path.name != ".lock"]
        assert all((path / "scores.json").exists() for path in (run / "evaluations").iterdir())
        flowbp.train(config.model_copy(update={"name": name}), tmp_path, resume=run)
        assert all(torch.equal(tensor, before[key]) for key, tensor in state_of(run).items())
        shutil.rmtree(run)


def fail_after(calls: int, target: str, patch: pytest.MonkeyPatch) -> None:
    """Makes a function find the disk full after some calls."""
    owner_name, _, name = target.rpartition(".")
    owner = pytest.importorskip("PIL.Image").Image if "PIL" in owner_name else sys.modules[owner_name]
    real, left = getattr(owner, name), [calls]

    def full(*given: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return real(*given, **options)

    patch.setattr(owner, name, full)
