"""Tiny random pipelines of every family, built from configurations: the real classes, no download."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
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
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
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

WIDTH = 32
SIZE = (16, 24)
FLUX2_TEXT = {"max_sequence_length": 12, "text_encoder_out_layers": (1, 2, 3)}
"""Height and width of the images: not square, so that rows and columns cannot be mistaken for each other."""


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """An image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


SOURCE = picture(40, 56)
"""What the contract suite edits where a family needs a source."""


def autoencoder(**changed) -> AutoencoderKL:
    blocks = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(latent_channels=4, sample_size=16, **blocks, **kinds, **changed)


def clip(kind: type):
    return kind(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer()),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=13,
            projection_dim=16,
        )
    )


def t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=len(clip_tokenizer()), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    )


def sd3() -> StableDiffusion3Pipeline:
    """As SD3.5-M: static shift 3, query-key norms, dual attention."""
    transformer = SD3Transformer2DModel(
        sample_size=32,
        pos_embed_max_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=clip(CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(CLIPTextModelWithProjection),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(),
        tokenizer_3=clip_tokenizer(),
    )


def flux() -> FluxPipeline:
    """As FLUX.1-dev: a shift that grows with the number of tokens, distilled guidance."""
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
        vae=autoencoder(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=clip(CLIPTextModel),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=clip_tokenizer(),
    )


def flux_kontext() -> FluxKontextPipeline:
    """As FLUX.1-Kontext: the networks of FLUX.1-dev, and a source image."""
    return FluxKontextPipeline(**flux().components)


def qwen3() -> Qwen3ForCausalLM:
    tokenizer = qwen_tokenizer()
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def flux2_networks(*, guidance_embeds: bool) -> dict[str, Any]:
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    return {
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "vae": vae,
    }


def flux2() -> Flux2KleinPipeline:
    """As FLUX.2-klein-base: an empirical shift, text states of three depths."""
    return Flux2KleinPipeline(
        **flux2_networks(guidance_embeds=False),
        text_encoder=qwen3(),
        tokenizer=qwen_tokenizer(),
        is_distilled=False,
    )


def flux2_dev() -> Flux2Pipeline:
    """As FLUX.2-dev: distilled guidance, and a processor that puts (the first letters of) a system message first."""
    tokenizer, image = qwen_tokenizer(), "[IMG]"
    tokenizer.add_special_tokens({"additional_special_tokens": [image, "[IMG_BREAK]", "[IMG_END]"]})
    turn = "{% for c in m.content %} {{ c.text[:2] if m.role == 'system' else c.text }}{% endfor %}<|im_end|>"
    processor = PixtralProcessor(
        PixtralImageProcessor(), tokenizer, chat_template="{% for m in messages %}" + turn + "{% endfor %}"
    )
    heads = {"hidden_size": 16, "num_attention_heads": 2, "head_dim": 8}
    text = {"model_type": "mistral", "intermediate_size": 32, "num_hidden_layers": 4, "num_key_value_heads": 2, **heads}
    vision = {"model_type": "pixtral", "intermediate_size": 16, "num_hidden_layers": 1, "image_size": 32, **heads}
    text_encoder = Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config=text | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id},
            vision_config=vision | {"patch_size": 16},
            image_token_index=tokenizer.convert_tokens_to_ids(image),
        )
    )
    return Flux2Pipeline(**flux2_networks(guidance_embeds=True), text_encoder=text_encoder, tokenizer=processor)


def z_image() -> ZImagePipeline:
    """As Z-Image: a fixed shift, text of variable length."""
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 64, 64],
    )
    return ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=autoencoder(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=qwen3(),
        tokenizer=qwen_tokenizer(),
    )


VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE_WORDS = (
    "system Describe user assistant".split(),
    "image by detailing color shape size texture quantity text spatial relationships objects background".split(),
)
"""Of the template in which Qwen-Image puts its prompts: first in a line, and after a space."""
QWEN_PATCH = 14
"""Side, in pixels, of the patches of tiny Qwen2.5-VL models."""


def qwen_image_tokenizer() -> Qwen2Tokenizer:
    """The template, but for the prompt, has as many tokens as with the published tokenizer: 34 before, 5 after."""
    tokenizer = qwen_tokenizer()
    tokenizer.model_max_length = 4096
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *VISION_TOKENS]})
    tokenizer.add_tokens([*TEMPLATE_WORDS[0], *(f" {word}" for word in TEMPLATE_WORDS[1])])
    return tokenizer


