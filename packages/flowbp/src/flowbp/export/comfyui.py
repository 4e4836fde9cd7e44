"""The same updates as an adapter for ComfyUI."""

from collections.abc import Mapping

import torch
from torch import Tensor

from flowbp.backbones.layer_names import SWAPPED, original_layers
from flowbp.export.adapters import Adapter, to_diffusers
from imgen_common.errors import UserError

COMFYUI_FILE = "comfyui_lora.safetensors"
SAME_NAMES = (
    *("StableDiffusion3Pipeline", "ZImagePipeline", "QwenImagePipeline"),
    *("QwenImageEditPipeline", "QwenImageEditPlusPipeline"),
)
"""Pipelines whose layers have the names of diffusers in ComfyUI."""


def to_comfyui(found: Mapping[str, Adapter], pipeline: str, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """The tensors under the names that ComfyUI reads.

    FLUX has its original names, with query, key and value as one layer; SD3, Z-Image and Qwen-Image have those of
    diffusers.  widths: number of outputs of every linear layer of the transformer.
    """
    if pipeline in SAME_NAMES:
        return to_diffusers(found)
    left = dict(found)
    keys: dict[str, Tensor] = {}
    for theirs, ours in original_layers(found, pipeline).items():
        parts = [left.pop(layer, None) for layer in ours]
        if any(parts):
            one = fuse_adapters(parts, [widths[layer] for layer in ours])
            if theirs == SWAPPED:
                one = Adapter(one.down, torch.cat(one.up.chunk(2)[::-1]))
            if pipeline in ("Flux2KleinPipeline", "Flux2Pipeline"):
                name, down, up = f"diffusion_model.{theirs}", "lora_A", "lora_B"
            else:
                name, down, up = "lora_unet_" + theirs.replace(".", "_"), "lora_down", "lora_up"
            keys |= {f"{name}.{down}.weight": one.down, f"{name}.{up}.weight": one.up}
    if left:
        raise UserError(f"no ComfyUI name is known for the layers {sorted(left)[:4]}; export --to diffusers instead")
    return keys


def fuse_adapters(parts: "list[Adapter | None]", widths: list[int]) -> Adapter:
    """One adapter for layers with the same input whose outputs are stacked; its rank is the sum of their ranks.

    widths: number of outputs of each layer; those without an adapter get zeros.
    """
    present = [part for part in parts if part is not None]
    up = torch.zeros(sum(widths), sum(len(part.down) for part in present))
    row = column = 0
    for part, width in zip(parts, widths, strict=True):
        if part is not None:
            rank = len(part.down)
            up[row : row + width, column : column + rank] = part.up
            column += rank
        row += width
    return Adapter(torch.cat([part.down for part in present]), up)
