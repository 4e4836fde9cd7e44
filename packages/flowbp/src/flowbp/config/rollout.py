"""How the rollouts of an update compute."""

from typing import Literal

from imgen_common.config import Config


class RolloutConfig(Config):
    """Evaluations without gradient of the training rollouts, 64 to 80 % of an update's operations.  With `ddp` only."""

    dtype: Literal["bfloat16", "fp8"] | None = None
    """Precision of their arithmetic, in a copy of the weights that is renewed in every update: `bfloat16`, 2 bytes per
    weight; `fp8`, products of the blocks' linear layers in 8-bit floats with a scale per row, 1 byte per weight there,
    the rest in bfloat16.  The sweep keeps `model.dtype`: its gradient is that of a rollout whose rounding errors are
    constants.  On a GPU `fp8` needs one of compute capability 8.9 or newer, and `compile` to be fast.  null: that of
    the network."""
    compile: Literal["default", "reduce-overhead"] | None = None
    """Mode of torch.compile for rollouts alone: `default`, the repeated blocks, one kind after the other;
    `reduce-overhead`, the whole network as a CUDA graph, for small batches, compiled anew for every shape.  Equal to
    rounding.  null: as `model.compile` says."""

    @property
    def changes_network(self) -> bool:
        """Whether rollouts evaluate something else than the network as it is trained."""
        return self.dtype is not None or self.compile is not None