def qwen2_5_vl(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    start, end, image, video = tokenizer.convert_tokens_to_ids(VISION_TOKENS)
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "bos_token_id": None,
                "eos_token_id": tokenizer.eos_token_id,
                "hidden_size": WIDTH,
                "intermediate_size": WIDTH,
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
                "patch_size": QWEN_PATCH,
                "out_hidden_size": WIDTH,
                "window_size": 4 * QWEN_PATCH,
                "fullatt_block_indexes": [0],
            },
            image_token_id=image,
            video_token_id=video,
            vision_start_token_id=start,
            vision_end_token_id=end,
        )
    )


def qwen_autoencoder() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[-0.8, 0.2, 0.1, -0.3],
        latents_std=[2.8, 1.5, 2.3, 1.9],
    )


def qwen_image() -> QwenImagePipeline:
    """As Qwen-Image: a shift by tokens with a last level, an autoencoder for videos of one frame."""
    tokenizer = qwen_image_tokenizer()
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    shift = {"use_dynamic_shifting": True, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
    return QwenImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**shift),
        vae=qwen_autoencoder(),
        text_encoder=qwen2_5_vl(tokenizer),
        tokenizer=tokenizer,
    )


def qwen3_vl(tokenizer: Qwen2Tokenizer) -> Qwen3VLConfig:
    start, end, image, video = tokenizer.convert_tokens_to_ids(VISION_TOKENS)
    return Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": WIDTH,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )


def krea2() -> Krea2Pipeline:
    """As Krea-2-Raw: text states of several layers as one stack, the autoencoder of Qwen-Image."""
    tokenizer = qwen_image_tokenizer()
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=WIDTH,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    return Krea2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400),
        vae=qwen_autoencoder(),
        text_encoder=Qwen3VLModel(qwen3_vl(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_select_layers=(1, 3),
    )


def qwen_image_21() -> QwenImage21Pipeline:
    """As Qwen-Image-2.1: latents of 16x16 pixels, images with opacity."""
    tokenizer = qwen_image_tokenizer()
    turn = "<|im_start|>{{ m.role }}\n{% for c in m.content %}{{ c.text }}{% endfor %}<|im_end|>\n"
    template = "{% for m in messages %}" + turn + "{% endfor %}"
    images, videos = Qwen2VLImageProcessor(), Qwen3VLVideoProcessor()
    transformer = QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    for parameter in transformer.parameters():
        parameter.data *= 2 if parameter.ndim == 2 else 1  # so that prompts show in images
    vae = AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=4,
        dim_mult=[1] * 5,
        num_res_blocks=1,
        latents_mean=[-0.8, 0.2, 0.1, -0.3],
        latents_std=[2.8, 1.5, 2.3, 1.9],
    )
    return QwenImage21Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192),
        vae=vae,
        text_encoder=Qwen3VLForConditionalGeneration(qwen3_vl(tokenizer)),
        processor=Qwen3VLProcessor(images, tokenizer, videos, chat_template=template),
    )


EDIT_WORDS = (
    "Describe color".split(),
    "key features input ( shape size texture objects background then explain how user text instruction should alter or "
    "modify image Generate a new that meets requirements while maintaining consistency with original where appropriate",
)


def qwen_image_edit(kind: type[DiffusionPipeline]) -> DiffusionPipeline:
    """As Qwen-Image-Edit, or -2511, whose sources are modulated at level 0: the text encoder is shown the sources.

    The template before the sources has as many tokens as with the published tokenizer, 64.
    """
    parts, tokenizer = qwen_image().components, qwen_image_tokenizer()
    tokenizer.add_tokens([*EDIT_WORDS[0], "),", "'s", *(f" {word}" for word in EDIT_WORDS[1].split())])
    parts |= {"tokenizer": tokenizer, "text_encoder": qwen2_5_vl(tokenizer)}
    if kind is QwenImageEditPlusPipeline:
        parts["transformer"] = type(parts["transformer"]).from_config(parts["transformer"].config, zero_cond_t=True)
    for parameter in parts["transformer"].parameters():
        parameter.data *= 2 if parameter.ndim == 2 else 1  # so that sources show in images
    sizes = {"patch_size": QWEN_PATCH, "temporal_patch_size": 2, "merge_size": 2}
    bounds = {"min_pixels": (2 * QWEN_PATCH) ** 2, "max_pixels": (4 * QWEN_PATCH) ** 2}
    images, videos = Qwen2VLImageProcessor(**sizes, **bounds), Qwen2VLVideoProcessor(**sizes)
    return kind(**parts, processor=Qwen2VLProcessor(images, tokenizer, videos, chat_template=""))


