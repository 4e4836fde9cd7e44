"""From images in [0, 1] to the input of a vision tower: float32, differentiable, resized as PIL resizes."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import interpolate, pad
from transformers import CLIPImageProcessor, Qwen2VLImageProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from flowbp.rewards.loading import load_part
from imgen_common.errors import UserError
from imgen_common.weights import loading

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
Filter = Literal["bilinear", "bicubic"]
PIL_FILTERS: Mapping[int, Filter] = {2: "bilinear", 3: "bicubic"}
"""Filters by their numbers in PIL, which a preprocessor_config.json gives; torch has no antialiased others."""
CLIP_LIKE = re.compile("(CLIP|Siglip|ViT)(ImageProcessor|FeatureExtractor)(Fast|Pil)?")
"""Names of the image processors that resize, crop and normalize as CLIP's does; each class has its own defaults."""
QWEN_FIELDS = {
    "do_resize": True,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
}
"""Fields of Qwen's image processor that `extract_patches` does not read, with the values for which it is the same."""


def resize(
    images: Float[Tensor, "b 3 h w"], height: int, width: int, mode: Filter = "bicubic"
) -> Float[Tensor, "b 3 height width"]:
    """Antialiased; the same tensor if it has that size already.

    As in PIL, and in torchvision and transformers on images of PIL, values that the filter overshoots are cut off:
    those of the horizontal filter before the vertical one.
    """
    for size in ((images.shape[-2], width), (height, width)):
        if images.shape[-2:] != size:
            # torch resizes the height of a single column wrongly: it gets a second one
            given, shown = (images.expand(-1, -1, -1, 2), 2) if images.shape[-1] == width == 1 else (images, size[1])
            given = interpolate(given, (size[0], shown), mode=mode, antialias=True, align_corners=False)
            images = given[..., : size[1]].clamp(0, 1)
    return images


