"""Tiny random pipelines of every family that draws here: flowbp's, FLUX.1-Kontext, Qwen-Image-Edit."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline, QwenImageEditPipeline, QwenImageEditPlusPipeline
from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

from tests.flowbp import families


def qwen(kind: type[DiffusionPipeline]) -> DiffusionPipeline:
    """Qwen-Image with a text encoder that is shown the references."""
    parts, patch = families.qwen_image().components, families.QWEN_PATCH
    sizes = {"patch_size": patch, "temporal_patch_size": 2, "merge_size": 2}
    bounds = {"min_pixels": (2 * patch) ** 2, "max_pixels": (4 * patch) ** 2}
    images, videos = Qwen2VLImageProcessor(**sizes, **bounds), Qwen2VLVideoProcessor(**sizes)
    return kind(**parts, processor=Qwen2VLProcessor(images, parts["tokenizer"], videos, chat_template=""))


NOT_HERE = (families.LIKE_FLUX, "krea2")
"""Families of flowbp whose pipelines are made below, or do not generate for interleave."""
PIPELINES = {name: family.make for name, family in families.FAMILIES.items() if name not in NOT_HERE} | {
    "kontext": families.flux_kontext,
    "qwen_edit": lambda: qwen(QwenImageEditPipeline),
    "qwen_edit_plus": lambda: qwen(QwenImageEditPlusPipeline),
}


@torch.no_grad()
def folder_of(name: str, place: Path) -> Path:
    """A folder with a tiny random pipeline whose prompts and references show in its images."""
    torch.manual_seed(0)
    pipe = PIPELINES[name]()
    for parameter in (*pipe.transformer.parameters(), *pipe.vae.parameters()):
        if not parameter.any():  # freshly made networks start with layers that say nothing
            torch.nn.init.normal_(parameter, std=0.05)
    for parameter in pipe.transformer.parameters():
        if parameter.ndim == 2:
            parameter *= 3
    pipe.save_pretrained(place / name)
    return place / name
