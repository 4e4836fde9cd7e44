import errno
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
from safetensors import SafetensorError

from imgen_common.errors import MENDABLE, DiskFullError, UserError, nearest, quoted, run_cli, written_or_warned

LIGHT_IMPORT = """
import sys, imgen_common.config, imgen_common.errors, imgen_common.hub, imgen_common.run_folder.folder
import imgen_common.streams
import imgen_common.images
heavy = {"torch", "transformers", "diffusers", "huggingface_hub", "tensorboard"} & set(sys.modules)
assert not heavy, heavy
"""


def program() -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)

    @app.command()
    def train(steps: int = 1) -> None:
        if steps == 2:
            raise UserError("steps: 2 given,\n  must be odd; give 1 or 3")
        if steps == 3:
            raise UserError("\x1b[2J\u202eunknown key \ud800")
        if steps == 4:
            raise RuntimeError("a bug")
        if steps == 6:
            raise KeyboardInterrupt
        print("trained")

    @app.command()
    def sample(kind: Literal["planner", "critic"] = "critic", size: Annotated[int, typer.Option(min=2)] = 2) -> None:
        pass

    @app.command()
    def show(name: str) -> None:
        pass

    return app


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["prog", *arguments])
    with pytest.raises(SystemExit) as stop:
        run_cli(program(), "prog")
    output = capsys.readouterr()
    return int(stop.value.code or 0), output.out + output.err


def test_nearest_names_a_close_option_only() -> None:
    assert nearest("learing_rate", ["learning_rate", "steps"]) == "; did you mean 'learning_rate'?"
    assert nearest("zzz", ["learning_rate"]) == ""
    assert nearest("zzz", []) == ""


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("HF_HUB_DOWNLOAD_TIMEOUT", "30s", "a whole number of seconds"),
        ("HF_HUB_ETAG_TIMEOUT", "", "a whole number of seconds"),
        ("DIFFUSERS_TIMEOUT_REMOTE_CODE", "1.5", "a whole number of seconds"),
        ("HF_DATASETS_IN_MEMORY_MAX_SIZE", "4GB", "a number of bytes"),
    ],
)
def test_a_variable_that_libraries_cannot_read_as_a_number_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str, what: str
) -> None:
    monkeypatch.setenv(name, value)
    said = f"prog: error: {name}={value}: must be {what}; correct or unset it\n"
    assert run(monkeypatch, capsys, "train") == (2, said)
    monkeypatch.setenv(name, "30")
    assert run(monkeypatch, capsys, "train") == (0, "trained\n")


def test_success_exits_0(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, capsys, "train") == (0, "trained\n")


def test_a_missing_argument_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(monkeypatch, capsys, "show")
    assert (code, text.splitlines()[-1]) == (2, "Error: Missing argument 'name'.")


def test_words_of_others_do_not_reach_the_terminal_raw(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, capsys, "train", "--steps", "3") == (2, "prog: error: [2J unknown key\n")


def test_user_error_is_one_line_and_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(monkeypatch, capsys, "train", "--steps", "2")
    assert (code, text) == (2, "prog: error: steps: 2 given, must be odd; give 1 or 3\n")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [(["trian"], "train"), (["train", "--stps", "3"], "--steps"), (["train", "--step=3"], "--steps")],
)
def test_usage_error_names_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], name: str
) -> None:
    code, text = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert name in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--kind", "critc"), "'--kind': 'critc' is not one of 'planner', 'critic'; did you mean 'critic'?"),
        (("--kind", "Planer"), "'--kind': 'Planer' is not one of 'planner', 'critic'; did you mean 'planner'?"),
        (("--kind", "zzz"), "'--kind': 'zzz' is not one of 'planner', 'critic'."),
        (("--size", "1"), "'--size': must be greater than or equal to 2."),
        (("--size", "two"), "'--size': "),
    ],
)
def test_a_bad_value_is_named_with_the_nearest_choice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    code, text = run(monkeypatch, capsys, "sample", *arguments)
    assert code == 2
    assert message in text.replace("\n", " ")
    assert "Value error" not in text


def test_ctrl_c_exits_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, capsys, "train", "--steps", "6")[0] == 130


def test_a_machine_without_a_folder_of_temporary_files_is_told_what_to_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(lambda: print(tempfile.gettempdir()))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/nowhere"])
    monkeypatch.setattr(sys, "argv", ["prog"])
    with pytest.raises(SystemExit):
        run_cli(app, "prog")
    said = capsys.readouterr().err
    assert said.startswith(
        "prog: error: No usable temporary directory found in ['/proc/nowhere']; set TMPDIR to a folder"
    )
    assert said.count("\n") == 1


def test_a_page_that_cannot_be_written_does_not_end_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> Path:
        raise DiskFullError("report.html: No space left on device")

    assert written_or_warned(lambda: Path("report.html"), "prog report x") == Path("report.html")
    assert written_or_warned(full, "prog report x") is None
    said = "warning: report.html: No space left on device; prog report x writes the page again\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EACCES, "Permission denied; change its permissions, or choose another"),
        (errno.EROFS, "Read-only file system; change its permissions, or choose another"),
        (errno.ENAMETOOLONG, "File name too long; shorten the name"),
        (errno.ENOSPC, "No space left on device; make room and run the command again"),
        (
            errno.EFBIG,
            "File too large; lift the limit on the size of files (ulimit -f), or choose a folder on another "
            "file system",
        ),
        (errno.EIO, "Input/output error; check the disk or its mount, then run the command again"),
        (errno.ENOTDIR, "Not a directory; give a folder for a folder, and a file for a file"),
    ],
)
def test_failures_of_the_file_system_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, advice: str
) -> None:
    app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)

    @app.command()
    def sample() -> None:
        raise OSError(number, os.strerror(number), "images/a.png")

    monkeypatch.setattr(sys, "argv", ["prog"])
    with pytest.raises(SystemExit) as stop:
        run_cli(app, "prog")
    assert (stop.value.code, capsys.readouterr().err) == (2, f"prog: error: images/a.png: {advice}\n")


