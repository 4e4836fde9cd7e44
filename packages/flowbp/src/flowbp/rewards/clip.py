"""Contrastive picture-text scores (PickScore and its kin) over transformers' `CLIPModel`."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate, normalize
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerBase


class ClipReward:
    """score = exp(logit_scale) cos(picture, prompt), the scale that PickScore publishes."""

    def __init__(self, model: CLIPModel, processor: CLIPImageProcessor, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.size: int = processor.size["shortest_edge"]
        self.crop = (processor.crop_size["height"], processor.crop_size["width"])
        self.mean, self.std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
        self.max_tokens: int = model.config.text_config.max_position_embeddings

    @classmethod
    def load(cls, folder: Path, *, device: torch.device | str = "cpu") -> "ClipReward":
        """Frozen float32 reward from a transformers folder with its image processor and tokenizer."""
        model = CLIPModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return cls(model.to(device).eval().requires_grad_(False), processor, tokenizer)

    def preprocess(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 crop crop"]:
        """Shorter side to `size` (bicubic, antialiased), centre crop, normalised: the processor's steps with gradient.

        Differs from the processor on uint8 pictures by its rounding to 1/255 only.
        """
        height, width = images.shape[-2:]
        if min(height, width) != self.size:
            scale = self.size / min(height, width)
            target = (round(height * scale), round(width * scale))
            images = interpolate(images, target, mode="bicubic", antialias=True, align_corners=False)
        top, left = (images.shape[-2] - self.crop[0]) // 2, (images.shape[-1] - self.crop[1]) // 2
        images = images[..., top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (t.to(images).view(3, 1, 1) for t in (self.mean, self.std))
        return (images - mean) / std

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """Scores of pictures in [0, 1] for their prompts."""
        picture = self.model.get_image_features(pixel_values=self.preprocess(images)).pooler_output
        return self.model.logit_scale.exp() * (normalize(picture, dim=-1) * self.text(prompts)).sum(-1)

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> Float[Tensor, "b d"]:
        """Unit text features."""
        batch = self.tokenizer(
            list(prompts), return_tensors="pt", padding=True, truncation=True, max_length=self.max_tokens
        ).to(self.model.device)
        features = self.model.get_text_features(**batch).pooler_output
        return normalize(features, dim=-1)
