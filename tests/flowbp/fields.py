"""Velocity fields, grids and losses the tests share."""

import math
from collections.abc import Callable

import numpy as np
import torch
from diffusers import Flux2Transformer2DModel
from torch import Tensor, nn

from flowbp.core.types import Velocity

NUM_SAMPLES, NUM_TOKENS, NUM_CHANNELS = 2, 4, 4


def tiny_flux2(seed: int = 0) -> nn.Module:
    """A random Flux2Transformer2DModel of 2.7 k parameters in float64: one double and one single block."""
    torch.manual_seed(seed)
    return Flux2Transformer2DModel(
        patch_size=1,
        in_channels=NUM_CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=1,
        joint_attention_dim=8,
        timestep_guidance_channels=8,
        axes_dims_rope=(2, 2, 2, 2),
        mlp_ratio=1.0,
        guidance_embeds=False,
    ).double()


def flux2_velocity(net: nn.Module, seed: int = 1) -> Velocity:
    """The network as a velocity over `NUM_SAMPLES` random prompts of three tokens."""
    rng = torch.Generator().manual_seed(seed)
    text = torch.randn(NUM_SAMPLES, 3, 8, dtype=torch.float64, generator=rng)
    img_ids = torch.tensor([[0, y, x, 0] for y in range(2) for x in range(2)])
    txt_ids = torch.tensor([[0, 0, 0, i] for i in range(3)])

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        copies = len(x) // NUM_SAMPLES
        return net(
            hidden_states=x,
            encoder_hidden_states=text.repeat(copies, 1, 1),
            timestep=sigma,
            img_ids=img_ids,
            txt_ids=txt_ids,
            return_dict=False,
        )[0]

    return velocity


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_sigmas(num_steps: int, rng: np.random.Generator) -> Tensor:
    """A grid with uneven steps, 1 ... 0."""
    widths = rng.uniform(0.2, 1.0, num_steps)
    return torch.tensor([*(1 - np.cumsum([0, *widths[:-1]]) / widths.sum()), 0.0], dtype=torch.float64)


def random_loss(shape: tuple[int, ...], seed: int = 2) -> Callable[[Tensor, slice], Tensor]:
    """A nonlinear loss that differs between samples."""
    direction = noise(*shape, seed=seed)

    def loss(x: Tensor, rows: slice) -> Tensor:
        return torch.tanh((x * direction[rows]).flatten(1).sum(1) / 4) + 0.1 * x.square().flatten(1).mean(1)

    return loss


def gradient(net: nn.Module) -> Tensor:
    """All parameter gradients in one vector."""
    return torch.cat([
        (torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in net.parameters() if p.requires_grad
    ])  # fmt: skip


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def linear_grid(num_steps: int) -> list[float]:
    """1 - i / N."""
    return [1 - i / num_steps for i in range(num_steps)] + [0.0]


def shifted_grid(num_steps: int, ratio: float) -> list[float]:
    """The papers' grids: linear from 1 to 1/N, sigma = ratio s / (1 + (ratio - 1) s), then 0."""
    base = [1 - i * (1 - 1 / num_steps) / (num_steps - 1) for i in range(num_steps)]
    return [ratio * s / (1 + (ratio - 1) * s) for s in base] + [0.0]


GRIDS = {
    "sd3": shifted_grid(25, 3.0),
    "flux1": shifted_grid(25, math.exp(0.63)),
    "flux2": shifted_grid(25, math.exp(1.8806157)),
}
