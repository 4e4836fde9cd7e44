"""Tiny random pipelines of every family that draws here."""

from pathlib import Path

import torch

from tests.flowbp import families

NOT_HERE = (families.LIKE_FLUX, "krea2", "qwen_image_21")
"""Families of flowbp whose pipelines are made below, or have tests of their own: other sizes, or no edits."""
PIPELINES = {name: family.make for name, family in families.FAMILIES.items() if name not in NOT_HERE} | {
    "kontext": families.flux_kontext,
}


@torch.no_grad()
def folder_of(name: str, place: Path) -> Path:
    """A folder with a tiny random pipeline whose prompts and references show in its images."""
    torch.manual_seed(0)
    pipe = PIPELINES[name]() if name in PIPELINES else families.FAMILIES[name].make()
    for parameter in (*pipe.transformer.parameters(), *pipe.vae.parameters()):
        if not parameter.any():  # freshly made networks start with layers that say nothing
            torch.nn.init.normal_(parameter, std=0.05)
    for parameter in pipe.transformer.parameters():
        if parameter.ndim == 2:
            parameter *= 3
    pipe.save_pretrained(place / name)
    return place / name
