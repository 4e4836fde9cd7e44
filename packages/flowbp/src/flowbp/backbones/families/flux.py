"""FLUX.1 (dev, schnell, Kontext) over diffusers: distilled guidance as an input, T5 and CLIP text."""

from collections.abc import Sequence

import torch
from diffusers.pipelines.flux import pipeline_flux_kontext
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from flowbp.backbones import pipelines
from flowbp.backbones.source_tokens import by_layout, with_sources
from flowbp.core.types import Cond, Layout


class Flux(pipelines.PipelineBackbone):
    """Latents are "b c h w" of the autoencoder; the transformer sees 2x2 patches of them."""

    guidance_kind = "distilled"

    def pipeline_guidance(self, scale: float) -> float:
        """The distilled guidance: `scale` goes around it."""
        return self.embedded_guidance

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
        return by_layout(self.velocity_of_layout, x, sigma, cond)

    def velocity_of_layout(self, x: Tensor, sigma: Tensor, cond: Cond, layout: Layout) -> Tensor:
        """`velocity` of samples that all have sources of one layout."""
        rows, columns = x.shape[2] // 2, x.shape[3] // 2

        def of_source(k: int, rows: int, columns: int) -> Tensor:
            return pipelines.positions(x.device, 1, rows, columns) + torch.tensor([k + 1, 0, 0], device=x.device)

        tokens = nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)
        given, ids = with_sources(tokens, pipelines.positions(x.device, 1, rows, columns), cond, layout, of_source)
        text = cond["text"]
        with pipelines.autocast(x, self.bfloat16):
            tokens = self.net(
                hidden_states=given,
                timestep=pipelines.flux_time(self.pipe.scheduler, sigma),
                guidance=self.guidance_input(sigma),
                pooled_projections=cond["pooled"],
                encoder_hidden_states=text,
                txt_ids=torch.zeros(text.shape[1], 3, device=x.device, dtype=torch.int64),
                img_ids=ids,
                return_dict=False,
            )[0]
        return nn.functional.pixel_shuffle(tokens[:, : rows * columns].transpose(1, 2).unflatten(2, (rows, columns)), 2)


class FluxKontext(Flux):
    """FLUX.1-Kontext: FLUX.1-dev that also sees a source image."""

    max_sources = 1

    def has_linear_levels(self) -> bool:
        """Always: this pipeline does not ask the scheduler for a spacing of its own."""
        return True

    def source_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """As the pipeline: of the resolutions that Kontext was trained on, the one with the nearest ratio of sides."""
        ratio, multiple = size[1] / size[0], 2 * self.pipe.vae_scale_factor
        known = pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS
        _, width, height = min((abs(ratio - width / height), width, height) for width, height in known)
        return height // multiple * multiple, width // multiple * multiple

    def prepare_source(self, image: Image.Image) -> Float[Tensor, "1 3 h w"]:
        """Pixels in [-1, 1], as the pipeline prepares them."""
        processor = self.pipe.image_processor
        height, width = self.source_size(processor.get_default_height_width(image))
        pixels: Tensor = processor.preprocess(processor.resize(image, height, width), height, width)
        return pixels

    def encode_source(self, pixels: Float[Tensor, "1 3 h w"]) -> Float[Tensor, "c rows columns"]:
        """2x2 patches of the latents of a prepared source image."""
        return nn.functional.pixel_unshuffle(super().encode_source(pixels), 2)
