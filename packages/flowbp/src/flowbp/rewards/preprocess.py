"""From pictures in [0, 1] to what a picture tower sees: float32, with gradient, resized as PIL resizes."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate, pad

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def resize(images: Float[Tensor, "b 3 h w"], height: int, width: int) -> Float[Tensor, "b 3 height width"]:
    """Bicubic and antialiased; the very tensor where nothing changes."""
    if images.shape[-2:] == (height, width):
        return images
    return interpolate(images, (height, width), mode="bicubic", antialias=True, align_corners=False)


def crop_square(images: Float[Tensor, "b 3 h w"], side: int, crop: tuple[int, int]) -> Float[Tensor, "b 3 c1 c2"]:
    """The shorter side made `side`, then the centre of `crop` (height, width): CLIP's way."""
    height, width = images.shape[-2:]
    short = min(height, width)
    images = resize(images, side * height // short, side * width // short)
    top, left = (images.shape[-2] - crop[0]) // 2, (images.shape[-1] - crop[1]) // 2
    return images[..., top : top + crop[0], left : left + crop[1]]


def letterbox(images: Float[Tensor, "b 3 h w"], side: int) -> Float[Tensor, "b 3 side side"]:
    """The longer side made `side`, then black borders, the odd line below or on the right: HPSv2's way."""
    height, width = images.shape[-2:]
    scale = side / max(height, width)
    images = resize(images, round(height * scale), round(width * scale))
    rows, columns = side - images.shape[-2], side - images.shape[-1]
    return pad(images, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


def normalise(
    images: Float[Tensor, "b 3 h w"], mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> Float[Tensor, "b 3 h w"]:
    """(x - mean) / std by channel."""
    return (images - images.new_tensor(mean).view(3, 1, 1)) / images.new_tensor(std).view(3, 1, 1)
