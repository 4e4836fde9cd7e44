"""The diffusers pipelines that can be generators, and how each one wants to be called."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from imgen_common.errors import UserError, nearest


@dataclass(frozen=True)
class PipelineFamily:
    """How a pipeline class wants to be called.

    edit: `references` (several for one image, each its own position), `reference` (one per prompt), `alone` (one prompt
    per call), `image` (another pipeline, `img2img`, starts from the noised source).  guidance: its argument.
    negative: the negative prompt without which it has no guidance; None: it takes none.  needs_image: it cannot
    generate without an image and is given a white one.
    """

    edit: Literal["references", "reference", "alone", "image"]
    max_references: int = 1
    guidance: str = "guidance_scale"
    negative: str | None = None
    needs_image: bool = False
    img2img: str = ""


FAMILIES: Mapping[str, PipelineFamily] = {
    "Flux2KleinPipeline": PipelineFamily("references", 10),
    "Flux2Pipeline": PipelineFamily("references", 10),
    "FluxKontextPipeline": PipelineFamily("reference"),
    "QwenImageEditPipeline": PipelineFamily("alone", 1, "true_cfg_scale", " ", needs_image=True),
    "QwenImageEditPlusPipeline": PipelineFamily("alone", 3, "true_cfg_scale", " ", needs_image=True),
    "StableDiffusion3Pipeline": PipelineFamily("image", negative="", img2img="StableDiffusion3Img2ImgPipeline"),
    "FluxPipeline": PipelineFamily("image", img2img="FluxImg2ImgPipeline"),
}
"""Families by the pipeline class that a folder's model_index.json names; a new one is one line here."""


def family_of(ref: str, folder: Path) -> tuple[str, PipelineFamily]:
    """Class name and family of a model's folder.  Raises UserError for another kind of model."""
    index = folder / "model_index.json"
    content = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    name = str(content.get("_class_name", "folder without model_index.json"))
    if name not in FAMILIES:
        allowed = ", ".join(FAMILIES)
        raise UserError(f"{ref}: cannot generate with a {name}{nearest(name, FAMILIES)}; allowed: {allowed}")
    return name, FAMILIES[name]
