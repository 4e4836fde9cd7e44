"""Pipelines of published models, built from the sizes that their `config.json` files state: nothing is downloaded.

A pipeline is built on torch's meta device, so that its sizes cost no memory, and is written as a diffusers folder
without weights, which is all that `flowbp estimate` reads.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImageEditPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    T5Config,
    T5EncoderModel,
)

from scripts.miniature.world.vocabulary import clip_tokenizer, qwen_tokenizer

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
"""Tokens around and in the place of the images that a Qwen reads."""
Size = Literal["published", "shallow", "tiny"]
"""`shallow`: as published, but the text encoders keep only their width and as few layers as the adapter reads.
`tiny`: a few thousand weights everywhere, to see whether code runs."""

# Sizes from the published config.json files, as the arguments of the classes ------------------------------------------

SD3_TRANSFORMER: dict[str, Any] = {
    # stabilityai/stable-diffusion-3.5-medium, transformer/config.json: 24 layers of 24 heads x 64, the first 13 with a
    # second attention over the image tokens alone
    **{"sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24},
    **{"attention_head_dim": 64, "num_attention_heads": 24, "caption_projection_dim": 1536},
    **{"joint_attention_dim": 4096, "pooled_projection_dim": 2048, "pos_embed_max_size": 384},
    **{"qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
}
SD3_VAE: dict[str, Any] = {
    # its vae/config.json: 16 channels, no 1x1 convolutions around the latents
    **{"latent_channels": 16, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 1024},
    **{"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4},
    **{"use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 1.5305, "shift_factor": 0.0609},
}
FLUX2_TRANSFORMER: dict[str, Any] = {
    # black-forest-labs/FLUX.2-klein-base-4B, transformer/config.json: 5 double and 20 single blocks of 24 heads x 128,
    # text of three depths of Qwen3-4B (3 x 2560), no guidance input; the rest are diffusers' defaults for FLUX.2
    **{"in_channels": 128, "num_layers": 5, "num_single_layers": 20, "attention_head_dim": 128},
    **{"num_attention_heads": 24, "joint_attention_dim": 7680, "guidance_embeds": False},
}
TINY_SD3_TRANSFORMER: dict[str, Any] = {
    **{"sample_size": 32, "pos_embed_max_size": 32, "num_layers": 3, "attention_head_dim": 8},
    **{"num_attention_heads": 4, "joint_attention_dim": 32, "caption_projection_dim": 32},
    **{"pooled_projection_dim": 32, "dual_attention_layers": (0,), "in_channels": 4, "out_channels": 4},
}
TINY_FLUX2_TRANSFORMER: dict[str, Any] = {
    **{"in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16},
    **{"num_attention_heads": 2, "joint_attention_dim": 48, "timestep_guidance_channels": 16},
    **{"axes_dims_rope": (4, 4, 4, 4)},
}
TINY_VAE: dict[str, Any] = {
    **{"latent_channels": 4, "block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4},
    **{"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
}

# Text encoders --------------------------------------------------------------------------------------------------------


def clip(kind: type[PreTrainedModel], width: int, layers: int, heads: int, size: Size) -> PreTrainedModel:
    """A CLIP text encoder.  A shallow one has two layers: the pipeline reads the last but one."""
    if size == "published":
        sizes = {"vocab_size": 49408, "intermediate_size": 4 * width}
        sizes |= {"num_hidden_layers": layers, "num_attention_heads": heads}
    else:
        sizes = {"vocab_size": 1000, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes |= {"max_position_embeddings": clip_length(size)}
    return kind(CLIPTextConfig(hidden_size=width, projection_dim=width, **sizes))


def clip_length(size: Size) -> int:
    """Tokens of a prompt that CLIP reads."""
    return 13 if size == "tiny" else 77


def t5(size: Size) -> T5EncoderModel:
    """The encoder of T5 1.1 XXL."""
    if size == "published":
        sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
        return T5EncoderModel(T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **sizes))
    width = 32 if size == "tiny" else 4096
    return T5EncoderModel(T5Config(vocab_size=1000, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def qwen3(size: Size, width: int, intermediate: int, pad_token_id: int) -> Qwen3ForCausalLM:
    """A Qwen3 of 36 layers, or of the four that the tiny and the shallow pipelines need."""
    if size == "published":
        sizes = {"vocab_size": 151936, "hidden_size": width, "intermediate_size": intermediate}
        sizes |= {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    else:
        sizes = {"vocab_size": 1000, "hidden_size": 16 if size == "tiny" else width, "intermediate_size": 32}
        sizes |= {"num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    return Qwen3ForCausalLM(Qwen3Config(pad_token_id=pad_token_id, **sizes))


def with_max_length(tokenizer: PreTrainedTokenizerBase, length: int) -> PreTrainedTokenizerBase:
    """The tokenizer, which now truncates and pads to `length` tokens."""
    tokenizer.model_max_length = length
    return tokenizer


# Pipelines, to be built on the meta device ----------------------------------------------------------------------------


def sd3_5_medium(size: Size = "published") -> DiffusionPipeline:
    """Stable Diffusion 3.5 medium with CLIP-L (width 768), CLIP-G (1280) and T5-XXL (4096)."""
    tiny = size == "tiny"
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**(SD3_TRANSFORMER | (TINY_SD3_TRANSFORMER if tiny else {}))),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(**(SD3_VAE | (TINY_VAE if tiny else {}))),
        text_encoder=clip(CLIPTextModelWithProjection, 16 if tiny else 768, 12, 12, size),
        tokenizer=with_max_length(clip_tokenizer(), clip_length(size)),
        text_encoder_2=clip(CLIPTextModelWithProjection, 16 if tiny else 1280, 32, 20, size),
        tokenizer_2=with_max_length(clip_tokenizer(), clip_length(size)),
        text_encoder_3=t5(size),
        tokenizer_3=with_max_length(clip_tokenizer(), 256),
    )


def flux1_dev() -> DiffusionPipeline:
    """FLUX.1-dev: 19 double and 38 single blocks of 24 heads x 128."""
    return FluxPipeline(
        transformer=FluxTransformer2DModel(guidance_embeds=True),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=AutoencoderKL(**(SD3_VAE | {"scaling_factor": 0.3611, "shift_factor": 0.1159})),
        text_encoder=clip(CLIPTextModel, 768, 12, 12, "published"),
        tokenizer=with_max_length(clip_tokenizer(), clip_length("published")),
        text_encoder_2=t5("published"),
        tokenizer_2=with_max_length(clip_tokenizer(), 512),
    )


def z_image() -> DiffusionPipeline:
    """Z-Image: 30 blocks of 30 heads x 128 and four refining ones, which are diffusers' defaults, with Qwen3-4B."""
    tokenizer = with_max_length(qwen_tokenizer(), 512)
    return ZImagePipeline(
        transformer=ZImageTransformer2DModel(axes_lens=[1536, 512, 512]),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=AutoencoderKL(**(SD3_VAE | {"scaling_factor": 0.3611, "shift_factor": 0.1159})),
        text_encoder=qwen3("published", 2560, 9728, tokenizer.pad_token_id),
        tokenizer=tokenizer,
    )


