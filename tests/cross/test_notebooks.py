"""The notebooks: fifteen cells each, with their outputs, and they run."""

import asyncio
from pathlib import Path

import nbformat
import pytest
from PIL import Image

import interleave
from scripts.notebooks import FOLDER, run_notebook

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_has_fifteen_cells_and_pictures(file: Path) -> None:
    cells = nbformat.read(file, as_version=4).cells
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    assert len(cells) == 15
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "error" for output in outputs)
    places = [f"/{name}/" for name in ("tmp", "root", "home", "work", "Users")]  # of the machine that ran it
    assert not any(place in str(output) for output in outputs for place in places)


@pytest.mark.exhaustive
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run_notebook(file)


def test_a_story_is_told_where_an_event_loop_runs() -> None:
    async def cell() -> str:
        told = interleave.tell_story("a square", lambda prompt, sources, seed: Image.new("RGB", (64, 64), "red"))
        return told.trajectory.status

    assert asyncio.run(cell()) == "complete"
