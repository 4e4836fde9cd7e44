"""Rewards on transformers' `CLIPModel`: PickScore, CLIPScore, HPSv2.1, the LAION aesthetic predictor."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerBase

from flowbp.core.prompt_limits import PromptLimit
from flowbp.rewards import preprocess
from flowbp.rewards.loading import load_frozen, load_head, scoring_head


class ClipReward:
    """score = exp(logit_scale) cos(image, prompt), the scale that PickScore publishes.

    cosine: the score is the cosine alone.  letterbox: images are padded to a square, as HPSv2 does, instead of cropped.
    """

    def __init__(
        self,
        model: CLIPModel,
        processor: CLIPImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        *,
        cosine: bool = False,
        letterbox: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.cosine, self.letterbox = model, tokenizer, cosine, letterbox
        self.size: int = processor.size["shortest_edge"]
        self.crop = (processor.crop_size["height"], processor.crop_size["width"])
        self.mean, self.std = tuple(processor.image_mean), tuple(processor.image_std)
        self.prompt_limit = PromptLimit(tokenizer, model.config.text_config.max_position_embeddings)

    @classmethod
    def load(
        cls, folder: Path, *, device: torch.device | str = "cpu", cosine: bool = False, letterbox: bool = False
    ) -> "ClipReward":
        """The frozen float32 reward of a transformers folder with its image processor and tokenizer."""
        model = load_frozen(CLIPModel, folder, device, torch.float32)
        processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return cls(model, processor, tokenizer, cosine=cosine, letterbox=letterbox)

    def preprocess(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 crop crop"]:
        """The differentiable steps of the image processor; on uint8 images only its rounding to 1/255 is missing."""
        if self.letterbox:
            images = preprocess.letterbox(images, self.size)
        else:
            images = preprocess.center_crop(images, self.size, self.crop)
        return preprocess.normalize_channels(images, self.mean, self.std)

    def image_features(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Image features of unit length."""
        return normalize(self.model.get_image_features(pixel_values=self.preprocess(images)).pooler_output, dim=-1)

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """Scores of images in [0, 1] for their prompts."""
        cosine = (self.image_features(images) * self.text_features(prompts)).sum(-1)
        return cosine if self.cosine else self.model.logit_scale.exp() * cosine

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Float[Tensor, "b d"]:
        """Text features of unit length."""
        batch = self.tokenizer(
            list(prompts), return_tensors="pt", padding=True, truncation=True, max_length=self.prompt_limit.max_length
        ).to(self.model.device)
        features = self.model.get_text_features(**batch).pooler_output
        return normalize(features, dim=-1)


class AestheticReward:
    """The LAION aesthetic predictor: a head on unit image features; about 1 (worst) to 10.  It ignores prompts."""

    def __init__(self, clip: ClipReward, head: nn.Module) -> None:
        self.clip, self.head = clip, head

    @classmethod
    def load(cls, folder: Path, *, device: torch.device | str = "cpu") -> "AestheticReward":
        """The frozen float32 reward of a `CLIPModel` folder that holds `head.safetensors` too."""
        clip = ClipReward.load(folder, device=device)
        return cls(clip, load_head(folder, scoring_head(clip.model.config.projection_dim), device))

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """Scores of images in [0, 1]."""
        return self.head(self.clip.image_features(images)).squeeze(-1)
