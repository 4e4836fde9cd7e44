"""Frozen models from folders; on the meta device they come without weights, which are then not read."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel


def pretrained(kind: type[PreTrainedModel], folder: Path, device: torch.device | str, dtype: torch.dtype) -> Any:
    """A transformers model of a folder, in eval mode, without gradient."""
    if str(device) == "meta":
        with torch.device("meta"):
            model = kind(AutoConfig.from_pretrained(folder, local_files_only=True)).to(dtype)
    else:
        model = kind.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
    return model.to(device).eval().requires_grad_(False)
