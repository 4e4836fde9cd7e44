"""Qwen-Image-2.1 over diffusers, from text: one block-causal sequence of text and image, latents of 16x16 pixels."""

from collections.abc import Sequence

import torch
from diffusers import QwenImage21Pipeline
from jaxtyping import Float
from torch import Tensor

from flowbp.backbones import pipelines
from flowbp.core.settings import NoiseLevels
from flowbp.core.types import LENGTHS, Cond

SLOT = 4
"""Tokens of the image for which one place of the network's `img_mask` stands."""


class QwenImage21(pipelines.PipelineBackbone):
    """Latents are "b c h w" of the autoencoder, a token each.  Positions follow the length of the text, so that every
    sample is evaluated alone, at its own length.  The keys and values of the text are computed in every evaluation."""

    pixels_per_token = 1
    pipe: QwenImage21Pipeline

    def __init__(self, pipe: QwenImage21Pipeline) -> None:
        super().__init__(pipe)
        rope = pipe.transformer.pos_embed
        if rope.freqs[0].is_meta:  # neither a weight nor a buffer: nothing else would fill it
            rope.__init__(rope.theta, rope.axes_dim)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        """{"text": "b tokens width", padded to `max_tokens`, LENGTHS: "b", how many of them the network sees}."""
        encoder, limit, hidden = self.pipe.text_encoder, self.prompt_limits()["text_encoder"], self.pipe._drop_idx
        given = {"padding": "max_length", "padding_side": "right", "truncation": True, "return_tensors": "pt"}
        texts = [limit.template(prompt) for prompt in prompts]
        tokens = limit.tokenizer(texts, max_length=limit.max_length, **given).to(encoder.device)
        # the network was trained on states before the last norm, which transformers 5 returns after it
        hook = encoder.model.language_model.norm.register_forward_hook(lambda module, given, output: given[0])
        try:
            states = encoder(tokens.input_ids, tokens.attention_mask, output_hidden_states=True).hidden_states[-1]
        finally:
            hook.remove()
        return {"text": states[:, hidden:], LENGTHS: tokens.attention_mask.sum(1) - hidden}

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(c, h, w) for images of `size` (height, width) pixels.  Raises UserError unless sides are multiples of 32."""
        rows, columns = pipelines.grid_size(size, 2 * self.pipe.vae_scale_factor)
        return self.pipe.transformer.config.in_channels, 2 * rows, 2 * columns

    def has_linear_levels(self) -> bool:
        """Always: this pipeline does not ask the scheduler for a spacing of its own."""
        return True

    def sigmas(self, steps: int, size: tuple[int, int], levels: NoiseLevels = "pipeline") -> Float[Tensor, " n_plus_1"]:
        """As for other families, but from the levels that model_index.json may hold (`sample_sigmas`) where so many
        steps are asked for; the pipeline takes those at any number of steps."""
        own = self.pipe.config.sample_sigmas
        if levels == "linear" or own is None or len(own) != steps:
            return super().sigmas(steps, size, levels)
        return pipelines.noise_levels(self.pipe.scheduler, steps, list(own), self.shift(steps, size))

    def shift(self, steps: int, size: tuple[int, int]) -> float:
        """By the number of tokens."""
        _, height, width = self.latent_shape(size)
        return pipelines.resolution_shift(self.pipe.scheduler, height * width)

    def velocity(self, x: Float[Tensor, "b c h w"], sigma: Float[Tensor, " b"], cond: Cond) -> Float[Tensor, "b c h w"]:
        """dx/dsigma, unguided."""
        time = pipelines.flux_time(self.pipe.scheduler, sigma)
        with pipelines.autocast(x, self.bfloat16):
            if LENGTHS not in cond:  # as in an estimate, on tensors without content, where values mean nothing
                number = cond["text"].shape[1] + x.shape[2] * x.shape[3]
                width = self.net.config.attention_head_dim // 2
                rotary = torch.empty(number, width, dtype=torch.complex64, device=x.device)
                return self.traceable(x, time, cond["text"], rotary)
            texts = [text[:length] for text, length in zip(cond["text"], cond[LENGTHS].tolist(), strict=True)]
            found = [self._of_sample(*one) for one in zip(x.split(1), time.split(1), texts, strict=True)]
        return torch.cat(found)

    def _of_sample(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        _, _, height, width = x.shape
        slots = torch.arange(len(text) + height * width // SLOT, device=x.device)[None] >= len(text)
        tokens = self.net(
            hidden_states=x.flatten(2).transpose(1, 2),
            encoder_hidden_states=text[None],
            timestep=time,
            img_shapes=[[(1, height, width)]],
            img_mask=slots,
            return_dict=False,
        )[0]
        return tokens[:, len(text) :].transpose(1, 2).unflatten(2, (height, width))

    def traceable(self, x: Tensor, time: Tensor, text: Tensor, rotary: Tensor) -> Tensor:
        """What the network computes of texts of one length: its own `forward` reads masks, which have no content in an
        estimate.  rotary: (tokens, width / 2) of `pos_embed`."""
        net, (_, _, height, width) = self.net, x.shape
        joint = torch.cat([net.txt_in(text), net.img_in(x.flatten(2).transpose(1, 2))], 1)
        num_text, number = text.shape[1], joint.shape[1]
        is_image = torch.arange(number, device=x.device) >= num_text
        state = net.time_text_embed(torch.cat([time, time.new_zeros(1)]).to(joint.dtype), joint)
        given = (net.modulation(state), rotary, None, is_image, None, None, None, [(0, num_text, True)], None)
        for block in net.transformer_blocks:
            recompute = net.gradient_checkpointing and torch.is_grad_enabled()
            joint = net._gradient_checkpointing_func(block, joint, *given) if recompute else block(joint, *given)
        tokens = net.proj_out(net.norm_out(joint, state, is_image))
        return tokens[:, num_text:].transpose(1, 2).unflatten(2, (height, width))

    def decode(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 height width"]:
        """Images in [0, 1], differentiable (but for the clamp): the colors of the only frame, without its opacity."""
        config = self.pipe.vae.config
        mean, std = (x.new_tensor(one).view(-1, 1, 1, 1) for one in (config.latents_mean, config.latents_std))
        return pipelines.decode(self.pipe.vae, x[:, :, None] * std + mean)[:, :3, 0]
