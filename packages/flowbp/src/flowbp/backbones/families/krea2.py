"""Krea 2 over diffusers: true guidance, stacked text states of Qwen3-VL, the autoencoder of Qwen-Image.

The pipeline's `guidance_scale` s is v + s (v - v_negative), so that `guidance_scale` here is 1 + s.
"""

from collections.abc import Sequence

import torch
from diffusers import Krea2Pipeline
from jaxtyping import Float
from torch import Tensor

from flowbp.backbones import pipelines
from flowbp.backbones.families.qwen_image import QwenLatents
from flowbp.core.types import Cond

DISTILLED_SHIFT = 1.15
"""The shift of a step-distilled model at every size."""


class Krea2(QwenLatents):
    """One stream of tokens: those of the text lie at the origin, those of the image on a grid."""

    pipe: Krea2Pipeline
    guidance_kind = "1 + pipeline's"

    def pipeline_guidance(self, scale: float) -> float:
        """One less: the pipeline adds to the guided velocity itself."""
        return scale - 1

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        """{"text": "b tokens layers width", `max_tokens` of them, "mask": "b tokens", which are not padding}."""
        text, mask = self.pipe.encode_prompt(list(prompts), max_sequence_length=self.max_tokens)
        return {"text": text, "mask": mask}

    def shift(self, steps: int, size: tuple[int, int]) -> float:
        """By the number of tokens, but for a step-distilled model."""
        return DISTILLED_SHIFT if self.pipe.config.is_distilled else super().shift(steps, size)

    def velocity(self, x: Float[Tensor, "b c h w"], sigma: Float[Tensor, " b"], cond: Cond) -> Float[Tensor, "b c h w"]:
        """dx/dsigma, unguided."""
        _, _, height, width = x.shape
        text = cond["text"]
        with pipelines.autocast(x, self.bfloat16):
            tokens = self.net(
                hidden_states=x.flatten(2).transpose(1, 2),
                encoder_hidden_states=text,
                timestep=sigma,
                position_ids=self.pipe.prepare_position_ids(text.shape[1], height, width, x.device),
                encoder_attention_mask=cond["mask"],
                return_dict=False,
            )[0]
        return tokens.transpose(1, 2).unflatten(2, (height, width))
