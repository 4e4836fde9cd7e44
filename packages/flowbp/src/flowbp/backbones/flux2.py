"""FLUX.2-klein-base over diffusers: true guidance, Qwen3 text states, normalized 2x2-patched latents."""

from collections.abc import Sequence

import torch
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from jaxtyping import Float
from torch import Tensor, nn

from flowbp.backbones import pipelines
from flowbp.core.types import Cond
from imgen_common.hub import text_layers


class Flux2(pipelines.PipelineBackbone):
    """Latents are "b c h w": c channels of normalized 2x2 patches, h and w in units of 2 x the autoencoder's factor."""

    def __init__(self, pipe: Flux2KleinPipeline) -> None:
        super().__init__(pipe)
        self.patch = 2 ** len(pipe.vae.config.block_out_channels)  # 2 x the autoencoder's factor
        self.text_layers = text_layers(pipe.text_encoder.config, self.pipe.transformer.config.joint_attention_dim)
        self.max_tokens = min(512, pipe.tokenizer.model_max_length)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        """{"text": "b tokens 3*width"}: hidden states of three depths, padded to `max_tokens`."""
        given = {"max_sequence_length": self.max_tokens, "text_encoder_out_layers": self.text_layers}
        return {"text": self.pipe.encode_prompt(list(prompts), **given)[0]}

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(c, h, w) for images of `size` (height, width) pixels.  Raises UserError where patches do not divide it."""
        return self.pipe.transformer.config.in_channels, *pipelines.grid_size(size, self.patch)

    def sigmas(self, steps: int, size: tuple[int, int]) -> Float[Tensor, " n_plus_1"]:
        """The pipeline's own noise levels: linear from 1 to 1/steps, shifted as the scheduler says, then 0."""
        _, height, width = self.latent_shape(size)
        mu = compute_empirical_mu(image_seq_len=height * width, num_steps=steps)
        return pipelines.noise_levels(
            self.pipe.scheduler, steps, pipelines.linear_levels(self.pipe.scheduler, steps), mu
        )

    def velocity(self, x: Float[Tensor, "b c h w"], sigma: Float[Tensor, " b"], cond: Cond) -> Float[Tensor, "b c h w"]:
        """dx/dsigma, unguided."""
        _, _, height, width = x.shape
        text = cond["text"]
        with pipelines.autocast(x, self.bfloat16):
            tokens = self.net(
                hidden_states=x.flatten(2).transpose(1, 2),
                timestep=pipelines.flux_time(self.pipe.scheduler, sigma),
                encoder_hidden_states=text,
                txt_ids=pipelines.positions(x.device, 1, 1, 1, text.shape[1]),
                img_ids=pipelines.positions(x.device, 1, height, width, 1),
                return_dict=False,
            )[0]
        return tokens.transpose(1, 2).unflatten(2, (height, width))

    def decode(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 height width"]:
        """Images in [0, 1], differentiable (but for the clamp)."""
        vae = self.pipe.vae
        std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
        patches = x.to(vae.dtype) * std.view(1, -1, 1, 1) + vae.bn.running_mean.view(1, -1, 1, 1)
        return pipelines.decode(vae, nn.functional.pixel_shuffle(patches, 2))
