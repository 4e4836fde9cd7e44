"""Tiny models of every family."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from families import FAMILIES, LATER, folder_of
from given import shrink_sources

from flowbp import backbones, cli
from flowbp.core.types import Backbone


@pytest.fixture(scope="session", autouse=True)
def _small_sources() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        shrink_sources(patch)
        yield


@pytest.fixture(
    scope="module",
    params=[pytest.param(f, marks=getattr(pytest.mark, LATER[f]) if f in LATER else ()) for f in FAMILIES],
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random pipeline of each family, saved."""
    return folder_of(request.param, tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    """The same, loaded."""
    return backbones.load(str(folder))


@pytest.fixture
def flowbp(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """`flowbp(*words)` -> exit code, output, errors."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flowbp", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        output = capsys.readouterr()
        return int(stop.value.code or 0), output.out, output.err

    return call
