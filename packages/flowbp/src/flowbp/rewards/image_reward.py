"""ImageReward on transformers' BLIP: a text tower that attends to the image, then a head."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import BlipConfig, BlipTextModel, BlipVisionModel, PreTrainedTokenizerBase

from flowbp.rewards import preprocess
from flowbp.rewards.loading import (
    are_weights_missing,
    at_least_float32,
    load_head,
    load_part,
    load_tokenizer,
    load_weights,
    prompt_of_each,
    read_tensors,
    scoring_head,
)
from imgen_common.prompt_limits import PromptLimit
from imgen_common.weights import weight_files

SCORE_MEAN, SCORE_STD = 0.16717362830052426, 1.0333394966054072
"""Mean and standard deviation of the raw score over the annotated images; the published score is standardized."""
MAX_TOKENS = 35


class ImageReward:
    """score = (head(state of the first token) - SCORE_MEAN) / SCORE_STD.  Source: ImageReward, arXiv 2304.05977."""

    def __init__(
        self, vision: BlipVisionModel, text: BlipTextModel, head: nn.Module, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.vision, self.text, self.head, self.tokenizer = vision, text, head, tokenizer
        self.size: int = vision.config.image_size
        self.prompt_limit = PromptLimit(tokenizer, min(MAX_TOKENS, text.config.max_position_embeddings))

    @classmethod
    def load(cls, folder: Path, *, device: torch.device | str = "cpu") -> "ImageReward":
        """The frozen float32 reward of a folder made by `flowbp convert-reward imagereward`."""
        vision, text = build_towers(load_part(BlipConfig, folder))
        files = () if are_weights_missing(folder, device) else weight_files(folder).files
        weights = {name: value for file in files for name, value in read_tensors(file, device).items()}
        for name, tower in (("vision_model.", vision), ("text_encoder.", text)):
            tower.to(device, torch.float32).eval().requires_grad_(False)
            if files:
                own = {k.removeprefix(name): v for k, v in weights.items() if k.startswith(name)}
                load_weights(tower, folder, own)
        head = load_head(folder, scoring_head(text.config.hidden_size), device)
        return cls(vision, text, head, load_tokenizer(folder, text))

    def preprocess(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 size size"]:
        """As the package does with torchvision: the shorter side is resized, the center cut out."""
        images = preprocess.center_crop(preprocess.resize_shorter(images, self.size), (self.size, self.size), round)
        return preprocess.normalize_channels(images)

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """Scores of images in [0, 1] for their prompts."""
        seen = self.vision(pixel_values=self.preprocess(images)).last_hidden_state
        length, texts = self.prompt_limit.max_length, [*prompt_of_each(prompts, images)]
        batch = self.tokenizer(texts, return_tensors="pt", padding="max_length", truncation=True, max_length=length).to(
            seen.device
        )
        read = self.text(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
        ).last_hidden_state
        return (self.head(at_least_float32(read[:, 0])).squeeze(-1) - SCORE_MEAN) / SCORE_STD


def build_towers(config: BlipConfig) -> tuple[BlipVisionModel, BlipTextModel]:
    """Vision and text tower with new weights."""
    return BlipVisionModel(config.vision_config), BlipTextModel(config.text_config, add_pooling_layer=False)
