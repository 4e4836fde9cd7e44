"""Tiny decoders: equal to those they are made after, and refused where they do not fit."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from families import folder_of, size_of
from safetensors.torch import load_file, save_file

from flowbp import backbones
from flowbp.backbones.loading import with_decoder
from flowbp.backbones.preview import Flux2TinyDecoder, load_preview
from flowbp.core.types import Backbone
from imgen_common.errors import UserError

CPU = torch.device("cpu")


def tiny_folder(place: Path, **changed) -> Path:
    """An AutoencoderTiny for the latents of the tiny families that have an AutoencoderKL."""
    torch.manual_seed(1)
    sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (2, 1)}
    AutoencoderTiny(**{"latent_channels": 4, **sizes, **blocks, **changed}).save_pretrained(place)
    return place


def tiny_flux2(file: Path, channels: int = 4, num_blocks: tuple[int, ...] = (3, 1)) -> Flux2TinyDecoder:
    """A decoder of the layout of taef2, saved under the published names beside the encoder's weights."""
    torch.manual_seed(1)
    decoder = Flux2TinyDecoder(channels, 8, num_blocks)
    tensors = {f"decoder.{name}": value for name, value in decoder.state_dict().items()}
    save_file({**tensors, "encoder.layers.0.weight": torch.zeros(8, 3, 3, 3)}, file)
    return decoder