def flux2_klein(size: Size, changes: dict[str, Any], width: int, intermediate: int) -> DiffusionPipeline:
    """FLUX.2-klein-base, whose transformer differs from that of 4B in `changes`, with a Qwen3 of this width."""
    tokenizer = with_max_length(qwen_tokenizer(), 12 if size == "tiny" else 512)
    return Flux2KleinPipeline(
        transformer=Flux2Transformer2DModel(**(FLUX2_TRANSFORMER | changes)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=AutoencoderKLFlux2(**(TINY_VAE if size == "tiny" else {})),
        text_encoder=qwen3(size, width, intermediate, tokenizer.pad_token_id),
        tokenizer=tokenizer,
        is_distilled=False,
    )


def flux2_klein_base_4b(size: Size = "published") -> DiffusionPipeline:
    """FLUX.2-klein-base-4B with Qwen3-4B."""
    return flux2_klein(size, TINY_FLUX2_TRANSFORMER if size == "tiny" else {}, width=2560, intermediate=9728)


def flux2_klein_base_9b() -> DiffusionPipeline:
    """FLUX.2-klein-base-9B with Qwen3-8B: 8 double and 24 single blocks of 32 heads x 128."""
    wider = {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288}
    return flux2_klein("published", wider, width=4096, intermediate=12288)


def qwen2_5_vl_7b() -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL-7B."""
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    text |= {"num_key_value_heads": 4, "vocab_size": 152064}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def qwen_image() -> DiffusionPipeline:
    """Qwen-Image: 60 double blocks of 24 heads x 128 with Qwen2.5-VL-7B; diffusers' defaults are its sizes."""
    return QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192),
        vae=AutoencoderKLQwenImage(),
        text_encoder=qwen2_5_vl_7b(),
        tokenizer=with_max_length(qwen_tokenizer(), 4096),
    )