def true_guidance(scale: float) -> dict[str, Any]:
    """Classifier-free guidance of a pipeline whose `guidance_scale` is an input of the model."""
    return {} if scale == 1 else {"true_cfg_scale": scale, "negative_prompt": ""}


class Family(NamedTuple):
    """A family of models: a tiny pipeline, and the arguments of its call for a scale of classifier-free guidance.

    true_guidance: whether the pipeline has such guidance.  max_sources: images that a prompt may have; min_sources:
    and that it must have: then the prompts of the contract suite are edits of `SOURCE` (see `given`).  size: of images.
    """

    make: Callable[[], DiffusionPipeline]
    guided: Callable[[float], dict[str, Any]] = lambda scale: {"guidance_scale": scale}
    max_sources: int = 0
    true_guidance: bool = True
    min_sources: int = 0
    size: tuple[int, int] = SIZE


FAMILIES = {
    "sd3": Family(sd3),
    "flux": Family(flux, true_guidance),
    "flux_kontext": Family(flux_kontext, lambda scale: {"max_area": SIZE[0] * SIZE[1], **true_guidance(scale)}, 1),
    "z_image": Family(z_image, lambda scale: {"guidance_scale": scale - 1}),
    "flux2_dev": Family(flux2_dev, lambda scale: FLUX2_TEXT, 10, true_guidance=False),
    "krea2": Family(krea2, lambda scale: {"guidance_scale": scale - 1}),
    "qwen_image": Family(qwen_image, true_guidance),
    "qwen_edit": Family(
        lambda: qwen_image_edit(QwenImageEditPipeline),
        lambda scale: {"image": SOURCE, **true_guidance(scale)},
        1,
        min_sources=1,
    ),
    "qwen_edit_plus": Family(
        lambda: qwen_image_edit(QwenImageEditPlusPipeline),
        lambda scale: {"image": [SOURCE], **true_guidance(scale)},
        3,
        min_sources=1,
    ),
    "qwen_image_21": Family(qwen_image_21, true_guidance, size=(32, 64)),
    "flux2": Family(flux2, lambda scale: {"guidance_scale": scale, **FLUX2_TEXT}, 10),
}
"""Every family of `flowbp.backbones`; the contract suite runs on each."""


def size_of(model: Any) -> tuple[int, int]:
    """Height and width of the images of a family, which its folder or a backbone tells."""
    if isinstance(model, Path):
        return FAMILIES[model.name].size if model.name in FAMILIES else SIZE
    return FAMILIES["qwen_image_21"].size if isinstance(model.pipe, QwenImage21Pipeline) else SIZE


def sides_of(model: Any) -> dict[str, int]:
    """`size_of` as arguments of a pipeline."""
    return dict(zip(("height", "width"), size_of(model), strict=True))


LIKE_FLUX = "flux_kontext"
"""A family whose adapter is another's but for its sources: in the default tier only these are tested."""
LATER = {LIKE_FLUX: "exhaustive", "z_image": "slow", "flux2_dev": "exhaustive", "krea2": "exhaustive"}
LATER |= dict.fromkeys(("qwen_edit", "qwen_edit_plus", "qwen_image_21"), "exhaustive")
"""Tiers of the families that run the contract suite after the default one; tests of their own stay in it."""


def folder_of(family: str, place: Path) -> Path:
    """A folder with a tiny random pipeline, as large models are published."""
    torch.manual_seed(0)
    pipe = FAMILIES[family].make()
    for part in (pipe.transformer, pipe.vae):
        for parameter in part.parameters():
            if not parameter.any():  # freshly made networks start with layers that say nothing
                torch.nn.init.normal_(parameter, std=0.05)
    pipe.save_pretrained(place / family)
    return place / family
