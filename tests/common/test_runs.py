import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import types
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from imgen_common.config import Config
from imgen_common.errors import UserError
from imgen_common.files import write_atomic
from imgen_common.run_folder import checkpoints
from imgen_common.run_folder import folder as runs
from imgen_common.run_folder.environment import _git
from imgen_common.run_folder.find import find_run, free_path, is_run
from imgen_common.run_folder.folder import RunFolder

COMMAND = ["flowbp", "train", "--set", "steps=3"]


class Settings(Config):
    steps: int = 3
    rate: float = 1e-4
    parts: tuple[int, ...] = (1, 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "one"


def new_run(folder: Path) -> RunFolder:
    return RunFolder.create(folder, Settings(), COMMAND)


def weights(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"a.b": torch.full((2, 3), value), "count": torch.tensor(7)}, "ema": {"a.b": torch.zeros(1)}}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_create_records_what_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "hidden-value")
    with new_run(folder) as run:
        assert run.config(Settings) == Settings()
    record = json.loads((folder / "environment.json").read_text())
    assert record["command"] == COMMAND
    assert record["packages"]["torch"] == metadata.version("torch")
    assert record["device"]["kind"] in ("cpu", "cuda")
    assert {"python", "platform", "git"} <= set(record)
    assert "hidden-value" not in (folder / "environment.json").read_text()


def test_git_tells_revision_and_change_but_not_the_lock(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    assert _git(tmp_path) is None
    git("init")
    for name in ("uv.lock", "code.py"):
        (tmp_path / name).write_text("1")
    git("add", ".")
    git("commit", "-m", "one")
    found = _git(tmp_path)
    assert found is not None
    assert len(found["revision"]) == 40
    (tmp_path / "uv.lock").write_text("2")
    assert _git(tmp_path) == found == {"revision": found["revision"], "dirty": False}
    (tmp_path / "code.py").write_text("2")
    assert _git(tmp_path) == found | {"dirty": True}


def test_create_refuses_a_run_or_any_other_content(folder: Path, tmp_path: Path) -> None:
    new_run(folder).close()
    before = files(folder)
    with pytest.raises(UserError, match="--resume or choose another name"):
        new_run(folder)
    assert files(folder) == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and not a run"):
        new_run(tmp_path / "notes")
    with pytest.raises(UserError, match="a file, not a folder"):
        new_run(tmp_path / "notes" / "a.txt")
    with pytest.raises(UserError, match="cannot be written"):
        new_run(tmp_path / "notes" / "a.txt" / "run")
    assert files(tmp_path / "notes") == {"a.txt": b"mine"}


def test_of_two_starts_at_once_the_second_leaves_the_first_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def after_another(path: Path) -> int:
        monkeypatch.undo()
        new_run(path).close()
        return runs._acquire(path)

    monkeypatch.setattr(runs, "_acquire", after_another)
    with pytest.raises(UserError, match="holds a run already"):
        new_run(folder)
    RunFolder.open(folder).close()


def test_the_lock_of_a_folder_that_a_group_shares_can_be_taken_by_others_of_it(folder: Path) -> None:
    before = os.umask(0o002)
    try:
        new_run(folder).close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / ".lock").stat().st_mode) == 0o664


