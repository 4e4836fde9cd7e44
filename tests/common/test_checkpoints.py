"""Damage to a checkpoint is found before a run resumes, and the run goes on from the one before it."""

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from test_runs import COMMAND, Recorder, Settings, files, new_run, weights

from imgen_common.errors import UserError, warn_once
from imgen_common.run_folder.checkpoints import MANIFEST, check_tensors, find_checkpoints, find_damage, write_manifest
from imgen_common.run_folder.data import check_data, hash_rows, record_data
from imgen_common.run_folder.environment import read_environment
from imgen_common.run_folder.folder import RunFolder, choose_checkpoint, set_aside_damaged_checkpoints

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("made") / "run"
    with new_run(folder) as run:
        for step in (1, 2, 3):
            run.save_checkpoint(step, weights(step), {"value": step})
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(made, tmp_path / "run")


@pytest.fixture(autouse=True)
def warnings() -> Iterator[None]:
    warn_once.cache_clear()
    yield
    warn_once.cache_clear()


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:06d}"


def flip(name: str, place: int = -1) -> Damage:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[place] ^= 1
        (folder / name).write_bytes(content)

    return damage


def write(name: str, text: str) -> Damage:
    return lambda folder: (folder / name).write_text(text)


def forget(name: str) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / MANIFEST).read_text())
        del content["files"][name]
        (folder / MANIFEST).write_text(json.dumps(content))

    return damage


def save(tensors: dict[str, torch.Tensor]) -> Damage:
    return lambda folder: save_file(tensors, folder / "model.safetensors")


