"""Qwen-Image-Edit over diffusers: Qwen-Image with source images, which the text encoder sees as the network does."""

from collections.abc import Sequence

import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from flowbp.backbones.families.qwen_image import QwenImage
from flowbp.core.types import Cond
from imgen_common.errors import UserError
from imgen_common.images import shape_problem
from imgen_common.prompt_limits import VISION

SOURCE_AREA = 1024 * 1024
"""Pixels, about, to which the pipelines bring a source image."""
VISION_END = "<|vision_end|>"


class QwenImageEdit(QwenImage):
    """One source image, the same for both readers."""

    pipe: QwenImageEditPipeline | QwenImageEditPlusPipeline
    min_sources = max_sources = 1
    reads_sources = True

    @torch.no_grad()
    def encode_edit(self, instruction: str, sources: Sequence[Image.Image]) -> Cond:
        """As `encode`, of one instruction: the states of its sources, then `max_tokens` of the text."""
        pipe, limit = self.pipe, self.prompt_limits()["text_encoder"]
        shown = [pipe.image_processor.resize(one, *self._shown_size((one.height, one.width))) for one in sources]
        text = limit.template(self._announced(len(shown)) + instruction)
        given = pipe.processor(text=[text], images=shown, return_tensors="pt").to(pipe.text_encoder.device)
        # without the types of tokens, which the pipeline does not give either: positions count tokens one by one
        seen = {name: given[name] for name in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")}
        states = pipe.text_encoder(**seen, output_hidden_states=True).hidden_states[-1]
        start, is_end = pipe.prompt_template_encode_start_idx, given.input_ids[0] == self._token(VISION_END)
        stop = int(is_end.nonzero()[len(shown) - 1]) + 1 + self.max_tokens  # counted from behind the last source
        states = states[:, start:stop]
        mask = torch.arange(stop - start, device=states.device)[None] < states.shape[1]
        return {"text": nn.functional.pad(states, (0, 0, 0, mask.shape[1] - states.shape[1])), "mask": mask}

    def _token(self, text: str) -> int:
        return int(self.pipe.tokenizer.convert_tokens_to_ids(text))

    def _announced(self, count: int) -> str:
        """What stands for so many sources before the instruction."""
        return VISION * count

    def _shown_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) at which the text encoder's image processor gets a source of `size`."""
        return self.source_size(size)

    def source_text_tokens(self, size: tuple[int, int]) -> int:
        """Tokens of text that stand for a source, prepared at `size`."""
        processor, text = self.pipe.processor.image_processor, self.pipe.tokenizer(self._announced(1)).input_ids
        patches = int(processor.get_number_of_image_patches(*self._shown_size(size)))
        return patches // processor.merge_size**2 + len(text) - 1

    def source_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """As the pipeline: of about 1024 x 1024 pixels, sides multiples of 32.

        Raises UserError for one that is too long.
        """
        height, width = size
        if problem := shape_problem(width, height):  # the text encoder's image processor refuses it
            raise UserError(f"the image {problem}; cut it")
        width, height, _ = pipeline_qwenimage_edit.calculate_dimensions(SOURCE_AREA, width / height)
        return height, width

    def prepare_source(self, image: Image.Image) -> Float[Tensor, "1 3 h w"]:
        """Pixels in [-1, 1], as the pipeline prepares them."""
        size = self.source_size((image.height, image.width))
        pixels: Tensor = self.pipe.image_processor.preprocess(image, *size)
        return pixels

    @torch.no_grad()
    def encode_source(self, pixels: Float[Tensor, "1 3 h w"]) -> Float[Tensor, "c rows columns"]:
        """2x2 patches of the latents of a prepared source image, which is a video of one frame."""
        vae = self.pipe.vae
        latents = self.pipe._encode_vae_image(pixels[:, :, None].to(vae.device, vae.dtype), generator=None)
        return nn.functional.pixel_unshuffle(latents[0, :, 0], 2)


class QwenImageEditPlus(QwenImageEdit):
    """Qwen-Image-Edit-2509 and -2511: several source images, of which the text encoder sees smaller ones."""

    max_sources = 3

    def _announced(self, count: int) -> str:
        return "".join(f"Picture {number}: {VISION}" for number in range(1, count + 1))

    def _shown_size(self, size: tuple[int, int]) -> tuple[int, int]:
        plus = pipeline_qwenimage_edit_plus
        width, height = plus.calculate_dimensions(plus.CONDITION_IMAGE_SIZE, size[1] / size[0])
        return height, width
