"""Settings of the core as frozen values, without torch."""

from typing import Annotated, ClassVar, Literal

from annotated_types import Gt, Le

from imgen_common.config import Config

Combination = Literal["weighted", "normalized", "pcgrad"]


GuidanceScale = Annotated[float, Gt(0), Le(100)]

NoiseLevels = Literal["pipeline", "linear"]
"""Which noise levels: those of the model's pipeline, or linspace(1, 1/N, N) with the model's shift."""

GuidanceRescale = Literal["none", "norm"]
"""What happens to a guided velocity: nothing, or it gets the norm of the conditional one."""


class GuidanceOptions(Config):
    """How classifier-free guidance is computed and differentiated."""

    renamed: ClassVar = {"scale": "guidance_scale, beside guidance"}

    detach_negative: bool = True
    """Whether the negative branch runs without gradient."""
    compensate: bool = False
    """Whether the backward pass is divided by the scale; the reported loss is not."""
    batched: bool = True
    """Whether both branches share one forward of twice the batch where both are treated alike.

    Two forwards of b and one of 2b differ by the rounding of their kernels (about 1e-6 relative in float32, 1e-2 in
    bfloat16), so with a detached negative the velocity that carries gradient differs by as much from the one of the
    rollout.  Only gradients feel it: values are pinned to the rollout.  false: two forwards everywhere, exactly equal.
    """
    rescale: GuidanceRescale | None = None
    """`norm`: each position of the latents of the guided velocity is scaled to the norm, over channels, that the
    conditional velocity has there, and gradients are those of what is sampled; `none`: not so; null: as the model's
    pipeline, `norm` for Qwen-Image and `none` for the others.  Evaluations follow it."""


class Guidance(GuidanceOptions):
    """v = v_neg + scale (v_cond - v_neg); with `rescale: norm`, v |v_cond| / |v|.

    With a detached negative branch dv/dtheta = scale dv_cond/dtheta and dv/dx = scale J_cond: the Jacobian a bridge
    sees is that of the positive branch alone.  Otherwise both branches carry gradient.  Both norms carry it too, and
    depend on the value of a detached negative.
    """

    scale: GuidanceScale = 1.0
    """Guidance scale s, above 0, at most 100; 1 runs the positive branch alone."""

    def gradient_needs_negative(self, rescale: GuidanceRescale = "none") -> bool:
        """Whether the gradient of the guided velocity depends on the negative branch, on its graph or on its value.

        rescale: what holds where that of these settings is None.
        """
        return self.scale != 1 and (not self.detach_negative or (self.rescale or rescale) != "none")

    @property
    def backward_scale(self) -> float:
        """Factor of `backpropagate(scale=...)`: 1 / scale if compensated.  It multiplies the cotangent once, so of a
        term nested behind a Jacobian it removes one of two factors of the scale, as in the papers."""
        return 1 / self.scale if self.compensate else 1.0
