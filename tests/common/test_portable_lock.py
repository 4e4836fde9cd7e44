import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "portable_lock.py"
HOST = "https" + "://index.example"
FULL = f"""version = 1
requires-python = ">=3.11, <3.13"

[[package]]
name = "own"
version = "0.1.0"
source = {{ editable = "packages/own" }}
dependencies = [
    {{ name = "thing", version = "1.0", source = {{ registry = "{HOST}/simple" }}, marker = "os_name == 'nt'" }},
]

[package.optional-dependencies]
more = [
    {{ name = "thing" }},
]

[package.metadata]
requires-dist = [
    {{ name = "thing", specifier = ">=1" }},
]
provides-extras = ["more"]

[package.metadata.requires-dev]
dev = [{{ name = "thing" }}]

[[package]]
name = "thing"
version = "1.0"
source = {{ registry = "{HOST}/simple" }}
sdist = {{ url = "{HOST}/thing-1.0.tar.gz", hash = "sha256:00", size = 1 }}
wheels = [
    {{ url = "{HOST}/thing-1.0-py3-none-any.whl", hash = "sha256:00", size = 1 }},
]
"""
PORTABLE = """version = 1
requires-python = ">=3.11, <3.13"

[[package]]
name = "own"
version = "0.1.0"
source = { editable = "packages/own" }
dependencies = [
    { name = "thing", version = "1.0", source = { registry = "." }, marker = "os_name == 'nt'" },
]

[package.optional-dependencies]
more = [
    { name = "thing" },
]

[[package]]
name = "thing"
version = "1.0"
source = { registry = "." }
"""


def script(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], input=text, capture_output=True, text=True)


def test_a_lock_is_reduced_to_pins_once_and_for_all(tmp_path: Path) -> None:
    lock = tmp_path / "uv.lock"
    lock.write_text(FULL)
    for _ in range(2):
        assert script(str(lock)).stdout == "2 packages, portable\n"
        assert lock.read_text() == PORTABLE
    assert tomllib.loads(PORTABLE)["package"][1] == {"name": "thing", "version": "1.0", "source": {"registry": "."}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (FULL, "an address"),
        (PORTABLE.replace('version = "1.0"', 'version = "1.0+cpu"'), "a local build"),
        (PORTABLE + 'hash = "sha256:00"\n', "a hash"),
        (PORTABLE + 'path = "thing.whl"\n', "a file"),
        ("version = 1\n", "no package"),
        ("", "no package"),
        ("[[", "Invalid initial character"),
    ],
)
def test_check_says_what_is_not_portable(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "uv.lock").write_text(text)
    for done in (script("--check", text=text), script("--check", str(tmp_path / "uv.lock"))):
        assert done.returncode == 1
        assert said in done.stderr
        assert "just lock" in done.stderr


def test_check_passes_the_portable_form() -> None:
    assert script("--check", text=PORTABLE).returncode == 0


def test_a_lock_that_names_a_repository_is_refused_and_left(tmp_path: Path) -> None:
    lock = tmp_path / "uv.lock"
    lock.write_text(FULL.replace('editable = "packages/own"', f'git = "{HOST}/own"'))
    before = lock.read_text()
    assert "correct pyproject.toml" in script(str(lock)).stderr
    assert lock.read_text() == before
