"""Runs the notebooks of docs/notebooks and keeps their outputs: `python scripts/notebooks.py [NAME...]`."""

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"


def run_notebook(file: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of this run.  Its run folders go to a temporary folder.

    Raises nbclient.exceptions.CellExecutionError where a cell fails.
    """
    notebook = nbformat.read(file, as_version=4)
    with tempfile.TemporaryDirectory() as place:
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": place}}).execute()
    for cell in notebook.cells:
        cell.metadata.clear()  # the times of the run, which would differ each time
        if "outputs" in cell:  # progress bars and warnings, with the paths of this machine
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def main() -> None:
    for name in sys.argv[1:] or sorted(file.stem for file in FOLDER.glob("*.ipynb")):
        file = FOLDER / f"{name}.ipynb"
        nbformat.write(run_notebook(file), file)


if __name__ == "__main__":
    main()
