"""Classifier-free guidance around any backbone, in one place."""

from collections.abc import Callable
from typing import Annotated

import torch
from annotated_types import Gt, Le
from torch import Tensor

from flowbp.types import Cond, Velocity, batch_size, concat, tile
from imgen_common.config import Config
from imgen_common.errors import UserError


class Guidance(Config):
    """v = v_neg + scale (v_cond - v_neg).

    With a detached negative branch dv/dtheta = scale dv_cond/dtheta and dv/dx = scale J_cond: the Jacobian a bridge
    sees is that of the positive branch alone.  Otherwise both branches carry gradient.  Source: facts 1.4.
    """

    scale: Annotated[float, Gt(0), Le(100)] = 1.0
    """Guidance scale s, above 0, at most 100; 1 runs the positive branch alone."""
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

    @property
    def backward_scale(self) -> float:
        """Factor of `backpropagate(scale=...)`: 1 / scale if compensated.  It multiplies the cotangent once, so of a
        term nested behind a Jacobian it removes one of two factors of the scale, as in the papers."""
        return 1 / self.scale if self.compensate else 1.0


def guided(
    velocity: Callable[[Tensor, Tensor, Cond], Tensor],
    cond: Cond,
    negative: Cond | None = None,
    guidance: Guidance | None = None,
) -> Velocity:
    """A backbone's `velocity(x, sigma, cond)` with prompts and guidance closed over.

    cond: conditioning of the b samples of a micro-batch; negative: that of their negative prompts, b rows or one for
    all.  The result takes any whole number of copies of the micro-batch, copy-major.
    Raises UserError if the scale needs a negative and there is none; ValueError if x is no whole number of copies.
    """
    guidance = guidance or Guidance()
    if guidance.scale == 1:
        return lambda x, sigma: velocity(x, sigma, tile(cond, _copies(x, cond)))
    if negative is None:
        raise UserError(
            f"guidance.scale {guidance.scale} needs a negative prompt; give one, or set guidance.scale to 1"
        )
    size = batch_size(cond)
    unconditional = tile(negative, size) if batch_size(negative) == 1 else dict(negative)
    if batch_size(unconditional) != size:
        raise ValueError(f"{batch_size(negative)} negative prompts for {size} samples; give one, or one per sample")

    def both(x: Tensor, sigma: Tensor) -> Tensor:
        copies = _copies(x, cond)
        positive, other = tile(cond, copies), tile(unconditional, copies)
        if guidance.batched and not (guidance.detach_negative and torch.is_grad_enabled()):
            v, v_neg = velocity(torch.cat([x, x]), torch.cat([sigma, sigma]), concat(positive, other)).chunk(2)
        else:
            v = velocity(x, sigma, positive)
            with torch.set_grad_enabled(torch.is_grad_enabled() and not guidance.detach_negative):
                v_neg = velocity(x, sigma, other)
        return v_neg + guidance.scale * (v - v_neg)

    return both


def _copies(x: Tensor, cond: Cond) -> int:
    copies, rest = divmod(len(x), batch_size(cond))
    if rest or not copies:
        raise ValueError(f"{len(x)} latents are no whole number of copies of {batch_size(cond)} prompts")
    return copies
