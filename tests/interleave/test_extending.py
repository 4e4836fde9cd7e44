"""CONTRIBUTING's recipe for a generator, followed in a copy of the package."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import interleave

GENERATOR = '''
from typing import Any, Literal

from PIL import Image

from imgen_common.config import Config
from interleave.protocols import GenerationRequest, HashedImage


class PlainConfig(Config):
    """Images of one color."""

    kind: Literal["plain"] = "plain"
    """The name of this generator in configurations."""

    def build(self) -> "PlainGenerator":
        return PlainGenerator()


class PlainGenerator:
    id, max_sources = "plain", 1
    params: dict[str, Any] = {}

    async def generate(self, request: GenerationRequest) -> HashedImage:
        return HashedImage.from_pil(Image.new("RGB", (8, 8), "red"))

    async def close(self) -> None:
        pass
'''
CHECK = """
import asyncio
from imgen_common.config import load
from interleave.loop.config import RunConfig
from interleave.loop.run import build_components
from interleave.protocols import GenerationRequest

config = load(RunConfig, [], ["generator.kind=plain", "planner.kind=none", "critic.kind=none", "cache=null"])
made = build_components(config)
image = asyncio.run(made.generator.generate(GenerationRequest("x", (), 0)))
print(made.generator.id, image.image.getpixel((0, 0)))
"""


@pytest.mark.slow
def test_a_generator_is_one_file_and_one_line(tmp_path: Path) -> None:
    package = Path(interleave.__file__).parent
    shutil.copytree(package, tmp_path / "interleave", ignore=shutil.ignore_patterns("__pycache__"))
    folder = tmp_path / "interleave" / "models" / "generators"
    (folder / "plain.py").write_text(GENERATOR)
    init = (folder / "__init__.py").read_text()
    member = "PipelineConfig | ServiceConfig"
    assert member in init
    imported = "from interleave.models.generators.plain import PlainConfig\n"
    init = imported + init.replace(member, f"PlainConfig | {member}")
    (folder / "__init__.py").write_text(init)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, env=environment, check=False)
    assert (done.stdout.strip(), done.stderr) == ("plain (255, 0, 0)", "")
