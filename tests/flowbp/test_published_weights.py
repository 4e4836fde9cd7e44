"""Published weights, where they are on disk: the aesthetic head and the tiny decoder of FLUX.2.

IMGEN_PUBLISHED_WEIGHTS names a folder with some of these files; a test whose file is missing is skipped:

    sac+logos+ava1-l14-linearMSE.pth      of christophschuhmann/improved-aesthetic-predictor
    taef2_decoder.pth, taef2_encoder.pth  of madebyollin/taesd
    *.jpg, *.jpeg, *.png                  more images to encode and decode, if there are any

`pytest -rP` shows what was measured.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2
from diffusers.models.autoencoders.vae import EncoderTiny
from families import folder_of
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from flowbp import backbones
from flowbp.backbones.loading import with_decoder
from flowbp.backbones.preview import PooledBlock, load_preview
from flowbp.rewards import RewardConfig
from flowbp.rewards.convert import convert_checkpoint
from imgen_common import hub
from imgen_common.images import from_pil

VARIABLE = "IMGEN_PUBLISHED_WEIGHTS"
HEAD = "sac+logos+ava1-l14-linearMSE.pth"
WIDTH = 768
"""Of the image features of CLIP ViT-L/14, which the head reads."""
MIN_PSNR = 25.0


def published(name: str) -> Path:
    """A file of the folder; the test is skipped where there is none."""
    folder = os.environ.get(VARIABLE)
    if folder is None:
        pytest.skip(f"{VARIABLE} is not set; it names a folder with {name}")
    file = Path(folder) / name
    if not file.is_file():
        pytest.skip(f"{VARIABLE}: has no {name}")
    return file


def tensors_of(name: str) -> dict[str, Tensor]:
    """The tensors of a published pickle, by torch's restricted unpickler; flowbp itself reads none of the decoder."""
    return {key: value.float() for key, value in torch.load(published(name), "cpu", weights_only=True).items()}


def drawn(side: int = 512) -> Image.Image:
    """A picture like a simple photograph: a sky, hills, a sun, windows, words."""
    large = Image.new("RGB", (2 * side, 2 * side))
    rows = np.linspace(0, 1, 2 * side)[:, None, None]
    sky = (1 - rows) * np.array([70, 120, 210]) + rows * np.array([240, 200, 160])
    large.paste(Image.fromarray(np.broadcast_to(sky, (2 * side, 2 * side, 3)).astype(np.uint8)))
    pen = ImageDraw.Draw(large)
    pen.ellipse((700, 120, 880, 300), fill=(255, 240, 190))
    for x, y, color in ((-200, 600, (60, 90, 70)), (400, 680, (45, 75, 50)), (100, 800, (90, 110, 60))):
        pen.ellipse((x, y, x + 900, y + 900), fill=color)
    pen.rectangle((300, 480, 480, 780), fill=(170, 70, 50))
    for x in range(320, 460, 50):
        for y in range(500, 740, 60):
            pen.rectangle((x, y, x + 25, y + 35), fill=(250, 230, 140), outline=(40, 30, 30), width=3)
    pen.text((60, 60), "a house below a hill", fill=(255, 255, 255), font_size=56)
    return large.resize((side, side), Image.Resampling.LANCZOS)


