"""The whole pipeline with the trained weights."""

from collections.abc import Mapping

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from flowbp import backbones
from flowbp.config import TrainConfig
from flowbp.export.adapters import lora_adapters


def merge_weights(config: TrainConfig, weights: Mapping[str, Tensor]) -> DiffusionPipeline:
    """The whole pipeline in float32, the trained weights merged into its transformer."""
    backbone = backbones.load(config.model.ref)
    with torch.no_grad():
        parameters = dict(backbone.net.named_parameters())
        if config.lora is None:
            for name, value in weights.items():
                parameters[name].copy_(value)
        else:
            for layer, adapter in lora_adapters(config, weights).items():
                parameters[f"{layer}.weight"].add_(adapter.update)
    return backbone.pipe
