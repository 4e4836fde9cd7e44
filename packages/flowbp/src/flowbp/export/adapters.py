"""The trained weights of a run as a diffusers adapter, or merged into the whole pipeline."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from flowbp import backbones
from flowbp.backbones.loading import check_same_shapes
from flowbp.config import TrainConfig

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Adapter:
    """The update of one linear layer, weight += up @ down.  down: (rank, in).  up: (out, rank), scale included."""

    down: Tensor
    up: Tensor

    @property
    def update(self) -> Tensor:
        """up @ down, which is added to the weight of the layer."""
        return self.up @ self.down


def lora_adapters(config: TrainConfig, weights: Mapping[str, Tensor]) -> dict[str, Adapter]:
    """The adapters of a run, by the name of their layer in the transformer."""
    assert config.lora is not None
    found = {}
    for name, down in weights.items():
        layer, part, _ = name.partition(".lora_A.")
        if part:
            up = weights[name.replace(".lora_A.", ".lora_B.")]
            found[layer] = Adapter(down.float().contiguous(), (config.lora.scale_of(layer) * up.float()).contiguous())
    return found


def to_diffusers(found: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """The tensors under the names that `pipeline.load_lora_weights` reads."""
    keys: dict[str, Tensor] = {}
    for layer, adapter in found.items():
        keys |= {f"transformer.{layer}.lora_A.weight": adapter.down, f"transformer.{layer}.lora_B.weight": adapter.up}
    return keys


def merge_weights(config: TrainConfig, weights: Mapping[str, Tensor], model: str | None = None) -> DiffusionPipeline:
    """The whole pipeline in float32, the trained weights merged into its transformer.

    model: a distilled sibling of the trained one, whose pipeline it is then.  Raises UserError where that does not fit.
    """
    if model is not None:
        base = backbones.init_empty_weights(config.model.ref, distilled=True)
        check_same_shapes(base.net, type(base.pipe), model, "--model")
    backbone = backbones.load(model or config.model.ref, distilled=True)  # nothing is trained
    parameters = dict(backbone.net.named_parameters())
    with torch.no_grad():
        if config.lora is None:
            for name, value in weights.items():
                parameters[name].copy_(value)
        else:
            for layer, adapter in lora_adapters(config, weights).items():
                parameters[f"{layer}.weight"].add_(adapter.update)
    return backbone.pipe
