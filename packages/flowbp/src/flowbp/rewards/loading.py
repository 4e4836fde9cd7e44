"""Frozen transformers models from folders; on the meta device without their weights, which are then not read."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel


def load_frozen(
    model_class: type[PreTrainedModel], folder: Path, device: torch.device | str, dtype: torch.dtype
) -> Any:
    """The model of a folder in eval mode, none of its parameters requiring a gradient."""
    if str(device) == "meta":
        with torch.device("meta"):
            model = model_class(AutoConfig.from_pretrained(folder, local_files_only=True)).to(dtype)
    else:
        model = model_class.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
    return model.to(device).eval().requires_grad_(False)
