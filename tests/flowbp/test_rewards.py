"""The CLIP reward: its preprocessing, its scale and its gradient."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor

from flowbp.rewards import RewardConfig
from flowbp.rewards.clip import ClipReward
from imgen_common import hub
from imgen_common.errors import UserError

REF = "builtin:shapes/heldout"
PROMPTS = ["a red circle", "two blue crosses"]


@pytest.fixture(scope="module")
def reward() -> ClipReward:
    return RewardConfig(ref=REF).load()


def pictures(height: int, width: int) -> torch.Tensor:
    smooth = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(smooth, (height, width), mode="bicubic", align_corners=True).clamp(0, 1)


def test_scores_are_the_models_own(reward: ClipReward) -> None:
    images = (pictures(32, 32) * 255).round() / 255
    folder = hub.resolve(REF)
    model, processor = CLIPModel.from_pretrained(folder).float(), CLIPProcessor.from_pretrained(folder)
    pil = [Image.fromarray((x * 255).byte().permute(1, 2, 0).numpy()) for x in images]
    batch = processor(text=PROMPTS, images=pil, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = model(**batch).logits_per_image.diagonal()
        assert torch.allclose(reward(images, PROMPTS), expected, atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 96), (128, 64), (32, 40)])
def test_preprocessing_follows_the_processor(reward: ClipReward, height: int, width: int) -> None:
    images = pictures(height, width)
    processor = CLIPImageProcessor.from_pretrained(hub.resolve(REF))
    pil = [Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy()) for x in images]
    expected = torch.as_tensor(np.stack(processor(pil).pixel_values))
    ours = reward.preprocess(images)
    assert ours.shape == expected.shape
    # the processor rounds to 1/255 twice, and 1/255 is 0.015 after normalisation
    assert (ours - expected).abs().max() < 0.04


def test_the_gradient_is_the_slope(reward: ClipReward) -> None:
    double = ClipReward(reward.model.double(), CLIPImageProcessor.from_pretrained(hub.resolve(REF)), reward.tokenizer)
    images = pictures(48, 48).double().requires_grad_()
    (gradient,) = torch.autograd.grad(double(images, PROMPTS).sum(), images)
    direction = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    step = 1e-6 * direction
    with torch.no_grad():
        slope = (double(images + step, PROMPTS) - double(images - step, PROMPTS)).sum() / 2e-6
    reward.model.float()
    assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-4)


def test_other_models_are_refused() -> None:
    with pytest.raises(UserError, match="allowed: clip"):
        RewardConfig(ref=str(hub.resolve("builtin:shapes/generator") / "text_encoder")).load()
