"""The miniature's `Flux2KleinPipeline`: one rectified flow for text-to-image and for editing with a reference image.

The reference is the image enlarged to 64x64, the smallest that the pipeline accepts, hence 64 reference tokens.
"""

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import interpolate, mse_loss
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from imgen_common.config import Config
from imgen_common.shapes.edits import Edit, sample_edit, verify_edits
from imgen_common.shapes.render import draw, render
from imgen_common.shapes.scene import Spec, balanced_specs, sample_spec
from imgen_common.shapes.steps import EDIT_KINDS
from imgen_common.shapes.verify import accuracy, verify
from imgen_common.streams import normal, numpy_generator, torch_generator
from scripts.miniature.world.session import Schedule, Session
from scripts.miniature.world.vocabulary import MAX_TOKENS, qwen_tokenizer


class Stage(Config):
    """One stage of the training."""

    folder: str
    """Folder of its state under the work folder."""
    start: str | None = None
    """Folder of the stage whose pipeline it starts from; null: fresh weights."""
    edit_share: float
    """Share of the updates that train editing."""
    schedule: Schedule
    """Length and learning rate."""


BASE = Stage(
    folder="generator",
    edit_share=0.35,
    schedule=Schedule(steps=9000, batch=64, lr=1.5e-3, warmup=200, constant=0.5, ema=0.9985, save_every=1000),
)
REFINE = Stage(
    folder="generator-refined",
    start="generator",
    edit_share=0.8,
    schedule=Schedule(steps=4000, batch=64, lr=1e-3, warmup=100, constant=0.4, ema=0.9985, save_every=1000),
)
"""Mostly editing, which the pipeline learns later than generating images from captions."""
EDIT_BATCH = 32
CAPTION_DROPOUT = 0.1
CACHE = {"images": 64_000, "edits": 32_000}
TEXT_WIDTH = 64
TEXT_LAYERS = (1, 2, 3)
"""Hidden states of the 4-layer text encoder that the transformer reads, as FLUX.2-klein reads 9, 18, 27 of 36."""
REFERENCE_SCALE = 2


def build_text_encoder(tokenizer: PreTrainedTokenizerBase) -> Qwen3ForCausalLM:
    """A text encoder with fresh weights."""
    text_encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=3 * TEXT_WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=16,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    torch.nn.init.normal_(text_encoder.get_input_embeddings().weight, std=0.3)
    return text_encoder


def build_pipeline(vae: AutoencoderKLFlux2) -> Flux2KleinPipeline:
    """A pipeline with fresh weights around a trained autoencoder."""
    tokenizer = qwen_tokenizer()
    text_encoder = build_text_encoder(tokenizer)
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4 * vae.config.latent_channels,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=len(TEXT_LAYERS) * TEXT_WIDTH,
        timestep_guidance_channels=64,
        mlp_ratio=3.0,
        axes_dims_rope=(8, 8, 8, 8),
        rope_theta=100,
        guidance_embeds=False,
    )
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=False,
    )


def token_ids(pipeline: Flux2KleinPipeline, texts: Sequence[str]) -> Tensor:
    """Token ids (n, MAX_TOKENS), made as the pipeline makes them."""
    tokenizer = pipeline.tokenizer
    rendered = [tokenizer.apply_chat_template([{"role": "user", "content": t}], tokenize=False) for t in texts]
    return tokenizer(
        rendered, return_tensors="pt", padding="max_length", truncation=True, max_length=MAX_TOKENS
    ).input_ids.to(pipeline.device)


def embed(pipeline: Flux2KleinPipeline, ids: Tensor) -> Tensor:
    """Prompt embeddings (n, MAX_TOKENS, 192) with gradient."""
    mask = (ids != pipeline.tokenizer.pad_token_id).long()
    states = pipeline.text_encoder.model(
        input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
    ).hidden_states
    return torch.cat([states[k] for k in TEXT_LAYERS], dim=-1)


@torch.no_grad()
def encode(pipeline: Flux2KleinPipeline, images: Tensor) -> Tensor:
    """Normalized latent tokens (n, L, 32) of images (n, 3, h, w) in [0, 1]."""
    parts = [pipeline._encode_vae_image(x * 2 - 1, generator=None) for x in images.to(pipeline.device).split(64)]
    return pipeline._pack_latents(torch.cat(parts))


