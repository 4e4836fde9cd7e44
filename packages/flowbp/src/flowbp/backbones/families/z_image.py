"""Z-Image over diffusers: true guidance, Qwen3 text states of a prompt's own length, one stream of tokens.

The pipeline's `guidance_scale` s is v + s (v - v_negative), so that `guidance_scale` here is 1 + s.
"""

from collections.abc import Sequence

import torch
from diffusers import ZImagePipeline
from jaxtyping import Float
from torch import Tensor

from flowbp.backbones import pipelines
from flowbp.core.types import LENGTHS, Cond

TEXT_LAYER = -2
"""Hidden states of the text encoder that the network reads: those before its last block."""


class ZImage(pipelines.PipelineBackbone):
    """Latents are "b c h w" of the autoencoder; the transformer sees 2x2 patches of them."""

    pixels_per_token = 1

    pipe: ZImagePipeline
    guidance_kind = "1 + pipeline's"

    def pipeline_guidance(self, scale: float) -> float:
        """One less: the pipeline adds to the guided velocity itself."""
        return scale - 1

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        """{"text": "b tokens width", padded to `max_tokens`, LENGTHS: "b", how many of them the network sees}."""
        given = {"padding": "max_length", "max_length": self.max_tokens, "truncation": True, "return_tensors": "pt"}
        encoder = self.pipe.text_encoder
        template = self.prompt_limits()["text_encoder"].template
        tokens = self.pipe.tokenizer([template(prompt) for prompt in prompts], **given).to(encoder.device)
        states = encoder(tokens.input_ids, tokens.attention_mask.bool(), output_hidden_states=True).hidden_states
        return {"text": states[TEXT_LAYER], LENGTHS: tokens.attention_mask.sum(1)}

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(c, h, w) for images of `size` (height, width) pixels.  Raises UserError where patches do not divide it."""
        rows, columns = pipelines.grid_size(size, 2 * self.pipe.vae_scale_factor)
        return self.pipe.transformer.config.in_channels, 2 * rows, 2 * columns

    def has_linear_levels(self) -> bool:
        """Always: this pipeline does not ask the scheduler for a spacing of its own."""
        return True

    def linear_levels(self, steps: int) -> list[float]:
        """From 1 to 1/steps, rounded as the pipeline rounds them."""
        return torch.linspace(1.0, 1 / steps, steps).tolist()

    def shift(self, steps: int, size: tuple[int, int]) -> float:
        """By the number of tokens, where the scheduler shifts dynamically."""
        _, height, width = self.latent_shape(size)
        return pipelines.resolution_shift(self.pipe.scheduler, height * width // 4)

    def velocity(self, x: Float[Tensor, "b c h w"], sigma: Float[Tensor, " b"], cond: Cond) -> Float[Tensor, "b c h w"]:
        """dx/dsigma, unguided: the network's time runs from noise to image, and its output with it."""
        text = cond["text"]
        # without lengths, as in an estimate, all of the text is seen
        lengths = cond[LENGTHS].tolist() if LENGTHS in cond else [text.shape[1]] * len(text)
        with pipelines.autocast(x, self.bfloat16):
            found = self.net(
                list(x.unsqueeze(2)),
                (1000 - sigma * self.pipe.scheduler.config.num_train_timesteps) / 1000,  # rounded as the pipeline does
                [states[:length] for states, length in zip(text, lengths, strict=True)],
                return_dict=False,
            )[0]
        return -torch.stack(found).squeeze(2)
