"""The packages as wheels: they hold what they need, and the main job runs from them outside the repository."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from browser import find_faults

ROOT = Path(__file__).parents[2]
FEW = "max_train_steps=1 total_batch_size=2 eval.num_prompts=4 eval.quick_num_prompts=2 eval.num_inference_steps=2"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the contents of all wheels."""
    place = tmp_path_factory.mktemp("wheels")
    subprocess.run(["uv", "build", "--all-packages", "--wheel", "--quiet", "--out-dir", place], cwd=ROOT, check=True)
    wheels = sorted(place.glob("*.whl"))
    assert [wheel.name.split("-")[0] for wheel in wheels] == ["flowbp", "imgen_common", "interleave"]
    for wheel in wheels:
        ZipFile(wheel).extractall(place / "site")
    return place / "site"


def run(installed: Path, place: Path, *words: str) -> str:
    """The output of a command that finds the packages in the wheels before any others."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=place, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_main_job_runs_from_wheels(browser: Any, installed: Path, tmp_path: Path) -> None:
    where = (
        "import flowbp, imgen_common, interleave; print(*(m.__path__[0] for m in (flowbp, imgen_common, interleave)))"
    )
    assert all(Path(path).is_relative_to(installed) for path in run(installed, tmp_path, "-c", where).split())
    sets = [part for one in FEW.split() for part in ("--set", one)]
    run(installed, tmp_path, "-m", "flowbp", "train", *sets)
    report = tmp_path / "runs" / "flowbp_bridge" / "report.html"
    report.write_text(report.read_text(encoding="utf-8").replace("<details", "<details open"), encoding="utf-8")
    assert find_faults(browser, report.as_uri()) == []
    run(installed, tmp_path, "-m", "interleave", "sft", "critic", "--help")


@pytest.mark.slow
def test_wheels_hold_one_version_and_the_license(installed: Path) -> None:
    for name in ("flowbp", "imgen_common", "interleave"):
        [folder] = installed.glob(f"{name}-*.dist-info")
        fields = (folder / "METADATA").read_text(encoding="utf-8")
        assert "License-Expression: Apache-2.0" in fields
        assert "Requires-Python: <3.13,>=3.11" in fields
        assert list(folder.glob("licenses/LICENSE"))
        assert not list((installed / name).rglob("*.pkl"))
    versions = {folder.name.split("-")[1] for folder in installed.glob("*.dist-info")}
    assert len(versions) == 1
