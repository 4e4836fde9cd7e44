"""Tiny models of every family."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from families import FAMILIES, LATER, folder_of

from flowbp import backbones, cli
from flowbp.core.types import Backbone


@pytest.fixture(scope="session", autouse=True)
def _small_sources() -> Iterator[None]:
    """Qwen-Image-Edit turns every source into a million pixels, for tiny networks too many tokens; here 40 x 40, about,
    and at least 32 x 32."""

    def small(wanted: Callable[..., tuple[int, ...]], area: int, ratio: float) -> tuple[int, ...]:
        return wanted(max(area * (40 / 1024) ** 2, 32 * 32), ratio)

    with pytest.MonkeyPatch.context() as patch:
        for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
            patch.setattr(module, "calculate_dimensions", partial(small, module.calculate_dimensions))
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
