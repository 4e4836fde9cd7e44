"""What tests give a family: prompts, which are edits where it needs source images."""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from families import FAMILIES, SOURCE
from PIL import Image

from flowbp.backbones.source_tokens import pack_sources
from flowbp.core.types import Backbone, Cond
from flowbp.data.edits import Edit, Source
from flowbp.data.embeddings import encode_one
from imgen_common.images import content_hash

INSTRUCTION = "make the circle green"


def edit(*images: Image.Image, text: str = INSTRUCTION) -> Edit:
    """An instruction with its sources."""
    return Edit(text, [Source(content_hash(one), (one.height, one.width), lambda one=one: one) for one in images])


def prompt_for(backbone: Backbone, text: str) -> str:
    """The text, or an edit of `SOURCE` where the family needs one."""
    return edit(*[SOURCE] * backbone.min_sources, text=text) if backbone.min_sources else text


def encode(backbone: Backbone, texts: Sequence[str]) -> Cond:
    """Conditioning of prompts with these texts."""
    if not backbone.min_sources:
        return backbone.encode(texts)
    rows = [encode_one(backbone, prompt_for(backbone, text)) for text in texts]
    latents = backbone.encode_source(backbone.prepare_source(SOURCE))
    found = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    return found | pack_sources([[latents] * backbone.min_sources] * len(texts))


def shrink_sources(patch: pytest.MonkeyPatch) -> None:
    """Qwen-Image-Edit turns every source into a million pixels, for tiny networks too many tokens; here 40 x 40, about,
    and at least 32 x 32."""

    def small(wanted: Callable[..., tuple[int, ...]], area: int, ratio: float) -> tuple[int, ...]:
        return wanted(max(area * (40 / 1024) ** 2, 32 * 32), ratio)

    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        patch.setattr(module, "calculate_dimensions", partial(small, module.calculate_dimensions))


def data_of(family: str) -> list[str]:
    """Settings of the prompts of a run: those of the defaults, or edits where the family needs sources."""
    keys = ("data.prompts", "eval.prompts", "eval.quick_prompts") if FAMILIES[family].min_sources else ()
    return [f"{key}=builtin:shapes/edits" for key in keys]
