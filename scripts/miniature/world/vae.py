"""The miniature's `AutoencoderKLFlux2`: 32x32 pixels to 8 channels of 8x8, that is 4x4 tokens of 32 numbers."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2
from torch import Tensor

from imgen_common.shapes.render import draw
from imgen_common.shapes.scene import sample_spec
from imgen_common.shapes.verify import accuracy, verify
from imgen_common.streams import numpy_generator, torch_generator
from scripts.miniature.world.session import Schedule, Session

SCHEDULE = Schedule(steps=2500, batch=32, lr=2e-3, constant=0.4, betas=(0.9, 0.99), weight_decay=1e-4)
KL_WEIGHT = 1e-3
FOREGROUND = 3.0
"""Extra loss weight of colored pixels, which decide the verdict and cover a tenth of the image."""


def build_vae() -> AutoencoderKLFlux2:
    """A fresh autoencoder."""
    return AutoencoderKLFlux2(
        block_out_channels=(16, 32, 32),
        decoder_block_out_channels=(24, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=8,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def render_images(count: int, seed: int, purpose: str, step: int) -> tuple[Tensor, list]:
    """Rendered training images (count, 3, 32, 32) in [0, 1] and their specs."""
    rng = numpy_generator(seed, purpose, step)
    specs = [sample_spec(rng) for _ in range(count)]
    return torch.from_numpy(draw(specs, rng)), specs


@torch.no_grad()
def reconstruct(vae: AutoencoderKLFlux2, images: Tensor) -> Tensor:
    """Decoded posterior modes, in [0, 1]."""
    parts = [vae.decode(vae.encode(x * 2 - 1).latent_dist.mode()).sample for x in images.split(64)]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def set_batch_norm(vae: AutoencoderKLFlux2, images: Tensor) -> None:
    """Sets the latent normalization (mean and variance of each patch channel) from images."""
    latents = torch.cat([vae.encode(x * 2 - 1).latent_dist.mode() for x in images.split(64)])
    b, c, h, w = latents.shape
    patches = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, c * 4, -1)
    vae.bn.running_mean.copy_(patches.mean((0, 2)))
    vae.bn.running_var.copy_(patches.var((0, 2)))


def train_vae(folder: Path, device: str = "cpu", seed: int = 0) -> None:
    """Trains (or resumes) in `folder` and leaves a diffusers folder in `folder/vae`."""
    torch.manual_seed(seed)
    vae = build_vae().to(device, memory_format=torch.channels_last)
    session = Session(folder, {"vae": vae}, SCHEDULE)
    held_out, specs = render_images(600, seed, "vae-validation", 0)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        images, _ = render_images(SCHEDULE.batch, seed, "vae", step)
        images = images.to(device, memory_format=torch.channels_last)
        posterior = vae.encode(images * 2 - 1).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=torch_generator(seed, "vae-noise", step))
        latents = posterior.mean + posterior.std * noise.to(device)
        error = vae.decode(latents).sample - (images * 2 - 1)
        weight = 1 + FOREGROUND * ((images.amax(1, keepdim=True) - images.amin(1, keepdim=True)) > 0.2)
        reconstruction = (weight * (error.abs() + error.square())).mean()
        divergence = posterior.kl().mean() / latents[0].numel()
        return reconstruction + KL_WEIGHT * divergence, {"l1": error.abs().mean().item(), "kl": divergence.item()}

    def evaluate() -> dict[str, float]:
        images = reconstruct(vae, held_out.to(device)).cpu()
        scores = accuracy(verify(images, specs), specs)
        return {f"verifier/{k}": v for k, v in scores.items()} | {"mse": (images - held_out).square().mean().item()}

    session.run(loss, evaluate)
    session.swap_average()
    set_batch_norm(vae, render_images(4096, seed, "vae-batch-norm", 0)[0].to(device))
    vae.save_pretrained(folder / "vae")
