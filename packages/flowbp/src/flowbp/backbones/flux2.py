"""FLUX.2-klein-base over diffusers: true guidance, Qwen3 text states, normalised 2x2-patched latents."""

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from flowbp.types import Cond
from imgen_common.errors import UserError


class Flux2:
    """Latents are "b c h w": c channels of normalised 2x2 patches, h and w in units of 2 x the autoencoder's factor."""

    def __init__(
        self,
        net: Flux2Transformer2DModel,
        vae: AutoencoderKLFlux2,
        text_encoder: Qwen3ForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ) -> None:
        self.net, self.vae = net, vae
        self.text_encoder, self.tokenizer, self.scheduler = text_encoder, tokenizer, scheduler
        self.channels: int = net.config.in_channels
        self.patch = 2 ** len(vae.config.block_out_channels)  # 2 x the autoencoder's factor
        self.text_layers = text_layers(text_encoder.config, net.config.joint_attention_dim)
        self.max_tokens = min(512, tokenizer.model_max_length)

    @classmethod
    def load(cls, folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> "Flux2":
        """A frozen backbone from a diffusers folder, in `dtype` (float32 by default)."""
        pipe = Flux2KleinPipeline.from_pretrained(folder, dtype=dtype or torch.float32, local_files_only=True)
        for module in (pipe.transformer, pipe.vae, pipe.text_encoder):
            module.to(device).eval().requires_grad_(False)
        return cls(pipe.transformer, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler)

    @classmethod
    def skeleton(cls, folder: Path) -> "Flux2":
        """The backbone of a diffusers folder with every weight on the meta device."""
        with torch.device("meta"):
            net = Flux2Transformer2DModel.from_config(Flux2Transformer2DModel.load_config(folder / "transformer"))
            vae = AutoencoderKLFlux2.from_config(AutoencoderKLFlux2.load_config(folder / "vae"))
            text_encoder = Qwen3ForCausalLM(Qwen3Config.from_pretrained(folder / "text_encoder"))
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        return cls(
            net, vae, text_encoder, tokenizer, FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
        )

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        """{"text": "b tokens 3*width"}: hidden states of three depths, padded to `max_tokens`."""
        text = Flux2KleinPipeline._get_qwen3_prompt_embeds(
            self.text_encoder,
            self.tokenizer,
            list(prompts),
            max_sequence_length=self.max_tokens,
            hidden_states_layers=list(self.text_layers),
        )
        return {"text": text}

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(c, h, w) for pictures of `size` (height, width) pixels.  Raises UserError where patches do not divide it."""
        if size[0] % self.patch or size[1] % self.patch or min(size) < self.patch:
            raise UserError(f"picture size {size[0]}x{size[1]}: height and width must be multiples of {self.patch}")
        return self.channels, size[0] // self.patch, size[1] // self.patch

    def noise(self, batch: int, size: tuple[int, int], rng: torch.Generator) -> Float[Tensor, "b c h w"]:
        """Standard normal float32 latents, drawn as the pipeline draws them."""
        return torch.randn(batch, *self.latent_shape(size), generator=rng, device=rng.device)

    def sigmas(self, steps: int, size: tuple[int, int]) -> Float[Tensor, " n_plus_1"]:
        """The pipeline's own noise levels: linear from 1 to 1/steps, shifted as the scheduler says, then 0."""
        _, height, width = self.latent_shape(size)
        scheduler = copy.deepcopy(self.scheduler)
        mu = compute_empirical_mu(image_seq_len=height * width, num_steps=steps)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), mu=mu)
        return scheduler.sigmas.float().cpu()

    def velocity(self, x: Float[Tensor, "b c h w"], sigma: Float[Tensor, " b"], cond: Cond) -> Float[Tensor, "b c h w"]:
        """dx/dsigma, unguided."""
        _, _, height, width = x.shape
        text = cond["text"]
        tokens = self.net(
            hidden_states=x.flatten(2).transpose(1, 2).to(text.dtype),
            timestep=sigma,
            encoder_hidden_states=text,
            txt_ids=_positions(x.device, length=text.shape[1]),
            img_ids=_positions(x.device, height=height, width=width),
            return_dict=False,
        )[0]
        return tokens.transpose(1, 2).unflatten(2, (height, width))

    def decode(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 height width"]:
        """Pictures in [0, 1], differentiable (but for the clamp)."""
        norm = self.vae.bn
        std = (norm.running_var + self.vae.config.batch_norm_eps).sqrt()
        patches = x.to(self.vae.dtype) * std.view(1, -1, 1, 1) + norm.running_mean.view(1, -1, 1, 1)
        latents = nn.functional.pixel_shuffle(patches, 2)
        return (self.vae.decode(latents, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)


def text_layers(config: Qwen3Config, joint_dim: int) -> tuple[int, ...]:
    """Which hidden states the transformer reads: evenly spaced, 9, 18, 27 of klein's 36 layers.

    Their number follows from the transformer's text width.  Raises UserError if the two models do not fit.
    """
    count, rest = divmod(joint_dim, config.hidden_size)
    if rest or not 0 < count < config.num_hidden_layers:
        raise UserError(
            f"a text encoder of {config.num_hidden_layers} layers of width {config.hidden_size} does not fit a "
            f"transformer that reads {joint_dim} numbers per token; take both from one folder"
        )
    return tuple(config.num_hidden_layers * k // (count + 1) for k in range(1, count + 1))


def _positions(device: torch.device, *, height: int = 1, width: int = 1, length: int = 1) -> Int[Tensor, "tokens 4"]:
    """Integer (time, row, column, word) of every token, row-major."""
    axes = (1, height, width, length)
    return torch.cartesian_prod(*(torch.arange(n, device=device) for n in axes)).view(-1, 4)
