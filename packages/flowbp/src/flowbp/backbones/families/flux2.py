"""FLUX.2 (klein-base, dev) over diffusers: text states of three depths, normalized 2x2-patched latents."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from flowbp.backbones import pipelines
from flowbp.backbones.preview import Flux2TinyDecoder
from flowbp.backbones.source_tokens import by_layout, with_sources
from flowbp.core.types import Cond, Layout
from imgen_common.errors import UserError
from imgen_common.images import enlarge
from imgen_common.prompt_limits import text_layers

SOURCE_TIME = 10
"""First coordinate of the tokens of source k is SOURCE_TIME (k + 1), that of the image's own tokens 0."""
SMALLEST_SOURCE, LARGEST_SOURCE, LONGEST_SOURCE = 64, 1024 * 1024, 8
"""Sides in pixels, pixels, and ratio of sides, that the pipeline takes or makes."""


class Flux2(pipelines.PipelineBackbone):
    """FLUX.2-klein-base: true guidance, Qwen3.

    Latents are "b c h w": c channels of normalized 2x2 patches, h and w in units of 2 x the autoencoder's factor.
    """

    max_sources = 10

    def __init__(self, pipe: Flux2KleinPipeline | Flux2Pipeline) -> None:
        super().__init__(pipe)
        self.patch = 2 ** len(pipe.vae.config.block_out_channels)  # 2 x the autoencoder's factor
        text = pipe.text_encoder.config.get_text_config()
        self.text_layers = text_layers(text, self.pipe.transformer.config.joint_attention_dim)
        self.max_tokens = min(self.max_tokens, self._tokenizer.model_max_length)

    @property
    def _tokenizer(self) -> Any:
        return self.pipe.tokenizer

    def set_max_tokens(self, length: int) -> None:
        """Sets `max_tokens`.  Raises UserError for more than the tokenizer's limit."""
        if length > (limit := self._tokenizer.model_max_length):
            raise UserError(
                f"model.max_sequence_length {length}: the model reads at most {limit} tokens; set it to null"
            )
        self.max_tokens = length

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        """{"text": "b tokens 3*width"}: hidden states of three depths, padded to `max_tokens`."""
        given = {"max_sequence_length": self.max_tokens, "text_encoder_out_layers": self.text_layers}
        return {"text": self.pipe.encode_prompt(list(prompts), **given)[0]}

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(c, h, w) for images of `size` (height, width) pixels.  Raises UserError where patches do not divide it."""
        return self.pipe.transformer.config.in_channels, *pipelines.grid_size(size, self.patch)

    def shift(self, steps: int, size: tuple[int, int]) -> float:
        """By the number of tokens and steps."""
        _, height, width = self.latent_shape(size)
        return compute_empirical_mu(image_seq_len=height * width, num_steps=steps)

    def velocity(self, x: Float[Tensor, "b c h w"], sigma: Float[Tensor, " b"], cond: Cond) -> Float[Tensor, "b c h w"]:
        """dx/dsigma, unguided, or at the distilled guidance."""
        return by_layout(self.velocity_of_layout, x, sigma, cond)

    def velocity_of_layout(self, x: Tensor, sigma: Tensor, cond: Cond, layout: Layout) -> Tensor:
        """`velocity` of samples that all have sources of one layout."""
        _, _, height, width = x.shape
        text = cond["text"]

        def of_source(k: int, rows: int, columns: int) -> Tensor:
            first = torch.tensor([SOURCE_TIME * (k + 1), 0, 0, 0], device=x.device)
            return pipelines.positions(x.device, 1, rows, columns, 1) + first

        ids = pipelines.positions(x.device, 1, height, width, 1)
        given, ids = with_sources(x.flatten(2).transpose(1, 2), ids, cond, layout, of_source)
        with pipelines.autocast(x, self.bfloat16):
            tokens = self.net(
                hidden_states=given,
                timestep=pipelines.flux_time(self.pipe.scheduler, sigma),
                guidance=self.guidance_input(sigma),
                encoder_hidden_states=text,
                txt_ids=pipelines.positions(x.device, 1, 1, 1, text.shape[1]),
                img_ids=ids,
                return_dict=False,
            )[0]
        return tokens[:, : height * width].transpose(1, 2).unflatten(2, (height, width))

    def source_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """As the pipeline: of at most 1024 x 1024 pixels, cut to whole patches; small ones enlarged to 64 pixels.

        Raises UserError for one that is too long.
        """
        height, width = (side * _enlargement(size) for side in size)
        if max(size) > LONGEST_SOURCE * min(size):
            raise UserError(
                f"{width}x{height} pixels: one side may be at most {LONGEST_SOURCE} times the other; cut the image"
            )
        if height * width > LARGEST_SOURCE:
            scale = (LARGEST_SOURCE / (height * width)) ** 0.5
            height, width = int(height * scale), int(width * scale)
        return height // self.patch * self.patch, width // self.patch * self.patch

    def prepare_source(self, image: Image.Image) -> Float[Tensor, "1 3 h w"]:
        """Pixels in [-1, 1], as the pipeline prepares them."""
        height, width = self.source_size((image.height, image.width))
        processor = self.pipe.image_processor
        image = processor._resize_if_exceeds_area(enlarge(image, _enlargement(image.size)), LARGEST_SOURCE)
        pixels: Tensor = processor.preprocess(image, height=height, width=width, resize_mode="crop")
        return pixels

    def decode(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 height width"]:
        """Images in [0, 1], differentiable (but for the clamp)."""
        vae = self.pipe.vae
        if isinstance(vae, Flux2TinyDecoder):  # made for normalized latents
            return pipelines.decode(vae, nn.functional.pixel_shuffle(x, 2))
        std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
        patches = x.to(vae.dtype) * std.view(1, -1, 1, 1) + vae.bn.running_mean.view(1, -1, 1, 1)
        return pipelines.decode(vae, nn.functional.pixel_shuffle(patches, 2))


class Flux2Dev(Flux2):
    """FLUX.2-dev: distilled guidance as an input, and Mistral 3, which reads a system message before the prompt."""

    embedded_guidance = 4.0
    guidance_kind = "distilled"

    def pipeline_guidance(self, scale: float) -> float:
        """The distilled guidance: `scale` goes around it."""
        return self.embedded_guidance

    @property
    def _tokenizer(self) -> Any:
        return self.pipe.tokenizer.tokenizer  # of a processor that also takes images

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        """As for klein.  The pipeline's processor reads tokens back, which those of an estimate do not have."""
        encoder, tokenizer = self.pipe.text_encoder, self._tokenizer
        turns = format_input(list(prompts), self.pipe.system_message)
        texts = self.pipe.tokenizer.apply_chat_template(turns, tokenize=False)
        has_start = tokenizer.bos_token is not None and texts[0].startswith(tokenizer.bos_token)
        given = {"padding": "max_length", "max_length": self.max_tokens, "truncation": True, "return_tensors": "pt"}
        tokens = tokenizer(texts, add_special_tokens=not has_start, **given).to(encoder.device)
        ids, mask = tokens.input_ids, tokens.attention_mask
        states = encoder(ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
        return {"text": torch.cat([states[layer] for layer in self.text_layers], -1)}


def _enlargement(size: tuple[int, int]) -> int:
    """By how much a source image is enlarged, so that its shorter side has `SMALLEST_SOURCE` pixels."""
    return -(-SMALLEST_SOURCE // min(size))
