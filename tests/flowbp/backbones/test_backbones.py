"""The FLUX.2 adapter against the unmodified pipeline, on the miniature and on the real model's numbers."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
from transformers import Qwen3Config

from flowbp import backbones
from flowbp.backbones.families.flux2 import Flux2, text_layers
from imgen_common import hub
from imgen_common.errors import UserError, warn_once

SIZE = (32, 32)
GOLDEN_512 = (
    *(1, 0.993686, 0.986913, 0.979629, 0.971773, 0.963276, 0.954056, 0.944016, 0.933042, 0.920998, 0.907718, 0.893002),
    *(0.876604, 0.858219, 0.837461, 0.813839, 0.786717, 0.755256, 0.718322, 0.674352, 0.621124, 0.555369, 0.472075),
    *(0.363147, 0.214596, 0),
)
"""FLUX.2-klein at 512x512 and 25 steps, as its pipeline prints them."""


@pytest.fixture(scope="module")
def backbone() -> Flux2:
    return backbones.load("builtin:shapes/generator")


@pytest.fixture(scope="module")
def pipeline() -> Flux2KleinPipeline:
    pipe = Flux2KleinPipeline.from_pretrained(hub.resolve("builtin:shapes/generator"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_noise_levels_are_the_published_ones(backbone: Flux2) -> None:
    pipe = copy.copy(backbone.pipe)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, time_shift_type="exponential"
    )
    klein = Flux2(pipe)
    klein.patch = 16
    assert klein.sigmas(25, (512, 512)).numpy() == pytest.approx(np.array(GOLDEN_512), abs=2e-6)


def test_noise_levels_equal_the_pipelines(backbone: Flux2, pipeline: Flux2KleinPipeline) -> None:
    pipeline(prompt="a red circle", height=32, width=32, num_inference_steps=7, max_sequence_length=12,
             text_encoder_out_layers=(1, 2, 3), guidance_scale=1.0, output_type="latent")  # fmt: skip
    assert torch.equal(backbone.sigmas(7, SIZE), pipeline.scheduler.sigmas)


def test_text_is_encoded_as_the_pipeline_does(backbone: Flux2, pipeline: Flux2KleinPipeline) -> None:
    prompts = ["a red circle", "", "two blue crosses"]
    expected, _ = pipeline.encode_prompt(prompts, max_sequence_length=12, text_encoder_out_layers=(1, 2, 3))
    assert torch.equal(backbone.encode(prompts)["text"], expected)


def test_decoding_equals_the_pipelines(backbone: Flux2, pipeline: Flux2KleinPipeline) -> None:
    latents = backbone.noise(2, SIZE, torch.Generator().manual_seed(3))
    by_hand = backbone.decode(latents)
    std = (pipeline.vae.bn.running_var + pipeline.vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
    plain = pipeline._unpatchify_latents(latents * std + pipeline.vae.bn.running_mean.view(1, -1, 1, 1))
    expected = pipeline.image_processor.postprocess(pipeline.vae.decode(plain).sample, output_type="pt")
    assert torch.allclose(by_hand, expected, atol=1e-6)


def test_the_cached_velocity_is_the_reforwarded_one(backbone: Flux2) -> None:
    x = backbone.noise(3, SIZE, torch.Generator().manual_seed(0))
    cond, sigma = backbone.encode(["a red circle"] * 3), torch.full((3,), 0.6)
    with torch.no_grad():
        cached = backbone.velocity(x, sigma, cond)
    assert torch.equal(cached, backbone.velocity(x.requires_grad_(), sigma, cond))
    assert cached.shape == x.shape


def test_sizes_that_do_not_fit_are_refused(backbone: Flux2) -> None:
    with pytest.raises(UserError, match="multiples of 8"):
        backbone.latent_shape((30, 32))
    assert backbone.latent_shape((32, 64)) == (32, 4, 8)


def test_text_layers_are_evenly_spaced() -> None:
    config = Qwen3Config(hidden_size=2560, num_hidden_layers=36)
    assert text_layers(config, 3 * 2560) == (9, 18, 27)
    with pytest.raises(UserError, match="does not fit"):
        text_layers(config, 1000)


def test_distilled_and_foreign_models_are_refused(pipeline: Flux2KleinPipeline, tmp_path: Path) -> None:
    pipeline.register_to_config(is_distilled=True)
    pipeline.save_pretrained(tmp_path / "distilled")
    pipeline.register_to_config(is_distilled=False)
    with pytest.raises(UserError, match=r"step-distilled, as its model_index.json says.*model.allow_distilled=true"):
        backbones.load(str(tmp_path / "distilled"))
    for name in ("Klein-Turbo", "FLUX.1-schnell", "models--org--FLUX.1-schnell/snapshots/741f7c"):
        pipeline.save_pretrained(tmp_path / name)
        with pytest.raises(UserError, match="step-distilled, as its name says"):
            backbones.load(str(tmp_path / name))
    with pytest.raises(UserError, match="not a diffusers pipeline"):
        backbones.load(str(hub.resolve("builtin:shapes/reward")))


def test_a_transformer_that_is_stored_quantized_is_refused(pipeline: Flux2KleinPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    file = tmp_path / "transformer" / "config.json"
    described = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": described}))
    with pytest.raises(UserError, match="stored quantized, and cannot be trained; give a model with plain ones"):
        backbones.load(str(tmp_path))
    with pytest.raises(UserError, match="its weights are quantized, which needs bitsandbytes; install it, or give"):
        hub.check_networks(tmp_path)


def test_a_setting_that_diffusers_does_not_know_is_said_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(hub.resolve("builtin:shapes/generator"), tmp_path / "model"))
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_rope_v2": True, "_diffusers_version": "99.0"}))
    warn_once.cache_clear()
    backbones.init_empty_weights(str(folder))
    assert "transformer/config.json: the installed diffusers" in capsys.readouterr().err
