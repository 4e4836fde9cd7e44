"""What the recipes need, by `flowbp estimate`, from the sizes of the published models: no weight is read.

The folders of the models are written here from the sizes that their published configurations state, so that the guide
can be made without a network.  Nothing of it was run at this size.

    python -m benchmarks.perf.hardware_guide
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from benchmarks.perf.gpu_update import FLUX2_TRANSFORMER, SD3_TRANSFORMER, SD3_VAE
from flowbp.config import TrainConfig
from flowbp.estimate import estimate_run
from flowbp.training import preflight
from imgen_common.config import load
from imgen_common.console import quiet_libraries
from imgen_common.shapes.vocabulary import clip_tokenizer, qwen_tokenizer

RECIPES = Path(__file__).parents[2] / "configs" / "flowbp"
ROWS = (
    ("sd3_5_medium", "lora_24gb", 1, ()),
    ("flux2_klein_base_4b", "lora_24gb", 1, ()),
    ("sd3_5_medium", "flowbp_lagrange", 8, ()),
    ("sd3_5_medium", "flowbp_lagrange", 8, ("distributed.kind=fsdp2",)),
    ("flux2_klein_base_4b", "flowbp_lagrange", 8, ("distributed.kind=fsdp2",)),
    ("flux2_klein_base_9b", "flowbp_lagrange", 8, ("distributed.kind=fsdp2",)),
    ("flux1_dev", "flowbp_lagrange", 8, ("distributed.kind=fsdp2",)),
)
"""Model, recipe, GPUs and settings on top of it."""


def clip_text(kind: type[PreTrainedModel], width: int, layers: int, heads: int) -> PreTrainedModel:
    """A text tower of CLIP."""
    sizes = {"hidden_size": width, "projection_dim": width, "intermediate_size": 4 * width}
    return kind(CLIPTextConfig(vocab_size=49408, num_hidden_layers=layers, num_attention_heads=heads, **sizes))


def t5() -> T5EncoderModel:
    """The encoder of T5 1.1 XXL."""
    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    return T5EncoderModel(T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **sizes))


def tokens(tokenizer: PreTrainedTokenizerBase, length: int) -> PreTrainedTokenizerBase:
    """A tokenizer that cuts and pads to `length`."""
    tokenizer.model_max_length = length
    return tokenizer


def sd3_5_medium() -> DiffusionPipeline:
    """Stable Diffusion 3.5 medium."""
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**SD3_TRANSFORMER),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(**SD3_VAE),
        text_encoder=clip_text(CLIPTextModelWithProjection, 768, 12, 12),
        tokenizer=tokens(clip_tokenizer(), 77),
        text_encoder_2=clip_text(CLIPTextModelWithProjection, 1280, 32, 20),
        tokenizer_2=tokens(clip_tokenizer(), 77),
        text_encoder_3=t5(),
        tokenizer_3=tokens(clip_tokenizer(), 256),
    )


def flux1_dev() -> DiffusionPipeline:
    """FLUX.1-dev: 19 double and 38 single blocks of 24 heads x 128."""
    return FluxPipeline(
        transformer=FluxTransformer2DModel(guidance_embeds=True),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=AutoencoderKL(**{**SD3_VAE, "scaling_factor": 0.3611, "shift_factor": 0.1159}),
        text_encoder=clip_text(CLIPTextModel, 768, 12, 12),
        tokenizer=tokens(clip_tokenizer(), 77),
        text_encoder_2=t5(),
        tokenizer_2=tokens(clip_tokenizer(), 512),
    )


def klein(transformer: dict[str, Any], **qwen: int) -> DiffusionPipeline:
    """FLUX.2-klein-base with a Qwen3 of 36 layers."""
    tokenizer = qwen_tokenizer()
    sizes = {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128} | qwen
    return Flux2KleinPipeline(
        transformer=Flux2Transformer2DModel(**(FLUX2_TRANSFORMER | transformer)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=AutoencoderKLFlux2(),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(vocab_size=151936, pad_token_id=tokenizer.pad_token_id, **sizes)),
        tokenizer=tokens(tokenizer, 512),
        is_distilled=False,
    )


def flux2_klein_base_4b() -> DiffusionPipeline:
    """FLUX.2-klein-base-4B with Qwen3-4B."""
    return klein({}, hidden_size=2560, intermediate_size=9728)


def flux2_klein_base_9b() -> DiffusionPipeline:
    """FLUX.2-klein-base-9B with Qwen3-8B: 8 double and 24 single blocks of 32 heads x 128."""
    wider = {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288}
    return klein(wider, hidden_size=4096, intermediate_size=12288)


PIPELINES: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd3_5_medium": sd3_5_medium,
    "flux1_dev": flux1_dev,
    "flux2_klein_base_4b": flux2_klein_base_4b,
    "flux2_klein_base_9b": flux2_klein_base_9b,
}


def write_pipeline(name: str, folder: Path) -> int:
    """Writes a diffusers folder without weights; returns the number of the transformer's parameters."""
    with torch.device("meta"):
        pipe = PIPELINES[name]()
    pipe.save_config(folder)
    for part, value in pipe.components.items():
        if isinstance(value, PreTrainedModel):
            value.config.save_pretrained(folder / part)
        elif isinstance(value, PreTrainedTokenizerBase):
            value.save_pretrained(folder / part)
        elif value is not None:
            value.save_config(folder / part)
    return sum(p.numel() for p in pipe.transformer.parameters())


def write_clip(folder: Path, text: dict[str, int], vision: dict[str, int], dim: int) -> None:
    """Writes the folder of a reward over CLIP without weights."""
    CLIPConfig(
        text_config={"vocab_size": 49408, **text}, vision_config={"patch_size": 14, **vision}, projection_dim=dim
    ).save_pretrained(folder)
    tokens(clip_tokenizer(), 77).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)


def layers(width: int, count: int, heads: int) -> dict[str, int]:
    """A tower of a transformer."""
    sizes = {"hidden_size": width, "intermediate_size": 4 * width}
    return sizes | {"num_hidden_layers": count, "num_attention_heads": heads}


def main() -> None:
    """Prints the table."""
    quiet_libraries()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        write_clip(root / "h14", layers(1024, 24, 16), layers(1280, 32, 16), 1024)
        write_clip(root / "l14", layers(768, 12, 12), layers(1024, 24, 16), 768)
        sizes = {name: write_pipeline(name, root / name) for name in PIPELINES}
        print("| model | recipe | GPUs | settings | peak GiB a GPU | of which in an update | TFLOP an update and GPU |")
        print("| --- | --- | --: | --- | --: | --: | --: |")
        for name, recipe, gpus, changes in ROWS:
            sets = [f"model.ref={root / name}", f"rewards.0.ref={root / 'h14'}", f"heldout.0.ref={root / 'h14'}"]
            sets += [f"heldout.1.ref={root / 'l14'}", *changes]
            sets += [f"{key}=builtin:shapes/test" for key in ("data.prompts", "eval.prompts", "eval.quick_prompts")]
            config = load(TrainConfig, [RECIPES / name / f"{recipe}.yaml"], sets)
            found = estimate_run(preflight.check_run(config, gpus, estimate_only=True))
            shown = " ".join(changes) or "-"
            print(
                f"| {name} ({sizes[name] / 1e9:.2f} B) | {recipe} | {gpus} | {shown} | {found.peak / 2**30:.1f} | "
                f"{found.update_peak / 2**30:.1f} | {found.flops / 1e12:,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