def test_create_takes_an_empty_folder_and_one_killed_at_birth(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in (".lock", "environment.json", ".config.yaml.tmp"):
        (folder / name).write_text("{")
    new_run(folder).close()
    assert RunFolder.open(folder).config(Settings) == Settings()


def test_open_wants_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        RunFolder.open(tmp_path)
    with pytest.raises(UserError, match="not a run folder"):
        RunFolder.open(tmp_path / "none")
    assert files(tmp_path) == {}


def test_open_refuses_another_configuration(folder: Path) -> None:
    new_run(folder).close()
    RunFolder.open(folder, Settings()).close()
    with pytest.raises(UserError, match=r"the run has rate = 0\.0001, now 0\.1 was given"):
        RunFolder.open(folder, Settings(rate=0.1))
    with pytest.raises(UserError, match=r"parts\.1 = 2, now null"):
        RunFolder.open(folder, Settings(parts=(1,)))
    RunFolder.open(folder, Settings(steps=9), may_differ=["steps"]).close()
    RunFolder.open(folder, Settings(parts=()), may_differ=["parts"]).close()


class Part(Config):
    size: int = 1
    depth: int = 2


class LaterSettings(Settings):
    """What `Settings` has become in a later version."""

    mode: str = "plain"
    part: Part = Part()
    extra: Part | None = None


def test_keys_of_a_later_version_have_their_defaults_in_runs_of_an_earlier_one(folder: Path) -> None:
    new_run(folder).close()
    RunFolder.open(folder, LaterSettings()).close()
    with pytest.raises(UserError, match=r'the run has mode = null, now "fancy"'):
        RunFolder.open(folder, LaterSettings(mode="fancy"))
    with pytest.raises(UserError, match=r"the run has part\.size = null, now 3"):
        RunFolder.open(folder, LaterSettings(part=Part(size=3)))
    with pytest.raises(UserError, match=r"the run has extra\.size = null, now 1"):
        RunFolder.open(folder, LaterSettings(extra=Part()))
    write_atomic(folder / "config.yaml", "steps: 3\nrate: 0.0001\nparts: [1]\npart: {size: 1}\n")
    with pytest.raises(UserError, match=r"the run has parts\.1 = null, now 2"):
        RunFolder.open(folder, LaterSettings())
    write_atomic(folder / "config.yaml", "steps: 3\nrate: 0.0001\nparts: [1, 2]\npart: {size: 1}\n")
    RunFolder.open(folder, LaterSettings()).close()


def test_open_keeps_the_environments_before(folder: Path) -> None:
    new_run(folder).close()
    for number in range(2):
        RunFolder.open(folder, command=["again", str(number)]).close()
    record = json.loads((folder / "environment.json").read_text())
    assert record["command"] == ["again", "1"]
    assert [earlier["command"] for earlier in record["earlier"]] == [COMMAND, ["again", "0"]]


def test_a_second_process_is_refused_until_the_first_is_killed(folder: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from imgen_common.config import Config;"
        "from imgen_common.run_folder.folder import RunFolder;"
        "run = RunFolder.open(Path(sys.argv[1])); print('open', flush=True); time.sleep(60)"
    )
    new_run(folder).close()
    with subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "open\n"
        with pytest.raises(UserError, match=rf"in use by another process \(pid {first.pid}\)"):
            RunFolder.open(folder)
        RunFolder.open(folder, is_main=False).close()
        first.kill()
        first.wait()
    RunFolder.open(folder).close()


def test_other_ranks_write_nothing(folder: Path, tmp_path: Path) -> None:
    other = RunFolder(folder, is_main=False)
    other.log(1, {"loss": 1.0})
    other.save_checkpoint(1, weights(1), {})
    other.log_image(1, "grid", Image.new("RGB", (2, 2)))
    other.rewind(0)
    assert files(tmp_path) == {}
    with new_run(folder) as run:
        run.save_checkpoint(1, weights(1), {})
        other.prune(last=1)
        assert other.latest_checkpoint() == 1
        assert torch.equal(other.load_checkpoint(1).tensors["model"]["a.b"], torch.ones(2, 3))


def test_metrics_are_json_lines_and_tensorboard(folder: Path) -> None:
    with new_run(folder) as run:
        run.log(0, {"loss": 2.0, "norm": float("inf")})
        run.log(1, {"loss": np.float32(0.5), "norm": float("nan")})
        run.log_image(1, "grid", Image.new("RGB", (4, 3), "red"))
        assert run.metrics() == [{"step": 0, "loss": 2.0, "norm": None}, {"step": 1, "loss": 0.5, "norm": None}]
    assert any(name.startswith("tensorboard/events") for name in files(folder))
    assert Image.open(folder / "samples" / "grid-000001.png").size == (4, 3)


def test_rewind_forgets_later_steps_and_a_torn_line(folder: Path) -> None:
    with new_run(folder) as run:
        for step in range(5):
            run.log(step, {"loss": step})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    with RunFolder.open(folder) as run:
        assert len(run.metrics()) == 5
        run.rewind(2)
        run.log(3, {"loss": 33})
        assert [(line["step"], line["loss"]) for line in run.metrics()] == [(0, 0), (1, 1), (2, 2), (3, 33)]
        run.rewind(-1)
        assert run.metrics() == []


class Recorder(types.ModuleType):
    """A tracker that remembers how it was called."""

    def __init__(self, name: str = "trackio") -> None:
        super().__init__(name)
        self.calls: list[Any] = []

    def init(self, **options: Any) -> types.SimpleNamespace:
        self.calls.append(options)
        chosen = options.get("id") or f"id-{len(self.calls)}"
        name = options["name"] if options["resume"] == "allow" else f"{options['name']}-7"  # it is taken
        return types.SimpleNamespace(id=chosen, entity="us", project=options["project"], name=name)

    def log(self, values: dict[str, float], step: int) -> None:
        self.calls.append((step, values))

    def finish(self) -> None:
        self.calls.append("finish")


def test_trackers_get_the_numbers_when_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "trackio", recorder)
    with RunFolder.create(folder, Settings(), COMMAND, trackers=["trackio"]) as run:
        run.log(1, {"loss": 1.0})
    options, logged, finish = recorder.calls
    assert (options["project"], options["name"], options["config"]["steps"]) == ("runs", "one", 3)
    assert (logged, finish) == ((1, {"loss": 1.0}), "finish")


