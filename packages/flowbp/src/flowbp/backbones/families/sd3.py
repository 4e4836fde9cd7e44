"""Stable Diffusion 3 and 3.5 over diffusers: true guidance, two CLIP texts and T5."""

from collections.abc import Sequence

import torch
from diffusers import StableDiffusion3Pipeline
from jaxtyping import Float
from torch import Tensor

from flowbp.backbones import pipelines
from flowbp.core.types import Cond
from imgen_common.errors import UserError


class SD3(pipelines.PipelineBackbone):
    """Latents are "b c h w" of the autoencoder."""

    pixels_per_token = 1

    pipe: StableDiffusion3Pipeline
    max_tokens = 256

    @property
    def unused_layers(self) -> tuple[str, ...]:
        """The queries of the text in the last block, which drops its text."""
        last = f"transformer_blocks.{len(self.pipe.transformer.transformer_blocks) - 1}.attn"
        return f"{last}.add_q_proj", f"{last}.norm_added_q"

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        """{"text": "b tokens width" of CLIP, then T5 padded to `max_tokens`, "pooled": "b width" of both CLIPs}."""
        text, _, pooled, _ = self.pipe.encode_prompt(
            list(prompts), None, None, do_classifier_free_guidance=False, max_sequence_length=self.max_tokens
        )
        return {"text": text, "pooled": pooled}

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(c, h, w) for images of `size` (height, width) pixels.  Raises UserError where patches do not divide it, or
        the network has fewer positions."""
        patch, most = self.pipe.transformer.config.patch_size, self.pipe.transformer.config.pos_embed_max_size
        pixels = patch * self.pipe.vae_scale_factor
        rows, columns = pipelines.grid_size(size, pixels)
        if most is not None and max(rows, columns) > most:
            raise UserError(
                f"image size {size[0]}x{size[1]}: this model has positions for sides of {most * pixels} pixels at most"
            )
        return self.pipe.transformer.config.in_channels, patch * rows, patch * columns

    def has_linear_levels(self) -> bool:
        """No: the pipeline takes the scheduler's spacing, whose smallest level is shifted twice."""
        return False

    def shift(self, steps: int, size: tuple[int, int]) -> float | None:
        """None for SD3.5, whose shift is 3; by the number of tokens where the scheduler shifts dynamically."""
        if not self.pipe.scheduler.config.use_dynamic_shifting:
            return None
        _, height, width = self.latent_shape(size)
        tokens = height * width // self.pipe.transformer.config.patch_size**2
        return pipelines.resolution_shift(self.pipe.scheduler, tokens)

    def velocity(self, x: Float[Tensor, "b c h w"], sigma: Float[Tensor, " b"], cond: Cond) -> Float[Tensor, "b c h w"]:
        """dx/dsigma, unguided."""
        with pipelines.autocast(x, self.bfloat16):
            return self.net(
                hidden_states=x,
                timestep=sigma * self.pipe.scheduler.config.num_train_timesteps,
                encoder_hidden_states=cond["text"],
                pooled_projections=cond["pooled"],
                return_dict=False,
            )[0]
