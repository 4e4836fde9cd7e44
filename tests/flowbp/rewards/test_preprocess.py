"""Preprocessing against PIL, torchvision and transformers' processors, on edges and odd sizes."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from PIL import Image
from tiers import tiers
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize
from transformers import AutoImageProcessor, CLIPImageProcessor

from flowbp.rewards import RewardConfig, preprocess
from imgen_common import hub
from imgen_common.errors import UserError

ROUNDING = 1.5 / 255
"""PIL rounds to 1/255 after each of two filters, whose absolute weights add up to 1.3."""
SIZES = ["33x47", "31x33", "7x61", "64x64", "83x121", "20x21", "129x86", "832x1216", "33x31", "45x46"]
NEW_SIZES = ["32x32", "17x90", "64x5", "97x41", "33x47"]


def edges(size: str, block: int = 3) -> tuple[torch.Tensor, Image.Image]:
    """Blocks of black, white and saturated colors: (1, 3, h, w) in [0, 1], and the same image."""
    height, width = map(int, size.split("x"))
    coarse = np.random.default_rng(0).integers(0, 2, (height // block + 1, width // block + 1, 3), np.uint8) * 255
    pixels = coarse.repeat(block, 0).repeat(block, 1)[:height, :width]
    return torch.from_numpy(pixels / 255).float().permute(2, 0, 1)[None], Image.fromarray(pixels)


@pytest.mark.parametrize("mode", preprocess.PIL_FILTERS)
@pytest.mark.parametrize("new", NEW_SIZES)
@pytest.mark.parametrize("size", tiers(SIZES, default=["33x47", "7x61"]))
def test_images_are_resized_as_pil_does(size: str, new: str, mode: int) -> None:
    images, pil = edges(size)
    height, width = map(int, new.split("x"))
    expected = tv.to_tensor(pil.resize((width, height), mode))
    found = preprocess.resize(images, height, width, preprocess.PIL_FILTERS[mode])[0]
    assert (found - expected).abs().max() < ROUNDING
    assert 0 <= found.min() <= found.max() <= 1


@pytest.mark.parametrize("side", [32, 33, 224])
@pytest.mark.parametrize("size", tiers(SIZES, default=["33x47", "83x121"]))
def test_the_center_is_cut_out_as_in_torchvision(size: str, side: int) -> None:
    images, pil = edges(size)
    expected = tv.to_tensor(Compose([Resize(side, InterpolationMode.BICUBIC), CenterCrop(side)])(pil))
    found = preprocess.center_crop(preprocess.resize_shorter(images, side), (side, side), round)[0]
    assert (found - expected).abs().max() < ROUNDING


@pytest.mark.exhaustive
def test_the_center_is_where_torchvision_and_transformers_have_it() -> None:
    processor = CLIPImageProcessor(do_resize=False, do_rescale=False, do_normalize=False)
    for height in range(20, 41):
        for width in range(20, 41):
            images = torch.arange(height * width).float().view(1, 1, height, width).expand(1, 3, -1, -1)
            for crop in ((32, 32), (21, 30), (40, 20)):
                assert torch.equal(preprocess.center_crop(images, crop, round), tv.center_crop(images, list(crop)))
                given = {"height": crop[0], "width": crop[1]}
                theirs = processor(images[0], crop_size=given, return_tensors="pt", input_data_format="channels_first")
                assert torch.equal(preprocess.center_crop(images, crop, int), theirs.pixel_values)


@pytest.mark.parametrize("size", tiers([*SIZES, "300x1"], default=["33x47", "129x86"]))
def test_letterboxes_are_those_of_hpsv2(size: str) -> None:
    """As open_clip's ResizeMaxSize in the package hpsv2 does it, on an image of PIL."""
    images, pil = edges(size)
    scale = 32 / max(pil.size)
    height, width = (max(1, round(n * scale)) for n in (pil.height, pil.width))
    resized = tv.resize(pil, [height, width], InterpolationMode.BICUBIC)
    rows, columns = 32 - height, 32 - width
    expected = tv.pad(resized, [columns // 2, rows // 2, columns - columns // 2, rows - rows // 2])
    assert (preprocess.letterbox(images, 32)[0] - tv.to_tensor(expected)).abs().max() < ROUNDING


PROCESSORS: dict[str, dict[str, Any]] = {
    "as published": {},
    "square": {"size": {"height": 32, "width": 32}, "do_center_crop": False},
    "stretched, then cropped": {"size": {"height": 41, "width": 36}},
    "larger, then cropped": {"size": {"shortest_edge": 37}},
    "smaller, then padded": {"size": {"shortest_edge": 27}},
    "one number": {"size": 32},
    "bilinear": {"resample": 2},
    "not resized": {"do_resize": False},
    "not normalized": {"do_normalize": False},
    "not rescaled": {"do_rescale": False},
    "rescaled otherwise": {"rescale_factor": 1 / 127.5},
    "other statistics": {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]},
}


def reward_folder(place: Path, fields: dict[str, Any]) -> Path:
    """The miniature's held-out reward with another image processor."""
    folder = Path(shutil.copytree(hub.resolve("builtin:shapes/heldout"), place / "reward"))
    published = CLIPImageProcessor.from_pretrained(folder).to_dict()
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text(json.dumps(published | fields))
    return folder


@pytest.mark.parametrize("size", tiers(["33x47", "83x121", "20x21"], default=["33x47"]))
@pytest.mark.parametrize("name", PROCESSORS)
def test_every_field_of_a_processor_is_followed(name: str, size: str, tmp_path: Path) -> None:
    folder = reward_folder(tmp_path, PROCESSORS[name])
    images, pil = edges(size)
    processor = CLIPImageProcessor.from_pretrained(folder)
    steps = preprocess.ProcessorSteps.of(processor, folder, 32)
    found, expected = steps(images), processor(pil, return_tensors="pt").pixel_values
    assert found.shape == expected.shape == (1, 3, 32, 32)
    unit = 1.0 if steps.normalization is None else min(steps.normalization[1])
    assert (found - expected).abs().max() < ROUNDING * steps.scale / unit


@pytest.mark.parametrize("kind", ["ViTImageProcessor", "SiglipImageProcessor", "CLIPImageProcessor"])
def test_what_a_processor_does_not_say_is_as_its_own_class_has_it(kind: str, tmp_path: Path) -> None:
    folder, (images, pil) = reward_folder(tmp_path, {}), edges("33x47")
    fields: dict[str, Any] = {"image_processor_type": kind, "size": {"height": 32, "width": 32}}
    if kind == "CLIPImageProcessor":
        fields["crop_size"] = {"height": 32, "width": 32}
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    steps = preprocess.ProcessorSteps.of(preprocess.load_processor(folder), folder, 32)
    expected = AutoImageProcessor.from_pretrained(folder)(pil, return_tensors="pt").pixel_values
    assert steps.normalization is not None
    assert (steps(images) - expected).abs().max() < ROUNDING / min(steps.normalization[1])


REFUSED: dict[str, dict[str, Any]] = {
    "resample 1": {"resample": 1},
    "resample 0": {"resample": 0},
    "size .*longest_edge": {"size": {"shortest_edge": 32, "longest_edge": 64}},
    "size 33.*allowed: 32x32": {"size": {"shortest_edge": 33}, "do_center_crop": False},
    "crop_size": {"crop_size": {"height": 32, "width": 30}},
    "crop_size None": {"image_processor_type": "ViTImageProcessor", "crop_size": None},
    "do_pad True": {"do_pad": True, "pad_size": {"height": 32, "width": 32}},
    "image_mean 0.5": {"image_mean": 0.5},
    "image_std": {"image_std": [0.5]},
    "image_std.*not 0": {"image_std": [0.5, 0, 0.5]},
    "image_mean .*nan": {"image_mean": [0.5, float("nan"), 0.5]},
    "image_mean .*'b'": {"image_mean": ["a", "b", "c"]},
    "CLIPImageProcessor that can be loaded": {"size": {"side": 32}},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_processor_that_is_not_reproduced_is_refused(reason: str, tmp_path: Path) -> None:
    folder = reward_folder(tmp_path, REFUSED[reason])
    with pytest.raises(UserError, match=reason):
        preprocess.ProcessorSteps.of(preprocess.load_processor(folder), folder, 32)


@pytest.mark.parametrize(
    ("kind", "is_read"),
    [
        ("CLIPImageProcessorFast", True),
        ("CLIPFeatureExtractor", True),
        ("SiglipImageProcessor", True),
        ("ViTImageProcessorFast", True),
        ("Siglip2ImageProcessor", False),
        ("ViTHybridImageProcessor", False),
        ("ConvNextImageProcessor", False),
        ("BitImageProcessor", False),
    ],
)
def test_a_processor_with_other_steps_is_refused_by_its_name(kind: str, is_read: bool, tmp_path: Path) -> None:
    folder = reward_folder(tmp_path, {"image_processor_type": kind, "crop_pct": 0.875})
    said = f"image_processor_type {kind}: is not reproduced"
    with nullcontext() if is_read else pytest.raises(UserError, match=said):
        RewardConfig(ref=str(folder)).load()


def test_a_reward_without_its_processor_is_refused(tmp_path: Path) -> None:
    folder = reward_folder(tmp_path, {})
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="no image processor that can be loaded"):
        RewardConfig(ref=str(folder)).load()


def test_gradients_pass_where_nothing_is_cut_off() -> None:
    images = edges("33x47")[0].mul(0.4).add(0.3).requires_grad_()
    preprocess.resize(images, 50, 20).sum().backward()
    assert images.grad is not None
    assert images.grad.count_nonzero() == images.grad.numel()
    assert images.grad.sum().item() == pytest.approx(3 * 50 * 20, rel=1e-3)
