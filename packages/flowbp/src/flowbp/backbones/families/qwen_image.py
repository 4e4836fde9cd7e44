"""Qwen-Image over diffusers: guidance rescaled to the conditional norm, Qwen2.5-VL text states, latents of a video."""

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor, nn

from flowbp.backbones import pipelines
from flowbp.backbones.source_tokens import append_sources, by_layout
from flowbp.core.settings import GuidanceRescale
from flowbp.core.types import Cond, Layout


class QwenLatents(pipelines.PipelineBackbone):
    """Latents are "b c h w": c channels of 2x2 patches, h and w in units of 2 x the autoencoder's factor."""

    def __init__(self, pipe: DiffusionPipeline) -> None:
        super().__init__(pipe)
        self.patch = 2 * pipe.vae_scale_factor

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(c, h, w) for images of `size` (height, width) pixels.  Raises UserError where patches do not divide it."""
        return self.pipe.transformer.config.in_channels, *pipelines.grid_size(size, self.patch)

    def noise(self, batch: int, size: tuple[int, int], rng: torch.Generator) -> Float[Tensor, "b c h w"]:
        """Standard normal float32 latents, drawn as the pipeline draws them, before it makes patches."""
        channels, rows, columns = self.latent_shape(size)
        drawn = torch.randn(batch, channels // 4, 2 * rows, 2 * columns, generator=rng, device=rng.device)
        return nn.functional.pixel_unshuffle(drawn, 2)

    def has_linear_levels(self) -> bool:
        """Always: this pipeline does not ask the scheduler for a spacing of its own."""
        return True

    def shift(self, steps: int, size: tuple[int, int]) -> float:
        """By the number of tokens."""
        _, height, width = self.latent_shape(size)
        return pipelines.resolution_shift(self.pipe.scheduler, height * width)

    def decode(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 height width"]:
        """Images in [0, 1], differentiable (but for the clamp): the only frame of a video."""
        config = self.pipe.vae.config
        latents = nn.functional.pixel_shuffle(x, 2)[:, :, None]
        mean, std = (latents.new_tensor(one).view(-1, 1, 1, 1) for one in (config.latents_mean, config.latents_std))
        return pipelines.decode(self.pipe.vae, latents * std + mean)[:, :, 0]


class QwenImage(QwenLatents):
    """Text states of Qwen2.5-VL behind a template."""

    guidance_rescale: GuidanceRescale = "norm"
    guidance_kind = "rescaled"

    def __init__(self, pipe: DiffusionPipeline) -> None:
        super().__init__(pipe)
        rope = pipe.transformer.pos_embed
        if rope.pos_freqs.is_meta:  # neither a weight nor a buffer: nothing else would fill it
            rope.__init__(rope.theta, rope.axes_dim, rope.scale_rope)

    @property
    def unused_layers(self) -> tuple[str, ...]:
        """What the last block computes for its text, which it drops."""
        last = f"transformer_blocks.{len(self.pipe.transformer.transformer_blocks) - 1}"
        attention = (f"{last}.attn.{name}" for name in ("add_q_proj", "norm_added_q", "to_add_out"))
        return *attention, f"{last}.txt_mlp"

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        """{"text": "b tokens width", padded to `max_tokens`, "mask": "b tokens", which of them are not padding}."""
        pipe = self.pipe
        given = {"padding": "max_length", "padding_side": "right", "truncation": True, "return_tensors": "pt"}
        limit = self.prompt_limits()["text_encoder"]
        tokens = limit.tokenizer([limit.template(one) for one in prompts], max_length=limit.max_length, **given)
        tokens = tokens.to(pipe.text_encoder.device)
        states = pipe.text_encoder(tokens.input_ids, tokens.attention_mask, output_hidden_states=True).hidden_states[-1]
        text, mask = (one[:, pipe.prompt_template_encode_start_idx :] for one in (states, tokens.attention_mask.bool()))
        return {"text": text * mask[..., None], "mask": mask}

    def velocity(self, x: Float[Tensor, "b c h w"], sigma: Float[Tensor, " b"], cond: Cond) -> Float[Tensor, "b c h w"]:
        """dx/dsigma, unguided."""
        return by_layout(self.velocity_of_layout, x, sigma, cond)

    def velocity_of_layout(self, x: Tensor, sigma: Tensor, cond: Cond, layout: Layout) -> Tensor:
        """`velocity` of samples that all have sources of one layout; this network sees them where they are given."""
        _, _, height, width = x.shape
        with pipelines.autocast(x, self.bfloat16):
            tokens = self.net(
                hidden_states=append_sources(x.flatten(2).transpose(1, 2), cond, layout),
                timestep=pipelines.flux_time(self.pipe.scheduler, sigma),
                encoder_hidden_states=cond["text"],
                encoder_hidden_states_mask=cond["mask"],
                img_shapes=[[(1, rows, columns) for rows, columns in ((height, width), *layout)]] * len(x),
                return_dict=False,
            )[0]
        return tokens[:, : height * width].transpose(1, 2).unflatten(2, (height, width))