def velocity(
    pipeline: Flux2KleinPipeline, x: Tensor, sigma: Tensor, text: Tensor, reference: Tensor | None = None
) -> Tensor:
    """dx/dsigma of tokens x (n, 16, 32) at noise levels sigma (n,), with optional reference tokens (n, 64, 32)."""
    side = int(x.shape[1] ** 0.5)
    ids = pipeline._prepare_latent_ids(x.new_zeros(1, 1, side, side))
    tokens = x
    if reference is not None:
        side = int(reference.shape[1] ** 0.5)
        ids = torch.cat([ids, pipeline._prepare_image_ids([x.new_zeros(1, 1, side, side)])], dim=1)
        tokens = torch.cat([x, reference], dim=1)
    out = pipeline.transformer(
        hidden_states=tokens,
        timestep=sigma,
        encoder_hidden_states=text,
        txt_ids=pipeline._prepare_text_ids(text[:1]),
        img_ids=ids,
        return_dict=False,
    )[0]
    return out[:, : x.shape[1]]


def decode(pipeline: Flux2KleinPipeline, x: Tensor) -> Tensor:
    """Images (n, 3, 32, 32) in [0, 1] of normalized latent tokens."""
    vae, side = pipeline.vae, int(x.shape[1] ** 0.5)
    z = x.permute(0, 2, 1).reshape(len(x), -1, side, side)
    std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
    z = pipeline._unpatchify_latents(z * std + vae.bn.running_mean.view(1, -1, 1, 1))
    return (torch.cat([vae.decode(part).sample for part in z.split(64)]) / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def sample(
    pipeline: Flux2KleinPipeline,
    texts: Sequence[str],
    noise: Tensor,
    *,
    steps: int = 25,
    guidance: float = 1.0,
    reference: Tensor | None = None,
) -> Tensor:
    """Images in [0, 1] by Euler steps on the pipeline's own noise levels."""
    pipeline.scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=1.0)
    sigmas = pipeline.scheduler.sigmas.to(pipeline.device)
    text = embed(pipeline, token_ids(pipeline, texts))
    null = embed(pipeline, token_ids(pipeline, [""])).expand_as(text)
    x = noise.to(pipeline.device)
    for now, then in pairwise(sigmas):
        sigma = now.expand(len(x))
        v = velocity(pipeline, x, sigma, text, reference)
        if guidance != 1.0:
            free = velocity(pipeline, x, sigma, null, reference)
            v = free + guidance * (v - free)
        x = x + (then - now) * v
    return decode(pipeline, x)


def enlarge(images: Tensor) -> Tensor:
    """Reference images (n, 3, 64, 64), enlarged as a user would do it."""
    return interpolate(images, scale_factor=REFERENCE_SCALE, mode="nearest")


def render_edits(edits: Sequence[Edit]) -> tuple[Tensor, Tensor]:
    """Before and after images (n, 3, 32, 32) in [0, 1]."""
    before = torch.from_numpy(np.stack([render(e.before) for e in edits]))
    return before, torch.from_numpy(np.stack([render(e.after) for e in edits]))


