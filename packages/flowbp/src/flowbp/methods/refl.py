from flowbp.axes import Leap, OneOfTail, PosteriorMean
from flowbp.methods.base import Method

REFL = Method(name="refl", reward_input=PosteriorMean(), active=OneOfTail(num_steps=11), weights=Leap())
"""Reward of the one-step estimate at one of the last 11 steps; gradient -sigma_i (dv_i/dtheta)^T g.

Source: ReFL, arXiv 2304.05977, in flow form (facts 3.1).
"""
