"""How the networks of a run compute: switches for memory and speed that leave the method as it is."""

from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    Krea2Transformer2DModel,
    ModelMixin,
    QwenImage21Transformer2DModel,
)
from diffusers.models.attention import AttentionModuleMixin
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from flowbp.config import ModelConfig
from flowbp.core.types import Backbone
from imgen_common.errors import UserError

GPU_ATTENTION = ("_native_efficient", "_native_cudnn", "flash", "xformers")
MASKLESS_ATTENTION = ("_native_flash", "flash")
"""Kernels that take no mask, which the padding of Krea 2's texts needs."""
RECOMPILE_LIMIT = 64
aten = torch.ops.aten
EXPENSIVE = (
    *(aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.convolution.default),
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
)
"""Operations whose results `recompute: selective` keeps."""


def blocks_of(net: nn.Module) -> list[nn.Module]:
    """The blocks that a diffusers transformer repeats: what is sharded, recomputed and compiled one by one."""
    assert isinstance(net, ModelMixin)
    return [module for module in net.modules() if type(module).__name__ in net._no_split_modules]


def apply_model_options(backbone: Backbone, model: ModelConfig) -> None:
    """Sets up a backbone's networks as the configuration says.  Raises UserError where they have no such choice."""
    net, vae = backbone.pipe.transformer, backbone.pipe.vae
    if model.max_sequence_length is not None:
        backbone.set_max_tokens(model.max_sequence_length)
    if model.recompute != "none":
        net.enable_gradient_checkpointing(_recompute_cheap_parts if model.recompute == "selective" else None)
    if model.attention is not None:
        set_attention(net, model.attention)
    if model.vae.dtype is not None:
        vae.to(getattr(torch, model.vae.dtype))
    if model.vae.gradient_checkpointing:
        if not vae._supports_gradient_checkpointing:
            raise UserError(
                f"model.vae.gradient_checkpointing: {type(vae).__name__} has none in diffusers; set it to false"
            )
        vae.enable_gradient_checkpointing()
    if model.vae.slicing:
        vae.enable_slicing()
    if model.vae.tile is not None:
        set_vae_tiling(vae, model.vae.tile, (model.height, model.width))


def _recompute_cheap_parts(block: Any, *args: Any) -> Any:
    """A block whose backward pass computes it again, but for the results of `EXPENSIVE` operations."""
    contexts = partial(create_selective_checkpoint_contexts, list(EXPENSIVE))
    return checkpoint(block.__call__, *args, use_reentrant=False, context_fn=contexts)


def set_attention(net: nn.Module, backend: str) -> None:
    """Which kernel the transformer's attention calls, in every layer."""
    layers = [module for module in net.modules() if isinstance(module, AttentionModuleMixin)]
    # the attention of Qwen-Image-2.1 asks for none where it sees the text
    if not layers or isinstance(net, QwenImage21Transformer2DModel):
        raise UserError(
            f"model.attention {backend}: the attention of {type(net).__name__} has no choice of backends here; "
            "set it to null"
        )
    if isinstance(net, Krea2Transformer2DModel) and backend in MASKLESS_ATTENTION:
        raise UserError(
            f"model.attention {backend}: takes no mask, and {type(net).__name__} masks its text; set it to native"
        )
    for layer in layers:
        layer.set_attention_backend(backend)


def check_machine(model: ModelConfig) -> None:
    """Raises UserError where this machine lacks what the configuration's switches need."""
    if model.attention in GPU_ATTENTION and not torch.cuda.is_available():
        raise UserError(f"model.attention {model.attention}: needs a CUDA device, torch sees none; set it to null")
    package = {"flash": "flash_attn", "xformers": "xformers"}.get(model.attention or "")
    if package is not None and find_spec(package) is None:
        raise UserError(f"model.attention {model.attention}: {package} is not installed; install it, or set it to null")
    if model.quantization is not None:
        check_torchao()


def check_torchao() -> None:
    """Raises UserError unless torchao, which quantizes, is installed; an estimate needs it too."""
    if find_spec("torchao") is None:
        raise UserError(
            "model.quantization int8: torchao is not installed; run: uv pip install torchao, or set it to null"
        )


def quantize(net: nn.Module, device: torch.device | None = None) -> None:
    """Makes weights of the blocks' linear layers 8-bit integers, with one scale per output (torchao), on `device`."""
    check_torchao()
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # type: ignore[import-not-found]

    chosen = {id(layer) for block in blocks_of(net) for layer in block.modules() if isinstance(layer, nn.Linear)}
    quantize_(net, Int8WeightOnlyConfig(), lambda module, name: id(module) in chosen, device=device)


def compile_blocks(net: nn.Module) -> None:
    """Compiles the repeated blocks; those of one kind share what was compiled."""
    # kinds of blocks, with and without gradient, first for one batch size and then for any: more than torch allows
    torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    for block in blocks_of(net):
        block.compile()


def set_vae_tiling(vae: Any, side: int, size: tuple[int, int]) -> None:
    """Makes the autoencoder decode larger images in tiles of `side` pixels that overlap by a quarter."""
    videos = isinstance(vae, AutoencoderKLQwenImage | AutoencoderKLQwenImage21)
    factor = vae.spatial_compression_ratio if videos else 2 ** (len(vae.config.block_out_channels) - 1)
    if side % (4 * factor) or side >= max(size):
        raise UserError(
            f"model.vae.tile {side}: must be a multiple of {4 * factor} pixels and less than the longer side of the "
            f"images, {max(size)}; or null"
        )
    if videos:
        vae.enable_tiling(side, side, 3 * side // 4, 3 * side // 4)
    else:
        vae.tile_sample_min_size, vae.tile_latent_min_size = side, side // factor
        vae.enable_tiling()
