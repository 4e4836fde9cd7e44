"""FLUX.1 (dev, schnell) over diffusers: distilled guidance as an input, T5 and CLIP text."""

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor, nn

from flowbp.backbones import pipelines
from flowbp.core.types import Cond

DEFAULT_EMBEDDED_GUIDANCE = 3.5
"""Guidance input of a guidance-distilled model unless another is set: the pipeline's own default."""


class Flux(pipelines.PipelineBackbone):
    """Latents are "b c h w" of the autoencoder; the transformer sees 2x2 patches of them."""

    longest_reader = "text_encoder_2"

    def __init__(self, pipe: DiffusionPipeline) -> None:
        super().__init__(pipe)
        self.guidance = DEFAULT_EMBEDDED_GUIDANCE

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        """{"text": "b tokens width" of T5, padded to `max_tokens`, "pooled": "b width" of CLIP}."""
        text, pooled, _ = self.pipe.encode_prompt(list(prompts), None, max_sequence_length=self.max_tokens)
        return {"text": text, "pooled": pooled}

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(c, h, w) for images of `size` (height, width) pixels.  Raises UserError where patches do not divide it."""
        rows, columns = pipelines.grid_size(size, 2 * self.pipe.vae_scale_factor)
        return self.pipe.transformer.config.in_channels // 4, 2 * rows, 2 * columns

    def shift(self, steps: int, size: tuple[int, int]) -> float:
        """By the number of tokens."""
        _, height, width = self.latent_shape(size)
        return pipelines.resolution_shift(self.pipe.scheduler, height * width // 4)

    def velocity(self, x: Float[Tensor, "b c h w"], sigma: Float[Tensor, " b"], cond: Cond) -> Float[Tensor, "b c h w"]:
        """dx/dsigma at the distilled guidance; true guidance, if any, goes around it."""
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        guidance = torch.full_like(sigma, self.guidance) if self.pipe.transformer.config.guidance_embeds else None
        text = cond["text"]
        with pipelines.autocast(x, self.bfloat16):
            tokens = self.net(
                hidden_states=nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2),
                timestep=pipelines.flux_time(self.pipe.scheduler, sigma),
                guidance=guidance,
                pooled_projections=cond["pooled"],
                encoder_hidden_states=text,
                txt_ids=torch.zeros(text.shape[1], 3, device=x.device, dtype=torch.int64),
                img_ids=pipelines.positions(x.device, 1, rows, columns),
                return_dict=False,
            )[0]
        return nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (rows, columns)), 2)
