"""Tiny decoders, which show in little time about what the autoencoder would; never for the reward of a training."""

import math
import re
from collections.abc import Mapping
from itertools import groupby
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny
from diffusers.models.autoencoders.vae import DecoderTiny
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from safetensors import safe_open
from torch import Tensor, nn

from imgen_common import hub
from imgen_common.errors import UserError
from imgen_common.weights import check_numbers, load_whole, loading, read_json

KEY = "model.vae.preview"
FAMILIES = "Stable Diffusion 3 (taesd3), FLUX.1 and Z-Image (taef1), FLUX.2 (taef2)"
"""What has a tiny decoder that is loaded here, and its published name."""
PREFIX = "decoder.layers."
"""How the names of a decoder's weights begin in the published file of FLUX.2's tiny autoencoder."""
NUM_GROUPS = 4
"""Of the group norm in `pool`."""


class PooledBlock(AutoencoderTinyBlock):
    """f(x + pool(x)), f being diffusers' tiny block: pool normalizes by statistics of the whole image."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, "relu")
        wide = 4 * channels
        self.pool = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False),
            nn.GroupNorm(NUM_GROUPS, wide),
            nn.ReLU(),
            nn.Conv2d(wide, channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return super().forward(x + self.pool(x))


class Flux2TinyDecoder(DecoderTiny):
    """FLUX.2's tiny decoder (taef2 of madebyollin/taesd): diffusers' layers, the first blocks being pooled ones.

    It decodes the latents that the transformer sees, 2x2 patches made pixels, with no statistics undone.
    """

    def __init__(self, channels: int, width: int, num_blocks: tuple[int, ...]) -> None:
        super().__init__(channels, 3, num_blocks, (width,) * len(num_blocks), 2, "relu", "nearest")
        for i in range(num_blocks[0]):
            self.layers[2 + i] = PooledBlock(width)  # after a convolution and its activation

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return next(self.parameters()).dtype

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """As an autoencoder of diffusers: images "b 3 h w" in [-1, 1] of "b c h w"."""
        return (self(latents),)


def load_preview(vae: Any, ref: str, device: torch.device | str) -> nn.Module:
    """The tiny decoder that `ref` names, frozen, in the precision of `vae`, the autoencoder whose latents it decodes.

    On the device "meta" only headers of its files are read.
    Raises UserError for an autoencoder without one, files of another kind, and latents of another shape.
    """
    if isinstance(vae, AutoencoderKLFlux2):
        tiny: Any = _read_flux2(ref, device)
    elif isinstance(vae, AutoencoderKL):
        tiny = _read_autoencoder_tiny(ref, device)
    else:
        raise UserError(
            f"{KEY} {ref}: there is no tiny decoder for the latents of {type(vae).__name__}; those of {FAMILIES} have "
            "one; set it to null"
        )
    layers: Any = (tiny.decoder if isinstance(tiny, AutoencoderTiny) else tiny).layers
    scales: list[Any] = [one.scale_factor for one in layers if isinstance(one, nn.Upsample)]
    found = layers[0].in_channels, int(math.prod(scales)), layers[-1].out_channels
    wanted = vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1), 3
    if found != wanted:
        said = ("{} channels for {} pixels a side and {} colors".format(*one) for one in (found, wanted))
        raise UserError(
            f"{KEY} {ref}: decodes latents of {next(said)}; the model's autoencoder has {next(said)}; give the tiny "
            f"decoder that was made for this model: {FAMILIES}"
        )
    return tiny.to(device=device, dtype=vae.dtype).eval().requires_grad_(False)


def _read_autoencoder_tiny(ref: str, device: torch.device | str) -> AutoencoderTiny:
    folder = hub.resolve(ref, single_file=True)
    if not folder.is_dir():
        raise UserError(f"{KEY} {ref}: is a single file; give the diffusers folder of an AutoencoderTiny")
    kind = read_json(folder / "config.json", folder).get("_class_name") if (folder / "config.json").exists() else None
    if kind != "AutoencoderTiny":
        raise UserError(f"{KEY} {ref}: is a {kind or 'folder without config.json'}; must be an AutoencoderTiny")
    with loading(f"{KEY} {ref}: cannot be loaded"):
        given = {"device_map": "meta"} if str(device) == "meta" else {}
        return load_whole(AutoencoderTiny, folder, **given)


def _read_flux2(ref: str, device: torch.device | str) -> Flux2TinyDecoder:
    file = hub.resolve(ref, single_file=True)
    if file.is_dir():
        raise UserError(f"{KEY} {ref}: is a folder of another model; give taef2.safetensors, as it is published")
    check_numbers(file, {})
    with safe_open(file, "pt") as opened:
        names = {name.removeprefix(PREFIX): name for name in opened.keys() if name.startswith(PREFIX)}  # noqa: SIM118
        shapes = {short: tuple(opened.get_slice(name).get_shape()) for short, name in names.items()}
        decoder = _layout_of(shapes)
        wanted = {name: tuple(p.shape) for name, p in decoder.layers.named_parameters()} if decoder else {}
        if decoder is None or wanted != shapes:
            other = min((name for name, _ in wanted.items() ^ shapes.items()), default="0.weight")
            raise UserError(
                f"{KEY} {ref}: is not the tiny decoder of FLUX.2: {PREFIX}{other} is {shapes.get(other, 'missing')}; "
                "give taef2.safetensors, as it is published"
            )
        if str(device) != "meta":
            tensors = {short: opened.get_tensor(name) for short, name in names.items()}
            decoder.layers.load_state_dict(tensors, assign=True)
    return decoder


def _layout_of(shapes: Mapping[str, tuple[int, ...]]) -> Flux2TinyDecoder | None:
    """The decoder, on the meta device, that weights of these names look like: runs of blocks between convolutions."""
    matches = [match for name in shapes if (match := re.match(r"(\d+)\.(conv\.0)?", name))]
    is_block = {int(match[1]): False for match in matches} | {int(match[1]): True for match in matches if match[2]}
    runs = groupby(is_block[i] for i in sorted(is_block))
    num_blocks = tuple(len([*run]) for block, run in runs if block)
    first = shapes.get("0.weight", ())
    if len(first) != 4 or not num_blocks:
        return None
    with torch.device("meta"):
        return Flux2TinyDecoder(channels=first[1], width=first[0], num_blocks=num_blocks)
