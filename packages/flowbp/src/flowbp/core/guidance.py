"""Classifier-free guidance around any backbone, in one place."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from flowbp.core.settings import Guidance, GuidanceRescale
from flowbp.core.types import Cond, Velocity, batch_size, concat, repeat_batch
from imgen_common.errors import UserError


def guided_velocity(
    velocity: Callable[[Tensor, Tensor, Cond], Tensor],
    cond: Cond,
    negative: Cond | None = None,
    guidance: Guidance | None = None,
    rescale: GuidanceRescale = "none",
    *,
    gradient_only: bool = False,
) -> Velocity:
    """A backbone's `velocity(x, sigma, cond)` with prompts and guidance closed over.

    cond: conditioning of the b samples of a micro-batch; negative: that of their negative prompts, b rows or one for
    all.  rescale: what holds where that of `guidance` is None (`Backbone.guidance_rescale`).  The result takes any
    whole number of copies of the micro-batch, copy-major.  gradient_only: its values mean nothing, its gradient is the
    same bit for bit, and a negative branch on which no gradient depends is not evaluated.
    Raises UserError if the scale needs a negative and there is none; ValueError if x is no whole number of copies.
    """
    guidance = guidance or Guidance()
    if guidance.scale == 1 or (gradient_only and not guidance.gradient_needs_negative(rescale)):
        return lambda x, sigma: guidance.scale * velocity(x, sigma, repeat_batch(cond, _copies(x, cond)))
    if negative is None:
        raise UserError(
            f"guidance_scale {guidance.scale} needs a negative prompt; give one, or set guidance_scale to 1"
        )
    unconditional = _of_every_sample(negative, batch_size(cond))

    def both(x: Tensor, sigma: Tensor) -> Tensor:
        copies = _copies(x, cond)
        positive, other = repeat_batch(cond, copies), repeat_batch(unconditional, copies)
        if guidance.batched and not (guidance.detach_negative and torch.is_grad_enabled()):
            v, v_neg = velocity(torch.cat([x, x]), torch.cat([sigma, sigma]), concat(positive, other)).chunk(2)
        else:
            # first the one that may have no graph, so that what it holds for a moment is not held beside a graph
            with torch.set_grad_enabled(torch.is_grad_enabled() and not guidance.detach_negative):
                v_neg = velocity(x, sigma, other)
            v = velocity(x, sigma, positive)
        guided = v_neg + guidance.scale * (v - v_neg)
        return rescale_norm(guided, v) if (guidance.rescale or rescale) == "norm" else guided

    return both


def rescale_norm(guided: Float[Tensor, "b c ..."], conditional: Float[Tensor, "b c ..."]) -> Float[Tensor, "b c ..."]:
    """guided |conditional| / |guided|, norms over the channels.  Source: the pipeline of Qwen-Image."""
    norm, target = (v.norm(dim=1, keepdim=True) for v in (guided, conditional))
    return guided * (target / norm)


def _of_every_sample(negative: Cond, size: int) -> Cond:
    found = repeat_batch(negative, size) if batch_size(negative) == 1 else dict(negative)
    if batch_size(found) != size:
        raise ValueError(f"{batch_size(negative)} negative prompts for {size} samples; give one, or one per sample")
    return found


def _copies(x: Tensor, cond: Cond) -> int:
    copies, rest = divmod(len(x), batch_size(cond))
    if rest or not copies:
        raise ValueError(f"{len(x)} latents are no whole number of copies of {batch_size(cond)} prompts")
    return copies
