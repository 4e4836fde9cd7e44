"""Generators: each with a configuration of its own `kind`, and `make`."""

from typing import Annotated

from pydantic import Field

from interleave.generators.cache import CachedGenerator
from interleave.generators.images_api import ImagesApiConfig, ImagesApiGenerator
from interleave.generators.pipeline import PipelineConfig, PipelineGenerator
from interleave.generators.scripted import ScriptedConfig, ScriptedGenerator
from interleave.generators.service import ServiceConfig, ServiceGenerator
from interleave.parts import Generator

GeneratorConfig = Annotated[
    PipelineConfig | ServiceConfig | ImagesApiConfig | ScriptedConfig, Field(discriminator="kind")
]

__all__ = [
    "CachedGenerator",
    "GeneratorConfig",
    "ImagesApiConfig",
    "ImagesApiGenerator",
    "PipelineConfig",
    "PipelineGenerator",
    "ScriptedConfig",
    "ScriptedGenerator",
    "ServiceConfig",
    "ServiceGenerator",
    "make",
]


def make(config: GeneratorConfig) -> Generator:
    """The generator that `config` describes, loaded.  Raises UserError where it cannot be had."""
    match config:
        case PipelineConfig():
            return PipelineGenerator(config)
        case ServiceConfig():
            return ServiceGenerator.connect(config)
        case ImagesApiConfig():
            return ImagesApiGenerator(config)
        case ScriptedConfig():
            return ScriptedGenerator.of(config)