DAMAGES: dict[str, Damage] = {
    "a flipped bit of a tensor": flip("model.safetensors"),
    "a flipped bit of a header": flip("ema.safetensors", 20),
    "a flipped bit of the state": flip("state.json", 9),
    "an empty file": write("model.safetensors", ""),
    "a file cut short": lambda folder: (folder / "ema.safetensors").write_bytes(b"x" * 20),
    "a missing file": lambda folder: (folder / "ema.safetensors").unlink(),
    "a file that is a folder": lambda folder: [(folder / "state.json").unlink(), (folder / "state.json").mkdir()],
    "a tensor that broadcasts": save({"a.b": torch.ones(1, 3), "count": torch.tensor(7)}),
    "another dtype": save({"a.b": torch.ones(2, 3).half(), "count": torch.tensor(7)}),
    "a missing tensor": save({"a.b": torch.ones(2, 3)}),
    "another step": write("state.json", '{"step": 2, "groups": ["ema", "model"], "state": {"value": 3}}'),
    "a list": write("state.json", "[1, 2]"),
    "a copy of an earlier one": lambda folder: [
        shutil.rmtree(folder),
        shutil.copytree(checkpoint(folder.parents[1], 2), folder),
    ],
    "a manifest without a group": forget("ema.safetensors"),
    "a manifest without the state": forget("state.json"),
    "a file of another step": lambda folder: shutil.copy(
        checkpoint(folder.parents[1], 2) / "model.safetensors", folder
    ),
    "an empty manifest": write(MANIFEST, ""),
    "a cut manifest": write(MANIFEST, '{"files": {"state.json": {"bytes": 1'),
    "another manifest": write(MANIFEST, '{"files": {"../../../nowhere": {"bytes": 1, "sha256": "0"}}}'),
    "a manifest of nothing": write(MANIFEST, '{"files": {}}'),
    "a pipe": lambda folder: [(folder / "state.json").unlink(), os.mkfifo(folder / "state.json")],
    "nothing left": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named_and_the_checkpoint_before_is_taken_when_asked(
    damage: Damage, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(checkpoint(folder, 3))
    before = files(folder)
    said = (
        r"damaged checkpoint \(.+\); that of step 2 is whole: go on with --resume \S+ --resume-from last-good, or .* 2"
    )
    with pytest.raises(UserError, match=said):
        RunFolder.open(folder)
    with pytest.raises(UserError, match=said):
        RunFolder.open(folder, is_main=False).load_checkpoint(3)
    choose_checkpoint(folder, "last")
    assert files(folder) == before
    choose_checkpoint(folder, "last-good")
    said = capsys.readouterr().err
    assert said.startswith("set aside a damaged checkpoint (")
    assert (folder / "checkpoints" / "damaged-step-000003").is_dir()
    assert "holds no checkpoint" not in said
    with RunFolder.open(folder) as run:
        assert run.checkpoints() == [1, 2]
        assert run.load_checkpoint(2).state == {"value": 2}


def set_aside(run: Path) -> set[int]:
    """The steps of the damaged checkpoints that are set aside."""
    return {int(path.name.rpartition("-")[2]) for path in set_aside_damaged_checkpoints(run)}


@pytest.mark.parametrize("step", [4, 9])
def test_a_copy_under_another_name_is_set_aside_and_the_run_goes_on(step: int, folder: Path) -> None:
    shutil.copytree(checkpoint(folder, 3), checkpoint(folder, step))
    said = r"state\.json is of step 3\); that of step 3 is whole: go on with --resume \S+ --resume-from last-good"
    with pytest.raises(UserError, match=said):
        RunFolder.open(folder)
    choose_checkpoint(folder, "last-good")
    with RunFolder.open(folder) as run:
        assert run.checkpoints() == [1, 2, 3]
        assert run.load_checkpoint(3).state == {"value": 3}


def test_a_check_that_takes_long_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert find_damage(checkpoint(folder, 3)) is None
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("imgen_common.run_folder.checkpoints.LARGE", 10)
    assert find_damage(checkpoint(folder, 3)) is None
    assert "step-000003 for damage: 0 GiB" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["step-3", "step-03"])
def test_a_folder_of_another_name_does_not_hide_a_checkpoint(name: str, folder: Path) -> None:
    (folder / "checkpoints" / name).mkdir()
    assert find_checkpoints(folder / "checkpoints")[3] == checkpoint(folder, 3)


def test_what_is_no_folder_or_file_of_ours_is_one_line(folder: Path, tmp_path: Path) -> None:
    elsewhere = checkpoint(folder, 3).rename(tmp_path / "elsewhere")
    checkpoint(folder, 3).symlink_to(elsewhere)
    flip("model.safetensors")(elsewhere)
    assert set_aside(folder) == {3}
    assert elsewhere.is_dir()
    (folder / "metrics.jsonl").mkdir()
    (folder / "samples").write_text("a file")
    for act in (lambda run: run.log(1, {"a": 1.0}), lambda run: run.log_image(1, "a", Image.new("RGB", (2, 2)))):
        with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written|samples: File exists"):
            work_in(folder, act)
    assert RunFolder.open(folder).metrics() == []


def work_in(folder: Path, act: Callable[[RunFolder], object]) -> None:
    with RunFolder.open(folder) as run:
        act(run)


def test_the_last_whole_one_may_be_further_back_or_none(folder: Path) -> None:
    for step in (3, 2):
        flip("model.safetensors")(checkpoint(folder, step))
    with pytest.raises(UserError, match="that of step 1 is whole"):
        RunFolder.open(folder)
    flip("model.safetensors")(checkpoint(folder, 1))
    with pytest.raises(
        UserError, match=r"no earlier one is whole: it starts again with --resume \S+ --resume-from last-good"
    ):
        RunFolder.open(folder)
    assert set_aside(folder) == {1, 2, 3}
    RunFolder.open(folder).close()


def test_last_good_needs_a_run_that_is_not_in_use(folder: Path) -> None:
    with pytest.raises(UserError, match="give the run by --resume"):
        choose_checkpoint(None, "last-good")
    with RunFolder.open(folder), pytest.raises(UserError, match="in use"):
        choose_checkpoint(folder, "last-good")
    assert set_aside_damaged_checkpoints(folder) == {}


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "", '{"step": 3', "{" * 99_999, '{"step": 3, "groups": 5, "state": {}}'),
        *('{"step": -3, "groups": [], "state": {}}', '{"step": 1e999, "groups": [], "state": {}}'),
        *('{"step": 2, "groups": ["ema", "model"], "state": {}}', '{"step": 3, "groups": ["../a"], "state": {}}'),
        '{"step": 3, "groups": ["other"], "state": {}}',
    ],
)
def test_one_of_an_earlier_version_is_taken_with_a_warning_unless_it_cannot_be_read(
    content: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = checkpoint(folder, 3)
    (place / MANIFEST).unlink()
    with RunFolder.open(folder) as run:
        assert run.load_checkpoint(3).state == {"value": 3}
    assert capsys.readouterr().err.count("not checked for damage") == 1
    (place / "state.json").write_text(content)
    said = r"step-000003: damaged checkpoint \(.*step 2 is"
    with pytest.raises(UserError, match=said):
        RunFolder.open(folder)
    with pytest.raises(UserError, match=said):
        RunFolder.open(folder, is_main=False).load_checkpoint(3)
    assert set_aside(folder) == {3}


def test_checkpoints_of_trl_are_found_checked_and_removed_where_they_were_not_finished(tmp_path: Path) -> None:
    new_run(tmp_path / "run").close()
    made = {step: tmp_path / "run" / "checkpoints" / f"checkpoint-{step}" for step in (2, 10, 12)}
    for place in made.values():
        (place / "global_step").mkdir(parents=True)
        for name in ("optimizer.pt", "global_step/rank_0.pt"):
            (place / name).write_bytes(b"state" * 99)
    for step in (2, 10):
        write_manifest(made[step])
    with RunFolder.open(tmp_path / "run") as run:
        assert run.checkpoints() == [2, 10]
    flip("global_step/rank_0.pt")(made[10])
    with pytest.raises(UserError, match=r"the content of global_step/rank_0.pt has changed\); that of step 2"):
        RunFolder.open(tmp_path / "run")
    made[2].joinpath(MANIFEST).rename(made[2] / "whole")  # as earlier versions left it
    assert set_aside(tmp_path / "run") == {10}
    assert RunFolder.open(tmp_path / "run").checkpoints() == [2]


def test_what_lies_beside_checkpoints_is_left_alone(folder: Path) -> None:
    beside = folder / "checkpoints"
    (beside / "checkpoint-100-merged").mkdir()
    (beside / "checkpoint-best").symlink_to(beside / "checkpoint-50")
    for name in ("checkpoint-100.tar.gz", ".old-notes", ".new-idea"):
        (beside / name).write_text("mine")
    before = sorted(path.name for path in beside.iterdir())
    RunFolder.open(folder).close()
    set_aside_damaged_checkpoints(folder)
    assert sorted(path.name for path in beside.iterdir()) == before


def test_a_copy_of_a_checkpoint_of_trl_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-100").mkdir()
    (tmp_path / "checkpoint-100" / "trainer_state.json").write_text('{"global_step": 100}')
    write_manifest(tmp_path / "checkpoint-100")
    shutil.copytree(tmp_path / "checkpoint-100", tmp_path / "checkpoint-200")
    assert find_damage(tmp_path / "checkpoint-100") is None
    assert find_damage(tmp_path / "checkpoint-200") == "trainer_state.json is of step 100"


def test_a_checkpoint_that_another_process_reads_is_removed_later(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    remove = os.rmdir

    def keeps_what_is_open(path: str, **given: Any) -> None:
        if "step-" in str(path):  # NFS, where a reader has a file of it open
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        remove(path, **given)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", keeps_what_is_open)
        for _ in range(2):
            with RunFolder.open(folder) as run:
                run.save_checkpoint(4, {}, {})
                run.prune(last=1)
                run.save_checkpoint(3, {}, {})
                run.prune(last=1)
                assert run.checkpoints() == [4]
    assert capsys.readouterr().err.count(".gone-step-000003: cannot be removed now") == 1
    RunFolder.open(folder).close()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000004"]


def test_a_full_share_of_a_disk_with_room_is_called_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr("imgen_common.run_folder.checkpoints.write_manifest", full)
    with pytest.raises(
        UserError, match=r"free, so it is your share of the disk that is full \(quota, or inodes: df -i"
    ):
        work_in(folder, lambda run: run.save_checkpoint(4, {}, {}))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, "a is missing"),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(1)}, "b is not of this model"),
        ({"a": torch.zeros(1, 3)}, r"a is \(1, 3\) torch.float32 instead of \(2, 3\) torch.float32"),
        ({"a": torch.zeros(3)}, r"a is \(3,\)"),
        ({"a": torch.zeros(2, 3, dtype=torch.bfloat16)}, "a is .* torch.bfloat16 instead of"),
    ],
)
def test_tensors_have_the_names_shapes_and_dtypes_of_the_model(tensors: dict[str, torch.Tensor], said: str) -> None:
    with pytest.raises(UserError, match=f"ema: {said}"):
        check_tensors("ema", tensors, {"a": torch.ones(2, 3)})
    check_tensors("ema", {"a": torch.zeros(2, 3)}, {"a": torch.ones(2, 3, device="meta")})


