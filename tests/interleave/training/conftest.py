"""What the trainings start from."""

from pathlib import Path

import pytest
from sets import make_set
from tiny import tiny_folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in `model`, a set in `set`."""
    folder = tmp_path_factory.mktemp("training")
    tiny_folder(folder / "model")
    make_set(folder / "set")
    return folder