def cache_latents(pipeline: Flux2KleinPipeline, folder: Path, seed: int) -> dict[str, Tensor]:
    """Latents and token ids of the training images and edits, computed once in chunks of 1000 and kept in `folder`."""
    file = folder / "latents.safetensors"
    if file.exists():
        return load_file(file)
    start = time.perf_counter()
    parts: dict[str, list[Tensor]] = {k: [] for k in ("z", "ids", "edit_z", "edit_ref", "edit_ids")}
    for chunk in range(CACHE["images"] // 1000):
        rng = numpy_generator(seed, "generator-pictures", chunk)
        specs = [sample_spec(rng) for _ in range(1000)]
        parts["z"].append(encode(pipeline, torch.from_numpy(draw(specs, rng))).half().cpu())
        parts["ids"].append(token_ids(pipeline, [s.caption for s in specs]).to("cpu", torch.int16))
    for chunk in range(CACHE["edits"] // 1000):
        rng = numpy_generator(seed, "generator-edits", chunk)
        edits = [sample_edit(rng) for _ in range(1000)]
        before, after = render_edits(edits)
        parts["edit_z"].append(encode(pipeline, after).half().cpu())
        parts["edit_ref"].append(encode(pipeline, enlarge(before)).half().cpu())
        parts["edit_ids"].append(token_ids(pipeline, [e.instruction for e in edits]).to("cpu", torch.int16))
    tensors = {k: torch.cat(v) for k, v in parts.items()}
    save_file(tensors, file.with_suffix(".new"))
    file.with_suffix(".new").rename(file)
    print(
        f"cached {len(tensors['z'])} images and {len(tensors['edit_z'])} edits in {time.perf_counter() - start:.0f} s"
    )
    return tensors


def evaluate_pipeline(
    pipeline: Flux2KleinPipeline, specs: Sequence[Spec], edits: Sequence[Edit], seed: int, guidance: Sequence[float]
) -> dict[str, float]:
    """Verifier accuracy by category and edit accuracy by kind, at equal noise for every guidance scale."""
    result: dict[str, float] = {}
    noise = torch.stack([normal((16, 32), seed, "evaluation", i) for i in range(max(len(specs), len(edits)))])
    before, _ = render_edits(edits)
    reference = encode(pipeline, enlarge(before))
    captions, instructions = [s.caption for s in specs], [e.instruction for e in edits]
    for scale in guidance:
        scores = accuracy(verify(sample_in_batches(pipeline, captions, noise, scale), specs), specs)
        result |= {f"cfg{scale:g}/{k}": v for k, v in scores.items()}
        held = verify_edits(sample_in_batches(pipeline, instructions, noise, scale, reference), edits)
        for kind in ("all", *EDIT_KINDS):
            chosen = [h for h, e in zip(held, edits, strict=True) if kind in ("all", e.change.kind)]
            result[f"edit-cfg{scale:g}/{kind}"] = sum(chosen) / len(chosen)
    return result


def sample_in_batches(
    pipeline: Flux2KleinPipeline, texts: Sequence[str], noise: Tensor, guidance: float, reference: Tensor | None = None
) -> Tensor:
    """`sample` in batches of 128; the first len(texts) rows of the noise are used."""
    parts = [slice(i, min(i + 128, len(texts))) for i in range(0, len(texts), 128)]
    return torch.cat(
        [
            sample(
                pipeline,
                texts[rows],
                noise[rows],
                guidance=guidance,
                reference=None if reference is None else reference[rows],
            )
            for rows in parts
        ]
    )


def latest_pipeline(work: Path) -> Path:
    """The pipeline folder of the last finished stage."""
    refined = work / REFINE.folder / "pipeline"
    return refined if refined.exists() else work / BASE.folder / "pipeline"


def flow_loss(
    pipeline: Flux2KleinPipeline, data: dict[str, Tensor], empty: Tensor, stage: Stage, rng: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    """The flow-matching loss of one batch, which is of text-to-image or of editing, and its value by name.

    loss = mean |v(x, sigma) - (noise - clean)|^2,   x = (1 - sigma) clean + sigma noise,   sigma = sigmoid(normal).
    data: see `cache_latents`.  empty: token ids of the empty prompt, which replaces dropped captions.
    """
    device = pipeline.device
    editing = bool(torch.rand((), generator=rng) < stage.edit_share)
    prefix, count = ("edit_", EDIT_BATCH) if editing else ("", stage.schedule.batch)
    rows = torch.randint(len(data[prefix + "z"]), (count,), generator=rng)
    clean, ids = data[prefix + "z"][rows].float(), data[prefix + "ids"][rows].long()
    reference = data["edit_ref"][rows].float().to(device) if editing else None
    dropped = torch.rand(count, generator=rng) < CAPTION_DROPOUT
    ids = torch.where(dropped[:, None], empty, ids)
    sigma = torch.sigmoid(torch.randn(count, generator=rng))
    noise = torch.randn(clean.shape, generator=rng)
    x = torch.lerp(clean, noise, sigma[:, None, None])
    with torch.autocast(device.type, torch.bfloat16):
        v = velocity(pipeline, x.to(device), sigma.to(device), embed(pipeline, ids.to(device)), reference)
    value = mse_loss(v.float(), (noise - clean).to(device))
    return value, {"edit_loss" if editing else "text_loss": value.item()}


def train_generator(work: Path, stage: Stage, device: str = "cpu", seed: int = 0) -> None:
    """Trains (or resumes) a stage under `work`, where the autoencoder is; leaves a folder `pipeline` in it."""
    torch.manual_seed(seed)
    folder = work / stage.folder
    folder.mkdir(parents=True, exist_ok=True)
    if stage.start is None:
        pipeline = build_pipeline(AutoencoderKLFlux2.from_pretrained(work / "vae" / "vae"))
    else:
        pipeline = Flux2KleinPipeline.from_pretrained(work / stage.start / "pipeline", dtype=torch.float32)
    pipeline.vae.eval().requires_grad_(False)
    pipeline.to(device)
    data = cache_latents(pipeline, work / BASE.folder, seed)
    session = Session(
        folder, {"transformer": pipeline.transformer, "text_encoder": pipeline.text_encoder.model}, stage.schedule
    )
    empty = token_ids(pipeline, [""])[0].cpu()
    rng = numpy_generator(seed, "generator-validation")
    specs = balanced_specs(240, rng, "tune")
    edits = [sample_edit(rng, "tune") for _ in range(120)]

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        return flow_loss(pipeline, data, empty, stage, torch_generator(seed, stage.folder, step))

    def validate() -> dict[str, float]:
        pipeline.transformer.eval()
        scores = evaluate_pipeline(pipeline, specs, edits, seed, (1.0, 2.0) if session.step % 4000 == 0 else (1.0,))
        pipeline.transformer.train()
        return scores

    session.run(loss, validate)
    session.swap_average()
    pipeline.save_pretrained(folder / "pipeline")