@pytest.mark.parametrize(
    ("tracker", "identity"),
    [("wandb", {"id": "id-1", "entity": "us", "name": "one"}), ("trackio", {"name": "one-7"})],
)
def test_a_resumed_run_goes_on_as_the_same_run_of_its_tracker(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tracker: Any, identity: dict[str, str]
) -> None:
    recorder = Recorder(tracker)
    monkeypatch.setitem(sys.modules, tracker, recorder)
    RunFolder.create(folder, Settings(), COMMAND, trackers=[tracker]).close()
    moved = folder.parent.rename(folder.parent.with_name("moved")) / "renamed"
    (moved.parent / "one").rename(moved)
    for _ in range(2):
        RunFolder.open(moved, Settings(), COMMAND, trackers=[tracker]).close()
    first, *later = [call for call in recorder.calls if call != "finish"]
    assert (first["resume"], first.get("id"), first["project"]) == ("never", None, "runs")
    for call in later:
        expected = identity if tracker == "trackio" else identity | {"name": "renamed"}
        assert (call["resume"], call["project"]) == ("allow", "runs")
        assert expected.items() <= call.items()


def test_a_tracker_that_is_added_later_starts_a_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder("wandb")
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    new_run(folder).close()
    RunFolder.open(folder, Settings(), COMMAND, trackers=["wandb"]).close()
    RunFolder.open(folder, Settings(), COMMAND, trackers=["wandb"]).close()
    begun = [(call["resume"], call["project"]) for call in recorder.calls if call != "finish"]
    assert begun == [("never", "ours"), ("allow", "ours")]
    (folder / "trackers.json").write_text("[")
    with pytest.raises(UserError, match=r"trackers\.json: damaged"):
        RunFolder.open(folder, Settings(), COMMAND, trackers=["wandb"])


def test_a_start_that_fails_in_a_folder_that_was_there_can_be_tried_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: Any) -> None:
        raise RuntimeError("not logged in")

    folder.mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(__name__="trackio", init=refuse))
    for _ in range(2):
        with pytest.raises(UserError, match="not logged in"):
            RunFolder.create(folder, Settings(), COMMAND, trackers=["trackio"])
    RunFolder.create(folder, Settings(), COMMAND).close()


