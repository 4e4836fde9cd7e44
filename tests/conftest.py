"""One torch thread, no network, and no test that needs a GPU where there is none."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
# Read when torch is first imported, here and in processes that a test starts; the controller of xdist needs no torch.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
# Where this is set, each of the hundreds of processes of the tests compiles torch, diffusers and transformers anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

# What a killed process has written survives without; a test that looks at how files are synced replaces it again.
os.fsync = lambda handle: None

settings.register_profile("untimed", deadline=None)  # the machine may be busy
settings.load_profile("untimed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium; skipped where there is none."""
    from browser import CHROMIUM, open_browser

    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with open_browser() as chromium:
        yield chromium


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("exhaustive"):  # by one of its parameters, though another one is slow
            item.own_markers = [mark for mark in item.own_markers if mark.name != "slow"]
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