@pytest.mark.parametrize("command", ["train", "sample"])
def test_a_working_directory_that_was_removed_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    code, said = run(monkeypatch, capsys, command)
    assert code == 2
    assert said.startswith("prog: error: the working directory is gone")
    assert said.count("\n") == 1


@pytest.mark.parametrize("number", [errno.EFBIG, errno.ESTALE])
def test_a_failure_that_safetensors_words_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)

    @app.command()
    def sample() -> None:
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")

    monkeypatch.setattr(sys, "argv", ["prog"])
    with pytest.raises(SystemExit) as stop:
        run_cli(app, "prog")
    said = f"prog: error: a file of weights: {os.strerror(number)}; {MENDABLE[number]}\n"
    assert (stop.value.code, capsys.readouterr().err) == (2, said)


@pytest.mark.parametrize(
    ("program", "advice"), [("flowbp", "flowbp estimate --memory"), ("interleave", "--dry-run of sft and grpo")]
)
@pytest.mark.parametrize("error", [MemoryError(), type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory.")])
def test_memory_that_ran_out_is_one_line_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, program: str, advice: str
) -> None:
    app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)

    @app.command()
    def sample() -> None:
        raise error

    monkeypatch.setattr(sys, "argv", [program])
    with pytest.raises(SystemExit) as stop:
        run_cli(app, program)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith(f"{program}: error: memory ran out (")
    assert said.count("\n") == 1
    assert advice in said
    assert ("flowbp" in said) == (program == "flowbp")


@pytest.mark.parametrize("library", ["libtorch_cpu.so", "libtorch_cuda.so"])
def test_libraries_that_a_limit_of_memory_keeps_out_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], library: str
) -> None:
    app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)

    @app.command()
    def sample() -> None:
        raise ImportError(f"{library}: failed to map segment from shared object")

    monkeypatch.setattr(sys, "argv", ["prog"])
    with pytest.raises(SystemExit) as stop:
        run_cli(app, "prog")
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith(f"prog: error: memory ran out as libraries were loaded ({library}: ")
    assert said.endswith("lift the limit (ulimit -v)\n")


@pytest.mark.parametrize(("encoding", "hint"), [("utf-8", False), ("ascii", True), ("iso8859-1", True)])
def test_an_argument_that_is_not_utf8_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], encoding: str, hint: bool
) -> None:
    monkeypatch.setattr(sys, "argv", ["prog", "train", b"caf\xc3".decode("ascii", "surrogateescape")])
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: encoding)
    with pytest.raises(SystemExit) as stop:
        run_cli(program(), "prog")
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("prog: error: argument 2, 'caf?': holds half of a surrogate pair")
    assert (f"but as {encoding}: PYTHONUTF8=1" in said) == hint


@pytest.mark.parametrize("name", ["random.py", "datetime.py"])
@pytest.mark.parametrize("program", ["flowbp", "interleave"])
def test_files_named_as_modules_of_python_are_not_imported(tmp_path: Path, program: str, name: str) -> None:
    (tmp_path / name).write_text("raise SystemExit('imported')")
    command = [sys.executable, "-m", program, "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["prog", "train", "--steps", "4"])
    with pytest.raises(RuntimeError, match="a bug"):
        run_cli(program(), "prog")


def test_importing_the_library_imports_no_torch() -> None:
    subprocess.run([sys.executable, "-c", LIGHT_IMPORT], check=True, timeout=60)


@pytest.mark.parametrize(
    ("path", "word"), [("runs/a", "runs/a"), ("runs/my run", "'runs/my run'"), (Path("a[b]"), "'a[b]'"), ("~x", "'~x'")]
)
def test_a_path_in_a_printed_command_is_one_word_of_a_shell(path: str, word: str) -> None:
    assert quoted(path) == word
    assert shlex.split(f"prog --resume {quoted(path)}")[2:] == [str(path)]


@pytest.mark.parametrize("words", [["--runs", "s3://key:secret@bucket/runs"], ["--out=gs://bucket/x"]])
def test_an_address_in_the_place_of_a_folder_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    """Its folder would be made here, as `s3:`."""
    monkeypatch.setattr(sys, "argv", ["prog", *words])
    with pytest.raises(SystemExit) as stop:
        run_cli(typer.Typer(), "prog")
    said = capsys.readouterr().err
    assert (stop.value.code, "is an address; give a folder of this machine" in said, "secret" in said) == (
        2,
        True,
        False,
    )


@pytest.mark.parametrize(
    ("word", "read"),
    [("--runs=~/runs", "--runs=HOME/runs"), ("~/runs", "HOME/runs"), ("--runs=~", "--runs=HOME"), ("~", "HOME")]
    + [(word, word) for word in ("--set=a=~/x", "a ~/x", "~~", "--runs=x~/y", "a=~/x", "")],
)
def test_a_home_folder_that_no_shell_has_expanded_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], word: str, read: str
) -> None:
    """bash leaves the ~ of `--runs=~/runs`, and every shell that of a quoted word."""
    app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)

    @app.command(context_settings={"ignore_unknown_options": True})
    def show(words: list[str]) -> None:
        print(words[0])

    monkeypatch.setenv("HOME", "HOME")
    monkeypatch.setattr(sys, "argv", ["prog", word])
    with pytest.raises(SystemExit) as stop:
        run_cli(app, "prog")
    assert (stop.value.code, capsys.readouterr().out) == (0, f"{read}\n")
