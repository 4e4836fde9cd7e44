"""The trained low-rank updates of a run, as a diffusers adapter."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from flowbp import backbones
from flowbp.config import TrainConfig
from imgen_common import hub

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Adapter:
    """The update of one linear layer, weight += up @ down.  down: (rank, in).  up: (out, rank), scale included."""

    down: Tensor
    up: Tensor

    @property
    def update(self) -> Tensor:
        """up @ down in float32, which is added to the weight of the layer."""
        return self.up.float() @ self.down.float()


def pipeline_class(config: TrainConfig) -> str:
    """Name of the diffusers pipeline class of the run's model."""
    index = hub.resolve(config.model.ref) / "model_index.json"
    return json.loads(index.read_text(encoding="utf-8"))["_class_name"]


def linear_output_sizes(config: TrainConfig) -> dict[str, int]:
    """Number of outputs of every linear layer of the run's transformer."""
    modules = backbones.init_empty_weights(config.model.ref).net.named_modules()
    return {name: module.out_features for name, module in modules if isinstance(module, nn.Linear)}


def lora_adapters(config: TrainConfig, weights: Mapping[str, Tensor]) -> dict[str, Adapter]:
    """The adapters of a run, by the name of their layer in the transformer."""
    assert config.lora is not None
    scale, found = config.lora.alpha / config.lora.rank, {}
    for name, down in weights.items():
        layer, part, _ = name.partition(".lora_A.")
        if part:
            up = weights[name.replace(".lora_A.", ".lora_B.")]
            found[layer] = Adapter(down.float().contiguous(), (scale * up.float()).contiguous())
    return found


def to_diffusers(found: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """The tensors under the names that `pipeline.load_lora_weights` reads."""
    keys: dict[str, Tensor] = {}
    for layer, adapter in found.items():
        keys |= {f"transformer.{layer}.lora_A.weight": adapter.down, f"transformer.{layer}.lora_B.weight": adapter.up}
    return keys
