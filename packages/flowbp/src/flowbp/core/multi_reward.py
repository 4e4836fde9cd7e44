"""Several rewards at once, at the level of gradients: only direct backpropagation has them to compare."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flowbp.core.settings import Combination


@dataclass(frozen=True)
class Agreement:
    """How the rewards' gradients at what they saw compare, per sample, detached.

    norms: (rewards, b), of each reward's own loss, weights not included.  cosines: (rewards, rewards, b).
    """

    norms: Float[Tensor, "rewards b"]
    cosines: Float[Tensor, "rewards rewards b"]


def gradient_agreement(gradients: Float[Tensor, "rewards b ..."]) -> Agreement:
    """Norms and pairwise cosines; the cosine with a gradient of zero is 0."""
    flat = gradients.flatten(2).double()
    norms = flat.norm(dim=-1)
    unit = flat / norms.clamp(min=torch.finfo(torch.float64).tiny).unsqueeze(-1)
    return Agreement(norms, torch.einsum("ibd,jbd->ijb", unit, unit))


def combine_gradients(
    gradients: Float[Tensor, "rewards b ..."], weights: Float[Tensor, " rewards"], how: Combination
) -> Float[Tensor, "b ..."]:
    """One gradient G (b, ...) of several g_r, with weights w_r, sample by sample.

    weighted:    G = sum w_r g_r: the rewards' scales decide.
    normalized:  G = sum w_r g_r n / |g_r|, n = sum w_r |g_r| / sum w_r: every reward pulls as its weight says, whatever
                 its scale, and the length stays what the losses made it.
    pcgrad:      from each g_r its part against another (where <g_r, g_s> < 0) is removed, in the order of the rewards,
                 then the weighted sum is taken.  Source: Gradient Surgery, arXiv 2001.06782, equation 1.
    """
    flat = gradients.flatten(2)
    if how == "pcgrad":
        flat = _without_conflicts(flat)
    scales = weights.to(flat).view(-1, 1, 1)
    if how == "normalized":
        norms = flat.norm(dim=-1, keepdim=True)
        mean = (scales * norms).sum(0) / scales.sum()
        scales = scales * torch.where(norms > 0, mean / norms, 0)
    return (scales * flat).sum(0).view(gradients.shape[1:])


def _without_conflicts(flat: Float[Tensor, "rewards b d"]) -> Float[Tensor, "rewards b d"]:
    squares = flat.square().sum(-1, keepdim=True)
    kept = []
    for r, own in enumerate(flat):
        for s, other in enumerate(flat):
            if r != s:
                against = (own * other).sum(-1, keepdim=True).clamp(max=0)
                own = own - torch.where(squares[s] > 0, against / squares[s], 0) * other
        kept.append(own)
    return torch.stack(kept)
