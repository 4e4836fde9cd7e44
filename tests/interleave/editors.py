"""Tiny random pipelines of every family that draws here: flowbp's, FLUX.1-Kontext, Qwen-Image-Edit."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from scripts.miniature.world.vocabulary import qwen_tokenizer
from tests.flowbp import families

MARKS = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def qwen(kind: type[DiffusionPipeline]) -> DiffusionPipeline:
    """A vision-language text encoder that is shown the references, and an autoencoder for one-frame videos."""
    tokenizer = qwen_tokenizer()
    tokenizer.model_max_length = 4096
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    patch, width = 14, 32
    ids = tokenizer.convert_tokens_to_ids
    text_encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": width,
                "intermediate_size": width,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "max_position_embeddings": 2048,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "patch_size": patch,
                "out_hidden_size": width,
                "window_size": 4 * patch,
                "fullatt_block_indexes": [0],
            },
            image_token_id=ids("<|image_pad|>"),
            video_token_id=ids("<|video_pad|>"),
            vision_start_token_id=ids("<|vision_start|>"),
            vision_end_token_id=ids("<|vision_end|>"),
        )
    )
    sizes = {"patch_size": patch, "temporal_patch_size": 2, "merge_size": 2}
    bounds = {"min_pixels": (2 * patch) ** 2, "max_pixels": (4 * patch) ** 2}
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=width,
        axes_dims_rope=(4, 6, 6),
    )
    return kind(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        processor=Qwen2VLProcessor(
            Qwen2VLImageProcessor(**sizes, **bounds), tokenizer, Qwen2VLVideoProcessor(**sizes), chat_template=""
        ),
        transformer=transformer,
    )


PIPELINES = {name: family.make for name, family in families.FAMILIES.items() if name != families.LIKE_FLUX} | {
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