def resize_shorter(images: Float[Tensor, "b 3 h w"], side: int, mode: Filter = "bicubic") -> Float[Tensor, "b 3 h2 w2"]:
    """Resizes the shorter side to `side`, and the longer one in proportion, rounded down."""
    height, width = images.shape[-2:]
    short = min(height, width)
    return resize(images, side * height // short, side * width // short, mode)


def center_crop(
    images: Float[Tensor, "b 3 h w"], crop: tuple[int, int], rounding: Callable[[float], int]
) -> Float[Tensor, "b 3 c1 c2"]:
    """Cuts out the center of size `crop` (height, width); a smaller image is padded with black first.

    rounding: of the first line and column, which may be halves: `int` in transformers, `round` in torchvision.
    """
    rows, columns = (max(0, want - have) for want, have in zip(crop, images.shape[-2:], strict=True))
    if rows or columns:
        images = pad(images, (columns // 2, (columns + 1) // 2, rows // 2, (rows + 1) // 2))
    top, left = (rounding((have - want) / 2) for want, have in zip(crop, images.shape[-2:], strict=True))
    return images[..., top : top + crop[0], left : left + crop[1]]


def letterbox(images: Float[Tensor, "b 3 h w"], side: int) -> Float[Tensor, "b 3 side side"]:
    """Resizes the longer side to `side`, then pads with black (an odd line at the end) to a square, as HPSv2 does."""
    height, width = images.shape[-2:]
    scale = side / max(height, width)
    images = resize(images, max(1, round(height * scale)), max(1, round(width * scale)))
    rows, columns = side - images.shape[-2], side - images.shape[-1]
    return pad(images, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


def normalize_channels(
    images: Float[Tensor, "b 3 h w"], mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> Float[Tensor, "b 3 h w"]:
    """(x - mean) / std for each channel."""
    return (images - images.new_tensor(mean).view(3, 1, 1)) / images.new_tensor(std).view(3, 1, 1)


def extract_patches(
    images: Float[Tensor, "b 3 h w"], processor: Qwen2VLImageProcessor
) -> tuple[Float[Tensor, "patches values"], Int[Tensor, "b 3"]]:
    """Input of the vision tower of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, and (1, rows, columns) of each image's patches.

    These are the steps of the image processor, from which they differ on uint8 images by the rounding of what is
    resized to 1/255 only.
    """
    height, width = smart_resize(
        *images.shape[-2:],
        factor=processor.patch_size * processor.merge_size,
        min_pixels=processor.size["shortest_edge"],
        max_pixels=processor.size["longest_edge"],
    )
    pixels = normalize_channels(resize(images, height, width), processor.image_mean, processor.image_std)
    patches, rows, columns = processor.patchify(
        pixels, processor.patch_size, processor.merge_size, processor.temporal_patch_size
    )
    grid = torch.tensor([[1, rows, columns]], device=images.device).expand(len(images), 3)
    return patches.flatten(0, 1), grid


@dataclass(frozen=True)
class ProcessorSteps:
    """What an image processor of transformers does, step by step, differentiable; on uint8 images only its rounding to
    1/255 is missing.

    size: the shorter side, or (height, width), or None for no resizing.  crop: None for no cropping.
    scale: of values in [0, 1].  normalization: mean and standard deviation, or None.
    """

    size: int | tuple[int, int] | None
    mode: Filter
    crop: tuple[int, int] | None
    scale: float
    normalization: tuple[tuple[float, ...], tuple[float, ...]] | None

    @classmethod
    def of(cls, processor: Any, where: Path, side: int) -> "ProcessorSteps":
        """The steps of a processor that `load_processor` gave, for a model that reads images of `side` x `side` pixels.

        Raises UserError, which names the field of its configuration, for what is not reproduced or does not fit.
        """
        size, mode = _size(processor, where), PIL_FILTERS.get(processor.resample)
        if processor.do_center_crop and processor.crop_size is None:
            raise _refused(where, "crop_size", None, f"{side}x{side}, which the model reads")
        crop = (processor.crop_size.height, processor.crop_size.width) if processor.do_center_crop else None
        if mode is None and size is not None:
            raise _refused(where, "resample", processor.resample, "2 (bilinear) or 3 (bicubic)")
        if processor.do_pad:
            raise _refused(where, "do_pad", True, "false")
        if (crop or size) != (side, side):
            field = "crop_size" if crop else "size"
            raise _refused(where, field, crop or size, f"{side}x{side}, which the model reads")
        for field in ("image_mean", "image_std"):
            given, allowed = getattr(processor, field), "three numbers" + ", not 0" * (field == "image_std")
            is_shaped = np.shape(given) == (3,) and all(isinstance(value, int | float) for value in given)
            if processor.do_normalize and not (
                is_shaped and np.isfinite(given).all() and (field == "image_mean" or all(given))
            ):
                raise _refused(where, field, given, allowed)
        scale = 255 * processor.rescale_factor if processor.do_rescale else 255.0
        normalization = (tuple(processor.image_mean), tuple(processor.image_std)) if processor.do_normalize else None
        return cls(size, mode or "bicubic", crop, scale, normalization)

    def __call__(self, images: Float[Tensor, "b 3 h w"], rounding: Callable[[float], int] = int) -> Tensor:
        """Images of (b, 3, side, side).  rounding: see `center_crop`."""
        if isinstance(self.size, int):
            images = resize_shorter(images, self.size, self.mode)
        elif self.size is not None:
            images = resize(images, *self.size, self.mode)
        if self.crop is not None:
            images = center_crop(images, self.crop, rounding)
        if self.scale != 1:
            images = images * self.scale
        return images if self.normalization is None else normalize_channels(images, *self.normalization)


def _size(processor: Any, where: Path) -> int | tuple[int, int] | None:
    """What a processor resizes images to."""
    if not processor.do_resize:
        return None
    size = {name: value for name, value in dict(processor.size).items() if value is not None}
    if size.keys() == {"shortest_edge"}:
        return int(size["shortest_edge"])
    if size.keys() == {"height", "width"}:
        return int(size["height"]), int(size["width"])
    raise _refused(where, "size", size, "{shortest_edge} or {height, width}")


def require_fields(processor: Any, where: Path, expected: Mapping[str, object]) -> None:
    """Raises UserError, which names the field, unless a processor's fields have the values that are reproduced."""
    for field, value in expected.items():
        found = getattr(processor, field)
        if found != value:
            raise _refused(where, field, found, str(value))


def load_processor(folder: Path) -> Any:
    """The image processor of a folder, of the class that its configuration names; CLIP's where it names none.

    Raises UserError where it cannot be loaded, and for a class with other steps than CLIP's.
    """
    with loading(f"{folder}: has no image processor that can be loaded"):
        fields, _ = CLIPImageProcessor.get_image_processor_dict(folder)
    kind = fields.get("image_processor_type") or fields.get("feature_extractor_type") or CLIPImageProcessor.__name__
    known = CLIP_LIKE.fullmatch(str(kind))
    if known is None:
        raise _refused(folder, "image_processor_type", kind, "those of CLIP, Siglip and ViT")
    return load_part(getattr(transformers, f"{known[1]}ImageProcessor"), folder)


def _refused(where: Path, field: str, found: object, allowed: str) -> UserError:
    return UserError(f"{where}: image processor, {field} {found}: is not reproduced; allowed: {allowed}")
