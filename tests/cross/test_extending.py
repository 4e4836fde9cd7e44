"""The recipes of CONTRIBUTING.md, followed to the letter in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COPIED = ("packages", "tests", "configs", "scripts", "benchmarks", "docs", "pyproject.toml", "mkdocs.yml")
COPIED += ("CONTRIBUTING.md", "README.md", "CHANGELOG.md")
NEW_FILE = re.compile(r"New file\s+`(\S+)`:\n\n```python\n(.*?)```", re.DOTALL)
NEW_LINES = re.compile(r"In `(\S+)`, before `([^`]*)`[^`]*(?:`[^`]*`[^`]*)?:\n\n```python\n(.*?)```", re.DOTALL)
TOYS = {
    "method": "stratified",
    "backbone": "sd3_pag",
    "reward": "brightness",
    "generator": "plain",
    "chat model": "echo",
    "judge": "size",
    "benchmark": "single_caption",
}
SUITES = ["flowbp/core", "flowbp/backbones"]
SUITES += ["flowbp/rewards/test_rewards.py", "interleave/models/test_contracts.py"]
SUITES += ["interleave/benchmarks/test_benchmark_contracts.py"]


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with one more of everything."""
    copy = tmp_path_factory.mktemp("copy")
    for name in COPIED:
        source = ROOT / name
        ignored = shutil.ignore_patterns("__pycache__", "results")
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=ignored)
        else:
            shutil.copy(source, copy)
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files, lines = NEW_FILE.findall(text), NEW_LINES.findall(text)
    assert (len(files), len(lines)) == (7, 23)
    for path, content in files:
        assert not (copy / path).exists()
        (copy / path).write_text(content, encoding="utf-8")
    for path, anchor, content in lines:
        before = (copy / path).read_text(encoding="utf-8")
        assert before.count(f"\n{anchor}\n") == 1, (path, anchor)
        (copy / path).write_text(before.replace(f"\n{anchor}\n", f"\n{content}{anchor}\n"), encoding="utf-8")
    run(copy, "scripts/reference.py")
    return copy


def run(copy: Path, *words: str) -> str:
    """The output of Python in the copy, whose packages come before those that are installed."""
    sources = [str(copy / "packages" / name / "src") for name in ("common", "flowbp", "interleave")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sources)}
    done = subprocess.run([sys.executable, *words], cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


def run_tests(copy: Path, *arguments: str) -> str:
    """The output of pytest in the copy."""
    return run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)


@pytest.mark.exhaustive
def test_the_contract_suites_hold_for_one_more_of_everything(extended: Path) -> None:
    chosen = " or ".join(TOYS.values())
    output = run_tests(extended, "-n0", "-vv", "-k", chosen, *(f"tests/{suite}" for suite in SUITES))
    for kind, toy in TOYS.items():
        assert re.search(rf"\[[^\]]*\b{toy}\b[^\]]*\] PASSED", output), kind


@pytest.mark.exhaustive
def test_every_test_holds_with_one_more_of_everything(extended: Path) -> None:
    run_tests(extended, "--deselect", "tests/cross/test_extending.py")
