"""FLUX.2-klein-base over diffusers: true guidance, Qwen3 text states, normalized 2x2-patched latents."""

from collections.abc import Sequence

import torch
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from flowbp.backbones import pipelines
from flowbp.backbones.source_tokens import by_layout, with_sources
from flowbp.core.prompt_limits import PromptLimit
from flowbp.core.types import Cond, Layout
from imgen_common.errors import UserError
from imgen_common.hub import text_layers
from imgen_common.images import enlarge

SOURCE_TIME = 10
"""First coordinate of the tokens of source k is SOURCE_TIME (k + 1), that of the image's own tokens 0."""
SMALLEST_SOURCE, LARGEST_SOURCE, LONGEST_SOURCE = 64, 1024 * 1024, 8
"""Sides in pixels, pixels, and ratio of sides, that the pipeline takes or makes."""


class Flux2(pipelines.PipelineBackbone):
    """Latents are "b c h w": c channels of normalized 2x2 patches, h and w in units of 2 x the autoencoder's factor."""

    max_sources = 10

    def __init__(self, pipe: Flux2KleinPipeline) -> None:
        super().__init__(pipe)
        self.patch = 2 ** len(pipe.vae.config.block_out_channels)  # 2 x the autoencoder's factor
        self.text_layers = text_layers(pipe.text_encoder.config, self.pipe.transformer.config.joint_attention_dim)
        self.max_tokens = min(self.max_tokens, pipe.tokenizer.model_max_length)

    def set_max_tokens(self, length: int) -> None:
        """Sets `max_tokens`.  Raises UserError for more than the tokenizer's limit."""
        if length > (limit := self.pipe.tokenizer.model_max_length):
            raise UserError(
                f"model.max_sequence_length {length}: the model reads at most {limit} tokens; set it to null"
            )
        self.max_tokens = length

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        """{"text": "b tokens 3*width"}: hidden states of three depths, padded to `max_tokens`."""
        given = {"max_sequence_length": self.max_tokens, "text_encoder_out_layers": self.text_layers}
        return {"text": self.pipe.encode_prompt(list(prompts), **given)[0]}

    def prompt_limits(self) -> dict[str, PromptLimit]:
        """How much of a prompt the text encoder reads beside the chat template."""

        def template(prompt: str) -> str:
            turns = [{"role": "user", "content": prompt}]
            given = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
            return str(self.pipe.tokenizer.apply_chat_template(turns, **given))

        return {"text_encoder": PromptLimit(self.pipe.tokenizer, self.max_tokens, template)}

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(c, h, w) for images of `size` (height, width) pixels.  Raises UserError where patches do not divide it."""
        return self.pipe.transformer.config.in_channels, *pipelines.grid_size(size, self.patch)

    def shift(self, steps: int, size: tuple[int, int]) -> float:
        """By the number of tokens and steps."""
        _, height, width = self.latent_shape(size)
        return compute_empirical_mu(image_seq_len=height * width, num_steps=steps)

    def velocity(self, x: Float[Tensor, "b c h w"], sigma: Float[Tensor, " b"], cond: Cond) -> Float[Tensor, "b c h w"]:
        """dx/dsigma, unguided."""
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
        std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
        patches = x.to(vae.dtype) * std.view(1, -1, 1, 1) + vae.bn.running_mean.view(1, -1, 1, 1)
        return pipelines.decode(vae, nn.functional.pixel_shuffle(patches, 2))


def _enlargement(size: tuple[int, int]) -> int:
    """By how much a source image is enlarged, so that its shorter side has `SMALLEST_SOURCE` pixels."""
    return -(-SMALLEST_SOURCE // min(size))
