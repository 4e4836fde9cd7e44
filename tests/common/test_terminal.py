"""Standard output that is no UTF-8 terminal: other encodings, closed pipes, full disks, closed descriptors."""

import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from imgen_common import terminal

TABLE = "reward \N{MINUS SIGN}0.30 … ✓ 1 → 2 ▁▄█"
PROGRAM = """
import sys, typer
from imgen_common.errors import run_cli
app = typer.Typer(pretty_exceptions_enable=False)
@app.command()
def train(file: str) -> None:
    for update in range(3000):
        print("update", update, "\\N{MINUS SIGN}0.25", flush=update % 2 == 0)
        print("warning", update, file=sys.stderr)
    with open(file, "w") as saved:
        saved.write("saved")
run_cli(app, "prog")
"""


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [
        ("utf-8", TABLE),
        ("ascii", "reward -0.30 ... + 1 -> 2 _-#"),
        ("latin-1", "reward -0.30 ... + 1 -> 2 _-#"),
        ("cp437", "reward -0.30 ... + 1 -> 2 _▄█"),
        ("gbk", "reward -0.30 … + 1 → 2 ▁▄█"),
        ("koi8-r", "reward -0.30 ... + 1 -> 2 _▄█"),
    ],
)
def test_any_encoding_shows_a_table(encoding: str, printed: str) -> None:
    assert TABLE.encode(encoding, "look-alikes").decode(encoding) == printed


@pytest.mark.parametrize("text", ["é 中 \N{GRINNING FACE}", "\ud83d", "\udcff a\N{ZERO WIDTH JOINER}b"])
def test_other_characters_are_escapes_as_in_json(text: str) -> None:
    shown = text.encode("ascii", "look-alikes").decode()
    assert shown.encode().decode("unicode_escape").encode("utf-16-be", "surrogatepass") == text.encode(
        "utf-16-be", "surrogatepass"
    )


@pytest.mark.parametrize(("errors", "kept"), [("strict", "look-alikes"), ("replace", "replace")])
def test_the_error_handler_that_a_user_chose_is_kept(errors: str, kept: str) -> None:
    original = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=errors, line_buffering=True)
    wrapped = terminal._wrap(original, terminal._Descriptor(os.devnull, "w"))
    assert (wrapped.encoding, wrapped.errors, wrapped.line_buffering) == ("ascii", kept, True)  # type: ignore[attr-defined]


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_lines_are_written_at_once(unbuffered: str) -> None:
    """Those of standard error always, those of standard output where Python is told so."""
    program = "import os, sys\nfrom imgen_common.terminal import safe_streams\nwith safe_streams():\n"
    program += f"    print('first', file=sys.stderr)\n    print('second', flush={not unbuffered})\n"
    program += "    os.write(2, b'third')\n"
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run([sys.executable, "-c", program], env=environment, text=True, check=True, **both)  # type: ignore[call-overload]
    assert done.stdout == "first\nsecond\nthird"


def test_a_pipe_that_does_not_wait_is_waited_for() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    text, got = "0123456789\n" * 40_000, bytearray()  # more than a pipe holds

    def read() -> None:
        while piece := os.read(reading, 4096):
            got.extend(piece)

    reader = threading.Thread(target=read)
    stream = terminal._wrap(None, terminal._Descriptor(writing, "w"))
    timer = threading.Timer(0.2, reader.start)
    timer.start()
    stream.write(text)
    stream.close()
    timer.join()
    reader.join()
    os.close(reading)
    assert got.decode() == text


def test_a_writer_outlives_its_reader() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    writer = io.TextIOWrapper(io.BufferedWriter(descriptor := terminal._Descriptor(writing, "w")), write_through=True)
    for _ in range(3):
        print("update", file=writer, flush=True)
    assert descriptor.failure is None


def test_a_full_disk_is_remembered() -> None:
    with Path("/dev/full").open("w") as full:
        writer = io.TextIOWrapper(io.BufferedWriter(descriptor := terminal._Descriptor(os.dup(full.fileno()), "w")))
        print("update", file=writer, flush=True)
        print("update", file=writer, flush=True)
    assert descriptor.failure is not None
    assert "No space" in str(descriptor.failure)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("shell", "code"),
    [
        ("{} | head -2", 0),
        ("{} 2>&1 | head -2", 0),
        ("{} >&-", 0),
        ("{} 2>&- >&-", 0),
        ("{} > /dev/full", 1),
        ("PYTHONIOENCODING=ascii {} > /dev/null", 0),
        ("PYTHONIOENCODING=cp437 {} | tail -1", 0),
        ("PYTHONUNBUFFERED=1 {} | head -c 5", 0),
    ],
)
def test_a_program_ends_its_work_whatever_becomes_of_its_output(shell: str, code: int, tmp_path: Path) -> None:
    script, saved = tmp_path / "program.py", tmp_path / "saved"
    script.write_text(PROGRAM)
    command = "set -o pipefail; " + shell.format(f"{sys.executable} {script} {saved}")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert saved.read_text() == "saved"
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.returncode == code, done.stderr[-500:]


def test_python_without_docstrings_is_refused_in_one_line(tmp_path: Path) -> None:
    def run(option: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, option, "-c", PROGRAM, str(tmp_path / "saved")]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert run("-O").returncode == 0
    refused = run("-OO")
    assert refused.returncode == 2
    assert refused.stderr.startswith("prog: error: Python runs without docstrings")
    assert refused.stderr.count("\n") == 1