# --- a disk that is full or gone -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded", "elsewhere"),
        RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534"),
    ],
)
def test_a_full_disk_in_mid_run_is_one_line_and_leaves_nothing_half(error: Exception, folder: Path) -> None:
    before = files(folder)
    half = folder / "checkpoints" / "checkpoint-9"

    def work(_: RunFolder) -> None:
        half.mkdir()
        (half / "optimizer.pt").write_bytes(b"half")
        raise error

    with pytest.raises(UserError, match=r"the disk is full; the checkpoint of step 3 is kept; .* --resume ") as caught:
        work_in(folder, work)
    assert caught.value.__suppress_context__
    assert files(folder) == before
    RunFolder.open(folder).close()


@pytest.mark.parametrize("number", [errno.EFBIG, errno.EIO, errno.EROFS])
def test_a_file_system_that_refuses_a_file_is_one_line(
    number: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")

    before = files(folder)
    monkeypatch.setattr("safetensors.torch.save_file", refuse)
    with pytest.raises(UserError, match=rf"\.safetensors: {os.strerror(number)}; .+; then go on with --resume "):
        work_in(folder, lambda run: run.save_checkpoint(4, weights(4), {}))
    assert files(folder) == before


def test_what_waits_to_be_written_may_find_the_disk_full_too(folder: Path) -> None:
    class Full:
        def close(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="the disk is full; the checkpoint of step 3"), RunFolder.open(folder) as run:
        run._writer = Full()  # type: ignore[assignment]
    RunFolder.open(folder).close()


def test_a_full_disk_while_a_run_is_created_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in ((1, "environment.json"), (2, "config.yaml")):
        left = [number]

        def fsync(_: int, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 1:
                raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", fsync)
            patch.setattr("imgen_common.files.sync", lambda what: fsync(0) if isinstance(what, int) else None)
            with pytest.raises(UserError, match=f"{name}: the disk is full; make room and run the command again"):
                new_run(tmp_path / "runs" / "new")
        assert list((tmp_path / "runs").iterdir()) == []
    new_run(tmp_path / "runs" / "new").close()


@pytest.mark.parametrize("act", ["log", "save", "read"])
def test_a_run_folder_removed_in_mid_run_is_one_line(act: str, folder: Path) -> None:
    acts: dict[str, Callable[[RunFolder], Any]] = {
        "log": lambda run: run.log(4, {"loss": 1.0}),
        "save": lambda run: run.save_checkpoint(4, weights(4), {}),
        "read": lambda run: (run.path / "grid.json").read_text(),
    }

    def work(run: RunFolder) -> None:
        shutil.rmtree(folder)
        acts[act](run)

    with pytest.raises(UserError, match="was removed, or its disk is gone, while the run wrote to it"):
        work_in(folder, work)
    assert not folder.exists()


def test_other_errors_stay_what_they_are(folder: Path) -> None:
    for error in (ValueError("mine"), UserError("mine"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, RunFolder.open(folder):
            raise error
        assert caught.value is error


# --- what is recorded -------------------------------------------------------------------------------------------------


def test_what_a_killed_process_sent_to_a_tracker_is_not_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "trackio", recorder)
    with RunFolder.create(tmp_path / "run", Settings(), COMMAND, trackers=["trackio"]) as run:
        for step, name in ((0, "eval"), (1, "train"), (2, "train")):
            run.log(step, {name: 1.0})
    for start, last in ((-1, 3), (1, 4)):  # killed before the first checkpoint, then after that of step 1
        with RunFolder.open(tmp_path / "run", Settings(), trackers=["trackio"]) as run:
            run.rewind(start)
            for step in range(start + 1, last + 1):
                run.log(step, {"train" if step else "eval": 1.0})
    sent = [call[0] for call in recorder.calls if isinstance(call, tuple)]
    assert sent == [0, 1, 2, 3, 4] == [line["step"] for line in run.metrics()]


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", '{"step": "3"}', '{"step": -1}', '{"step": 1e400}', '{"step": 99999999999999999999}', "\0\0"),
        *('{"loss": 1}', '{"step": 3, "loss": "high"}', '{"step": 3, "loss": 1e999}', '{"step": 3, "loss": NaN}'),
        *('{"step": 3, "loss": {"a": 1}}', '{"step": 3, "\\ud800": 1}', "[" * 50_000),
    ],
)
def test_damaged_lines_of_metrics_are_left_out(text: str, folder: Path) -> None:
    (folder / "metrics.jsonl").write_text(f'{{"step": 1, "loss": 1.5}}\n{text}\n{{"step": 2, "loss": null}}\n')
    with RunFolder.open(folder) as run:
        assert [line["step"] for line in run.metrics()] == [1, 2]
        run.rewind(1)
        assert [line["step"] for line in run.metrics()] == [1]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '{"earlier": 3}', '{"packages": []}', '{"device": "gpu"}', '{"command": [1]}', "[" * 50_000],
)
def test_a_damaged_environment_stops_no_run(text: str, folder: Path) -> None:
    (folder / "environment.json").write_text(text)
    assert read_environment(folder) == {}
    with RunFolder.open(folder, command=["again"]):
        record = json.loads((folder / "environment.json").read_text())
        assert (record["command"], record["earlier"]) == (["again"], [])


