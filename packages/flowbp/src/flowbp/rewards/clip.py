"""Rewards on transformers' `CLIPModel`: PickScore, CLIPScore, HPSv2.1, the LAION aesthetic predictor."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize
from transformers import CLIPModel, PreTrainedTokenizerBase

from flowbp.rewards import preprocess
from flowbp.rewards.loading import (
    at_least_float32,
    load_frozen,
    load_head,
    load_tokenizer,
    prompt_of_each,
    scoring_head,
)
from imgen_common.prompt_limits import PromptLimit

MIN_CHANGE = 1e-3
"""Length below which a change of image features counts as that long, so that the gradient at no change is bounded."""


class ClipReward:
    """score = exp(logit_scale) cos(image, prompt), the scale that PickScore publishes.

    cosine: the score is the cosine alone.  letterbox: images are padded to a square, as HPSv2 does, instead of cropped.
    crop_rounding: how a center crop rounds, `int` as transformers or `round` as torchvision.
    """

    def __init__(
        self,
        model: CLIPModel,
        processor: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        cosine: bool = False,
        letterbox: bool = False,
        crop_rounding: Callable[[float], int] = int,
    ) -> None:
        self.model, self.tokenizer, self.cosine, self.letterbox = model, tokenizer, cosine, letterbox
        self.side: int = model.config.vision_config.image_size
        self.steps = preprocess.ProcessorSteps.of(processor, Path(model.name_or_path), self.side)
        self.crop_rounding = crop_rounding
        self.prompt_limit = PromptLimit(tokenizer, model.config.text_config.max_position_embeddings)

    @classmethod
    def load(cls, folder: Path, *, device: torch.device | str = "cpu", **options: Any) -> "ClipReward":
        """The frozen float32 reward of a transformers folder with its image processor and tokenizer.

        options: further arguments of the class.  Raises UserError for an image processor that is not reproduced.
        """
        model, processor = load_frozen(CLIPModel, folder, device, torch.float32), preprocess.load_processor(folder)
        return cls(model, processor, load_tokenizer(folder, model.text_model), **options)

    def preprocess(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 crop crop"]:
        """The differentiable steps of the image processor, or of HPSv2's own; see `ProcessorSteps`."""
        if not self.letterbox:
            return self.steps(images, self.crop_rounding)
        return preprocess.normalize_channels(preprocess.letterbox(images, self.side))

    def image_features(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Image features of unit length."""
        features = self.model.get_image_features(pixel_values=self.preprocess(images)).pooler_output
        return normalize(at_least_float32(features), dim=-1)

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """Scores of images in [0, 1] for their prompts."""
        cosine = (self.image_features(images) * self.text_features(prompt_of_each(prompts, images))).sum(-1)
        return cosine if self.cosine else self.model.logit_scale.exp() * cosine

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Float[Tensor, "b d"]:
        """Text features of unit length."""
        batch = self.tokenizer(
            list(prompts), return_tensors="pt", padding=True, truncation=True, max_length=self.prompt_limit.max_length
        ).to(self.model.device)
        features = self.model.get_text_features(**batch).pooler_output
        return normalize(at_least_float32(features), dim=-1)


class EditClipReward(ClipReward):
    """score = cos(E(image) - E(source), E(caption) - E(source caption)), in [-1, 1]; E are unit CLIP features.

    Whether an edit changes the image in the direction in which the words change: the directional similarity of
    StyleGAN-NADA (arXiv 2108.00946), as InstructPix2Pix (arXiv 2211.09800) measures edits with it.  The captions are
    the attributes `caption` and `source_caption` of a prompt.  Without a caption of the result the instruction stands
    for it, without one of the source the empty text.  Of several sources the last counts; an image without any is
    compared as it is, with the text as it is.
    """

    sees_sources = True

    def __call__(
        self,
        images: Float[Tensor, "b 3 h w"],
        prompts: Sequence[str],
        sources: Sequence[Sequence[Float[Tensor, "3 _ _"]]] = (),
    ) -> Float[Tensor, " b"]:
        """Scores of images in [0, 1] for their instructions and source images."""
        change, prompts = self.image_features(images), prompt_of_each(prompts, images)
        wanted = self.text_features([getattr(prompt, "caption", None) or prompt for prompt in prompts])
        edits = [i for i in range(len(images)) if sources and sources[i]]
        if edits:
            with torch.no_grad():
                before = torch.zeros_like(change)
                before[edits] = torch.cat([self.image_features(sources[i][-1][None].to(images)) for i in edits])
                said = torch.zeros_like(wanted)
                said[edits] = self.text_features([getattr(prompts[i], "source_caption", None) or "" for i in edits])
            change, wanted = change - before, wanted - said
        return cosine_similarity(change, wanted, eps=MIN_CHANGE)


class AestheticReward:
    """The LAION aesthetic predictor: a head on unit image features; about 1 (worst) to 10.  It ignores prompts."""

    def __init__(self, clip: ClipReward, head: nn.Module) -> None:
        self.clip, self.head = clip, head

    @classmethod
    def load(cls, folder: Path, *, device: torch.device | str = "cpu") -> "AestheticReward":
        """The frozen float32 reward of a `CLIPModel` folder that holds `head.safetensors` too."""
        clip = ClipReward.load(folder, device=device, crop_rounding=round)
        return cls(clip, load_head(folder, scoring_head(clip.model.config.projection_dim), device))

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """Scores of images in [0, 1]."""
        return self.head(self.clip.image_features(images)).squeeze(-1)
