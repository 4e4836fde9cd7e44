"""Tiny models of every family.  Property tests are not timed one by one: the machine may be busy."""

from pathlib import Path

import pytest
from families import FAMILIES, LIKE_FLUX, folder_of
from hypothesis import settings

from flowbp import backbones
from flowbp.core.types import Backbone

settings.register_profile("flowbp", deadline=None)
settings.load_profile("flowbp")


@pytest.fixture(
    scope="module", params=[pytest.param(f, marks=pytest.mark.exhaustive if f == LIKE_FLUX else ()) for f in FAMILIES]
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random pipeline of each family, saved."""
    return folder_of(request.param, tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    """The same, loaded."""
    return backbones.load(str(folder))