def test_a_file_in_the_place_of_the_run_folders_is_said(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(UserError, match=r"--runs .*runs: is a file; give the folder that holds the run folders"):
        free_path(tmp_path / "runs", "x", "run")


def test_a_missing_tracker_is_a_user_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="'wandb' is not installed"):
        RunFolder.create(folder, Settings(), COMMAND, trackers=["wandb"])
    assert not folder.exists()


def test_a_tracker_that_does_not_start_is_a_user_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class LoggedOutError(Exception):
        pass

    def init(**options: Any) -> None:
        raise LoggedOutError("api_key not configured (no-tty).\ncall wandb.login()")

    recorder = Recorder("wandb")
    monkeypatch.setattr(recorder, "init", init)
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    said = r"tracker wandb: cannot be started \(api_key not configured \(no-tty\)\. call wandb\.login\(\)\); log in"
    with pytest.raises(UserError, match=said):
        RunFolder.create(folder, Settings(), COMMAND, trackers=["wandb"])
    assert not folder.exists()
    new_run(folder).close()
    with pytest.raises(UserError, match=said):
        RunFolder.open(folder, Settings(), COMMAND, trackers=["wandb"])


def test_a_tracker_that_fails_in_mid_run_does_not_end_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def log(values: dict[str, float], step: int) -> None:
        raise ConnectionError("network down")

    recorder = Recorder()
    monkeypatch.setattr(recorder, "log", log)
    monkeypatch.setitem(sys.modules, "trackio", recorder)
    with RunFolder.create(folder, Settings(), COMMAND, trackers=["trackio"]) as run:
        for step in (1, 2, 3):
            run.log(step, {"loss": 1.0})
        assert [line["step"] for line in run.metrics()] == [1, 2, 3]
    assert capsys.readouterr().err.count("tracker trackio: did not take numbers (network down); metrics.jsonl") == 1


def test_a_tracker_that_does_not_end_undoes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def finish() -> None:
        raise ConnectionError("network down")

    recorder = Recorder()
    monkeypatch.setattr(recorder, "finish", finish)
    monkeypatch.setitem(sys.modules, "trackio", recorder)
    with RunFolder.create(folder, Settings(), COMMAND, trackers=["trackio"]) as run:
        run.log(1, {"loss": 1.0})
    assert capsys.readouterr().err.count("tracker trackio: was not ended (network down); what it lacks is in metr") == 1
    RunFolder.open(folder).close()  # the lock was given back


def test_checkpoints_come_back_equal(folder: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    tensors = {
        "model": {
            "whole": base,
            "tied": base,
            "view": base[:, 1],
            "turned": base.t(),
            "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
            "none": torch.zeros(0, 3),
            "parameter": torch.nn.Parameter(torch.ones(2)),
        },
        "random": {"state": torch.get_rng_state(), "flags": torch.tensor([True, False])},
        "empty": {},
    }
    state = {"cursor": 3, "names": ["a", None], "best": float("-inf"), "nested": {"x": 0.1}}
    with new_run(folder) as run:
        assert run.latest_checkpoint() is None
        run.save_checkpoint(12, tensors, state)
        step, loaded, loaded_state = run.load_checkpoint(12)
    assert (step, loaded_state) == (12, state)
    assert loaded.keys() == tensors.keys()
    for name, group in tensors.items():
        assert loaded[name].keys() == group.keys()
        assert all(torch.equal(loaded[name][key], tensor) for key, tensor in group.items())
        assert all(loaded[name][key].dtype == tensor.dtype for key, tensor in group.items())
    assert (folder / "checkpoints" / "step-000012" / "model.safetensors").is_file()


@settings(max_examples=30)
@given(st.lists(st.integers(0, 10**7), unique=True, min_size=1, max_size=6), st.integers(1, 4), st.data())
def test_prune_keeps_the_newest_and_the_named(steps: list[int], last: int, data: st.DataObject) -> None:
    named = data.draw(st.sets(st.sampled_from(steps)))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "checkpoints"
        for step in steps:
            (folder / f"step-{step:06d}").mkdir(parents=True)
        run = RunFolder(Path(place), is_main=True)
        run.prune(last, named)
        assert run.checkpoints() == sorted(set(sorted(steps)[-last:]) | named)
        assert len(list(folder.iterdir())) == len(run.checkpoints())


def test_load_names_the_steps_there_are_and_damage(folder: Path) -> None:
    with new_run(folder) as run:
        with pytest.raises(UserError, match="no checkpoint of step 3; there are: none"):
            run.load_checkpoint(3)
        run.save_checkpoint(1, weights(1), {})
        run.save_checkpoint(2, weights(2), {})
        with pytest.raises(UserError, match="there are: 1, 2"):
            run.load_checkpoint(3)
        file = folder / "checkpoints" / "step-000002" / "ema.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(UserError, match="damaged checkpoint"):
            run.load_checkpoint(2)


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_full_disk_is_noticed_before_writing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with new_run(folder) as run:
        run.save_checkpoint(1, weights(1), {})
        before = files(folder)
        monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 1000, 1000))
        with pytest.raises(UserError, match=r"no room for a checkpoint: \d+ bytes .* needed, 1000 free"):
            run.save_checkpoint(2, weights(2), {})
        assert files(folder) == before


