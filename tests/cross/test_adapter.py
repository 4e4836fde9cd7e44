"""What flowbp exports, interleave draws with: the two meet on disk only."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flowbp import backbones
from flowbp.backbones.loading import load_trained_weights, mark_trainable
from flowbp.config import TrainConfig
from flowbp.evaluation import sampling
from flowbp.export import export_run
from imgen_common.config import load
from imgen_common.errors import UserError
from imgen_common.images import to_pil
from imgen_common.run_folder.folder import RunFolder
from interleave.models.generators.pipeline import GenerationSettings, PipelineConfig, PipelineRunner
from interleave.protocols import GenerationRequest, HashedImage
from tests.interleave.editors import folder_of

SIZE = {"height": 32, "width": 48}
GUIDANCE = {"flux": 3.5, "flux2_dev": 4.0, "z_image": 0.0}
"""What flowbp tells a guidance-distilled model unless it is told otherwise, and no guidance of Z-Image."""


def trained(place: Path, model: Path, *sets: str) -> Path:
    """A run whose adapter is random, as if it had been trained."""
    config = load(TrainConfig, [], [f"model.ref={model}", "name=run", "lora={rank: 4, alpha: 2}", *sets])
    parameters = mark_trainable(backbones.load(str(model)).net, config)
    rng = torch.Generator().manual_seed(1)
    weights = {name: p.detach() + 0.3 * torch.randn(p.shape, generator=rng) for name, p in parameters.items()}
    with RunFolder.create(place / "run", config, ["flowbp"]) as run:
        run.save_checkpoint(1, {"weights": weights, "ema": weights, "optimizer": {}}, {})
    return place / "run"


def drawn_by_flowbp(model: Path, run: Path | None) -> np.ndarray:
    backbone = backbones.load(str(model))
    if run is not None:
        load_trained_weights(backbone, run)
    (image,) = to_pil(sampling.generate_images(backbone, "a red circle", [3], (32, 48), 3, 1.0))
    return np.asarray(image, np.int16)


def drawn_by_interleave(family: str, model: Path, lora: Path | None, weight: float = 1.0) -> np.ndarray:
    config = PipelineConfig(
        ref=str(model),
        lora=None if lora is None else str(lora),
        lora_weight=weight,
        num_inference_steps=3,
        guidance_scale=GUIDANCE.get(family, 1.0),
        **SIZE,
    )
    (picture,) = PipelineRunner(config).generate([GenerationRequest("a red circle", (), 3)])
    assert isinstance(picture, HashedImage), picture
    return np.asarray(picture.image, np.int16)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["flux2", "sd3", "flux", "z_image", "flux2_dev"])
def test_an_exported_adapter_gives_the_same_image(family: str, tmp_path: Path) -> None:
    model = folder_of(family, tmp_path)
    run = trained(tmp_path, model)
    out = export_run(run, "diffusers", tmp_path / "out")
    base, aligned = drawn_by_flowbp(model, None), drawn_by_flowbp(model, run)
    assert np.abs(aligned - base).mean() > 0.2
    assert np.abs(drawn_by_interleave(family, model, out) - aligned).max() <= 1
    assert np.abs(drawn_by_interleave(family, model, None) - base).max() <= 1
    assert np.abs(drawn_by_interleave(family, model, out, 0.0) - base).max() <= 1
    assert np.abs(drawn_by_interleave(family, model, out, 0.5) - aligned).mean() > 0.05
    merged = export_run(run, "merged", tmp_path / "merged")
    assert np.abs(drawn_by_interleave(family, merged, None) - aligned).max() <= 1


@pytest.mark.slow
def test_an_exported_adapter_says_how_it_is_drawn_and_one_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = folder_of("flux2", tmp_path)
    run = trained(tmp_path, model, "model.max_sequence_length=9", "model.height=64")
    out = export_run(run, "diffusers", tmp_path / "out")
    drawn = PipelineRunner(PipelineConfig(ref=str(model), lora=str(out), width=48)).settings
    assert drawn == GenerationSettings(max_sequence_length=9, height=64, width=48)
    other = folder_of("sd3", tmp_path)
    with pytest.raises(UserError, match="does not fit StableDiffusion3Pipeline"):
        drawn_by_interleave("sd3", other, out)
    first = (out / "pytorch_lora_weights.safetensors").rename(out / "first.safetensors")
    (out / "second.safetensors").write_bytes(first.read_bytes())
    with pytest.raises(UserError, match=r"2 safetensors files \(first.safetensors, second.safetensors\); give one of"):
        drawn_by_interleave("flux2", model, out)


T5_LAYER = "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q"


@pytest.mark.parametrize(
    ("factor", "layer", "said"),
    [
        pytest.param("lora_A", None, "has one of two factors", marks=pytest.mark.slow),
        ("lora_B", None, "has one of two factors"),
        pytest.param(
            None,
            "text_encoder.text_model.encoder.layers.7.self_attn.q_proj",
            "does not fit StableDiffusion3Pipeline",
            marks=pytest.mark.slow,
        ),
        pytest.param(None, T5_LAYER, "which has no", marks=pytest.mark.slow),  # diffusers loads it without a word
    ],
)
def test_an_adapter_that_would_be_loaded_in_part_is_refused(
    factor: str | None, layer: str | None, said: str, tmp_path: Path
) -> None:
    model = folder_of("sd3", tmp_path)
    file = export_run(trained(tmp_path, model), "diffusers", tmp_path / "out") / "pytorch_lora_weights.safetensors"
    weights = load_file(file)
    if factor is not None:
        del weights[next(name for name in weights if factor in name)]
    if layer is not None:
        weights |= {f"{layer}.lora_A.weight": torch.ones(4, 16), f"{layer}.lora_B.weight": torch.ones(16, 4)}
    save_file(weights, file)
    with pytest.raises(UserError, match=said):
        drawn_by_interleave("sd3", model, file.parent)