def images() -> dict[str, Tensor]:
    """Images (1, 3, h, w) in [0, 1] whose sides are multiples of 16, by name."""
    found = {"the drawing": drawn()}
    folder = Path(os.environ.get(VARIABLE, ""))
    for file in sorted(path for end in ("jpg", "jpeg", "png") for path in folder.glob(f"[!.]*.{end}")):
        image = Image.open(file).convert("RGB")
        found[file.name] = image.crop((0, 0, image.width // 16 * 16, image.height // 16 * 16))
    return {name: from_pil([image]) for name, image in found.items()}


def tiny_encoder() -> EncoderTiny:
    """The encoder of taef2: diffusers' layers, the blocks at the lowest resolution being pooled ones."""
    encoder = EncoderTiny(3, 32, (1, 3, 3, 3), (64,) * 4, "relu")
    for i in (11, 12, 13):
        encoder.layers[i] = PooledBlock(64)
    encoder.layers.load_state_dict(tensors_of("taef2_encoder.pth"))
    return encoder.eval()


def taef2(place: Path) -> Path:
    """The decoder as its author publishes it on the hub: without the clamp, which the pickle counts as a layer."""
    named = {}
    for key, value in tensors_of("taef2_decoder.pth").items():
        layer, _, rest = key.partition(".")
        named[f"decoder.layers.{int(layer) - 1}.{rest}"] = value
    save_file(named, place / "taef2.safetensors")
    return place / "taef2.safetensors"


def psnr(a: Tensor, b: Tensor) -> float:
    return float(-10 * (a - b).square().mean().log10())


@torch.no_grad()
def test_flux2s_tiny_decoder_gives_back_what_its_encoder_saw(tmp_path: Path) -> None:
    encoder, file = tiny_encoder(), taef2(tmp_path)
    with torch.device("meta"):
        vae = AutoencoderKLFlux2()  # the sizes of the published one
    backbone = backbones.load(str(folder_of("flux2", tmp_path)))
    preview = with_decoder(backbone, load_preview(vae, str(file), "cpu"))
    for name, image in images().items():
        latents = encoder(2 * image - 1)
        packed = nn.functional.pixel_unshuffle(latents, 2)  # as the transformer sees them
        quality = psnr(preview.decode(packed), image)
        print(f"{name}: {quality:.1f} dB; latents {packed.mean():.2f} mean, {packed.std():.2f} standard deviation")
        assert quality > MIN_PSNR
        # other statistics than those of normalized latents would be seen
        assert psnr(preview.decode(packed * 2), image) < quality - 5
        assert psnr(preview.decode(packed + 1), image) < quality - 5


def wide_clip(place: Path) -> Path:
    """The miniature's CLIP with random weights and features as wide as the head reads them."""
    source = hub.resolve("builtin:shapes/reward")
    shutil.copytree(source, place, ignore=shutil.ignore_patterns("*.safetensors"))
    settings: Any = CLIPConfig.from_pretrained(source)
    settings.projection_dim = settings.vision_config.projection_dim = settings.text_config.projection_dim = WIDTH
    torch.manual_seed(0)
    CLIPModel(settings).save_pretrained(place)
    return place


def test_the_published_aesthetic_head_scores_as_the_product_of_its_matrices(tmp_path: Path) -> None:
    """It has no activations: score = w.e + b with unit features e.  The weights of CLIP are random here."""
    file = published(HEAD)
    folder = convert_checkpoint("aesthetic", file, str(wide_clip(tmp_path / "clip")), tmp_path / "aesthetic")
    reward = RewardConfig(score="aesthetic", ref=str(folder)).load()
    given = torch.rand(4, 3, 40, 56, generator=torch.Generator().manual_seed(0)).requires_grad_()
    features = reward.clip.image_features(given)
    assert features.shape == (4, WIDTH)
    value = features.detach().double().T
    tensors = tensors_of(HEAD)
    for layer in (0, 2, 4, 6, 7):
        value = tensors[f"layers.{layer}.weight"].double() @ value + tensors[f"layers.{layer}.bias"].double()[:, None]
    scores = reward(given, [""] * 4)
    print(f"scores {', '.join(f'{score:.3f}' for score in scores.tolist())}")
    assert scores.tolist() == pytest.approx(value[0].tolist(), abs=1e-4)
    random = nn.functional.normalize(torch.randn(4000, WIDTH, generator=torch.Generator().manual_seed(0)), dim=-1)
    spread = reward.head(random)[:, 0]
    print(f"of random features: {spread.mean():.3f} mean, {spread.std():.3f} standard deviation")
    scores.sum().backward()
    assert given.grad is not None
    assert given.grad.abs().max() > 0
