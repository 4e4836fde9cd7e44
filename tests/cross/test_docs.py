"""The documentation: commands are understood, tutorials do what they say, recipes are valid, the site builds."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml
from browser import find_faults
from command_lines import FEW, ONE, ROLLOUT, parse
from PIL import Image

from flowbp.config import TrainConfig
from imgen_common.config import load
from imgen_common.errors import UserError

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TUTORIALS = [ROOT / "docs" / "quickstart.md", *sorted((ROOT / "docs" / "tutorials").glob("*.md"))]
NEEDS = ("# needs published weights", "# needs small files from the Hub", "# needs a server")
"""The line above commands of a block that cannot be run here, and must say so."""


def command_lines(page: Path) -> list[str]:
    """The commands of both programs in indented and fenced blocks, each as one line."""
    text = re.sub(r"\s*\\\n\s*", " ", page.read_text(encoding="utf-8"))
    text = re.sub(r"```python\n.*?```", "", text, flags=re.DOTALL)
    found = []
    for line in text.splitlines():
        words = re.sub(
            r"^(\$ |pip install uv && |uv run |torchrun [^m]*-m |accelerate launch .*?-m )+", "", line.strip()
        )
        is_block = line.startswith("    ") or line == line.strip()
        if is_block and re.match(r"(flowbp|interleave) [a-z-]+( |$)", words) and not is_prose(words):
            found.append(words.split("  #")[0].strip())
    return found


def is_prose(words: str) -> bool:
    """Whether a line that begins with a program's name is a sentence or a row of an overview."""
    return bool(
        re.search(r"\.\.\.|   \S|[A-Z]{3,}|^\S+ [a-z]+ (is|has|makes|aligns|needs|and|of|computes|reads)\b|\.$", words)
    ) or ("|" in words and "=" not in words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_is_understood(page: Path) -> None:
    for line in command_lines(page):
        assert parse(line) == 0, f"{page.name}: {line}"


def test_commands_are_found() -> None:
    found = {page.name: command_lines(page) for page in TUTORIALS}
    assert "flowbp train damped.yaml --dry-run" in found["method.md"]
    assert sum(map(len, found.values())) >= 60


def test_every_recipe_of_the_tutorials_is_valid(tmp_path: Path) -> None:
    names = []
    for page in TUTORIALS:
        for name, content in recipes(page).items():
            (tmp_path / name).write_text(content)
            load(TrainConfig, [tmp_path / name])
            names.append(name)
    assert names == ["damped.yaml", "my_reward.yaml", "two.yaml"]
    (tmp_path / "damped.yaml").write_text("methd: {}\n")
    with pytest.raises(UserError):
        load(TrainConfig, [tmp_path / "damped.yaml"])


def recipes(page: Path) -> dict[str, str]:
    """{file name: content} of the YAML blocks whose first line names a file."""
    text = page.read_text(encoding="utf-8")
    return dict(re.findall(r"```yaml\n# (\S+\.yaml)\n(.*?)```", text, re.DOTALL))


# --- run -------------------------------------------------------------------------------------------------------------


def small(line: str) -> str:
    """Options that make a command of a tutorial take seconds."""
    if "--dry-run" in line or "--shard" in line:
        return ""
    for start, options in {
        "flowbp train": FEW,
        "flowbp eval": "--num-prompts 6",
        "interleave data build": "--set prompts.count=24",
        "interleave sft": f"{ONE} --set trl.warmup_steps=0",
        "interleave grpo": ROLLOUT,
        "interleave benchmark wise --out": "--limit 2",
    }.items():
        if line.startswith(start):
            return options
    return ""


def test_all_packages_have_one_version() -> None:
    files = [ROOT / "pyproject.toml", *(ROOT / "packages").glob("*/pyproject.toml")]
    versions = {tomllib.loads(file.read_text(encoding="utf-8"))["project"]["version"] for file in files}
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"]
    assert len(files) == 4
    assert versions == {citation}


@pytest.mark.exhaustive
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_does_what_it_says(page: Path, tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "circle.png")
    text = page.read_text(encoding="utf-8")
    for name, content in recipes(page).items():
        (tmp_path / name).write_text(content)
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        lines = re.sub(r"\s*\\\n\s*", " ", block).splitlines()
        for number, line in enumerate(lines):
            if line not in NEEDS:
                run_line(line, tmp_path, needs=any(mark in lines[:number] for mark in NEEDS))
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL)):
        (tmp_path / f"snippet{number}.py").write_text(code)
        subprocess.run([sys.executable, f"snippet{number}.py"], cwd=tmp_path, check=True)


def run_line(line: str, place: Path, *, needs: bool) -> None:
    """Runs one command; one that needs what is not here must end with one line that says so."""
    line = line.removeprefix("uv run ")
    if line.startswith(("pip ", "pytest", "export ", "hf ")):
        return
    words = shlex.split(f"{line} {small(line)}")
    if words[0] == "torchrun":
        words = ["-m", "torch.distributed.run", *words[1:], *shlex.split(FEW)]
    else:
        words = ["-m", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *words], cwd=place, capture_output=True, text=True, env=environment)
    output = f"{line}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, output
    if needs:
        assert done.returncode == 2, output
        assert ": error: " in done.stderr.splitlines()[-1], output
    else:
        # 1: a story that the critic never accepted
        assert done.returncode == 0 or (done.returncode == 1 and words[1] == "interleave"), output


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """The built site, and its address."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    handler = partial(SilentHandler, directory=str(tmp_path / "site"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path / "site", f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class SilentHandler(SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_reads_well(browser: Any, site: tuple[Path, str]) -> None:
    folder, address = site
    pages = list(folder.rglob("*.html"))
    assert len(pages) > 50
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:)?//', text), page
    for name in ("index", "tutorials/method", "reference/flowbp_configuration", "results/methods"):
        assert find_faults(browser, f"{address}/{name}.html") == []
