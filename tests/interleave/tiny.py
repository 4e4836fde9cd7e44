"""A tiny vision-language model folder with fresh weights, of the miniature's class and words."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from imgen_common import hub
from scripts.miniature.agents import models


def tiny_folder(folder: Path, seed: int = 0) -> Path:
    """Weights, processor and chat template, as `LocalChat` loads them."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(hub.resolve("builtin:shapes/planner", weights=False))
    torch.manual_seed(seed)
    size = models.ModelSize(width=64, layers=2, vision_width=32, vision_layers=2)
    models.build_model(size, processor.tokenizer).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def drop_weight(file: Path, part: str) -> None:
    """Removes the first weight whose name has `part` in it."""
    weights = load_file(file)
    name = next(key for key in sorted(weights) if part in key)
    save_file({key: value for key, value in weights.items() if key != name}, file, {"format": "pt"})
