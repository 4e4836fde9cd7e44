"""The same updates as an adapter for ComfyUI."""

from collections.abc import Mapping

import torch
from torch import Tensor

from flowbp.export.adapters import Adapter, to_diffusers
from imgen_common.errors import UserError

COMFYUI_FILE = "comfyui_lora.safetensors"


def to_comfyui(found: Mapping[str, Adapter], pipeline: str, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """The tensors under the names that ComfyUI reads.

    FLUX has its original names, with query, key and value as one layer; SD3 has those of diffusers.
    widths: number of outputs of every linear layer of the transformer.
    """
    if pipeline == "StableDiffusion3Pipeline":
        return to_diffusers(found)
    left = dict(found)
    keys: dict[str, Tensor] = {}
    for theirs, ours in _flux_layers(found, flux2=pipeline == "Flux2KleinPipeline").items():
        parts = [left.pop(layer, None) for layer in ours]
        if any(parts):
            one = fuse_adapters(parts, [widths[layer] for layer in ours])
            if pipeline == "Flux2KleinPipeline":
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


def _flux_layers(found: Mapping[str, Adapter], *, flux2: bool) -> dict[str, list[str]]:
    """Every layer, by its original name, of blocks that have adapters, and the diffusers layers that it consists of."""
    linear = {"in": "linear_in", "out": "linear_out"} if flux2 else {"in": "net.0.proj", "out": "net.2"}
    names: dict[str, list[str]] = {}
    for block in sorted({".".join(name.split(".")[:2]) for name in found if "blocks." in name}):
        kind, number = block.split(".")
        if kind == "transformer_blocks":
            double = f"double_blocks.{number}"
            for side, prefix, projection in (("img", "to_", "to_out.0"), ("txt", "add_", "to_add_out")):
                ends = ("q", "k", "v") if side == "img" else ("q_proj", "k_proj", "v_proj")
                names[f"{double}.{side}_attn.qkv"] = [f"{block}.attn.{prefix}{end}" for end in ends]
                names[f"{double}.{side}_attn.proj"] = [f"{block}.attn.{projection}"]
                mlp = f"{block}.ff" if side == "img" else f"{block}.ff_context"
                names[f"{double}.{side}_mlp.0"] = [f"{mlp}.{linear['in']}"]
                names[f"{double}.{side}_mlp.2"] = [f"{mlp}.{linear['out']}"]
        elif flux2:
            names[f"single_blocks.{number}.linear1"] = [f"{block}.attn.to_qkv_mlp_proj"]
            names[f"single_blocks.{number}.linear2"] = [f"{block}.attn.to_out"]
        else:
            parts = [f"{block}.attn.to_q", f"{block}.attn.to_k", f"{block}.attn.to_v", f"{block}.proj_mlp"]
            names[f"single_blocks.{number}.linear1"] = parts
            names[f"single_blocks.{number}.linear2"] = [f"{block}.proj_out"]
    return names