@pytest.mark.parametrize("said", [Usage(0, 0, 0), OSError(errno.ENOSYS, "Function not implemented")])
def test_a_file_system_that_does_not_say_its_room_is_written_to(
    folder: Path, monkeypatch: pytest.MonkeyPatch, said: Usage | OSError
) -> None:
    def ask(path: Path) -> Usage:
        if isinstance(said, OSError):
            raise said
        return said

    monkeypatch.setattr(shutil, "disk_usage", ask)
    with new_run(folder) as run:
        run.save_checkpoint(1, weights(1), {})
        assert run.checkpoints() == [1]


def test_a_disk_that_fills_up_while_writing_leaves_the_checkpoint_before(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    with new_run(folder) as run:
        run.save_checkpoint(1, weights(1), {})
        before = files(folder)
        monkeypatch.setattr(checkpoints, "write_atomic", full)
        with pytest.raises(UserError, match="no room for a checkpoint"):
            run.save_checkpoint(2, weights(2), {})
        assert files(folder) == before


class Killed(BaseException):
    """Stands for the instant after which a killed process does nothing more."""


@pytest.mark.parametrize("step", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_kill_between_any_two_file_operations_leaves_old_or_new(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saves checkpoint 2 beside checkpoint 1, or 1 over 1, and dies before the first, second, ... file operation."""
    for instant in range(100):
        folder = tmp_path / str(instant)
        with new_run(folder) as run:
            run.save_checkpoint(1, weights(1), {"value": 1})
            with monkeypatch.context() as patch:
                die_after(instant, patch)
                try:
                    run.save_checkpoint(step, weights(9), {"value": 9})
                    survived = True
                except Killed:
                    survived = False
        with RunFolder.open(folder) as run:
            assert run.checkpoints() in ([1], [1, step])
            for found in run.checkpoints():
                _, tensors, state = run.load_checkpoint(found)
                assert state["value"] in ({1, 9} if found == step else {1})
                assert torch.equal(tensors["model"]["a.b"], torch.full((2, 3), float(state["value"])))
            assert len(list((folder / "checkpoints").iterdir())) == len(run.checkpoints())
        if survived:
            assert instant > 8
            return
    pytest.fail("never survived")


def die_after(count: int, patch: pytest.MonkeyPatch) -> None:
    """Makes every call of a file operation after the first `count` raise Killed."""
    left = [count]

    def mortal(real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return real(*arguments, **options)

        return call

    for owner, name in (
        (Path, "mkdir"),
        (Path, "rename"),
        (Path, "replace"),
        (Path, "open"),
        (os, "fsync"),
        (checkpoints.shutil, "rmtree"),
    ):
        patch.setattr(owner, name, mortal(getattr(owner, name)))


@pytest.mark.slow
def test_kill_9_in_the_middle_of_saving_leaves_whole_checkpoints(folder: Path) -> None:
    program = (
        "import sys, torch; from pathlib import Path; from imgen_common.run_folder.folder import RunFolder\n"
        "run = RunFolder.open(Path(sys.argv[1]))\n"
        "for step in range(10**6):\n"
        "    run.save_checkpoint(step % 3, {'m': {'x': torch.full((100000,), float(step))}}, {'step': step})\n"
        "    print('saved', flush=True)"
    )
    new_run(folder).close()
    with subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.5)
        process.send_signal(signal.SIGKILL)
    with RunFolder.open(folder) as run:
        assert run.checkpoints()
        for step in run.checkpoints():
            _, tensors, state = run.load_checkpoint(step)
            assert torch.equal(tensors["m"]["x"], torch.full((100000,), float(state["step"])))
        assert all(not path.name.startswith(".") for path in (folder / "checkpoints").iterdir())


def test_a_kill_while_pruning_leaves_no_torn_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with new_run(folder) as run:
        for step in (1, 2):
            run.save_checkpoint(step, weights(step), {})
        with monkeypatch.context() as patch:
            die_after(1, patch)
            with pytest.raises(Killed):
                run.prune(last=1)
        assert run.checkpoints() == [2]
    with RunFolder.open(folder) as run:
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000002"]


def test_write_atomic_replaces_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    write_atomic(file, "old")
    for instant in range(2):
        with monkeypatch.context() as patch:
            die_after(instant, patch)
            with pytest.raises(Killed):
                write_atomic(file, "new")
        assert file.read_text() == "old"
    write_atomic(file, "new")
    assert file.read_text() == "new"


@pytest.mark.parametrize("program", ["{}", "env/bin/{}", "packages/{}/__main__.py"])
def test_a_run_of_another_command_is_refused_by_name(tmp_path: Path, program: str) -> None:
    story, aligned = program.format("interleave"), program.format("flowbp")
    for name, command in (("story", [story, "run", "x"]), ("aligned", [aligned, "train"]), ("own", ["a.py"])):
        RunFolder.create(tmp_path / name, Settings(), command).close()
    assert find_run("aligned", tmp_path, "flowbp train") == find_run("aligned", tmp_path) == tmp_path / "aligned"
    assert find_run("story", tmp_path, "interleave batch", "interleave run") == tmp_path / "story"
    assert find_run("own", tmp_path, "flowbp train") == tmp_path / "own"  # of a script: what it holds must tell
    (tmp_path / "own" / "checkpoints" / "step-000002").mkdir(parents=True)
    with pytest.raises(UserError, match=rf"not a run folder .*; give that of the run, {tmp_path / 'own'}"):
        find_run(str(tmp_path / "own" / "checkpoints" / "step-000002"), tmp_path)
    with pytest.raises(UserError, match="story: a run of `interleave run`, not of `flowbp train`"):
        find_run("story", tmp_path, "flowbp train")
    RunFolder.create(tmp_path / "table", Settings(), [aligned, "benchmark", "aligned"]).close()
    with pytest.raises(UserError, match="table: a run of `flowbp benchmark`, not of `flowbp train`"):
        find_run("table", tmp_path, "flowbp train")
    (tmp_path / "own" / "config.yaml").write_text("")
    with pytest.raises(UserError, match=r"own/config\.yaml: is empty, as after a loss of power; restore it, or start"):
        find_run("own", tmp_path, "flowbp train")
    with pytest.raises(UserError, match="aligned: a run of `flowbp train`, not of `interleave sft`"):
        find_run(str(tmp_path / "aligned"), tmp_path, "interleave sft", "interleave grpo")


@pytest.mark.parametrize("name", ["n" * 300, "é" * 130, "ключ" * 70, "中" * 100])
def test_names_that_no_folder_can_have(name: str, tmp_path: Path) -> None:
    assert not is_run(name, tmp_path)
    with pytest.raises(UserError, match="no such run"):
        find_run(name, tmp_path)
    for wanted, otherwise in ((name, "story"), (None, name)):
        with pytest.raises(UserError, match="at most 240 bytes"):
            free_path(tmp_path, wanted, otherwise)
