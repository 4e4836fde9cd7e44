"""What is trained, and how: adapters and the optimizer."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, TypeVar

from annotated_types import Ge, Gt, Le, Lt
from pydantic import Field

from imgen_common.config import Config

PositiveInt = Annotated[int, Ge(1)]
N = TypeVar("N", int, float)


class LoraConfig(Config):
    """Low-rank adapters (peft) instead of all weights."""

    renamed: ClassVar = {"targets": "target_modules"}

    init: str | None = None
    """Adapter to begin with: a safetensors file or folder of diffusers, PEFT, kohya or ComfyUI, or `org/name@revision`,
    with `/FILE.safetensors` behind it where a repository has several.  All other keys here are then those of the
    adapter; leave them out.  A resumed run takes its own checkpoint instead.  null: an update of zero."""
    rank: Annotated[int, Ge(1), Le(4096)] = 16
    """Rank of each update."""
    alpha: Annotated[float, Gt(0)] = 16.0
    """The update is scaled by alpha / rank."""
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj", "to_out")
    """Ends of the names of the linear layers that get an adapter."""
    rank_pattern: Mapping[str, PositiveInt] = Field(default={})
    """Other ranks than `rank`, by the end of a layer's name."""
    alpha_pattern: Mapping[str, Annotated[float, Gt(0)]] = Field(default={})
    """Other alphas than `alpha`, by the end of a layer's name."""

    def rank_of(self, layer: str) -> int:
        """The rank of a layer's update."""
        return _by_end(self.rank_pattern, layer, self.rank)

    def alpha_of(self, layer: str) -> float:
        """The alpha of a layer's update."""
        return _by_end(self.alpha_pattern, layer, self.alpha)

    def scale_of(self, layer: str) -> float:
        """alpha / rank of a layer's update."""
        return self.alpha_of(layer) / self.rank_of(layer)


def _by_end(pattern: Mapping[str, N], layer: str, default: N) -> N:
    return next((value for end, value in pattern.items() if f".{layer}".endswith(f".{end}")), default)


class OptimConfig(Config):
    """AdamW."""

    renamed: ClassVar = {"lr": "learning_rate", "warmup": "lr_warmup_steps", "schedule": "lr_scheduler"}

    learning_rate: Annotated[float, Gt(0), Le(1)] = 1e-4
    """Peak learning rate."""
    betas: tuple[Annotated[float, Ge(0), Lt(1)], Annotated[float, Ge(0), Lt(1)]] = (0.9, 0.99)
    """Decay rates of the two moments."""
    eps: Annotated[float, Ge(1e-37)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Ge(0)] = 1e-4
    """Decoupled weight decay."""
    max_grad_norm: Annotated[float, Gt(0)] = 1.0
    """Gradients are scaled down to this norm."""
    lr_warmup_steps: Annotated[int, Ge(0)] = 5
    """Updates of linear warm-up."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls from the warm-up to the last update (linear and cosine: to zero)."""