def test_other_data_is_refused_and_its_lack_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def of(*rows: str) -> dict[str, Any]:
        return {"data.prompts": hash_rows(rows), "eval.prompts": hash_rows(["x"])}

    check_data(folder, of("a"))
    assert "not checked that its data is the same" in capsys.readouterr().err
    record_data(folder, of("a", "b"))
    check_data(folder, of("a", "b"))
    for rows, said in (
        (("a", "c"), "; restore it"),
        (("b", "a"), "; restore it"),
        (("ab",), r" \(2 rows then, 1 now\)"),
        (("a", "b", ""), r" \(2 rows then, 3 now\)"),
        ((), r" \(2 rows then, 0 now\)"),
        (("a\0b",), r" \(2 rows then, 1 now\)"),
        (("a", "\ud800"), "; restore it"),
    ):
        with pytest.raises(UserError, match=rf"data.prompts has changed since the run was started{said}"):
            check_data(folder, of(*rows))
    (folder / "data.json").write_text("[]")
    with pytest.raises(UserError, match=r"data\.json: damaged"):
        check_data(folder, of("a", "b"))


@pytest.mark.parametrize("change", [shutil.rmtree, lambda path: path.rename(path.with_name("step-last"))])
def test_a_run_whose_checkpoints_are_gone_says_that_it_begins_again(
    change: Callable[[Path], object], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2, 3):
        change(checkpoint(folder, step).rename(folder / "checkpoints" / "step-000001"))
        shutil.rmtree(folder / "checkpoints" / "step-last", ignore_errors=True)
    choose_checkpoint(folder, "last")
    assert "holds no checkpoint, so its training begins at the first update" in capsys.readouterr().err
