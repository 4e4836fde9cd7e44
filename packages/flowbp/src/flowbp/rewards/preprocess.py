"""From images in [0, 1] to the input of a vision tower: float32, differentiable, resized as PIL resizes."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate, pad

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def resize(images: Float[Tensor, "b 3 h w"], height: int, width: int) -> Float[Tensor, "b 3 height width"]:
    """Bicubic and antialiased; the same tensor if it has that size already."""
    if images.shape[-2:] == (height, width):
        return images
    return interpolate(images, (height, width), mode="bicubic", antialias=True, align_corners=False)


def center_crop(images: Float[Tensor, "b 3 h w"], side: int, crop: tuple[int, int]) -> Float[Tensor, "b 3 c1 c2"]:
    """Resizes the shorter side to `side`, then cuts out the center of size `crop` (height, width), as CLIP does."""
    height, width = images.shape[-2:]
    short = min(height, width)
    images = resize(images, side * height // short, side * width // short)
    top, left = (images.shape[-2] - crop[0]) // 2, (images.shape[-1] - crop[1]) // 2
    return images[..., top : top + crop[0], left : left + crop[1]]


def letterbox(images: Float[Tensor, "b 3 h w"], side: int) -> Float[Tensor, "b 3 side side"]:
    """Resizes the longer side to `side`, then pads with black (an odd line at the end) to a square, as HPSv2 does."""
    height, width = images.shape[-2:]
    scale = side / max(height, width)
    images = resize(images, round(height * scale), round(width * scale))
    rows, columns = side - images.shape[-2], side - images.shape[-1]
    return pad(images, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


def normalize_channels(
    images: Float[Tensor, "b 3 h w"], mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> Float[Tensor, "b 3 h w"]:
    """(x - mean) / std for each channel."""
    return (images - images.new_tensor(mean).view(3, 1, 1)) / images.new_tensor(std).view(3, 1, 1)
