"""The miniature's two `CLIPModel`s: a training reward and a held-out one with independent random numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import Flux2KleinPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits, cross_entropy, normalize, pad, softplus
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTextConfig, CLIPVisionConfig

from imgen_common.config import Config
from imgen_common.shapes.render import draw
from imgen_common.shapes.scene import SIZE, Spec, Split, balanced_specs, sample_spec
from imgen_common.shapes.verify import verify
from imgen_common.streams import normal, numpy_generator, torch_generator
from scripts.miniature.world.generator import latest_pipeline, sample
from scripts.miniature.world.negatives import hard_negative, turned
from scripts.miniature.world.session import Schedule, Session
from scripts.miniature.world.vocabulary import MAX_TOKENS, clip_tokenizer


class Variant(Config):
    """Settings that distinguish the reward models."""

    seed: int
    """Seed of weights, images, negatives and augmentation."""
    width: int
    """Hidden size of both towers."""
    vision_layers: int
    """Layers of the image tower."""
    text_layers: int
    """Layers of the text tower."""
    negatives: int
    """Hard negatives per image."""
    noise: float
    """Largest standard deviation of added pixel noise."""
    blur: float
    """Share of images that are blurred."""
    shift: int
    """Largest shift of the image in pixels."""
    places: float
    """Least share of images whose caption names a place."""
    schedule: Schedule
    """Length and rate of the training."""


REWARD = Variant(
    seed=1, width=96, vision_layers=3, text_layers=2, negatives=3, noise=0.12, blur=0.3, shift=0, places=0.5,
    schedule=Schedule(steps=4500, batch=64, lr=1.2e-3, constant=0.5, ema=0.998, save_every=500),
)  # fmt: skip
HELDOUT = Variant(
    seed=777, width=80, vision_layers=4, text_layers=3, negatives=2, noise=0.06, blur=0.5, shift=1, places=0.4,
    schedule=Schedule(steps=3500, batch=64, lr=1.2e-3, constant=0.5, ema=0.997, save_every=500),
)  # fmt: skip


WORD_SCALE, POSITION_SCALE = 0.3, 0.5
"""Standard deviations of fresh word and position embeddings.  With the 0.02 of transformers neither tower learns to
tell left from right: the contribution of each to their product is too small."""


def build_clip(variant: Variant) -> tuple[CLIPModel, CLIPProcessor]:
    """A fresh model and its processor."""
    tokenizer = clip_tokenizer()
    width = variant.width
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=variant.text_layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS + 1,
        projection_dim=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=variant.vision_layers,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=4,
        projection_dim=64,
    )
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64, logit_scale_init_value=2.3
    )
    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    model = CLIPModel(config)
    with torch.no_grad():
        nn.init.normal_(model.text_model.embeddings.token_embedding.weight, std=WORD_SCALE)
        model.vision_model.embeddings.position_embedding.weight[1:] += POSITION_SCALE * position_waves(SIZE // 4, width)
    return model, CLIPProcessor(images, tokenizer)


def position_waves(side: int, width: int) -> Tensor:
    """Sines and cosines of the rows, then of the columns, of a square of patches, (side^2, width)."""
    phases = torch.arange(side)[:, None] / side * math.pi * torch.exp(torch.linspace(0, math.log(8), width // 4))
    axis = torch.cat([phases.sin(), phases.cos()], dim=1)
    shape = (side, side, -1)
    return torch.cat([axis[:, None].expand(shape), axis[None].expand(shape)], dim=-1).reshape(side * side, width)


def image_features(model: CLIPModel, processor: CLIPProcessor, images: Tensor) -> Tensor:
    """Unit features (n, 64) of images (n, 3, 32, 32) in [0, 1]."""
    images = images.to(model.device)
    mean = images.new_tensor(processor.image_processor.image_mean).view(3, 1, 1)
    std = images.new_tensor(processor.image_processor.image_std).view(3, 1, 1)
    pooled = model.vision_model(pixel_values=(images - mean) / std).pooler_output
    return normalize(model.visual_projection(pooled).float(), dim=-1)


def text_features(model: CLIPModel, processor: CLIPProcessor, captions: Sequence[str]) -> Tensor:
    """Unit features (n, 64) of captions."""
    batch = processor.tokenizer(
        list(captions), return_tensors="pt", padding="max_length", truncation=True, max_length=MAX_TOKENS + 1
    ).to(model.device)
    pooled = model.text_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).pooler_output
    return normalize(model.text_projection(pooled).float(), dim=-1)


def augment(images: Tensor, variant: Variant, rng: torch.Generator) -> Tensor:
    """Blurred, noisy and shifted copies, so that the model does not rely on sharp edges."""
    n = len(images)

    def uniform() -> Tensor:
        return torch.rand(n, 1, 1, 1, generator=rng)

    if variant.shift:
        dx, dy = torch.randint(-variant.shift, variant.shift + 1, (2,), generator=rng).tolist()
        images = images.roll((dy, dx), (2, 3))
    blurred = avg_pool2d(pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = torch.lerp(images, blurred, (uniform() < variant.blur).float() * uniform())
    level = variant.noise * uniform() * (uniform() < 0.6).float()
    return (images + level * torch.randn(images.shape, generator=rng)).clamp(0, 1)


HARD_WEIGHT = 2.0


def contrastive_loss(
    model: CLIPModel, images: Tensor, texts: Tensor, keys: Sequence[tuple], negatives: int
) -> tuple[Tensor, Tensor]:
    """Contrastive loss with hard negatives, and the share of images whose own caption beats all of its negatives.

    images: (n, 64).  texts: (n (1 + negatives), 64), first the n captions, then the negatives, caption-major.
    keys: one per text; texts of equal keys may describe the same image and do not repel each other, except a
    image's own negatives, which are known to be false.
    """
    n = len(images)
    logits = model.logit_scale.exp() * images @ texts.T
    rows = torch.arange(n, device=images.device)
    own = n + rows[:, None] * negatives + torch.arange(negatives, device=images.device)
    same = torch.tensor([[a == b for b in keys] for a in keys[:n]], device=images.device)
    same[rows, rows] = False
    same[rows[:, None], own] = False
    logits = logits.masked_fill(same, -1e4)
    hard = torch.cat([logits.diagonal()[:, None], logits.gather(1, own)], dim=1)
    zeros = torch.zeros_like(rows)
    loss = (
        cross_entropy(logits, rows)
        + 0.5 * cross_entropy(logits[:, :n].T, rows)
        + HARD_WEIGHT * cross_entropy(hard, zeros)
    )
    return loss, (hard.argmax(1) == 0).float().mean()


@torch.no_grad()
def pair_accuracy(model: CLIPModel, processor: CLIPProcessor, seed: int, count: int = 900) -> dict[str, float]:
    """Share of held-out images whose caption scores above one hard negative, by category (test split)."""
    rng = numpy_generator(seed, "reward-validation")
    specs = balanced_specs(count, rng, "test")
    images = image_features(model, processor, torch.from_numpy(draw(specs, rng)))
    true = text_features(model, processor, [s.caption for s in specs])
    false = text_features(model, processor, [hard_negative(s, rng).caption for s in specs])
    right = ((images * true).sum(-1) > (images * false).sum(-1)).tolist()
    groups: dict[str, list[bool]] = {"all": right}
    for spec, ok in zip(specs, right, strict=True):
        groups.setdefault(spec.category, []).append(ok)
    return {f"pairs/{k}": float(np.mean(v)) for k, v in groups.items()}


def sample_batch(variant: Variant, step: int) -> tuple[list[Spec], list[Spec], Tensor]:
    """Captions, their negatives (caption-major) and augmented true images of one update.

    Where a caption names a place, its first negative is the same caption with the opposite place.
    """
    rng = numpy_generator(variant.seed, "reward", step)
    specs: list[Spec] = []
    while len(specs) < variant.schedule.batch:
        spec = sample_spec(rng)
        if spec.place or len(specs) >= variant.places * variant.schedule.batch:
            specs.append(spec)
    negatives = [
        turned(spec) if spec.place and i == 0 else hard_negative(spec, rng)
        for spec in specs
        for i in range(variant.negatives)
    ]
    images = augment(torch.from_numpy(draw(specs, rng)), variant, torch_generator(variant.seed, "augment", step))
    return specs, negatives, images


def train_reward(folder: Path, variant: Variant, device: str = "cpu") -> None:
    """Trains (or resumes) in `folder`; leaves a transformers folder in `folder/model`."""
    torch.manual_seed(variant.seed)
    model, processor = build_clip(variant)
    model.to(device)
    session = Session(folder, {"model": model}, variant.schedule)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        specs, negatives, images = sample_batch(variant, step)
        everything = [*specs, *negatives]
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            features = image_features(model, processor, images)
            texts = text_features(model, processor, [s.caption for s in everything])
        keys = [tuple(sorted(s.things)) for s in everything]
        value, right = contrastive_loss(model, features, texts, keys, variant.negatives)
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4)
        return value, {"hard": right.item()}

    session.run(loss, lambda: pair_accuracy(model, processor, variant.seed))
    session.swap_average()
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")


def score(model: CLIPModel, processor: CLIPProcessor, images: Tensor, captions: Sequence[str]) -> Tensor:
    """exp(logit_scale) cos(image, caption), shape (n,)."""
    parts = [
        (image_features(model, processor, x) * text_features(model, processor, captions[i * 64 : i * 64 + 64])).sum(-1)
        for i, x in enumerate(images.split(64))
    ]
    return model.logit_scale.exp() * torch.cat(parts)


@dataclass(frozen=True)
class LabeledImages:
    """Generated images (n, 3, 32, 32) in [0, 1], their captions, and whether the verifier accepts each (n,)."""

    images: Tensor
    captions: list[str]
    verdicts: Tensor


@torch.no_grad()
def verifier_agreement(model: CLIPModel, processor: CLIPProcessor, fresh: LabeledImages) -> dict[str, float]:
    """How scores agree with the verifier on generated images: AUC, and the mean score of right and of wrong ones."""
    scores = score(model, processor, fresh.images, fresh.captions).cpu()
    right, wrong = scores[fresh.verdicts], scores[~fresh.verdicts]
    auc = ((right[:, None] > wrong).float() + 0.5 * (right[:, None] == wrong).float()).mean()
    return {
        "auc": auc.item(),
        "right": right.mean().item(),
        "wrong": wrong.mean().item(),
        "spread": scores.std().item(),
    }


TUNE_SCHEDULE = Schedule(steps=500, batch=48, lr=6e-4, warmup=50, constant=0.2, ema=0.995, save_every=100)
NUM_LABELED = {"tune": 7200, "test": 600}
"""Generated images labeled by the verifier: of the tuning split for training, of the test split for the AUC."""


@torch.no_grad()
def label_images(pipeline: Flux2KleinPipeline, split: Split, seed: int, file: Path | None = None) -> LabeledImages:
    """Images of a split at guidance 1 and 2 in turns with their labels, kept in `file` or read from there."""
    specs = balanced_specs(NUM_LABELED[split], numpy_generator(seed, f"label-{split}"), split)
    captions = [s.caption for s in specs]
    if file is not None and file.exists():
        kept = load_file(file)
        return LabeledImages(kept["images"].float(), captions, kept["verdicts"])
    parts = []
    for chunk, start in enumerate(range(0, len(specs), 120)):
        noise = torch.stack([normal((16, 32), seed, f"label-{split}", i) for i in range(start, start + 120)])
        parts.append(sample(pipeline, captions[start : start + 120], noise, steps=25, guidance=1.0 + chunk % 2).cpu())
    images = torch.cat(parts)
    verdicts = torch.tensor(verify(images, specs))
    if file is not None:
        save_file({"images": images.half(), "verdicts": verdicts}, file.with_suffix(".new"))
        file.with_suffix(".new").rename(file)
    return LabeledImages(images, captions, verdicts)


def labeled_losses(
    model: CLIPModel, processor: CLIPProcessor, bias: nn.Linear, shown: LabeledImages, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Classification and ranking loss of half a batch of right and half a batch of wrong generated images."""
    half = TUNE_SCHEDULE.batch // 2
    right, wrong = shown.verdicts.nonzero()[:, 0], (~shown.verdicts).nonzero()[:, 0]
    rows = torch.cat([s[torch.randint(len(s), (half,), generator=rng)] for s in (right, wrong)])
    noisy = augment(shown.images[rows], REWARD.model_copy(update={"blur": 0.0, "noise": 0.05}), rng)
    scores = score(model, processor, noisy, [shown.captions[i] for i in rows]) + bias.bias
    classification = binary_cross_entropy_with_logits(scores, shown.verdicts[rows].float().to(scores.device))
    return classification, softplus(scores[half:][None] - scores[:half][:, None]).mean()