@pytest.fixture(scope="module")
def flux2(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return backbones.load(str(folder_of("flux2", tmp_path_factory.mktemp("flux2"))))


def latents_of(backbone: Backbone) -> torch.Tensor:
    return backbone.noise(2, size_of(backbone), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["sd3", "flux", "z_image"])
def test_latents_reach_diffusers_tiny_autoencoder_as_they_are(family: str, tmp_path: Path) -> None:
    backbone = backbones.load(str(folder_of(family, tmp_path)))
    folder = tiny_folder(tmp_path / "tiny")
    preview = with_decoder(backbone, load_preview(backbone.pipe.vae, str(folder), CPU))
    x = latents_of(backbone)
    theirs = AutoencoderTiny.from_pretrained(folder).decode(x).sample
    assert torch.equal(preview.decode(x), (theirs / 2 + 0.5).clamp(0, 1))
    assert preview.decode(x).shape == backbone.decode(x).shape
    assert (preview.decode(x) - backbone.decode(x)).abs().max() > 0.01
    assert type(backbone.pipe.vae).__name__ == "AutoencoderKL"


def test_without_pools_flux2s_decoder_is_diffusers_tiny_one_of_unpacked_latents(
    flux2: Backbone, tmp_path: Path
) -> None:
    """Pools whose last convolution is zero add nothing."""
    tiny_flux2(tmp_path / "taef2.safetensors")
    tensors = load_file(tmp_path / "taef2.safetensors")
    silent = {name: torch.zeros_like(value) if ".pool.3." in name else value for name, value in tensors.items()}
    save_file(silent, tmp_path / "silent.safetensors")
    preview = with_decoder(flux2, load_preview(flux2.pipe.vae, str(tmp_path / "silent.safetensors"), CPU))
    theirs = AutoencoderTiny.from_pretrained(tiny_folder(tmp_path / "tiny", num_decoder_blocks=(3, 1)))
    plain = {name.removeprefix("decoder."): value for name, value in silent.items() if name.startswith("decoder.")}
    theirs.decoder.load_state_dict({name: value for name, value in plain.items() if ".pool." not in name})
    x = latents_of(flux2)
    unpacked = torch.nn.functional.pixel_shuffle(x, 2)
    assert torch.equal(preview.decode(x), (theirs.decode(unpacked).sample / 2 + 0.5).clamp(0, 1))


def test_pools_see_the_whole_image(flux2: Backbone, tmp_path: Path) -> None:
    """Convolutions reach fewer than 48 rows of the latents: the first row changes the last one through a pool."""
    decoder = tiny_flux2(tmp_path / "taef2.safetensors")
    tiny = load_preview(flux2.pipe.vae, str(tmp_path / "taef2.safetensors"), CPU)
    x = torch.randn(1, 4, 48, 4, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, :, 0] += 1
    with torch.no_grad():
        assert torch.equal(tiny.decode(x)[0], decoder(x))
        assert (tiny.decode(x)[0] - tiny.decode(changed)[0])[..., -4:, :].abs().max() > 0


def test_a_folder_with_nothing_but_one_file_is_that_file(flux2: Backbone, tmp_path: Path) -> None:
    """As the hub has taef2."""
    decoder = tiny_flux2(tmp_path / "taef2.safetensors")
    tiny = load_preview(flux2.pipe.vae, str(tmp_path), CPU)
    assert all(torch.equal(value, tiny.state_dict()[name]) for name, value in decoder.state_dict().items())


def test_only_headers_are_read_on_the_meta_device(flux2: Backbone, tmp_path: Path) -> None:
    tiny_flux2(tmp_path / "taef2.safetensors")
    assert load_preview(flux2.pipe.vae, str(tmp_path), "meta").layers[0].weight.is_meta
    kl = backbones.init_empty_weights(str(folder_of("flux", tmp_path))).pipe.vae
    assert load_preview(kl, str(tiny_folder(tmp_path / "tiny")), "meta").decoder.layers[0].weight.is_meta


@pytest.mark.parametrize("family", ["krea2", "qwen_image", "qwen_image_21"])
def test_families_without_a_tiny_decoder_are_refused(family: str, tmp_path: Path) -> None:
    vae = backbones.init_empty_weights(str(folder_of(family, tmp_path))).pipe.vae
    with pytest.raises(
        UserError, match=r"model\.vae\.preview x: there is no tiny decoder .*QwenImage.*FLUX\.2 \(taef2"
    ):
        load_preview(vae, "x", "meta")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"latent_channels": 16},
            "decodes latents of 16 channels for 2 pixels a side and 3 colors; the model's .* has 4",
        ),
        ({"upsampling_scaling_factor": 4}, "4 channels for 4 pixels a side .* 4 channels for 2 pixels"),
        ({"out_channels": 4}, "and 4 colors; .* and 3 colors; give the tiny decoder that was made for"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_latents_of_another_shape_are_refused(changed: dict, message: str, device: str, tmp_path: Path) -> None:
    vae = backbones.init_empty_weights(str(folder_of("flux", tmp_path))).pipe.vae
    with pytest.raises(UserError, match=message):
        load_preview(vae.to_empty(device="cpu"), str(tiny_folder(tmp_path / "tiny", **changed)), device)


def test_files_of_another_kind_are_refused(flux2: Backbone, tmp_path: Path) -> None:
    file, vae = tmp_path / "taef2.safetensors", flux2.pipe.vae
    tiny_flux2(file, channels=32)
    with pytest.raises(UserError, match="decodes latents of 32 channels"):
        load_preview(vae, str(file), CPU)
    with pytest.raises(UserError, match=r"is a folder of another model; give taef2\.safetensors"):
        load_preview(vae, str(tiny_folder(tmp_path / "tiny")), CPU)
    tensors = load_file(file)
    odd = {
        "decoder.layers.2.pool.1.bias is missing": {k: v for k, v in tensors.items() if "2.pool.1.bias" not in k},
        r"decoder.layers.0.bias is \(9,\)": tensors | {"decoder.layers.0.bias": torch.zeros(9)},
        "decoder.layers.7.more is ": tensors | {"decoder.layers.7.more": torch.zeros(1)},
        "decoder.layers.0.weight is missing": {"1.weight": torch.zeros(8, 4, 3, 3)},
    }
    for message, content in odd.items():
        save_file(content, file)
        with pytest.raises(UserError, match=message):
            load_preview(vae, str(file), "meta")
    torch.save(tensors, tmp_path / "taef2.pth")
    with pytest.raises(UserError, match="weights are read from safetensors files"):
        load_preview(vae, str(tmp_path / "taef2.pth"), CPU)
    flux = backbones.init_empty_weights(str(folder_of("flux", tmp_path))).pipe.vae
    with pytest.raises(UserError, match="give the diffusers folder of an AutoencoderTiny"):
        load_preview(flux, str(file), CPU)
    with pytest.raises(UserError, match="is a AutoencoderKL; must be an AutoencoderTiny"):
        load_preview(flux, str(tmp_path / "flux" / "vae"), CPU)
