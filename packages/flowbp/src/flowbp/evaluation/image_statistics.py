"""Cheap statistics of images that change when a reward is exploited: darkness, color, edges, patterns."""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d, normalize

DARK, VIVID, EDGE, BINS = 0.05, 0.9, 0.1, 8


@torch.no_grad()
def image_statistics(images: Float[Tensor, "b 3 h w"], period: int = 8) -> dict[str, Float[Tensor, " b"]]:
    """One number per image by name, for images in [0, 1].

    dark: share of pixels with a luminance below 0.05.  saturated: share of pixels that are neither dark nor less
    saturated than 0.9 (HSV).  edges: share of pixels where the luminance steps by more than 0.1.  colors: entropy in
    bits of the colors in 8x8x8 bins.  grid: share of the variance in patterns that repeat every `period` pixels, in
    rows and columns, which a transformer's or an autoencoder's patches leave behind.
    """
    images = images.detach().float()
    luminance = (images * images.new_tensor((0.299, 0.587, 0.114)).view(3, 1, 1)).sum(1)
    high, low = images.amax(1), images.amin(1)
    vivid = ((high - low) > VIVID * high) & (luminance >= DARK)
    down, across = luminance.diff(dim=1)[:, :, 1:], luminance.diff(dim=2)[:, 1:, :]
    return {
        "dark": (luminance < DARK).float().mean((1, 2)),
        "saturated": vivid.float().mean((1, 2)),
        "edges": ((down.square() + across.square()).sqrt() > EDGE).float().mean((1, 2)),
        "colors": _entropy(images),
        "grid": _periodicity(luminance, period),
    }


def _entropy(images: Tensor) -> Tensor:
    levels = (images * BINS).long().clamp(0, BINS - 1)
    codes = (levels[:, 0] * BINS + levels[:, 1]) * BINS + levels[:, 2]
    counts = torch.zeros(len(images), BINS**3, device=images.device)
    counts.scatter_add_(1, codes.flatten(1), torch.ones_like(codes.flatten(1), dtype=counts.dtype))
    shares = counts / codes[0].numel()
    return -(shares * shares.clamp(min=1e-12).log2()).sum(1)


def _periodicity(luminance: Tensor, period: int) -> Tensor:
    """Variance of the mean tile over the whole variance; the mean of each tile is subtracted first.

    0 for images without a pattern of that period (1 / number of tiles for noise), 1 for a pattern that fills the image.
    """
    height, width = (side // period * period for side in luminance.shape[1:])
    if height < 2 * period or width < 2 * period:
        return luminance.new_full((len(luminance),), math.nan)
    tiles = luminance[:, :height, :width].unfold(1, period, period).unfold(2, period, period)
    tiles = tiles - tiles.mean((3, 4), keepdim=True)
    whole = tiles.square().mean((1, 2, 3, 4))
    pattern = tiles.mean((1, 2)).square().mean((1, 2))
    return torch.where(whole > 1e-8, pattern / whole.clamp(min=1e-8), 0)


def rms_distance(before: Float[Tensor, "b 3 h w"], after: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """Root mean squared difference of images in [0, 1], blurred so that noise and small shifts weigh little."""
    return _blur(after.float() - before.float()).square().flatten(1).mean(1).sqrt()


def dissimilarity(before: Float[Tensor, "b 3 h w"], after: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """1 - correlation of images that are blurred as in `rms_distance`.

    0 for the same shapes in the same places, whatever the brightness, contrast and tint of the whole; about 1 for
    images that have nothing in common.  Between two flat images it is 0, between a flat one and another 1/2.
    """
    return (_pattern(before) - _pattern(after)).square().sum(1) / 2


def _pattern(images: Tensor) -> Tensor:
    """Blurred images minus their mean color, as unit vectors; 0 for flat images."""
    coarse = _blur(images.float())
    return normalize((coarse - coarse.mean((2, 3), keepdim=True)).flatten(1), eps=1e-4)


def _blur(images: Tensor) -> Tensor:
    return avg_pool2d(images, max(1, min(4, min(images.shape[-2:]) // 4)))