def qwen_image_21() -> DiffusionPipeline:
    """Qwen-Image-2.1: 32 blocks of 32 heads x 128, diffusers' defaults, with Qwen3-VL-8B."""
    text = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}
    text |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
    vision = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "out_hidden_size": 4096}
    tokenizer = with_max_length(qwen_tokenizer(), 4096)
    tokenizer.add_special_tokens({"additional_special_tokens": list(VISION_TOKENS)})
    template = "{% for m in messages %}{{ m.role }}{% for c in m.content %}{{ c.text[:99] }}{% endfor %}{% endfor %}"
    images, videos = Qwen2VLImageProcessor(), Qwen3VLVideoProcessor()
    return QwenImage21Pipeline(
        transformer=QwenImage21Transformer2DModel(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLQwenImage21(),
        text_encoder=Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision)),
        processor=Qwen3VLProcessor(images, tokenizer, videos, chat_template=template),
    )


def qwen_image_edit() -> DiffusionPipeline:
    """Qwen-Image-Edit: the networks of Qwen-Image, and a processor that shows the text encoder the source image."""
    parts = qwen_image().components
    tokenizer = parts["tokenizer"]
    tokenizer.add_special_tokens({"additional_special_tokens": list(VISION_TOKENS)})
    bounds = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 16384}
    images, videos = Qwen2VLImageProcessor(**bounds), Qwen2VLVideoProcessor()
    processor = Qwen2VLProcessor(images, tokenizer, videos, chat_template="")
    return QwenImageEditPipeline(**parts, processor=processor)


def krea2() -> DiffusionPipeline:
    """Krea-2-Raw: 28 blocks of 48 heads x 128, diffusers' defaults, with Qwen3-VL-4B and Qwen-Image's autoencoder."""
    text = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
    text |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
    vision = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2560}
    return Krea2Pipeline(
        transformer=Krea2Transformer2DModel(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400),
        vae=AutoencoderKLQwenImage(),
        text_encoder=Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)),
        tokenizer=with_max_length(qwen_tokenizer(), 4096),
    )


def flux2_dev() -> DiffusionPipeline:
    """FLUX.2-dev: 8 double and 48 single blocks of 48 heads x 128, diffusers' defaults, with Mistral Small 3."""
    tokenizer, image = with_max_length(qwen_tokenizer(), 512), "[IMG]"
    tokenizer.add_special_tokens({"additional_special_tokens": [image, "[IMG_BREAK]", "[IMG_END]"]})
    template = "{% for m in messages %}{% for c in m.content %} {{ c.text }}{% endfor %}{% endfor %}"
    text: dict[str, Any] = {
        "vocab_size": 131072,
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_hidden_layers": 40,
    }
    text |= {"model_type": "mistral", "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    vision: dict[str, Any] = {
        "model_type": "pixtral",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
    }
    vision |= {"num_attention_heads": 16, "head_dim": 64, "image_size": 1540, "patch_size": 14}
    return Flux2Pipeline(
        transformer=Flux2Transformer2DModel(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=AutoencoderKLFlux2(),
        text_encoder=Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision)),
        tokenizer=PixtralProcessor(PixtralImageProcessor(), tokenizer, chat_template=template),
    )


def write_configs(make: Callable[[], DiffusionPipeline], folder: Path) -> DiffusionPipeline:
    """Writes a diffusers folder without weights; returns the pipeline, which lies on the meta device."""
    with torch.device("meta"):
        pipeline = make()
    pipeline.save_config(folder)
    for name, part in pipeline.components.items():
        if isinstance(part, PreTrainedModel):
            part.config.save_pretrained(folder / name)
        elif isinstance(part, PreTrainedTokenizerBase | ProcessorMixin):
            part.save_pretrained(folder / name)
        elif part is not None:
            part.save_config(folder / name)
    return pipeline
