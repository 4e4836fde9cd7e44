"""Initial noise, one random stream per sample."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowbp.core.types import Backbone
from imgen_common.streams import normal


def initial_noise(backbone: Backbone, size: tuple[int, int], seed: int, purpose: str, indices: Sequence[int]) -> Tensor:
    """Noise (len(indices), ...): each sample from its own stream, so that batch, rank and order do not matter."""
    return torch.stack([normal(backbone.latent_shape(size), seed, purpose, i) for i in indices])