def tune_reward(work: Path, device: str = "cpu", seed: int = 11) -> None:
    """Tunes the trained reward on generated images with the verifier's labels, as human-preference models are tuned.

    Half of every batch keeps to rendered images and hard negatives.  Leaves a folder in `work/reward-tuned/model`.
    """
    torch.manual_seed(seed)
    folder, source = work / "reward-tuned", work / "reward" / "model"
    folder.mkdir(parents=True, exist_ok=True)
    model, processor = CLIPModel.from_pretrained(source), CLIPProcessor.from_pretrained(source)
    model.to(device).train()
    bias = nn.Linear(1, 1, device=device)
    nn.init.constant_(bias.bias, -model.logit_scale.exp().item() / 2)
    session = Session(folder, {"model": model, "bias": bias}, TUNE_SCHEDULE)
    pipeline = Flux2KleinPipeline.from_pretrained(latest_pipeline(work)).to(device)
    shown, fresh = (
        label_images(pipeline, split, seed, folder / f"labeled-{split}.safetensors") for split in ("tune", "test")
    )

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        variant = REWARD.model_copy(update={"schedule": TUNE_SCHEDULE, "seed": seed})
        specs, negatives, images = sample_batch(variant, step)
        everything = [*specs, *negatives]
        features = image_features(model, processor, images)
        texts = text_features(model, processor, [s.caption for s in everything])
        value, hard = contrastive_loss(
            model, features, texts, [tuple(sorted(s.things)) for s in everything], variant.negatives
        )
        classification, ranking = labeled_losses(model, processor, bias, shown, torch_generator(seed, "tune", step))
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4)
        return 0.5 * value + classification + ranking, {"labeled": classification.item(), "hard": hard.item()}

    def evaluate() -> dict[str, float]:
        return verifier_agreement(model, processor, fresh) | {"bias": bias.bias.item()}

    session.run(loss, evaluate)
    session.swap_average()
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
