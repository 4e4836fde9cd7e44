"""The miniature's training, every stage with tiny numbers: what it leaves, the unmodified classes load."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from scripts.miniature.world import generator, package, rewards, vae
from scripts.miniature.world.session import Schedule

pytestmark = pytest.mark.exhaustive
sample = generator.sample


def short(schedule: Schedule) -> Schedule:
    return schedule.model_copy(update={"steps": 2, "batch": 4, "save_every": 2})


def sample_quickly(*given: Any, **named: Any) -> torch.Tensor:
    return sample(*given, **named | {"steps": 2})


def test_all_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = rewards.REWARD.model_copy(update={"schedule": short(rewards.REWARD.schedule)})
    monkeypatch.setattr(vae, "SCHEDULE", short(vae.SCHEDULE))
    monkeypatch.setattr(generator, "CACHE", {"images": 1000, "edits": 1000})
    monkeypatch.setattr(rewards, "REWARD", variant)
    monkeypatch.setattr(rewards, "TUNE_SCHEDULE", short(rewards.TUNE_SCHEDULE))
    monkeypatch.setattr(rewards, "NUM_LABELED", {"tune": 120, "test": 120})
    monkeypatch.setattr(package, "NUM_EVALUATED", {"captions": 48, "edits": 12, "reconstructions": 12})
    monkeypatch.setattr(package, "WEIGHTS", tmp_path / "weights")
    for module in (generator, rewards):
        monkeypatch.setattr(module, "sample", sample_quickly)
    # two tiny untrained models agree on nothing, and the tuning needs images of both kinds
    labeled = torch.arange(120) % 2 == 0
    monkeypatch.setattr(rewards, "verify", lambda images, specs: labeled.tolist())

    vae.train_vae(tmp_path / "vae")
    for stage in (generator.BASE, generator.REFINE):
        generator.train_generator(tmp_path, stage.model_copy(update={"schedule": short(stage.schedule)}))
    rewards.train_reward(tmp_path / "reward", variant)
    rewards.train_reward(tmp_path / "heldout", variant)
    rewards.tune_reward(tmp_path)
    package.package_models(tmp_path)

    pipe = Flux2KleinPipeline.from_pretrained(tmp_path / "weights" / "generator", dtype=torch.float32)
    kwargs = {"max_sequence_length": 12, "text_encoder_out_layers": (1, 2, 3), "num_inference_steps": 2}
    edited = pipe(Image.new("RGB", (64, 64)), "remove the circle", height=32, width=32, **kwargs).images[0]
    assert edited.size == (32, 32)
    for name in ("reward", "heldout"):
        CLIPModel.from_pretrained(tmp_path / "weights" / name)
        CLIPProcessor.from_pretrained(tmp_path / "weights" / name)
        assert (tmp_path / "weights" / name / "provenance.json").exists()
