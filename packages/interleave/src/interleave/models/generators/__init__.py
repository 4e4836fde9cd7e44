"""Generators: each is one file with a configuration of its own `kind`, whose `build` makes it."""

from typing import Annotated

from pydantic import Field

from interleave.models.generators.images_api import ImagesApiConfig
from interleave.models.generators.pipeline import PipelineConfig
from interleave.models.generators.scripted import ScriptedConfig
from interleave.models.generators.service import ServiceConfig

GeneratorConfig = Annotated[
    PipelineConfig | ServiceConfig | ImagesApiConfig | ScriptedConfig,  # a new generator is one more member
    Field(discriminator="kind"),
]
