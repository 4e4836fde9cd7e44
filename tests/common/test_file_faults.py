"""Files on disks that are full, gone, or cannot lock or sync; and files that hold something else than was written."""

import errno
import fcntl
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from pydantic import BaseModel

from imgen_common.errors import DiskFullError, UserError, WriteError, is_disk_full, run_cli, warn_once
from imgen_common.files import (
    append,
    append_line,
    atomic_folder,
    lock,
    make_folder,
    read_json,
    read_json_lines,
    sync,
    write_atomic,
)


class Numbers(BaseModel):
    values: list[float]


@pytest.fixture(autouse=True)
def warnings() -> Iterator[None]:
    warn_once.cache_clear()
    yield
    warn_once.cache_clear()


def failing(number: int) -> Callable[..., None]:
    def call(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO])
def test_a_file_system_without_locks_is_not_in_use_and_says_so_once(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(number))
    with (tmp_path / "a").open("wb") as file:
        assert lock(file)
        assert lock(file.fileno())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the file system has no locks")
    assert os.strerror(number) in line


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EAGAIN])
def test_only_a_lock_that_would_block_is_in_use(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(number))
    with (tmp_path / "a").open("wb") as file:
        assert not lock(file)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EACCES, errno.EBADF, errno.ENOTTY])
@pytest.mark.parametrize("call", ["fsync", "open"])
def test_a_folder_that_cannot_be_synced_does_not_end_a_run(
    number: int, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = os.open

    def no_folders(path: Path, *flags: int) -> int:
        return real(path, *flags) if not Path(path).is_dir() else failing(number)() or 0

    monkeypatch.setattr(os, call, failing(number) if call == "fsync" else no_folders)
    for name in ("a", "b"):
        write_atomic(tmp_path / name, name)
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["a", "b"]
    assert capsys.readouterr().err.count("warning: the file system does not say") == 1


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.EROFS, WriteError), (errno.EACCES, WriteError), (errno.EPERM, WriteError), (errno.EDQUOT, DiskFullError)],
)
def test_a_folder_into_which_nothing_can_be_written_is_refused_at_once(
    number: int, kind: type[UserError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that is there already, and that may be read."""
    make_folder(tmp_path / "a" / "b")
    assert not list((tmp_path / "a" / "b").iterdir())
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **given: failing(number)(given))
    for name in ("a/b", "new"):
        with pytest.raises(kind, match=f"{name}: (cannot be written|the disk is full)"):
            make_folder(tmp_path / name)


@pytest.mark.parametrize(
    ("number", "kind", "said"),
    [
        (errno.ENOSPC, DiskFullError, "the disk is full; make room"),
        (errno.EDQUOT, DiskFullError, "the disk is full; make room"),
        (errno.EIO, WriteError, "Input/output error"),
        (errno.EROFS, WriteError, "Read-only file system"),
    ],
)
def test_what_cannot_be_written_is_a_typed_error_and_leaves_the_old_file_alone(
    number: int, kind: type[UserError], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomic(tmp_path / "a", "old")
    write_atomic(tmp_path / "log", "first\n")
    monkeypatch.setattr(os, "fsync", failing(number))
    with pytest.raises(kind, match=said):
        write_atomic(tmp_path / "a", "new")
    with (tmp_path / "log").open("ab", buffering=0) as file, pytest.raises(kind, match=said):
        append(file, b"second\n", durable=True)
    with pytest.raises(OSError, match=os.strerror(number)):
        sync(tmp_path / "a")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old", "log": "first\n"}


@pytest.mark.parametrize("name", [".", "..", "/", "", "there"])
def test_a_folder_in_the_place_of_a_file_is_said(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    with pytest.raises(UserError, match="is a folder; give the path of a file"):
        write_atomic(Path(name), "text")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_link_to_nothing_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "runs").symlink_to(tmp_path / "gone" / "away")
    with pytest.raises(UserError, match="a part of this path is a file, or a link to nothing"):
        make_folder(tmp_path / "runs" / "mine")


def test_a_name_of_the_greatest_length_can_be_written(tmp_path: Path) -> None:
    for name in ("n" * 255, "\U0001f600" * 63, "é" * 127):
        write_atomic(tmp_path / name, "x")
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("I/O error: Disk quota exceeded (os error 122)"),
        RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534"),
    ],
)
def test_every_library_says_that_the_disk_is_full_in_its_own_words(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    app = typer.Typer()

    @app.command()
    def tool() -> None:
        raise error

    assert is_disk_full(error)
    monkeypatch.setattr(sys, "argv", ["tool"])
    with pytest.raises(SystemExit) as end:
        run_cli(app, "tool")
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("tool: error: the disk is full")


def test_reading_a_damaged_archive_is_not_a_full_disk() -> None:
    words = "[enforce fail at inline_container.cc:297] . PytorchStreamReader failed reading zip archive"
    assert not is_disk_full(RuntimeError(words))


@pytest.mark.parametrize(
    "content",
    [
        *("", "[", "[]", '{"values": [1, 2', '{"values": 3}', '{"values": ["a"]}', "[" * 100_000, "\0", "\ufeff{}"),
        *('{"values": ["\\ud800"]}', '{"values": [1' + "0" * 5000 + '], "x": }'),
    ],
)
def test_json_of_another_kind_is_a_user_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.json: damaged"):
        read_json(tmp_path / "a.json", Numbers)


def test_json_that_is_missing_or_larger_than_anything_we_write_is_refused_unread(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path / "none.json", Numbers)
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="larger than 256 MiB"):
        read_json(tmp_path / "large.json", Numbers)


def test_lines_that_are_torn_or_damaged_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    assert list(read_json_lines(file, Numbers)) == []
    append_line(file, '{"values": [1]}')
    with file.open("ab") as stream:
        stream.write(b'{"values": [2\n\xff\xfe\n' + b"[" * 9999 + b'\n{"values": []}\n{"values": [3]')
    assert [line.values for line, _ in read_json_lines(file, Numbers)] == [[1.0], []]


def test_a_folder_beside_the_new_one_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model.new").mkdir()
    (tmp_path / "model.new" / "mine").write_text("kept")
    with atomic_folder(tmp_path / "model") as fresh:
        (fresh / "a").write_text("1")
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["a"]
    assert (tmp_path / "model.new" / "mine").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.new"]
